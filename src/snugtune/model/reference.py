"""What frozen linears and the head should compute, by plain torch code: the truth that the self-test holds them against.

No kernel of `formats` is used. Weights are decoded a few rows at a time, and gradients are autograd's; nothing as large as a
weight in fp32 is ever made. Shapes: W [out, in], x [n, in], dy [n, out].
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from snugtune.model.formats import CODES, W8A8, Bits4, Dense, Format, Int8, Outliers, Parts
from snugtune.model.frozen import FrozenLinear
from snugtune.model.head import Logits
from snugtune.model.routed import Slot

PIECE = 1 << 18
"""Weights decoded at a time."""


def pieces(shape: tuple[int, int]) -> Iterator[slice]:
    """The rows of a weight in groups of about `PIECE` numbers."""
    count = max(1, PIECE // shape[1])
    for first in range(0, shape[0], count):
        yield slice(first, min(first + count, shape[0]))


def reference_rows(format: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype, rows: slice) -> Tensor:
    """Some rows of W [out, in], in fp32 or wider with the values they have in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(format, Dense):
        return parts["dense"][rows].to(wide)
    if isinstance(format, Int8):
        decoded = parts["int8"][rows].float() * (parts["scale"][rows, None] / 127)
    else:
        assert isinstance(format, Bits4)
        decoded = _from_4bit(format, parts, rows.start * shape[1], rows.stop * shape[1]).view(-1, shape[1])
    return decoded.to(dtype).to(wide)


def true_use(layer: FrozenLinear, parts: Parts, slot: Slot | None, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y [n, out] of x [n, in], and from dy the gradients of x and of the slot's A and B; all in fp32 or wider."""
    wide = torch.promote_types(layer.dtype, torch.float32)
    factors = [] if slot is None else [_leaf(factor.detach().to(x.dtype), wide) for factor in (slot.a, slot.b)]
    x, dy = _leaf(x, wide), dy.to(wide)
    taken, given = _taken(layer.format, x.detach()), _given(layer.format, parts, dy)
    whole = torch.empty_like(dy)
    for rows in pieces(layer.shape):
        weight = reference_rows(layer.format, parts, layer.shape, torch.float32 if given is not None else layer.dtype, rows)
        bias = None if layer.bias is None else layer.bias[rows].to(wide)
        with torch.enable_grad():
            y = F.linear(x, weight, bias)
            if taken is not None:  # its weight is not rounded to 16 bits on its way
                exact = reference_rows(layer.format, parts, layer.shape, torch.float32, rows).to(wide)
                y = y + (F.linear(taken, exact, bias) - y).detach()  # its gradient stays
            if given is not None:
                y = _Given.apply(y, given[:, rows])
            assert isinstance(y, Tensor)
            if slot is not None:
                y = y + slot.scale * F.linear(F.linear(x, factors[0]), factors[1][rows])
            y.backward(dy[:, rows])  # pieces add up in the gradients
        whole[:, rows] = y.detach()
    dx, *gradients = (_gradient(leaf) for leaf in (x, *factors))
    return whole, dx, gradients


def true_nll(layer: FrozenLinear | None, shape: Logits, h: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted negative log likelihood of hidden states h [n, D] and its gradient [n, D], in fp64.

    `layer` is the head; without one h are logits. Logits are rounded to h's format, as the model rounds its own.
    """
    wide = _leaf(h, torch.float64)
    with torch.enable_grad():
        raw = wide if layer is None else _logits(layer, wide)
        z = shape(raw)
        z = z + (shape(raw.to(h.dtype)) - z).detach()  # its gradient stays
        total = F.cross_entropy(z, targets, reduction="none") @ weights.double()
        total.backward()
    return total.detach(), _gradient(wide)


def _logits(layer: FrozenLinear, h: Tensor) -> Tensor:
    """[n, D] -> h W^T + b [n, V]; each piece of W is decoded anew for its gradient."""

    def some(h: Tensor, rows: slice) -> Tensor:
        weight = reference_rows(layer.format, layer.parts(), layer.shape, layer.dtype, rows).to(h.dtype)
        return F.linear(h, weight, None if layer.bias is None else layer.bias[rows].to(h.dtype))

    made = [checkpoint(some, h, rows, use_reentrant=False, preserve_rng_state=False) for rows in pieces(layer.shape)]
    return torch.cat(made, dim=1)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _leaf(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype, copy=True).requires_grad_()


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _taken(format: Format, x: Tensor) -> Tensor | None:
    """What a product in int8 makes of x [n, in]; None where there is none."""
    if isinstance(format, Outliers | W8A8):
        return _in_int8(x, format.threshold if isinstance(format, Outliers) else math.inf)
    return None


def _given(format: Format, parts: Parts, dy: Tensor) -> Tensor | None:
    """The same of dy [n, out] in backward: it is rounded with the weight's scales in it."""
    if not isinstance(format, W8A8):
        return None
    scale = parts["scale"] / 127
    return torch.where(scale > 0, _in_int8(dy * scale, math.inf) / scale, 0.0)  # stored rows of zeros have no scale


class _Given(torch.autograd.Function):
    """Passes y on, and back what it was told instead of the gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, given: Tensor) -> Tensor:
        ctx.given = given
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.given, None


def _in_int8(x: Tensor, threshold: float) -> Tensor:
    """x [n, in] rounded to int8 by rows, but for outliers."""
    far = x.abs() >= threshold
    scale = x.masked_fill(far, 0).abs().amax(dim=1, keepdim=True).clamp_min(1e-36)
    # bf16 has few numbers, so that many lie just between two of int8: rounded as `Int8` does
    return torch.where(far, x, (x * (127 / scale)).round() * (scale / 127))


def _from_4bit(format: Bits4, parts: Parts, start: int, stop: int) -> Tensor:
    """Numbers `start` to `stop` of the flat weight. Its blocks know nothing of rows."""
    first, last = start // format.block, -(-stop // format.block)
    begin = first * format.block  # a whole block, and so a whole byte
    numbers = _unpacked(format, parts["packed"], begin, stop - begin)
    numbers *= _scales(format, parts, first, last).repeat_interleave(format.block)[: len(numbers)]
    return numbers[start - begin :]


def _unpacked(format: Bits4, packed: Tensor, start: int, count: int) -> Tensor:
    """Numbers of the code, two a byte: the first is in the upper half."""
    code = torch.tensor(CODES[format.kind], device=packed.device)
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1).view(torch.int64)[:, 0]  # of each byte
    return pairs[packed[start // 2 :][: (count + 1) // 2].int()].view(torch.float32)[:count]


def _scales(format: Bits4, parts: Parts, first: int, last: int) -> Tensor:
    """The largest magnitude of each of some blocks."""
    absmax = parts["absmax"][first:last]
    if not format.double:
        return absmax
    nested = parts["nested_absmax"][torch.arange(first, last, device=absmax.device) // format.nested_block]
    return parts["nested_code"][absmax.int()] * nested + parts["offset"]
