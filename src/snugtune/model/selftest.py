"""The gradient self-test: a small batch goes through the planned path, and every frozen linear is held against plain autograd.

Kernels of narrow weights, and weights that come and go, fail silently: right in forward and wrong in backward, or right
until an evaluation. So nothing is trained before each linear's output and gradients were seen to be those of its weight,
decoded here by plain torch code; and once more after an evaluation. The head's loss is held in the same way.

In a large model the first, the middle and the last linear of each kind stand for the others, which the same code serves; of
those it is seen that they are given the weights that were kept for them, in forward and in backward.
Shapes: W [out, in], x [n, in], dy [n, out].
"""

import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snugtune.errors import GradientError
from snugtune.model.base import Base
from snugtune.model.formats import Parts
from snugtune.model.frozen import FrozenLinear
from snugtune.model.proofs import probe_batch
from snugtune.model.reference import true_nll, true_use
from snugtune.model.remade import Function, another
from snugtune.model.routed import RoutedLinear, Slot
from snugtune.types import Batch, Segment

WHOLE = 1 << 28
"""Weights up to which every linear of a model is held against autograd."""
RANK = 4
_JOB = "gradient self-test"
# What rounding explains: the relative L2 error of any one feature over the tokens.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_CHAIN = 4
"""Roundings on the way to a factor's gradient, or through the head: sums may not even them out (2.03 % seen, random weights)."""
_EXACT = 0.1
"""The loss is taken in fp32 of logits that were rounded alike (1e-7 seen in bf16, too)."""
_SMALL = 0.2
"""A feature smaller than this share of the usual one is held against that: it is a sum of larger ones that cancel."""


class Checked(NamedTuple):
    """How many linears were held against autograd, of how many that took part."""

    compared: int
    linears: int

    def __str__(self) -> str:
        which = f"{self.compared} of {self.linears}" if self.compared < self.linears else f"{self.compared}"
        rest = "; the others have the weights that were kept for them" if self.compared < self.linears else ""
        return f"gradients of {which} linears and of the head agree with plain autograd{rest}"


def check_gradients(base: Base) -> Checked:
    """Hold the frozen linears of `base` and its head against plain autograd, before and after an evaluation.

    Leaves no trace: no adapter, hook or gradient, no random number drawn. Raises `GradientError` at the first that is wrong.
    """
    linears = ((n, m) for n, m in base.model.named_modules() if isinstance(m, RoutedLinear | FrozenLinear))
    modules = {name: module for name, module in linears if not name.endswith(".frozen")}
    if not modules:
        return Checked(0, 0)
    compared = _representatives(modules)
    training, devices = base.model.training, [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), ExitStack() as undo:
        undo.callback(base.model.train, training)
        for name, site in base.sites.items():
            if name in compared:
                site.slots[_JOB] = _random_slot(site, zlib.crc32(name.encode()), base.device)
                undo.callback(site.slots.pop, _JOB)
        stored: dict[str, int] = {}
        seen = _check(base, modules, compared, stored, "")
        _evaluate(base)
        _check(base, modules, compared, stored, " after an evaluation")
    return Checked(len(seen & compared), len(seen))


