"""Traces are kept under all that they follow from, found again, and made anew where what was kept is no trace."""

from dataclasses import replace
from pathlib import Path

import pytest

from conftest import tiny_config
from quantised import plan_of
from snugtune.config import JobConfig
from snugtune.memory import kept
from snugtune.memory.estimate import Estimator, Runtime, Work
from snugtune.memory.kept import TraceCache

WORK = Work(JobConfig.model_validate({"name": "a", "data": "x.jsonl", "method": {"type": "lora"}}), (40, 24), 60)
PLAN = plan_of("fp32")


def estimated(folder: Path, work: Work = WORK, arch: str = "llama", **knobs: object) -> tuple[int, int]:
    """(the predicted peak, files made for it) by an estimator that knows nothing itself."""
    config = tiny_config(arch)
    before = len(list(folder.glob("*")))
    plan = replace(PLAN, **knobs)
    total = Estimator(config, kept=TraceCache(folder, config)).estimate(plan, [work], Runtime(0)).total
    return total, len(list(folder.glob("*"))) - before


def test_what_was_traced_is_found_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = estimated(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(Estimator, "_at", refuse)  # what traces
    assert first[1] == 1 and estimated(tmp_path) == (first[0], 0)
    assert estimated(tmp_path, threads=7, gradients="released", optimizer_state="8bit")[1] == 0  # none of these is traced


def test_whatever_changes_a_trace_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert estimated(tmp_path)[1] == 1
    assert estimated(tmp_path, recompute="blocks")[1] == 1
    assert estimated(tmp_path, work=replace(WORK, lengths=(64,)))[1] == 1
    assert estimated(tmp_path, work=replace(WORK, scored=9))[1] == 1
    assert estimated(tmp_path, arch="gemma2")[1] == 1
    wider = JobConfig.model_validate({"name": "a", "data": "x.jsonl", "method": {"type": "lora", "r": 3}})
    assert estimated(tmp_path, work=replace(WORK, config=wider))[1] == 1
    monkeypatch.setattr(kept, "_our_tools", lambda: ("other code",))
    assert estimated(tmp_path)[1] == 1


@pytest.mark.parametrize("content", ["", "[1, 2]", "{}", '{"weights": 1}', "\x00\xff"])
def test_a_file_that_is_no_trace_is_made_anew(tmp_path: Path, content: str) -> None:
    total, _ = estimated(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(content, encoding="latin-1")
    assert estimated(tmp_path) == (total, 0)
    assert file.read_text().startswith("{")


def test_a_folder_that_cannot_be_made_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "in the way").write_text("")
    config = tiny_config("llama")
    estimator = Estimator(config, kept=TraceCache(tmp_path / "in the way" / "traces", config))
    assert estimator.estimate(PLAN, [WORK], Runtime(0)).total > 0
