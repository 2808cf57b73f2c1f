"""A job's optimizer step by itself: what it works through, how it ends, what there is to say of it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from snugtune.errors import JobFailedError
from snugtune.optim import clip_grad_norm
from snugtune.training.job import Job
from snugtune.training.metrics import StepMetrics
from snugtune.training.release import StepInBackward
from snugtune.types import Chunk

MAX_SKIPS = 10
"""Non-finite gradients in a row after which a job is given up (fp16's loss scale needs a few to settle)."""


@dataclass
class Turn:
    """A job's optimizer step under way: its chunks, and how many of them went through the base."""

    chunks: list[Chunk]
    size: float
    loss: Tensor
    began: tuple[int, float]  # the trainer's tokens and seconds then
    done: int = 0

    @property
    def tokens(self) -> int:
        """Of the chunks that are done."""
        return sum(len(chunk.tokens) for chunk in self.chunks[: self.done])

    @property
    def through(self) -> bool:
        return self.done == len(self.chunks)


@dataclass(frozen=True)
class Work:
    """What chunks come to."""

    chunks: int = 0
    examples: int = 0
    tokens: int = 0
    label_tokens: int = 0  # of these, those that are scored

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> "Work":
        return cls(
            chunks=len(chunks),
            examples=sum(len(c.lengths) for c in chunks),
            tokens=sum(len(c.tokens) for c in chunks),
            label_tokens=sum(len(c.rows) for c in chunks),
        )

    def __add__(self, more: "Work") -> "Work":
        return Work(
            self.chunks + more.chunks,
            self.examples + more.examples,
            self.tokens + more.tokens,
            self.label_tokens + more.label_tokens,
        )


def optim_step(job: Job, lr: float | None = None) -> float:
    """Clip the job's own gradient and step its optimizer, unless that is not finite. Returns the gradient's norm.

    `lr`: instead of what the job's schedule says. After too many skips in a row the job is given up.
    """
    if job.in_backward is not None:
        return _ended_in_backward(job, job.in_backward)
    for group in job.optimizer.param_groups:
        group["lr"] = job.lr() if lr is None else lr
    job.unscale()
    limit = math.inf if job.config.max_grad_norm is None else job.config.max_grad_norm
    norm = float(clip_grad_norm(job.attached.parameters(), limit))
    with _whole_or_given_up(job):
        if math.isfinite(norm):
            job.optimizer.step()
        job.rescale()
        job.attached.publish()
        job.step += 1
    _count_skip(job, not math.isfinite(norm))
    return norm


def _ended_in_backward(job: Job, taken: StepInBackward) -> float:
    """A step that was made in backward. One that only a part of the weights made is the job's last."""
    with _whole_or_given_up(job):
        norm = float(taken.end())
        job.step += 1
    _count_skip(job, not math.isfinite(norm))
    if not math.isfinite(norm) and taken.half_done:
        job.diverged = True
        job.failure = (
            f"job '{job.name}': gradients stopped being finite within backward (step {job.step}), when some weights had made "
            "their step; lower optimizer.lr, or set plan.gradients: kept, which skips such a step"
        )
    return norm


def _count_skip(job: Job, skipped: bool) -> None:
    job.skipped_in_a_row = job.skipped_in_a_row + 1 if skipped else 0
    if job.skipped_in_a_row >= MAX_SKIPS:
        job.diverged = True
        job.failure = (
            f"job '{job.name}': {MAX_SKIPS} steps in a row had no finite gradient (step {job.step}); "
            "lower optimizer.lr, lengthen schedule.warmup, or look for broken examples"
        )


def completed(job: Job, work: Work, norm: float, peak_memory: int) -> StepMetrics:
    """Count the work of the step that a job has just completed as its own, and say what there is to say of it."""
    job.seen_tokens += work.tokens
    job.seen_label_tokens += work.label_tokens
    finite = math.isfinite(norm)
    return StepMetrics(
        job=job.name,
        step=job.step,
        total_steps=job.total,
        epoch=0.0 if job.by_hand else round(job.epoch, 4),
        examples=work.examples,
        tokens=work.tokens,
        label_tokens=work.label_tokens,
        total_tokens=job.seen_tokens,
        total_label_tokens=job.seen_label_tokens,
        lr=float(job.optimizer.param_groups[0]["lr"]),
        grad_norm=norm if finite else None,
        skipped=not finite,
        peak_memory=peak_memory,
    )


@contextmanager
def _whole_or_given_up(job: Job) -> Iterator[None]:
    """Whatever breaks off the block leaves the job between two steps, where nothing goes on from: it is given up.

    Also by what is nobody's own, as Ctrl-C or memory that is short while an optimizer makes its state.
    """
    try:
        yield
    except BaseException as error:
        give_up_half_way(job, error)
        raise


def give_up_half_way(job: Job, error: BaseException) -> None:
    """Its weights are neither those before the step nor those after it."""
    where = "was broken off in the middle of its optimizer step"
    job.failure = f"job '{job.name}': {where} ({type(error).__name__}); let it go on from its last saved state"
    job.error = error if isinstance(error, Exception) else JobFailedError(job.failure)
