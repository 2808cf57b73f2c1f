"""What a person sees in the terminal: one calm live display, plain lines where there is no terminal."""

import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import track as rich_track
from rich.table import Table
from rich.text import Text

from snugtune.run import RunResult
from snugtune.training.job import Job
from snugtune.training.metrics import StepMetrics

PLAIN_SECONDS = 10.0
"""Without a terminal: a line at least this often, and at each evaluation."""


def quiet_libraries() -> None:
    """Let transformers and its kin speak only of errors; what matters of their warnings we say ourselves."""
    import warnings
    from logging import CRITICAL

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity(CRITICAL)  # of a download that broke off, our one line tells
    warnings.filterwarnings("ignore", module="(transformers|torch|peft)")


class Console:
    """Shows notes, progress bars with ETA, and results. Progress goes to stderr, results to stdout."""

    def __init__(self) -> None:
        self.out = RichConsole(highlight=False)
        self.err = RichConsole(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, float] = {}  # when each job last had a plain line
        self._began: dict[str, tuple[float, int]] = {}  # when each job began here, and after which step

    def note(self, text: str) -> None:
        self.err.print(Text("  " + text, style="dim"), soft_wrap=True)

    def say(self, text: str = "", style: str = "") -> None:
        self.out.print(Text(text, style=style), soft_wrap=True)

    def error(self, text: str) -> None:
        """One line, whatever the text brings: line ends and control characters of files and libraries become blanks."""
        text = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)
        self.err.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)

    def track(self, items: Sequence[Any], what: str) -> Iterable[Any]:
        if not self.err.is_terminal or len(items) < 200:
            return items
        return rich_track(items, description=f"  {what}", console=self.err, transient=True)

    def begin(self, jobs: Sequence[Job]) -> None:
        self._began = {job.name: (time.monotonic(), job.step) for job in jobs}
        if not self.err.is_terminal:
            return
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.err,
        )
        for job in jobs:
            self._tasks[job.name] = self._progress.add_task(job.name, total=job.total, completed=job.step, facts="")
        self._progress.start()

    def step(self, metrics: StepMetrics) -> None:
        facts = step_facts(metrics)
        if metrics.eval_loss is not None:
            self.note(f"{metrics.job}: step {metrics.step}/{metrics.total_steps}  held-out loss {metrics.eval_loss:.4f}")
        if metrics.skipped:
            self.note(f"{metrics.job}: step {metrics.step} skipped, its gradient was not finite")
        if self._progress is not None:
            self._progress.update(self._tasks[metrics.job], completed=metrics.step, facts=facts)
        elif metrics.loss is not None and self._line_due(metrics):
            self.note(f"{metrics.job}: step {metrics.step}/{metrics.total_steps}  {facts}  eta {self._left(metrics):.0f} s")

    def _line_due(self, metrics: StepMetrics) -> bool:
        """Whether a job's last plain line is old enough, or this is its last step."""
        due = time.monotonic() - self._lines.get(metrics.job, 0.0) > PLAIN_SECONDS or metrics.step == metrics.total_steps
        if due:
            self._lines[metrics.job] = time.monotonic()
        return due

    def _left(self, metrics: StepMetrics) -> float:
        """Seconds until the job ends, at the pace so far."""
        began, step = self._began[metrics.job]
        return (time.monotonic() - began) / max(1, metrics.step - step) * (metrics.total_steps - metrics.step)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def results(self, result: RunResult) -> None:
        """A table of the jobs and where everything lies."""
        table = Table(box=None, pad_edge=False)
        for column in ("job", "steps", "loss", "held-out loss"):
            table.add_column(column)
        for job in result.artefacts:
            lines = [m for m in result.metrics if m["job"] == job]
            losses = [m["loss"] for m in lines if "loss" in m]
            held = [m["eval_loss"] for m in lines if "eval_loss" in m]
            table.add_row(job, str(lines[-1]["step"]), arrow(losses), arrow(held))
        self.out.print(table)
        peak = f"; peak memory {gib(result.peak_bytes)}" if result.peak_bytes else ""
        took = f"trained in {result.seconds:.0f} s{peak}; " if not result.already_finished else ""
        self.say(f"{took}metrics in {result.folder / 'metrics.jsonl'}")
        for folder in result.artefacts.values():
            self.say(str(folder))


def step_facts(metrics: StepMetrics) -> str:
    """Loss, speed and memory of a step, in one line."""
    if metrics.loss is None:
        return ""
    return f"loss {metrics.loss:.4f}  {metrics.tokens_per_second:.0f} tok/s  {gib(metrics.peak_memory)}"


def arrow(values: Sequence[float]) -> str:
    """First and last of a series: `3.58 -> 1.26`."""
    return f"{values[0]:.4f} -> {values[-1]:.4f}" if values else "-"


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
