"""Fixtures of the bad-input tests; `pytest_plugins = ("places",)` makes them known in a test module."""

import shutil
import tempfile
from pathlib import Path

import pytest
from common import write_lines
from spoil import RECORDS, TWO, config


@pytest.fixture
def place(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's working directory: a good config, its data and a model; temporary files and caches go here as well."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "cache/gguf").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(model_folder, tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", RECORDS)
    config(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A place with finished runs of one job (`out`) and of two (`two`): made once, copied for each test."""
    from snugtune.config import read_config
    from snugtune.run import train

    place = tmp_path_factory.mktemp("finished")
    write_lines(place / "data.jsonl", RECORDS)
    # As in `config`, but with the model's full path: a copy of this place refers to the same one.
    shutil.copytree(model_folder, place / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(read_config(config(place)))
        train(read_config(config(place, output="two", jobs=TWO)))
    return place


@pytest.fixture
def ran(place: Path, finished: Path) -> Path:
    """`place` with the finished runs `out` and `two` in it."""
    for run in ("out", "two"):
        shutil.copytree(finished / run, place / run)
    return place
