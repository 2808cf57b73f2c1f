"""What a run takes, held against what was predicted: counted by what it is for, and what that says of what is to come."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from snugtune.memory.budget import Watch
from snugtune.memory.trace import storage_of
from snugtune.model.base import Base
from snugtune.model.stream import StreamedLinear
from snugtune.training.job import Job
from snugtune.words import gib

RISES = 1.002
"""What is there is counted anew where the peak has risen by this factor."""


@dataclass(frozen=True)
class Counted:
    """Bytes of the tensors that stay from one step to the next, by what they are for."""

    weights: int  # of the base; streamed ones: the buffers
    adapters: int  # or masters, where weights of the base train that are not fp32
    gradients: int
    optimizer: int  # its state

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.gradients + self.optimizer


def counted(base: Base, jobs: Iterable[Job]) -> Counted:
    """What is on the base's device now. A storage counts once, for the first thing that it is for; jobs at rest have none."""
    jobs, seen = list(jobs), set[int]()
    trained = [weight for job in jobs for weight in job.attached.parameters()]

    def fresh(tensors: Iterable[Tensor | None]) -> int:
        size = 0
        for tensor in tensors:
            if tensor is not None and tensor.device.type == base.device.type and storage_of(tensor) not in seen:
                seen.add(storage_of(tensor))
                size += tensor.untyped_storage().nbytes()
        return size

    return Counted(
        weights=fresh(_weights(base)),
        adapters=fresh(trained),
        gradients=fresh([*(w.grad for w in (*trained, *base.model.parameters())), base.spare.buffer]),
        optimizer=fresh(t for job in jobs for t in tree_leaves(list(job.optimizer.state.values())) if isinstance(t, Tensor)),
    )


def _weights(base: Base) -> Iterator[Tensor]:
    yield from base.model.parameters()
    yield from base.model.buffers()
    for module in base.model.modules():
        if isinstance(module, StreamedLinear):
            yield from module.stream.buffers


@dataclass(frozen=True)
class Forecast:
    """What was predicted, as far as it tells of smaller forwards. In bytes; `tokens` of the largest forward."""

    total: int
    comes: int  # of it, what comes and goes with a forward, and the holes between
    tokens: int

    @classmethod
    def of(cls, estimate: object) -> "Forecast | None":
        """From the estimate in `plan.json`; None where it does not say enough, or its fullest moment is no forward's."""
        known = estimate if isinstance(estimate, Mapping) else {}
        if known.get("when") not in ("body", "head", "backward"):
            return None
        total, tokens = known.get("total_bytes"), known.get("tokens")
        comes = (known.get(name) for name in ("activations", "logits", "transients", "holes"))
        if not isinstance(total, int) or not isinstance(tokens, int) or tokens < 1:
            return None
        return cls(total, sum(size for size in comes if isinstance(size, int)), tokens)

    def at(self, tokens: int) -> int:
        """The peak predicted with forwards of up to so many tokens.

        On a line, which is above what smaller forwards take: attention's part grows with the square of their lengths.
        """
        return self.total - round(self.comes * (1 - min(1.0, tokens / self.tokens)))

    def to_come(self, seen: int, peak: int, largest: int) -> int:
        """The peak to expect at `largest` tokens, where forwards of `seen` had this one: errors do not shrink."""
        return self.at(largest) + max(0, peak - self.at(seen))


class Meter:
    """Counts what a run takes while it runs. `earlier`: what a session before this one had counted.

    `forecast`: None where nothing can be foreseen. On CUDA nothing is: there the allocator keeps the budget, and the peak is
    that of what it gave, without what the process has besides.
    """

    def __init__(self, watch: Watch, budget: int, forecast: Forecast | None = None, earlier: object = None):
        self.watch, self.budget, self.earlier = watch, budget, earlier
        self.forecast = None if watch.device == "cuda" else forecast
        self.fullest: Counted | None = None
        self.step = 0  # when that was counted, of all jobs together
        self.peak = 0  # then

    def is_due(self) -> bool:
        """Whether nothing was counted yet, or the peak has risen since."""
        return self.fullest is None or self.watch.peak() > RISES * self.peak

    def count(self, base: Base, jobs: Iterable[Job], step: int) -> None:
        """Count what is there; the fullest count stands."""
        found, self.peak = counted(base, jobs), self.watch.peak()
        if self.fullest is None or found.total > self.fullest.total:
            self.fullest, self.step = found, step

    def short(self, largest: int) -> str | None:
        """Why a forward of up to `largest` tokens, of more than any so far, would not stay within the budget; None: it does.

        To be asked where the peak so far is that of a step.
        """
        forecast, seen, peak = self.forecast, self.watch.largest, self.watch.peak()
        if forecast is None or largest <= seen or forecast.to_come(seen, peak, largest) <= self.budget:
            return None
        return f"memory would run short ({seen} tokens took {gib(peak)}, predicted {gib(forecast.at(seen))}; {largest} may come)"

    def facts(self) -> Any:
        """For `plan.json`, in bytes: what was counted, the process before the base was loaded, and the `rest` of the peak.

        The rest is activations, logits, transients, what the process grew by and what lies unused: nobody can tell these apart
        from outside. Where the peak was while weights were read, not all that was counted was there then.
        """
        if self.fullest is None:
            return self.earlier
        peak, process = self.watch.peak(), self.watch.before
        rest = {"process": process, "rest": peak - process - self.fullest.total, "total_bytes": peak}
        return {**asdict(self.fullest), **rest, "tokens": self.watch.largest, "step": self.step}