def _representatives(modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """All linears of a small model; of a large one three of each kind, which differ in the numbers in their names alone."""
    layers = {name: _frozen(module) for name, module in modules.items()}
    if sum(layer.in_features * layer.out_features for layer in layers.values()) <= WHOLE:
        return frozenset(layers)
    kinds: dict[object, list[str]] = {}
    for name, layer in layers.items():
        kind = (re.sub(r"\d+", "#", name), type(modules[name]), type(layer), layer.format, layer.shape)
        kinds.setdefault(kind, []).append(name)
    return frozenset(names[at] for names in kinds.values() for at in (0, len(names) // 2, -1))


def _frozen(module: nn.Module) -> FrozenLinear:
    layer = module.frozen if isinstance(module, RoutedLinear) else module
    assert isinstance(layer, FrozenLinear)
    return layer


def _random_slot(site: RoutedLinear, seed: int, device: torch.device) -> Slot:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(RANK, site.in_features, generator=generator) / site.in_features**0.5
    b = torch.randn(site.out_features, RANK, generator=generator) * 0.02
    return Slot(a.to(device).requires_grad_(), b.to(device).requires_grad_(), scale=1.0)


def _batches(base: Base) -> Iterator[Batch]:
    """Two short sequences in a row, or one after the other where they cannot share it."""
    both = probe_batch(base.model)
    rows = [both.lengths] if base.packable else [(n,) for n in both.lengths]
    at = 0
    for lengths in rows:
        part = slice(at, at := at + sum(lengths))
        segment = Segment(_JOB, slice(0, sum(lengths)), 0, lengths)
        yield Batch(both.input_ids[:, part], both.position_ids[:, part], lengths, (segment,))


def _loss(base: Base, batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean negative log likelihood of each next token of the row, as training takes it, and what it is taken of."""
    hidden, targets = base.hidden(batch)[:-1], batch.input_ids[0, 1:]
    weights = torch.full(targets.shape, 1.0 / len(targets), device=base.device)
    return base.head.for_segment(batch.segments[0]).nll(hidden, targets, weights), hidden


def _evaluate(base: Base) -> None:
    base.model.eval()
    with torch.no_grad():
        for batch in _batches(base):
            with base.routed(batch):
                _loss(base, batch)


def _check(base: Base, modules: Mapping[str, nn.Module], compared: frozenset[str], stored: dict[str, int], when: str) -> set[str]:
    """A forward and a backward of each batch; returns which linears took part in both."""
    base.model.train()
    slots = {name: site.slots[_JOB] for name, site in base.sites.items() if name in compared}
    factors = [factor for slot in slots.values() for factor in (slot.a, slot.b)]
    seen: set[str] = set()
    for batch in _batches(base):
        probe = _Probe(compared, stored, when, _TOLERANCE[base.dtype])
        with probe.watching(base, modules), base.routed(batch):
            loss, hidden = _loss(base, batch)
            probe.recording = False  # what is called from now on is recomputed
            loss.backward(inputs=[*probe.embedded, *factors])
        for name, truths in probe.factors.items():
            probe.check_factors(name, slots[name], truths)
        probe.check_head(base, modules, hidden.detach(), batch.input_ids[0, 1:])
        seen |= probe.seen
        for factor in factors:
            factor.grad = None
    return seen


@dataclass(eq=False)
class _Call:
    """One use of a linear in the planned path: what went in, came out, and came back."""

    name: str
    layer: FrozenLinear
    slot: Slot | None
    inputs: list[Tensor]
    function: Function | None  # what the linear takes of its inputs
    y: Tensor | None = None
    dy: Tensor | None = None
    gradients: dict[int, Tensor] = field(default_factory=dict)  # of the inputs

    def x(self) -> Tensor:
        return self.inputs[0] if self.function is None else self.function(*self.inputs)

    def true_gradients(self, dx: Tensor) -> list[Tensor]:
        """Of the inputs, given that of x."""
        if self.function is None:
            return [dx]
        with torch.enable_grad():
            leaves = [tensor.to(dx.dtype).requires_grad_() for tensor in self.inputs]
            return list(torch.autograd.grad(self.function(*leaves), leaves, dx))


@dataclass
class _Probe:
    """What hooks see of one forward and backward. A use of a linear is compared as soon as its backward is through."""

    compared: frozenset[str]
    stored: dict[str, int]  # checksum of what is kept of each weight
    when: str
    tolerance: float
    recording: bool = True
    last: _Call | None = None
    calls: dict[str, list[_Call]] = field(default_factory=dict)
    embedded: list[Tensor] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    factors: dict[str, list[Tensor]] = field(default_factory=dict)  # the true gradients of A and B so far

    @contextmanager
    def watching(self, base: Base, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        handles = [base.model.get_input_embeddings().register_forward_hook(self._embedded)]
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(self._after, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _embedded(self, module: nn.Module, inputs: object, out: Tensor) -> Tensor:
        """The first linears, too, are to give the gradient of their input."""
        out = out.detach().requires_grad_()
        self.embedded.append(out)
        return out

    def _before(
        self, name: str, module: nn.Module, args: tuple[Tensor, ...], how: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]] | None:
        layer, self.last = _frozen(module), None
        if not (self.recording and all(x.requires_grad for x in args)):
            return None
        own = tuple(another(x) for x in args)  # others may take the same input: the gradient of this use alone
        if name in self.compared:
            slot = module.slots[_JOB] if isinstance(module, RoutedLinear) else None
            self.last = _Call(name, layer, slot, [_rows(x).clone() for x in args], how.get("function"))
            self.calls.setdefault(name, []).append(self.last)
            for at, x in enumerate(own):
                x.register_hook(partial(self._came_back, self.last, at))
        else:
            self._check_kept(name, layer)
            own[0].register_hook(lambda dx: self._check_kept(name, layer))
        return own, how

    def _came_back(self, call: _Call, at: int, gradient: Tensor) -> None:
        call.gradients[at] = _rows(gradient)
        if len(call.gradients) == len(call.inputs):
            self._compare(call)

    def _after(self, name: str, module: nn.Module, args: object, y: Tensor) -> Tensor | None:
        call = self.last
        if not self.recording and len(uses := self.calls.get(name, [])) == 1 and uses[0].y is not None:
            self._hold(name, "output in recompute", _rows(y), uses[0].y, self.tolerance)
        if call is None:
            return None
        call.y = _rows(y).clone()  # no linear calls another, so it is the one that began last
        own = y.clone()  # some models write into it, and a hook on a view would be lost
        own.register_hook(lambda dy: setattr(call, "dy", _rows(dy)))
        return own

    def _check_kept(self, name: str, layer: FrozenLinear) -> None:
        """What is computed with now must be what is kept of the weight, and has been."""
        if name not in self.stored:
            self.stored[name] = _checksum(layer.fresh_parts())
        if _checksum(layer.parts()) != self.stored[name]:
            raise self._error(name, "the weight that it computes with is not the one that was kept")
        self.seen.add(name)

    def _compare(self, call: _Call) -> None:
        assert call.y is not None and call.dy is not None
        self.calls[call.name].remove(call)
        parts = call.layer.fresh_parts()
        checksum = _checksum(parts)
        if self.stored.setdefault(call.name, checksum) != checksum:
            raise self._error(call.name, "the weight it keeps has changed")
        y, dx, gradients = true_use(call.layer, parts, call.slot, call.x(), call.dy)
        self._hold(call.name, "output", call.y, y, self.tolerance)
        for at, truth in enumerate(call.true_gradients(dx)):
            self._hold(call.name, "gradient of the input", call.gradients[at], truth, self.tolerance)
        if call.slot is not None:
            before = self.factors.get(call.name, [])
            self.factors[call.name] = [b + g for b, g in zip(before, gradients, strict=True)] if before else gradients
        self.seen.add(call.name)

    def check_head(self, base: Base, modules: Mapping[str, nn.Module], hidden: Tensor, targets: Tensor) -> None:
        """Hold the loss of a few hidden states [n, D] and its gradient against autograd."""
        head, few = base.head, slice(None, None, 4)
        name = next((n for n, m in modules.items() if m is head.project), None)
        if name is None and head.project is not None:
            return  # it trains, by plain autograd
        h, targets = hidden[few].clone().requires_grad_(), targets[few]
        weights = torch.linspace(0.5, 1.5, len(h), device=h.device) / len(h)
        ours = head.nll(h, targets, weights)
        (dh,) = torch.autograd.grad(ours, h)
        truth, true_dh = true_nll(None if name is None else _frozen(modules[name]), head.shape, h, targets, weights)
        name = name or "the model's head"
        self._hold(name, "loss", ours.detach().view(1, 1), truth.view(1, 1), _EXACT * self.tolerance)
        self._hold(name, "gradient of the hidden states", dh, true_dh, _CHAIN * self.tolerance)

    def check_factors(self, name: str, slot: Slot, truths: list[Tensor]) -> None:
        """Hold the gradients that gathered in an adapter's factors against those of all uses of its linear."""
        for side, factor, truth in zip("AB", (slot.a, slot.b), truths, strict=True):
            assert factor.grad is not None
            ours = factor.grad.view(-1, 1)  # as one feature: some of its numbers are sums that cancel
            self._hold(name, f"gradient of the adapter's {side}", ours, truth.reshape(-1, 1), _CHAIN * self.tolerance)

    def _hold(self, name: str, what: str, ours: Tensor, truth: Tensor, tolerance: float) -> None:
        error = disagreement(ours, truth)
        if not error <= tolerance:
            raise self._error(name, f"its {what} differs by {100 * error:.3g}% (rounding explains {100 * tolerance:.3g}%)")

    def _error(self, name: str, what: str) -> GradientError:
        return GradientError(
            f"self-test: {name}{self.when}: {what}, held against plain autograd on its own weight; this machine would train it "
            "wrongly, so nothing was trained: set plan.weights: bf16 and plan.offload: none"
        )


def _rows(t: Tensor) -> Tensor:
    return t.detach().flatten(0, -2)


def _checksum(parts: Parts) -> int:
    total = 0
    for _, part in sorted(parts.items()):
        total = zlib.crc32(part.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data, total)
    return total


def disagreement(ours: Tensor, truth: Tensor) -> float:
    """The largest relative L2 error of any feature (column) over the rows; infinite where a number is not finite."""
    errors, sizes = (ours.to(truth.dtype) - truth).norm(dim=0), truth.norm(dim=0)
    usual = float(sizes.square().mean().sqrt())
    worst = float((errors / sizes.clamp_min(max(_SMALL * usual, 1e-30))).max())
    return worst if worst == worst else float("inf")
