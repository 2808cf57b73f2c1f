"""The live display, through a fake terminal: it fits, it is not torn, and without a terminal there are plain lines."""

import io
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from rich.console import Console as RichConsole
from rich.text import Text
from transformers.utils import logging

from snugtune.console import Console, arranged, quiet_libraries, shortened
from snugtune.observer import RunResult
from snugtune.training.metrics import StepMetrics

LONG = "a-job-whose-name-says-everything-about-it-and-a-bit-more-0123456"
UP = "\x1b[1A"


def driven(names: list[str], width: int, height: int = 24, steps: int = 3, total: int = 1000, terminal: bool = True) -> str:
    """What reaches stderr of a run of jobs, with a held-out loss at the second step."""
    console = Console()
    console.err = RichConsole(file=io.StringIO(), force_terminal=terminal, width=width, height=height, highlight=False)
    jobs: list[Any] = [SimpleNamespace(name=name, step=0, total=total) for name in names]
    console.begin(jobs)
    for step in range(1, steps + 1):
        for name in names:
            held = 2.5 if step == 2 else None
            facts: dict[str, Any] = {"loss": 3.2345, "tokens_per_second": 12345.6, "peak_memory": 3 * 2**30, "eval_loss": held}
            console.step(StepMetrics(name, step, total, 0.1, **facts))
    console.end()
    return console.err.file.getvalue()  # type: ignore[attr-defined]


def plain(text: str) -> list[str]:
    return [line.rstrip() for line in Text.from_ansi(text).plain.splitlines()]


def screen(text: str) -> list[str]:
    """What a terminal shows in the end: lines overwritten as the codes say."""
    lines, at = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[a-zA-Z]|\r|\n)", text):
        if part == "\n":
            at += 1
            if at == len(lines):
                lines.append("")
        elif part == UP:
            at -= 1
        elif part == "\x1b[2K":
            lines[at] = ""
        elif part and not part.startswith(("\x1b", "\r")):
            lines[at] += part
        assert at >= 0, "the cursor left the display"
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("names", [["default"], [LONG, "b", "shop-a"]], ids=["one", "three"])
def test_the_live_display_fits(names: list[str], width: int) -> None:
    """One whole line a job: count, loss and time left are there even in a narrow terminal, and nothing is left behind."""
    text = driven(names, width)
    live = [line for line in plain(text) if " eta " in line]
    assert max(map(len, live)) <= width
    shown = screen(text)
    bars = [line for line in shown if " eta " in line]
    assert len(bars) == len(names), "old frames are overwritten"
    for name, line in zip(names, bars, strict=True):
        assert re.fullmatch(rf"  {re.escape(name[:4])}\S*\s+[━╸╺]+\s+3/1000 loss 3\.2345.* eta [-\d]:[-\d]+:[-\d]+", line), line
        assert ("12346 tok/s" in line) == (width >= 80)
    if width == 140:
        assert "3.00 GiB" in bars[0]
    held = [line for line in shown if "held-out loss 2.5000" in line]
    assert [line.split(":")[0].strip() for line in held] == names, "notes stand above, whole"
    assert shown.index(held[-1]) < shown.index(bars[0])


def test_many_jobs_in_a_low_terminal() -> None:
    """Those that are done make room for those that are not."""
    names = [f"job-{i:02}" for i in range(30)]
    console = Console()
    console.err = RichConsole(file=io.StringIO(), force_terminal=True, width=80, height=12, highlight=False)
    jobs: list[Any] = [SimpleNamespace(name=name, step=0, total=2 if i < 25 else 9) for i, name in enumerate(names)]
    console.begin(jobs)
    for job in jobs:
        console.step(StepMetrics(job.name, 2, job.total, 0.1, loss=1.0, tokens_per_second=1.0))
    assert console._progress is not None
    assert [task.description for task in console._progress.tasks if task.visible] == names[25:]
    console.end()


