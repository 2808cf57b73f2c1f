"""Runs whose weights stay on disk, as processes: killed, without room for the file, two at once.

The truth is a resident run of the same config.
"""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import pytest
from common import (
    FINE,
    Ran,
    Trouble,
    assert_refused,
    assert_same_run,
    files_below,
    in_a_process,
    messages,
    write_config,
    write_lines,
)

from conftest import tiny_model, tiny_tokenizer
from snugtune.files import claimed
from snugtune.model.blockfile import DATA

RECORDS = [messages(f"What about {i}?", f"It is {i * i}, or so.") for i in range(8)]
WRITING = "writing the blocks' weights to "


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of more blocks than there are buffers."""
    folder = tmp_path_factory.mktemp("deep")
    tiny_model("llama", num_hidden_layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_run(place: Path, deep: Path, offload: str = "weights", **fields: Any) -> Path:
    place.mkdir(exist_ok=True)
    write_lines(place / "data.jsonl", RECORDS)
    base = {
        "model": deep, "data": "data.jsonl", "output": "run", "validation": 0.25, "max_seq_len": 64, "batch_size": 2, "steps": 8,
        "eval_every": 2, "checkpoint_every": 3, "method": {"type": "lora", "r": 2, "lora_dropout": 0.1},
        "plan": {"weights": "nf4", "offload": offload, "recompute": "blocks"},
    }  # fmt: skip
    write_config(place / "config.yaml", **base | fields)
    return place


def train(place: Path, trouble: Trouble = FINE) -> Ran:
    code = in_a_process(_command, place, trouble)
    out, err = ((place / name).read_text(encoding="utf-8") for name in (".stdout", ".stderr"))
    return Ran(code, out, err)


def _command(place: Path, trouble: Trouble) -> None:
    os.environ["SNUGTUNE_CACHE"] = str(place.parent / "cache")
    common._command(["train", "config.yaml"], place, trouble)


def test_a_killed_streamed_run_ends_as_a_resident_one(tmp_path: Path, deep: Path) -> None:
    truth, place = write_run(tmp_path / "truth", deep, offload="none"), write_run(tmp_path / "place", deep)
    assert train(truth).code == 0
    assert train(place, Trouble(signal.SIGKILL, after_lines=5)).code == -signal.SIGKILL
    ran = train(place)
    assert ran.code == 0, ran.err
    assert WRITING not in ran.err
    assert_same_run(place / "run", truth / "run")


def test_no_room_for_the_file_is_one_line_and_leaves_nothing(tmp_path: Path, deep: Path) -> None:
    place = write_run(tmp_path / "place", deep)
    ran = train(place, Trouble(file_limit=50_000))
    last = assert_refused(ran, "cannot write", "the blocks' weights need 0.1 MiB", "file size limit reached", "SNUGTUNE_CACHE")
    assert str(tmp_path / "cache" / "streamed") in last
    assert not (place / "run").exists()
    assert not list((tmp_path / "cache" / "streamed").rglob("*weights*"))
    assert train(place).code == 0


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path: Path, deep: Path) -> None:
    place = write_run(tmp_path / "place", deep)
    assert train(place).code == 0
    (file,) = (tmp_path / "cache").rglob(DATA)
    unfinished = file.parent.with_name(".part-blocks-x")
    file.parent.rename(unfinished)
    again = write_run(tmp_path / "again", deep)
    assert train(again).code == 0
    assert files_below(file.parent.parent) == {f"blocks/{DATA}", "blocks/about.json", "blocks/sources.json"}


def test_two_processes_at_once_make_one_file(tmp_path: Path, deep: Path) -> None:
    places = [write_run(tmp_path / name, deep, steps=2) for name in ("one", "two")]
    with ThreadPoolExecutor(2) as both:
        runs = list(both.map(train, places))
    assert [ran.code for ran in runs] == [0, 0], [ran.err for ran in runs]
    assert sum(WRITING in ran.err for ran in runs) == 1
    assert_same_run(places[0] / "run", places[1] / "run")
    assert len(list((tmp_path / "cache").rglob(DATA))) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_who_waits_for_the_file_is_told_and_can_be_interrupted(tmp_path: Path, deep: Path, number: signal.Signals) -> None:
    first = train(write_run(tmp_path / "first", deep, steps=1))
    assert first.code == 0
    (file,) = (tmp_path / "cache").rglob(DATA)
    folder = file.parent.parent
    file.unlink()
    place, lines = write_run(tmp_path / "place", deep), first.err.splitlines()
    before = next(i for i, line in enumerate(lines) if WRITING in line)
    with claimed(folder):
        ran = train(place, Trouble(number, watched=".stderr", after_lines=before + 1))
    assert ran.code == 130
    assert ran.err.splitlines()[before:] == [
        f"  another process is writing {folder}; waiting for it",
        "error: interrupted before training; nothing is lost, the same command begins again",
    ]
    assert not (place / "run").exists()
    assert train(place).code == 0
