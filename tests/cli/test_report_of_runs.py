"""Training writes the report however it ends, the command writes it at any time, and no report ever spoils a run."""

from pathlib import Path
from typing import Any

import pytest
from common import here, messages, write_lines

from snugtune.config import RunConfig
from snugtune.observer import Silent
from snugtune.run import train
from snugtune.training.metrics import StepMetrics


def config_of(model: Path, place: Path, **fields: Any) -> RunConfig:
    write_lines(place / "data.jsonl", [messages("Hi?", "Hello!")] * 3)
    good = {"model": str(model), "data": str(place / "data.jsonl"), "output": str(place / "run"), "batch_size": 2, "steps": 3}
    return RunConfig.model_validate(good | {"max_seq_len": 32, "plan": {"weights": "fp32"}} | fields)


class Stopping(Silent):
    """Breaks the run off after a step."""

    def __init__(self, last: int):
        self.last = last

    def step(self, metrics: StepMetrics) -> None:
        if metrics.step == self.last:
            raise KeyboardInterrupt


class Obstructing(Silent):
    """Puts a folder where the report would go."""

    def __init__(self, folder: Path):
        self.folder, self.notes = folder, []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, jobs: Any) -> None:
        (self.folder / "report.html/full").mkdir(parents=True)


def test_a_run_leaves_its_report(model_folder: Path, tmp_path: Path) -> None:
    train(config_of(model_folder, tmp_path))
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert ">finished<" in page
    assert "adapters/default" in page


def test_broken_off_and_resumed(model_folder: Path, tmp_path: Path) -> None:
    config = config_of(model_folder, tmp_path, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, Stopping(2))
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert ">not finished<" in page
    assert "at step 2 of 3" in page
    train(config)
    assert ">finished<" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_spoils_nothing(model_folder: Path, tmp_path: Path) -> None:
    observer = Obstructing(tmp_path / "run")
    assert train(config_of(model_folder, tmp_path), observer).artefacts["default"].is_dir()
    assert [note for note in observer.notes if note.startswith("report: ") and "is not written" in note]


def test_the_command(model_folder: Path, tmp_path: Path) -> None:
    train(config_of(model_folder, tmp_path))
    (tmp_path / "run/report.html").unlink()
    done = here("report", tmp_path / "run")
    assert (done.code, done.out) == (0, f"written: {tmp_path / 'run/report.html'}\n")
    assert (tmp_path / "run/report.html").is_file()
    assert here("report", tmp_path / "run", "--output", tmp_path / "other.html").code == 0
    assert "<title>run: snugtune report</title>" in (tmp_path / "other.html").read_text(encoding="utf-8")


def test_the_command_says_what_is_broken(model_folder: Path, tmp_path: Path) -> None:
    """One line each, and still there is a page; stdout says where."""
    train(config_of(model_folder, tmp_path))
    with (tmp_path / "run/metrics.jsonl").open("a") as stream:
        stream.write("half a li\n")
    (tmp_path / "run/plan.json").write_text("{")
    done = here("report", tmp_path / "run")
    assert (done.code, done.out) == (0, f"written: {tmp_path / 'run/report.html'}\n")
    assert done.err.splitlines() == [
        "  metrics.jsonl: line 4 is broken and left out",
        "  plan.json cannot be read; the plan is left out",
    ]


def test_the_command_on_something_else(tmp_path: Path) -> None:
    done = here("report", tmp_path)
    assert done.code == 2
    assert "is not a run folder (no config.yaml)" in " ".join(done.err.split())