def test_a_line_says_how_its_job_ended() -> None:
    """Jobs leave at steps of their own; a line that has ended waits for nothing, and the others go on."""
    console = Console()
    console.err = RichConsole(file=io.StringIO(), force_terminal=True, width=100, height=24, highlight=False)
    ends = {"a": "finished", "b": "failed", "c": "stopped early", "d": "parked", "e": "training"}
    jobs: list[Any] = [SimpleNamespace(name=name, step=0, total=9) for name in ends]
    console.begin(jobs)
    for step in range(1, 10):
        for name in ends if step < 4 else "ae":
            console.step(StepMetrics(name, step, 9, 0.1, loss=1.5, tokens_per_second=1.0))
    for name, status in ends.items():
        console.status(name, status)
    console.status("ended-before-the-resume", "finished")
    console.end()
    shown = [line for line in screen(console.err.file.getvalue()) if " eta " in line]  # type: ignore[attr-defined]
    counts = {"a": "9/9", "b": "3/9", "c": "3/9", "d": "3/9", "e": "9/9"}
    said = {"a": "done", "b": "failed", "c": "stopped", "d": "parked", "e": "loss 1.5000"}
    for line, name in zip(shown, ends, strict=True):
        assert re.match(rf"  {name} .* {counts[name]} {said[name]} ", line), line
        assert ("eta -:--:--" in line) == (name in "bcd"), line


@pytest.mark.parametrize("terminal", [True, False])
def test_a_resumed_run_without_jobs_to_train(terminal: bool) -> None:
    """All had ended before it was interrupted: there is nothing to show."""
    assert driven([], 80, terminal=terminal) == ""


def test_a_table_of_jobs_that_did_not_all_end_well(capsys: pytest.CaptureFixture[str]) -> None:
    """One without a step, one without an adapter: each has its row; where all are finished nothing is said of it."""
    metrics = [{"job": "a", "step": n, "loss": 3.0 - n} for n in (1, 2)] + [{"job": "b", "step": 1, "skipped": True}]
    told = {"a": "finished", "b": "failed", "c": "parked"}
    result = RunResult(Path("run"), {"a": Path("run/adapters/a")}, metrics, [], {}, None, statuses=told)
    Console().results(result)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "status" and "(first -> last step)" in head
    assert re.fullmatch(r"a +2 +2\.0000 -> 1\.0000 +- +finished", rows[0])
    assert re.fullmatch(r"b +1 +- +- +failed", rows[1])
    assert re.fullmatch(r"c +- +- +- +parked", rows[2])
    assert rows[4:] == ["run/adapters/a"]
    Console().results(RunResult(Path("run"), {"a": Path("run/adapters/a")}, metrics, [], {}, None, statuses={"a": "finished"}))
    assert "status" not in capsys.readouterr().out


def test_without_a_terminal_there_are_plain_lines() -> None:
    lines = driven([LONG, "b"], 60, terminal=False, steps=3, total=3).splitlines()
    assert all("\x1b" not in line and line.startswith("  ") for line in lines)
    assert sum(line.startswith(f"  {LONG}: step 3/3  loss 3.2345  12346 tok/s  3.00 GiB  eta ") for line in lines) == 1
    assert f"  {LONG}: step 2/3  held-out loss 2.5000" in lines


