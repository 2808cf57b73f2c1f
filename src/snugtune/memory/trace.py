"""What a step holds at its peaks, counted by running the trainer's own step on tensors without values.

Nothing here knows what a step does: whatever storage an operator makes is counted from then until it is freed, so a change
of the code changes the count with it.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snugtune.config import JobConfig
from snugtune.model.base import Base
from snugtune.training.examples import JobData
from snugtune.training.job import Job, new_job
from snugtune.training.trainer import Trainer
from snugtune.types import Chunk, Plan

Phase = Literal["body", "head", "backward"]
"""Of a forward and its backward: up to the hidden states; scores and their gradient; back through the body."""


@dataclass(frozen=True)
class Held:
    """Bytes alive at one moment, by the phase that they were made in."""

    made_in: Mapping[Phase, float]

    @property
    def total(self) -> float:
        return sum(self.made_in.values())


@dataclass(frozen=True)
class Trace:
    """The fullest moment of each phase, and what is at rest meanwhile. All in bytes."""

    peaks: Mapping[Phase, Held]
    weights: int  # of the base
    trained: int  # what trains: adapters, or masters where they are not the weights themselves
    gradients: int


class Ledger(TorchDispatchMode):
    """Counts the storages that operators make while it is entered, but those of `known` tensors."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.phase: Phase = "body"
        self.live: Counter[Phase] = Counter()
        self.peaks: dict[Phase, Held] = {}
        self._seen = {storage_of(tensor) for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return made

    def _count(self, tensor: Tensor) -> None:
        key = storage_of(tensor)
        if key in self._seen:
            return
        storage = tensor.untyped_storage()
        self._seen.add(key)
        weakref.finalize(storage, self._freed, key, self.phase, storage.nbytes())
        self.live[self.phase] += storage.nbytes()
        peak = self.peaks.get(self.phase)
        if peak is None or self.live.total() > peak.total:
            self.peaks[self.phase] = Held(dict(self.live))

    def _freed(self, key: int, phase: Phase, size: int) -> None:
        self._seen.discard(key)
        self.live[phase] -= size

    @contextmanager
    def following(self, base: Base) -> Iterator[None]:
        """Inside the block the phase is that of `base`'s step."""
        body = base.model if base.body is None else base.body

        def goes_back(gradient: Tensor) -> None:
            self.phase = "backward"

        def begins(*_: object) -> None:
            self.phase = "body"

        def ends(module: object, inputs: object, output: Any) -> None:
            self.phase = "head"
            states = output.logits if base.body is None else output.last_hidden_state
            if states.requires_grad:
                states.register_hook(goes_back)

        hooks = [body.register_forward_pre_hook(begins), body.register_forward_hook(ends)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def storage_of(tensor: Tensor) -> int:
    """What is the same for tensors that share memory, as long as one of them lives."""
    return tensor.untyped_storage()._cdata


class _NoWatch:
    """Of a step without memory."""

    def peak(self) -> int:
        return 0

    def make_room(self, tokens: int) -> None: ...


def trace_step(base: Base, jobs: Sequence[tuple[JobConfig, Chunk]], plan: Plan) -> Trace:
    """The forward and backward of one chunk of each job, side by side where the plan lets them."""
    attached = [new_job(base, config, JobData(()), plan) for config, _ in jobs]
    trainer = Trainer(base, plan, _NoWatch())
    for job in attached:
        trainer.add(job)
        job.attached.zero_grad()
    weights = {storage_of(t): t.untyped_storage().nbytes() for t in (*base.model.parameters(), *base.model.buffers())}
    trained = {storage_of(p): p.untyped_storage().nbytes() for job in attached for p in job.attached.parameters()}
    gradients = [p.grad for job in attached for p in job.attached.parameters() if p.grad is not None]
    ledger = Ledger((*base.model.parameters(), *base.model.buffers(), *_of(attached), *gradients))
    queues = {config.name: [chunk] for config, chunk in jobs}
    with ledger.following(base), ledger:
        trainer.forward_backward(queues, dict.fromkeys(queues, 1.0))
    return Trace(
        peaks=dict(ledger.peaks),
        weights=sum(weights.values()),
        trained=sum(size for key, size in trained.items() if key not in weights),
        gradients=sum(g.nbytes for g in gradients),
    )


def _of(jobs: Iterable[Job]) -> Iterator[Tensor]:
    for job in jobs:
        yield from job.attached.parameters()
