"""How the weight of a frozen linear is kept: named tensors ("parts") and the way back to the weight.

Pure functions of tensors: where the parts lie (in memory, on disk) is not their business. The kernels are bitsandbytes'
registered operators, called directly: its modules corrupt gradients on CPU. Shapes: W [out, in], x [n, in].
"""

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from snugtune.model.pieces import starts

Parts = Mapping[str, Tensor]
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The parts that a weight will have: dtype and shape of each."""

PIECE = 1 << 18
"""Elements that are encoded or decoded at a time where an operator needs wide intermediates.

With four times as many, what the allocator kept of them made loading SmolLM2 in nf4 peak at 1.7 times its final size; so, 1.05.
"""


# QLoRA's appendix E (arXiv 2305.14314); fp4 as bitsandbytes defines it, its largest at 1 and the sign in the first bit.
_NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
CODES: dict[str, tuple[float, ...]] = {"nf4": _NF4, "fp4": (*_FP4, *(-value for value in _FP4))}
"""What the 16 values of 4 bits stand for."""
_INT8_PIECE = 1 << 20
"""Elements of the wider side that are multiplied in int8 at a time."""
_LEAST = 1e-36
"""The least scale of int8: 127 divided by less would overflow, and rows of zeros have none."""


class Format(Protocol):
    """A number format of weights at rest."""

    @property
    def name(self) -> str: ...

    def layout(self, out: int, width: int) -> Layout:
        """The parts of a weight [out, width], before there is one."""
        ...

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """W [out, in], floating point -> its parts."""
        ...

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The parts -> W [out, in] in `dtype`."""
        ...

    def matmul(self, x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        """x [..., in] -> x W^T + b [..., out]."""
        ...

    def matmul_t(self, dy: Tensor, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """dy [..., out] -> dy W [..., in], with W as it is in `dtype`."""
        ...


class _Decoded:
    """Products with the weight as it is decoded."""

    def matmul(self: Format, x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        return F.linear(x, self.decode(parts, shape, x.dtype), bias)

    def matmul_t(self: Format, dy: Tensor, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return dy @ self.decode(parts, shape, dtype)


@dataclass(frozen=True)
class Dense(_Decoded):
    """The weight itself; it is computed with as it lies, whatever format it was moved to since."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype, str(self.dtype))

    def layout(self, out: int, width: int) -> Layout:
        return {"dense": (self.dtype, (out, width))}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return {"dense": weight.to(self.dtype)}

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return parts["dense"]


@dataclass(frozen=True)
class Int8(_Decoded):
    """8 bits a weight: W = q s / 127, with s the largest magnitude of each row (Dettmers et al. 2022, arXiv 2208.07339)."""

    @property
    def name(self) -> str:
        return "int8"

    def layout(self, out: int, width: int) -> Layout:
        return {"int8": (torch.int8, (out, width)), "scale": (torch.float32, (out,))}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        rows = max(1, PIECE // weight.shape[1])
        made = [_rows_in_int8(part) for part in weight.split(rows)]
        return {"int8": torch.cat([q for q, _ in made]), "scale": torch.cat([scale for _, scale in made])}

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        q, scale = parts["int8"], parts["scale"] / 127
        weight = torch.empty(shape, dtype=dtype, device=q.device)
        rows = max(1, PIECE // shape[1])
        for start in starts(shape[0], rows, q):  # the product is fp32, and as large as the piece
            part = slice(start, start + rows)
            weight[part] = q[part] * scale[part, None]
        return weight


@dataclass(frozen=True)
class Outliers(Int8):
    """Int8 whose products are in int8 too, as LLM.int8() has them, but for what is large in x; backward is as it was.

    Rows of x are rounded to int8, but for numbers of at least the threshold, which are multiplied in x's own format. Which
    numbers these are is decided one by one, not by columns of the batch, so that no row depends on its neighbours.
    """

    threshold: float

    def matmul(self, x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        _operators()
        rows = x.reshape(-1, shape[1])
        far = rows.abs() >= self.threshold
        near, scale = _rows_in_int8(rows.masked_fill(far, 0))
        sums = torch.ops.bitsandbytes.int8_linear_matmul.default(near, parts["int8"])
        y = sums * (scale[:, None] / 127) * (parts["scale"] / 127)
        columns, at = far.any(dim=0).nonzero().flatten(), far.nonzero()
        if len(columns):
            weight = (parts["int8"][:, columns] * (parts["scale"][:, None] / 127)).t().contiguous()
            begins = far.sum(dim=1).cumsum(0) - far.sum(dim=1)
            # a sum of its own for each row, over its far numbers alone: a matrix product's order would depend on the others
            found, values = torch.searchsorted(columns, at[:, 1]), rows[far].float()
            y += F.embedding_bag(found, weight, begins, mode="sum", per_sample_weights=values)
        if bias is not None:
            y += bias
        return y.to(x.dtype).view(*x.shape[:-1], shape[0])


@dataclass(frozen=True)
class W8A8(Int8):
    """Int8 whose products are in int8 too, forward and backward: rows of x and of dy are rounded, whatever is large in them.

    In backward the weight's scales, which stand along the sum, are worked into dy before it is rounded. int8 products sum
    whole numbers exactly, so that no row depends on its neighbours.
    """

    ALIGNED: ClassVar[int] = 8
    """What CUDA's products want both sides of a weight to be a multiple of."""

    def matmul(self, x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        y = _int8_product(x.reshape(-1, shape[1]), parts["int8"].t(), None, parts["scale"] / 127, bias)
        return y.view(*x.shape[:-1], shape[0])

    def matmul_t(self, dy: Tensor, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        dx = _int8_product(dy.reshape(-1, shape[0]), parts["int8"], parts["scale"] / 127, None, None)
        return dx.view(*dy.shape[:-1], shape[1])


def _int8_product(x: Tensor, q: Tensor, before: Tensor | None, after: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [n, k], q int8 [k, m] -> ((x * before [k]) rounded by rows) q * after [m] + bias [m], in x's dtype.

    Some rows at a time: sums and what becomes of them take four bytes a number.
    """
    y = x.new_empty(len(x), q.shape[1])
    count = max(1, _INT8_PIECE // max(q.shape))
    for start in starts(len(x), count, x):
        part = slice(start, start + count)
        near, scale = _rows_in_int8(x[part] if before is None else x[part] * before)
        sums = _int_mm(near, q) * (scale[:, None] / 127)
        if after is not None:
            sums *= after
        if bias is not None:
            sums += bias
        y[part] = sums
    return y


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """int8 [n, k] x int8 [k, m] -> int32 [n, m]. CUDA's wants more than 16 rows."""
    short = 17 - len(a) if a.is_cuda else 0
    return torch.ops.aten._int_mm(F.pad(a, (0, 0, 0, short)) if short > 0 else a, b)[: len(a)]


def _rows_in_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, in] -> int8 [n, in] and the scale [n] of each row, its largest magnitude."""
    scale = rows.abs().amax(dim=1).float().clamp_min_(_LEAST)
    return (rows.float() * (127 / scale[:, None])).round_().to(torch.int8), scale


@dataclass(frozen=True)
class Bits4(_Decoded):
    """4 bits a weight: blocks of consecutive weights share a scale, their largest magnitude (QLoRA, arXiv 2305.14314).

    `kind` is the code of 16 numbers: nf4, whose steps follow a normal distribution, or fp4. `double`: the scales are kept
    in 8 bits each, in blocks of 256 with scales of their own: 4.127 instead of 4.5 bits a weight at a block of 64.
    """

    block: int = 64
    double: bool = False
    kind: str = "nf4"
    nested_block: ClassVar[int] = 256

    @property
    def name(self) -> str:
        return self.kind

    def layout(self, out: int, width: int) -> Layout:
        blocks = -(-out * width // self.block)
        packed: Layout = {"packed": (torch.uint8, (-(-out * width // 2),))}
        if not self.double:
            return {**packed, "absmax": (torch.float32, (blocks,))}
        nested = -(-blocks // self.nested_block)
        scales = {"absmax": (torch.uint8, (blocks,)), "nested_absmax": (torch.float32, (nested,))}
        return {**packed, **scales, "nested_code": (torch.float32, (256,)), "offset": (torch.float32, (1,))}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        _operators()
        ops, flat = torch.ops.bitsandbytes, weight.contiguous().view(-1)
        pieces = flat.split(PIECE // self.block * self.block)
        made = [ops.quantize_4bit.default(piece, self.block, self.kind, torch.uint8) for piece in pieces]
        parts = {"packed": torch.cat([p.view(-1) for p, _ in made]), "absmax": torch.cat([a for _, a in made])}
        return self._nest(parts) if self.double else parts

    def _nest(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        absmax = parts["absmax"]
        offset, code = absmax.mean(), _dynamic_code(absmax.device)
        q, scales = torch.ops.bitsandbytes.quantize_blockwise.default(absmax - offset, code, self.nested_block)
        return parts | {"absmax": q, "nested_absmax": scales, "nested_code": code, "offset": offset.view(1)}

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        absmax = parts["absmax"]
        if self.double:
            nested = _dequantize_blockwise(absmax, parts["nested_absmax"], parts["nested_code"], self.nested_block)
            absmax = nested + parts["offset"]
        count, packed = shape[0] * shape[1], parts["packed"]
        # On CPU the operator takes wrong scales where blocks cross rows (bitsandbytes 0.50.2): rows of whole blocks, then.
        width = shape[1] if shape[1] % self.block == 0 else self.block
        rows, rest = divmod(count, width)
        how = (self.block, self.kind)
        made = _dequantize_4bit(packed[: rows * width // 2], absmax[: rows * width // self.block], *how, [rows, width], dtype)
        if rest:  # a last block that is not full; of whole bytes, since others would be compiled first
            end = _dequantize_4bit(packed[rows * width // 2 :], absmax[-1:], *how, [1, rest + rest % 2], dtype)
            made = torch.cat((made.view(-1), end.view(-1)[:rest]))
        return made.view(shape)


def _dequantize_4bit(packed: Tensor, absmax: Tensor, block: int, kind: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    if packed.is_meta:  # what is only planned imports nothing
        return torch.empty(shape, dtype=dtype, device="meta")
    _operators()
    return torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, block, kind, shape, dtype)


def _dequantize_blockwise(q: Tensor, absmax: Tensor, code: Tensor, block: int) -> Tensor:
    if q.is_meta:
        return torch.empty(q.shape, dtype=torch.float32, device="meta")
    _operators()
    return torch.ops.bitsandbytes.dequantize_blockwise.default(q, absmax, code, block, torch.float32)


@functools.cache
def _operators() -> None:
    """Register bitsandbytes' operators with torch. Its import costs seconds, so only what is quantised pays."""
    importlib.import_module("bitsandbytes")


@functools.cache
def _dynamic_code(device: Any) -> Tensor:
    """The 256 numbers of bitsandbytes' dynamic 8-bit code (Dettmers 2015, arXiv 1511.04561)."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)
