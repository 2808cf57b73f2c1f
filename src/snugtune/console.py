"""What a person sees in the terminal: one calm live display, plain lines where there is no terminal."""

import re
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import track as rich_track
from rich.table import Column, Table
from rich.text import Text

from snugtune.errors import InputError
from snugtune.observer import RunResult
from snugtune.training.job import Job
from snugtune.training.metrics import StepMetrics, by_job, mean_ends, steps_of_mean
from snugtune.words import gib

PLAIN_SECONDS = 10.0
"""Without a terminal: a line at least this often, and at each evaluation."""
UNBOUNDED = 10_000
"""Columns of what is no terminal: nothing is wrapped or cut there."""
LEFT = {"finished": "done", "stopped early": "stopped", "failed": "failed", "parked": "parked"}
"""What a job's line says once it takes no part any more: no wider than a loss."""
LONGEST_NAME, WIDEST_BAR, NARROWEST_BAR = 24, 28, 8
FACTS = (0, 11, 24, 35)
"""Columns that the first so many facts of a step take: loss, speed, memory."""


def quiet_libraries() -> None:
    """Let transformers and its kin speak only of errors; what matters of their warnings we say ourselves.

    Downloads keep their bars in a terminal, and elsewhere have none.
    """
    import os
    import sys
    import warnings
    from logging import CRITICAL

    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity(CRITICAL)  # of a download that broke off, our one line tells
    if not sys.stderr.isatty():
        disable_progress_bars()
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported, by who needs it
    warnings.filterwarnings("ignore", module="(transformers|torch|peft|datasets|huggingface_hub|tokenizers|accelerate)")


class Console:
    """Shows notes, progress bars with ETA, and results. Progress goes to stderr, results to stdout."""

    def __init__(self) -> None:
        self.out = RichConsole(highlight=False)
        self.err = RichConsole(stderr=True, highlight=False)
        if not self.out.is_terminal:
            self.out.width = UNBOUNDED
        self._progress: Progress | None = None
        self._layout = Layout(0, False, 0)
        self._tasks: dict[str, TaskID] = {}
        self._told = -PLAIN_SECONDS  # when plain lines were last due
        self._due: set[str] = set()  # jobs that still wait for theirs
        self._began: dict[str, tuple[float, int]] = {}  # when each job began here, and after which step

    def note(self, text: str) -> None:
        self.err.print(Text("  " + text, style="dim"), soft_wrap=True)

    def say(self, text: str = "", style: str = "") -> None:
        self.out.print(Text(text, style=style), soft_wrap=True)

    def table(self, table: Table) -> None:
        """A table on stdout; without a terminal its lines end where their text does."""
        if self.out.is_terminal:
            self.out.print(table)
            return
        with self.out.capture() as captured:
            self.out.print(table)
        self.raw("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def raw(self, text: str) -> None:
        """Text for pipes, and pieces of an answer as they come: no colour, no wrapping, no line end of its own."""
        self.out.file.write(text)
        self.out.file.flush()

    def error(self, text: str) -> None:
        """One line, whatever the text brings: line ends and control characters of files and libraries become blanks."""
        text = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)
        self.err.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)

    def ask(self, question: str, default: str = "") -> str:
        """Ask a person, on stderr; an empty answer is the default. Raises `InputError` where the input has ended."""
        end = " " if question.endswith("?") and not default else ": "
        self.err.print(Text.assemble(question, (f" [{default}]" if default else "", "dim"), end), end="", soft_wrap=True)
        try:
            return input().strip() or default
        except EOFError as error:
            self.err.print()
            raise InputError("the input ended before everything was answered; nothing is written") from error

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside the block a person sees that there is work on `what`, of which nobody knows how long it takes."""
        with self.err.status(f"  {what}") if self.err.is_terminal else nullcontext():
            yield

    def track(self, items: Sequence[Any], what: str) -> Iterable[Any]:
        if not self.err.is_terminal or len(items) < 200:
            return items
        return rich_track(items, description=f"  {what}", console=self.err, transient=True)

    def begin(self, jobs: Sequence[Job]) -> None:
        self._began = {job.name: (time.monotonic(), job.step) for job in jobs}
        if not (self.err.is_terminal and jobs):  # none: all had ended before the run was interrupted
            return
        names = {job.name: shortened(job.name, max(8, min(LONGEST_NAME, self.err.width // 5))) for job in jobs}
        count = max(2 * len(str(job.total)) + 1 for job in jobs)
        self._layout = arranged(self.err.width, max(map(len, names.values())), count)
        columns = [
            TextColumn("  {task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=self._layout.bar),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=True)),
            *([TimeElapsedColumn()] if self._layout.elapsed else []),
            TextColumn("eta"),
            _Eta(),
        ]
        self._progress = Progress(*columns, console=self.err)
        for job in jobs:
            self._tasks[job.name] = self._progress.add_task(names[job.name], total=job.total, completed=job.step, facts="")
        self._progress.start()

    def status(self, job: str, status: str) -> None:
        """Say on the job's line how it ended; there is nothing left to wait for."""
        if self._progress is None or status not in LEFT or job not in self._tasks:
            return
        self._progress.update(self._tasks[job], facts=LEFT[status] if self._layout.facts else "", visible=not self._crowded)
        self._progress.stop_task(self._tasks[job])

    @property
    def _crowded(self) -> bool:
        """Whether there are more lines than the terminal has: then those that are done make room."""
        return len(self._tasks) > self.err.height - 2

    def step(self, metrics: StepMetrics) -> None:
        if metrics.eval_loss is not None:
            self.note(f"{metrics.job}: step {metrics.step}/{metrics.total_steps}  held-out loss {metrics.eval_loss:.4f}")
        if metrics.skipped:
            self.note(f"{metrics.job}: step {metrics.step} skipped, its gradient was not finite")
        if self._progress is not None:
            self._progress.update(
                self._tasks[metrics.job],
                completed=metrics.step,
                facts=step_facts(metrics, self._layout.facts),
                visible=not self._crowded or metrics.step < metrics.total_steps,
            )
        elif metrics.loss is not None and self._line_due(metrics):
            told = f"{step_facts(metrics)}  eta {self._left(metrics):.0f} s"
            self.note(f"{metrics.job}: step {metrics.step}/{metrics.total_steps}  {told}")

    def _line_due(self, metrics: StepMetrics) -> bool:
        """Whether the jobs' last plain lines are old enough and this one has had none since, or this is its last step.

        One clock for all jobs: with one each, steps of nearly that length would give some jobs twice the lines of others.
        """
        if time.monotonic() - self._told > PLAIN_SECONDS:
            self._told, self._due = time.monotonic(), set(self._began)
        due = metrics.job in self._due or metrics.step == metrics.total_steps
        self._due.discard(metrics.job)
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
        found = by_job(result.metrics)
        lines = {job: found.get(job, []) for job in (*result.statuses, *result.artefacts)}
        losses = {job: [m["loss"] for m in lines[job] if "loss" in m] for job in lines}
        count = steps_of_mean(min((len(found) for found in losses.values() if found), default=0))
        told = {job: result.statuses.get(job, "finished") for job in lines}
        table = Table(box=None, pad_edge=False)
        table.add_column("job", overflow="fold")
        for column in (
            "steps",
            f"loss (first {count} -> last {count} steps)" if count > 1 else "loss (first -> last step)",
            "held-out loss",
            *(["status"] if set(told.values()) != {"finished"} else []),
        ):
            table.add_column(column)
        for job, status in told.items():
            last = lines[job][-1]["step"] if lines[job] else "-"
            row = job, str(last), arrow(mean_ends(losses[job], count)), arrow(result.held_out.get(job, ())), status
            table.add_row(*row[: len(table.columns)])
        self.table(table)
        peak = f"; peak memory {gib(result.peak_bytes)}" if result.peak_bytes else ""
        took = f"trained in {result.seconds:.0f} s{peak}; " if not result.already_finished else ""
        self.say(f"{took}metrics in {result.folder / 'metrics.jsonl'}")
        for folder in result.artefacts.values():
            self.say(str(folder))


