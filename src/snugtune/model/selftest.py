"""The gradient self-test: a small batch goes through the planned path, and every frozen linear is held against plain autograd.

Kernels of narrow weights, and weights that come and go, fail silently: right in forward and wrong in backward, or right
until an evaluation. So nothing is trained before each linear's output and gradients were seen to be those of its weight,
decoded here by plain torch code; and once more after an evaluation. One such weight is alive at a time.
Shapes: W [out, in], x [n, in], dy [n, out].
"""

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snugtune.errors import GradientError
from snugtune.model.base import Base
from snugtune.model.formats import CODES, Bits4, Dense, Format, Int8, Parts
from snugtune.model.frozen import FrozenLinear
from snugtune.model.proofs import probe_batch
from snugtune.model.routed import RoutedLinear, Slot
from snugtune.types import Batch, Segment

PIECE = 1 << 20
"""Weights decoded at a time."""
RANK = 4
_JOB = "gradient self-test"
# What rounding explains: the relative L2 error of any one feature over the tokens.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_CHAIN = 4
"""Roundings on the way to a factor's gradient, which sums over tokens may not even out (2.03 % seen on random weights)."""
_SMALL = 0.2
"""A feature smaller than this share of the usual one is held against that: it is a sum of larger ones that cancel."""


def check_gradients(base: Base) -> int:
    """Hold every frozen linear of `base` against plain autograd, before and after an evaluation; returns how many.

    Leaves no trace: no adapter, hook or gradient, no random number drawn. Raises `GradientError` at the first that is wrong.
    """
    modules: dict[nn.Module, str] = {}
    for name, module in base.model.named_modules():
        if isinstance(module, RoutedLinear | FrozenLinear) and not name.endswith(".frozen"):
            modules[module] = name
    training, devices = base.model.training, [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), ExitStack() as undo:
        undo.callback(base.model.train, training)
        for name, site in base.sites.items():
            site.slots[_JOB] = _random_slot(site, zlib.crc32(name.encode()), base.device)
            undo.callback(site.slots.pop, _JOB)
        stored: dict[str, int] = {}
        checked = _check(base, modules, stored, "")
        _evaluate(base)
        _check(base, modules, stored, " after an evaluation")
    return len(checked)


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


def _loss(base: Base, batch: Batch) -> Tensor:
    """The mean negative log likelihood of each next token of the row, as training takes it."""
    hidden, targets = base.hidden(batch)[:-1], batch.input_ids[0, 1:]
    weights = torch.full(targets.shape, 1.0 / len(targets), device=base.device)
    return base.head.for_segment(batch.segments[0]).nll(hidden, targets, weights)


def _evaluate(base: Base) -> None:
    base.model.eval()
    with torch.no_grad():
        for batch in _batches(base):
            with base.routed(batch):
                _loss(base, batch)


def _check(base: Base, modules: dict[nn.Module, str], stored: dict[str, int], when: str) -> set[str]:
    """A forward and a backward of each batch; returns which linears took part in both."""
    base.model.train()
    slots = {name: site.slots[_JOB] for name, site in base.sites.items()}
    factors = [factor for slot in slots.values() for factor in (slot.a, slot.b)]
    checked: set[str] = set()
    for batch in _batches(base):
        probe = _Probe(stored, when, _TOLERANCE[base.dtype])
        with probe.watching(base, modules), base.routed(batch):
            loss = _loss(base, batch)
            probe.recording = False  # what is called from now on is recomputed
            loss.backward(inputs=[*probe.embedded, *factors])
        for name, truths in probe.factors.items():
            probe.check_factors(name, slots[name], truths)
        checked |= probe.checked
        for factor in factors:
            factor.grad = None
    return checked


@dataclass(eq=False)
class _Call:
    """One use of a linear in the planned path: what went in, came out, and came back."""

    name: str
    layer: FrozenLinear
    slot: Slot | None
    x: Tensor
    y: Tensor | None = None
    dy: Tensor | None = None


