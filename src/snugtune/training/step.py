"""A job's optimizer step by itself: what it works through, how it ends, what there is to say of it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snugtune.errors import JobFailedError
from snugtune.optim import clip_grad_norm
from snugtune.training.job import Job
from snugtune.training.metrics import StepMetrics
from snugtune.training.recut import is_out_of_memory
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
    with _whole_or_given_up(job) as stepping:
        if math.isfinite(norm):
            with stepping:
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


class _Writes(TorchDispatchMode):
    """Inside it, notes whether a job's weights or its optimizer's state are written to; counts of steps can be brought back.

    Every write goes through torch's dispatcher. `Tensor._version` counts neither those of fused optimizers nor those by `.data`.
    """

    def __init__(self, job: Job):
        super().__init__()
        self.state = job.optimizer.state
        self.entries = {weight: dict(entry) for weight, entry in self.state.items()}
        kept = [v for entry in self.entries.values() for v in entry.values() if isinstance(v, Tensor)]
        self.counts = [(tensor, tensor.clone()) for tensor in kept if tensor.numel() == 1]
        large = (tensor for tensor in kept if tensor.numel() != 1)
        self.places = {t.untyped_storage().data_ptr() for t in (*job.attached.parameters(), *large)}
        self.any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        done = func(*args, **(kwargs or {}))
        if func._schema.is_mutable and not self.any:
            named = (kwargs or {}) | dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            written = [named.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            tensors = (t for t in tree_leaves(written) if isinstance(t, Tensor))
            self.any = any(t.untyped_storage().data_ptr() in self.places for t in tensors)
        return done

    def undo(self) -> bool:
        """Bring the optimizer back to where it was, if none of what takes memory was written to; whether that is so."""
        if not self.any:
            self.state.clear()
            self.state.update(self.entries)
            for tensor, before in self.counts:
                tensor.copy_(before)
        return not self.any


@contextmanager
def _whole_or_given_up(job: Job) -> Iterator[AbstractContextManager[object]]:
    """Whatever breaks off the block leaves the job between two steps, where nothing goes on from: it is given up.

    Also by what is nobody's own, as Ctrl-C; but where memory runs out before the optimizer, which is to step within what this
    gives, has written anything, the step did not happen. That is seen to where it is likely and costs little: in first
    steps, which make the state, and in fused ones.
    """
    optimizer, writes = job.optimizer, _Writes(job)
    fused = type(optimizer) in (AdamW, SGD) and bool(optimizer.defaults["fused"])
    seen = fused or not optimizer.state
    try:
        yield writes if seen else nullcontext()
    except BaseException as error:
        if seen and is_out_of_memory(error) and writes.undo():
            raise
        give_up_half_way(job, error)
        raise


def give_up_half_way(job: Job, error: BaseException) -> None:
    """Its weights are neither those before the step nor those after it."""
    where = "was broken off in the middle of its optimizer step"
    job.failure = f"job '{job.name}': {where} ({type(error).__name__}); let it go on from its last saved state"
    job.error = error if isinstance(error, Exception) else JobFailedError(job.failure)
