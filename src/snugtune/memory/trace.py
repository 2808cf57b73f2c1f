"""What a step holds at its peaks, counted by running the trainer's own step on tensors without memory.

Nothing here knows what a step does: whatever storage an operator makes is counted from then until it is freed, so a change
of the code changes the count with it.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snugtune.config import JobConfig
from snugtune.memory.operators import GIVEN, WITHIN
from snugtune.model.attention import forget_masks
from snugtune.model.base import Base
from snugtune.model.frozen import FrozenLinear
from snugtune.model.offload import blocks_of
from snugtune.optim.narrow import SMALLEST
from snugtune.training.examples import JobData
from snugtune.training.job import Job, new_job, stepped
from snugtune.training.trainer import Trainer
from snugtune.types import Chunk, Plan

Phase = Literal["body", "head", "backward"]
"""Of a forward and its backward: up to the hidden states; scores and their gradient; back through the body."""
Held = Mapping[Phase, float]
"""Bytes alive at one moment, by the phase that they were made in."""


@dataclass(frozen=True)
class Trace:
    """The fullest moment of each phase, and what is at rest meanwhile. All in bytes."""

    peaks: Mapping[Phase, Held]
    weights: float  # of the base
    linears: float  # of these, those of frozen linears in blocks
    block: float  # of the largest block's
    largest: float  # numbers of the largest weight
    largest_four: float  # of the four largest together: so many are read at a time (GLOBAL_WORKERS of transformers' loading)
    trained: float  # what trains: adapters, or masters where they are not the weights themselves
    gradients: float
    matrices: Mapping[tuple[int, ...], float]  # shape of what the optimizer is given -> how many of it
    flat: float  # numbers in vectors that it is given, adapters in one piece
    small: float  # numbers in short ones
    tied: float  # bytes of gradients that come in two parts: of what is in the body and the head


MOST = 100_000
"""Operators of a step of few blocks, beyond which it is a loop over tokens in Python (slow Mamba): usual ones have 3,000."""


class EndlessError(RuntimeError):
    """A step that would take minutes to trace."""


class Ledger(TorchDispatchMode):
    """Counts the storages that operators make while it is entered, but those of `known` tensors."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, so nothing need be kept from it: that takes a quarter of a trace's time."""
        return False

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.phase: Phase = "body"
        self.operators = 0
        self.live: Counter[Phase] = Counter()
        self.peaks: dict[Phase, Held] = {}
        self._seen: set[int] = set()
        for tensor in known:
            self._seen.add(storage_of(tensor))
            weakref.finalize(tensor.untyped_storage(), self._seen.discard, storage_of(tensor))  # another may lie there then

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        if self.operators > MOST:
            raise EndlessError("its step is a loop over tokens")
        run = GIVEN[func] if func in GIVEN and args[0].is_meta else func
        made = run(*args, **(kwargs or {}))
        for leaf in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        if func in WITHIN:
            self._reached(WITHIN[func](*args))
        return made

    def _count(self, tensor: Tensor) -> None:
        key = storage_of(tensor)
        if key in self._seen:
            return
        storage = tensor.untyped_storage()
        self._seen.add(key)
        weakref.finalize(storage, self._freed, key, self.phase, storage.nbytes())
        self.live[self.phase] += storage.nbytes()
        self._reached()

    def _reached(self, within: int = 0) -> None:
        """Note what is alive, with so many bytes that an operator has beside it while it runs."""
        peak = self.peaks.get(self.phase)
        if peak is None or self.live.total() + within > sum(peak.values()):
            self.peaks[self.phase] = {**self.live, self.phase: self.live[self.phase] + within}

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

    def give_back(self) -> None: ...

    def exceeded(self) -> bool:
        return False


def trace_step(base: Base, jobs: Sequence[tuple[JobConfig, Chunk]], plan: Plan) -> Trace:
    """The forward and backward of one chunk of each job, side by side where the plan lets them; `base` is a hollow one."""
    attached = [new_job(base, config, JobData(()), plan) for config, _ in jobs]
    trainer = Trainer(base, plan, _NoWatch())
    for job in attached:
        trainer.add(job)
        job.begin_step()
    at_rest = (*base.model.parameters(), *base.model.buffers())
    weights = {storage_of(t): t.untyped_storage().nbytes() for t in at_rest}
    trained = {storage_of(p): p.untyped_storage().nbytes() for p in _parameters(attached)}
    gradients = [p.grad for p in _parameters(attached) if p.grad is not None]
    ledger = Ledger((*at_rest, *_parameters(attached), *gradients))
    queues = {config.name: [chunk] for config, chunk in jobs}
    forget_masks()  # else those that another trace has made would not be counted
    with ledger.following(base), ledger:
        trainer.forward_backward(queues, dict.fromkeys(queues, 1.0))
    sizes = sorted(_sizes(base.model).values(), reverse=True)
    blocks = [_frozen_bytes(base.model.get_submodule(name)) for name in blocks_of(base.model)]
    weights_stepped = [weight for job in attached for weight in stepped(job.attached, job.config)]
    vectors = [weight.numel() for weight in weights_stepped if weight.dim() < 2]
    return Trace(
        peaks=dict(ledger.peaks),
        weights=sum(weights.values()),
        linears=sum(blocks),
        block=max(blocks, default=0),
        largest=sizes[0],
        largest_four=sum(sizes[:4]),
        trained=sum(size for key, size in trained.items() if key not in weights),
        gradients=sum(g.nbytes for g in gradients),
        matrices=Counter(tuple(weight.shape) for weight in weights_stepped if weight.dim() > 1),
        flat=sum(count for count in vectors if count >= SMALLEST),
        small=sum(count for count in vectors if count < SMALLEST),
        tied=_tied_bytes(base),
    )


def _frozen_bytes(block: nn.Module) -> int:
    return sum(module.nbytes for module in block.modules() if isinstance(module, FrozenLinear))


def _sizes(model: nn.Module) -> dict[int, int]:
    """The numbers of each weight, whatever it is kept in."""
    found = {storage_of(p): p.numel() for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            found[storage_of(next(iter(module.parts().values())))] = module.in_features * module.out_features
    return found


def _tied_bytes(base: Base) -> int:
    head = set() if base.head.project is None else set(base.head.project.parameters())
    body = set() if base.body is None else set(base.body.parameters())
    return sum(4 * weight.numel() for weight in head & body)


def _parameters(jobs: Iterable[Job]) -> Iterator[Tensor]:
    for job in jobs:
        yield from job.attached.parameters()