class _Eta(TimeRemainingColumn):
    """The time left; none for a job that has ended before its last step."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.stop_time is None or task.finished else Text("-:--:--", style="progress.remaining")


@dataclass(frozen=True)
class Layout:
    """What a line of the live display has room for: how many facts, the time since the start, and a bar of so many columns."""

    facts: int
    elapsed: bool
    bar: int


def arranged(width: int, name: int, count: int) -> Layout:
    """As much as fits in `width` columns next to a name and a count of given widths; the bar gives way first."""
    fixed = 2 + name + 1 + 1 + count + len(" eta ") + len("0:00:00")
    for facts, elapsed in ((3, True), (3, False), (2, False), (1, False), (0, False)):
        bar = width - fixed - FACTS[facts] - (facts > 0) - (len(" 0:00:00") if elapsed else 0) - 1
        if bar >= NARROWEST_BAR:
            return Layout(facts, elapsed, min(bar, WIDEST_BAR))
    return Layout(0, False, NARROWEST_BAR)


def shortened(name: str, width: int) -> str:
    """A name with its middle left out where it is too long: names that go together often differ at their ends."""
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"


def printable(text: str) -> str:
    """Without control characters: what a model or a file says must not move the cursor or recolour the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def step_facts(metrics: StepMetrics, count: int = 3) -> str:
    """Loss, speed and memory of a step, or the first `count` of these, in one line."""
    if metrics.loss is None:
        return ""
    facts = (f"loss {metrics.loss:.4f}", f"{metrics.tokens_per_second:.0f} tok/s", gib(metrics.peak_memory))
    return "  ".join(facts[:count])


def arrow(values: Sequence[float]) -> str:
    """First and last of a series: `3.58 -> 1.26`."""
    return f"{values[0]:.4f} -> {values[-1]:.4f}" if values else "-"
