"""What a step reports, and the file it is reported to."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snugtune.errors import InputError, StorageError
from snugtune.files import write_whole

MEAN_STEPS = 10
"""Steps at each end of a run whose mean stands for its loss there: single batches differ too much."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step of one job. Step 0 is the state before training and carries an evaluation only."""

    job: str  # name of the job
    step: int  # from 1; 0 is before training
    total_steps: int  # of the job
    epoch: float  # passes over the data so far
    loss: float | None = None  # mean over the step's label weights; None where it is not finite
    examples: int = 0  # of the step
    tokens: int = 0  # non-padding tokens of the step
    label_tokens: int = 0  # of these, those that are trained
    total_tokens: int = 0  # of the job so far
    total_label_tokens: int = 0  # of these, those that were trained
    lr: float | None = None  # learning rate of the step
    grad_norm: float | None = None  # before clipping
    skipped: bool = False  # the gradient was not finite; nothing was updated
    tokens_per_second: float | None = None  # of all jobs together, in this step
    peak_memory: int = 0  # bytes, of the whole process (CPU) or device (CUDA)
    eval_loss: float | None = None  # held-out loss; None where there was no evaluation, or where it is not finite
    eval_tokens: int | None = None  # label tokens evaluated


@dataclass(frozen=True)
class Sample:
    """What a job answered at a step; step 0 is before training."""

    job: str  # name of the job
    step: int  # after which it was asked
    index: int  # which prompt, from 0
    prompt: str  # as a person would write it
    answer: str  # without the token that ends it


class MetricsFile:
    """A `.jsonl` file of what happened at each job's steps. On resume it is cut back to where each job stands."""

    def __init__(self, path: Path, resume_at: Mapping[str, int] | None = None):
        self.path = path
        kept = [] if resume_at is None or not path.exists() else _up_to(path, resume_at)
        write_whole(path, "".join(kept))
        try:
            self._stream = path.open("ab", buffering=0)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error

    def write(self, entry: StepMetrics | Sample) -> None:
        """Append one line, or none of it. Raises `StorageError`."""
        fields = {k: v for k, v in dataclasses.asdict(entry).items() if v is not None and v is not False}
        line, start = (json.dumps(fields) + "\n").encode(), self.path.stat().st_size
        try:
            while line:
                line = line[self._stream.write(line) :]
        except OSError as error:
            os.ftruncate(self._stream.fileno(), start)
            raise StorageError(f"cannot write {self.path}: {error.strerror}; free space and run again") from error

    def sync(self) -> None:
        """Make sure that what was written survives a crash of the machine."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file. Raises `InputError` when it is gone or damaged."""
    return [_entry(path, line) for line in _complete_lines(path)]


def by_job(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The lines of each job, by its name."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(str(line["job"]), []).append(line)
    return found


def held_out_course(lines: Sequence[Mapping[str, Any]], keep_best: bool) -> list[float]:
    """A job's held-out losses, from before training to that of its result: its last state, or the best after training began."""
    held = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    trained = [loss for step, loss in held if step > 0]
    if not (keep_best and trained):
        return [loss for _, loss in held]
    return [loss for step, loss in held if step == 0] + trained[: trained.index(min(trained)) + 1]


def steps_of_mean(count: int) -> int:
    """How many steps to take the mean of at each end of `count` steps: never one twice, but at least one."""
    return max(1, min(MEAN_STEPS, count // 2))


def mean_ends(losses: Sequence[float], count: int) -> list[float]:
    """The means of the first and the last `count` losses: [first, last], one value where there is one step, else nothing."""
    ends = [losses[:count], losses[-count:]] if len(losses) > 1 else [losses] if losses else []
    return [sum(end) / len(end) for end in ends]


def _up_to(path: Path, resume_at: Mapping[str, int]) -> list[str]:
    entries = [(line, _entry(path, line)) for line in _complete_lines(path)]
    return [line for line, entry in entries if entry["step"] <= resume_at.get(entry["job"], -1)]


def _entry(path: Path, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int) or not isinstance(entry.get("job"), str):
        raise InputError(f"{path}: damaged, a line of it is no step of a job; bring it back, or give a new output folder")
    return entry


def _complete_lines(path: Path) -> list[str]:
    """A kill can leave half a last line; it is not counted."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); bring it back, or give a new output folder") from error
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