@dataclass
class _Probe:
    """What hooks see of one forward and backward. A use of a linear is compared as soon as its backward is through."""

    stored: dict[str, int]  # checksum of what is kept of each weight
    when: str
    tolerance: float
    recording: bool = True
    last: _Call | None = None
    embedded: list[Tensor] = field(default_factory=list)
    checked: set[str] = field(default_factory=set)
    factors: dict[str, list[Tensor]] = field(default_factory=dict)  # the true gradients of A and B so far

    @contextmanager
    def watching(self, base: Base, modules: dict[nn.Module, str]) -> Iterator[None]:
        handles = [base.model.get_input_embeddings().register_forward_hook(self._embedded)]
        for module, name in modules.items():
            handles.append(module.register_forward_pre_hook(partial(self._before, name)))
            handles.append(module.register_forward_hook(self._after))
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

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0]
        if not (self.recording and x.requires_grad):
            self.last = None
            return None
        layer = module.frozen if isinstance(module, RoutedLinear) else module
        assert isinstance(layer, FrozenLinear)
        slot = module.slots[_JOB] if isinstance(module, RoutedLinear) else None
        self.last = call = _Call(name, layer, slot, _rows(x).clone())
        own = x.view_as(x)  # other linears may take the same input: the gradient of this use alone
        own.register_hook(lambda dx: self._compare(call, _rows(dx)))
        return (own, *args[1:])

    def _after(self, module: nn.Module, args: object, y: Tensor) -> Tensor | None:
        call = self.last
        if call is None:
            return None
        call.y = _rows(y).clone()  # no linear calls another, so it is the one that began last
        own = y.clone()  # some models write into it, and a hook on a view would be lost
        own.register_hook(lambda dy: setattr(call, "dy", _rows(dy)))
        return own

    def _compare(self, call: _Call, dx: Tensor) -> None:
        assert call.y is not None and call.dy is not None
        layer, slot, parts = call.layer, call.slot, call.layer.fresh_parts()
        checksum = _checksum(parts)
        if self.stored.setdefault(call.name, checksum) != checksum:
            raise self._error(call.name, "the weight it keeps has changed")
        weight = reference_weight(layer.format, parts, layer.shape, layer.dtype)
        wide = weight.dtype
        with torch.enable_grad():
            x = call.x.to(wide).requires_grad_()
            y = F.linear(x, weight, None if layer.bias is None else layer.bias.to(wide))
            if isinstance(layer.format, Int8) and layer.format.outlier_threshold:
                y = y + (_int8_product(layer, layer.format, parts, call.x.to(wide)) - y).detach()  # its gradient stays
            factors = [] if slot is None else [f.detach().to(call.x.dtype).to(wide).requires_grad_() for f in (slot.a, slot.b)]
            if slot is not None:
                y = y + slot.scale * F.linear(F.linear(x, factors[0]), factors[1])
            truth, *gradients = torch.autograd.grad(y, [x, *factors], call.dy.to(wide))
        self._hold(call.name, "output", call.y, y.detach(), self.tolerance)
        self._hold(call.name, "gradient of the input", dx, truth, self.tolerance)
        if slot is not None:
            before = self.factors.get(call.name, [])
            self.factors[call.name] = [b + g for b, g in zip(before, gradients, strict=True)] if before else gradients
        self.checked.add(call.name)

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


def _int8_product(layer: FrozenLinear, format: Int8, parts: Parts, x: Tensor) -> Tensor:
    """x [n, in] rounded to int8 by rows, but for outliers, times a weight that is not rounded to 16 bits on its way."""
    far = x.abs() >= format.outlier_threshold
    scale = x.masked_fill(far, 0).abs().amax(dim=1, keepdim=True).clamp_min(1e-36)
    # bf16 has few numbers, so that many lie just between two of int8: rounded as `Int8` does
    taken = torch.where(far, x, (x * (127 / scale)).round() * (scale / 127))
    weight = reference_weight(format, parts, layer.shape, torch.float32)
    return F.linear(taken, weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def disagreement(ours: Tensor, truth: Tensor) -> float:
    """The largest relative L2 error of any feature (column) over the rows; infinite where a number is not finite."""
    errors, sizes = (ours.to(truth.dtype) - truth).norm(dim=0), truth.norm(dim=0)
    usual = float(sizes.square().mean().sqrt())
    worst = float((errors / sizes.clamp_min(max(_SMALL * usual, 1e-30))).max())
    return worst if worst == worst else float("inf")


def reference_weight(format: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """W [out, in] in fp32 or wider with the values it has in `dtype`, by plain torch code: no kernel of `formats` is used."""
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(format, Dense):
        return parts["dense"].to(wide)
    if isinstance(format, Int8):
        values, scales, run = parts["int8"].view(-1), parts["scale"] / 127, shape[1]
    else:
        assert isinstance(format, Bits4)
        values, scales, run = parts["packed"].view(-1), _scales(format, parts), format.block
    weight = torch.empty(shape[0] * shape[1], dtype=wide, device=values.device)
    for start in range(0, len(weight), piece := max(1, PIECE // (2 * run)) * 2 * run):  # whole bytes, and runs of one scale
        out = weight[start : start + piece]
        numbers = (
            values[start : start + piece].float() if isinstance(format, Int8) else _unpacked(format, values, start, len(out))
        )
        first, whole = start // run, len(out) // run * run
        numbers[:whole].view(-1, run).mul_(scales[first : first + whole // run, None])
        numbers[whole:].mul_(scales[-1])
        out.copy_(numbers.to(dtype))
    return weight.view(shape)


def _unpacked(format: Bits4, packed: Tensor, start: int, count: int) -> Tensor:
    """Numbers of the code, two a byte: the first is in the upper half."""
    code = torch.tensor(CODES[format.kind], device=packed.device)
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1).view(torch.int64)[:, 0]  # of each byte
    return pairs[packed[start // 2 :][: (count + 1) // 2].int()].view(torch.float32)[:count]


def _scales(format: Bits4, parts: Parts) -> Tensor:
    """The largest magnitude of each block."""
    absmax = parts["absmax"]
    if not format.double:
        return absmax
    nested = parts["nested_absmax"].repeat_interleave(format.nested_block)[: len(absmax)]
    return parts["nested_code"][absmax.int()] * nested + parts["offset"]
