"""When memory runs out under way: what ran out is told from other errors, and the next step of a plan to less of it is found.

Whatever was broken off is done again on the same data. What changes is how it is cut: chunks, rows of logits, what is kept for
backward. That moves sums by rounding alone; dropout and noise of a chunk are drawn for it, so other chunks draw others.
"""

import errno
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, Protocol, TypeVar

import torch

from snugtune.types import MIN_ROWS, Chunk, Plan

T = TypeVar("T")
Knob = Literal["fused_tokens", "capacity", "head_rows", "recompute"]
OF_A_JOB: frozenset[Knob] = frozenset({"capacity", "head_rows"})
"""Knobs that are one job's own: to turn them leaves the bits of all others as they are. The rest changes no bits at all."""

_LEAF = torch.zeros((), requires_grad=True)
_OLDEST = _LEAF.clone()
"""A node of autograd's that was made before all others."""
_UNALLOCATED = ("can't allocate memory", "bad_alloc", "Unable to allocate")


@dataclass(frozen=True)
class Change:
    """A change of the plan under way. `step`: the first that it holds for, from 1, of the job that was at work."""

    job: str
    step: int
    knob: Knob
    value: int | str
    cause: str

    @property
    def told(self) -> str:
        """In a person's words."""
        what = {
            "fused_tokens": "jobs take turns",
            "capacity": f"chunks of at most {self.value} tokens",
            "head_rows": f"logits of at most {self.value} tokens at a time",
            "recompute": "each block's activations recomputed in backward",
        }[self.knob]
        return f"{self.cause} at step {self.step}: {what} from here on"


def tighter(plan: Plan, capacity: int, head_rows: int, chunks: Sequence[Chunk], sharing: bool) -> tuple[Knob, int | str] | None:
    """The next knob to turn for less memory, and its value; None: there is none left. Pure.

    `capacity`, `head_rows`: the job's; `chunks`: what it worked on; `sharing`: whether jobs share forwards now. What costs
    least comes first. Chunks go down to the longest sequence, rows of logits to `MIN_ROWS`.
    """
    if sharing:
        return "fused_tokens", 0
    largest = max((len(chunk.tokens) for chunk in chunks), default=0)
    longest = max((length for chunk in chunks for length in chunk.lengths), default=0)
    smaller = max(longest, largest // 2)
    if capacity and smaller < largest:
        return "capacity", smaller
    rows = min(head_rows, max((len(chunk.rows) for chunk in chunks), default=0))
    if rows > MIN_ROWS:
        return "head_rows", max(MIN_ROWS, rows // 2)
    return ("recompute", "blocks") if plan.recompute != "blocks" else None


def nothing_left(plan: Plan, head_rows: int, chunks: Sequence[Chunk], routable: bool) -> str:
    """How little a step was done with when no knob was left, and what of the config to change, in words. Pure."""
    longest = max((length for chunk in chunks for length in chunk.lengths), default=0)
    recomputed = " and recomputed activations" if plan.recompute == "blocks" else ""
    fixes = ["a shorter max_seq_len"]
    if not routable:
        fixes.append("method: lora")
    elif plan.weights != "nf4":
        fixes.append("plan.weights: nf4")
    if plan.offload == "none":
        fixes.append("plan.offload: weights" if routable else "plan.offload: activations")
    if plan.optimizer_state == "fp32":
        fixes.append("plan.optimizer_state: 8bit")
    return (
        f"nothing is left to be cut: it had one sequence of up to {longest} tokens and logits of {head_rows} of them at a time"
        f"{recomputed}; it needs more memory, or in a new output {', '.join(fixes)}"
    )


class Watch(Protocol):
    """What the trainer is told about memory."""

    def peak(self) -> int:
        """Highest use so far, in bytes."""
        ...

    def make_room(self, tokens: int) -> None:
        """A forward of so many tokens comes next."""
        ...

    def give_back(self) -> None:
        """Nothing is held any more of what memory was wanted for: it ran out, or a job has made its first step."""
        ...

    def exceeded(self) -> bool:
        """Whether more was used than there is to use since this was last asked; it is asked after each batch."""
        ...


class Short:
    """Instead of a result: memory ran out."""


def unless_short(work: Callable[[], T]) -> T | Short:
    """What `work` gives. Where memory runs out in it, nothing of what it held is held any more when this returns."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        forget_locals(error)
    _forget_queue()
    return Short()


def _forget_queue() -> None:
    """Let autograd's engine forget what was left of a backward that broke off: it keeps the whole graph, for ever.

    Tasks wait in a queue of the thread, and the latest node's comes first. When that of the oldest has its turn, all others
    have had theirs, and those of a broken backward are dropped.
    """
    torch.autograd.grad(_OLDEST, _LEAF, retain_graph=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short. torch says so on CPU by a plain `RuntimeError` of its allocator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _UNALLOCATED)


def forget_locals(error: BaseException) -> None:
    """Leave an error its traceback without the values in its frames, and in those that called them: they keep jobs' memory."""
    seen: set[int] = set()
    todo: list[Any] = [error]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            for frame, _ in traceback.walk_tb(one.__traceback__):
                _clear(frame)
            todo += [one.__cause__, one.__context__]


def _clear(frame: FrameType | None) -> None:
    """Empty a frame and its callers, up to one that still runs."""
    with suppress(RuntimeError):  # it runs
        while frame is not None:
            frame.clear()
            frame = frame.f_back