def test_plain_lines_are_shared_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps as long as the pause between lines, some a bit shorter, some a bit longer: no job gets more lines than another."""
    clock = [0.0]
    monkeypatch.setattr("snugtune.console.time.monotonic", lambda: clock[0])
    console = Console()
    console.err = RichConsole(file=io.StringIO(), width=60, highlight=False)
    names = ["a", "b", "c"]
    jobs: list[Any] = [SimpleNamespace(name=name, step=0, total=100) for name in names]
    console.begin(jobs)
    for step in range(1, 31):
        for name in names:
            clock[0] += (3.2, 3.4, 3.5)[(step + len(name)) % 3] + (0.3 if name == "b" and step % 2 else 0.0)
            console.step(StepMetrics(name, step, 100, 0.1, loss=1.0, tokens_per_second=1.0))
    lines = console.err.file.getvalue().splitlines()  # type: ignore[attr-defined]
    counts = [sum(line.startswith(f"  {name}: ") for line in lines) for name in names]
    assert max(counts) - min(counts) <= 1 and min(counts) >= 10, counts


def test_losses_of_the_table_are_means(capsys: pytest.CaptureFixture[str]) -> None:
    """Of as many steps at each end as all jobs have, ten at most; without a terminal no line ends in blanks."""
    metrics = [{"job": "a", "step": n, "loss": loss} for n, loss in enumerate([4.0, 2.0, 9.0, 1.0, 2.0], 1)]
    metrics += [{"job": "b", "step": n, "loss": float(n)} for n in range(1, 41)]
    folders = {name: Path("run") / name for name in ("a", "b")}
    Console().results(RunResult(Path("run"), folders, metrics, [], {}, None))
    lines = capsys.readouterr().out.splitlines()
    assert "loss (first 2 -> last 2 steps)" in lines[0]
    assert re.fullmatch(r"a +5 +3\.0000 -> 1\.5000 +-", lines[1])
    assert re.fullmatch(r"b +40 +1\.5000 -> 39\.5000 +-", lines[2])
    long = RunResult(Path("run"), {"b": Path("run/b")}, metrics, [], {"b": (3.0, 2.0)}, None)
    Console().results(long)
    lines += (table := capsys.readouterr().out.splitlines())
    assert "loss (first 10 -> last 10 steps)" in table[0]
    assert re.fullmatch(r"b +40 +5\.5000 -> 35\.5000 +3\.0000 -> 2\.0000", table[1])
    assert lines == [line.rstrip() for line in lines]


def test_a_table_of_results_cuts_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = [{"job": LONG, "step": 2, "loss": 2.0, "eval_loss": 3.0}, {"job": LONG, "step": 3, "loss": 1.0, "eval_loss": 2.0}]
    result = RunResult(Path("run"), {LONG: Path("run/adapters") / LONG}, metrics, [], {LONG: (3.0, 2.0)}, 2**30)
    Console().results(result)
    out = capsys.readouterr().out
    assert re.search(rf"{LONG} +3 +2\.0000 -> 1\.0000 +3\.0000 -> 2\.0000", out)
    narrow = Console()
    narrow.out = RichConsole(file=io.StringIO(), force_terminal=True, width=60, highlight=False)
    narrow.results(result)
    table = plain(narrow.out.file.getvalue())[:-2]  # type: ignore[attr-defined]
    assert max(map(len, table)) <= 60
    head = next(n for n, line in enumerate(table) if line.startswith("job "))
    assert "".join(line.split(" ")[0] for line in table[head + 1 :]) == LONG, "folded, not cut"


def test_layout_gives_way_in_order() -> None:
    found = [arranged(width, 12, 9) for width in (140, 82, 72, 60, 40)]
    assert [layout.facts for layout in found] == [3, 3, 2, 1, 0]
    assert [layout.elapsed for layout in found] == [True, False, False, False, False]
    assert all(8 <= layout.bar <= 28 for layout in found)


def test_shortened_keeps_both_ends() -> None:
    assert shortened("short", 8) == "short"
    assert shortened("adapter-for-shop-17", 10) == "adapt…p-17"
    assert all(len(shortened("x" * 50, width)) == width for width in range(8, 30))


def test_libraries_are_quiet() -> None:
    """Warnings of libraries, whatever was set before, and their loggers; those of other people's code are heard."""
    libraries = ("transformers.models.llama", "torch.utils", "peft.tuners", "datasets.load", "huggingface_hub.file_download")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet_libraries()
        for module in (*libraries, "mine"):
            warnings.warn_explicit(module, UserWarning, module, 1, module=module)
    assert [str(warning.message) for warning in heard] == ["mine"]
    assert logging.get_verbosity() == logging.ERROR
    assert are_progress_bars_disabled(), "no bars where there is no terminal"
