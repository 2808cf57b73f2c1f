"""Of torch's operators, what a trace needs to know that the meta device does not tell, or tells slowly.

`WITHIN`: what an operator holds while it runs. `GIVEN`: what it gives, where torch's own answer is refused, or takes long.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operators
from torch import Tensor

aten = torch.ops.aten


def _flash_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, borders: Tensor, *_: object) -> int:
    """Bytes that `mha_varlen_bwd` has besides its results (flash_attn/flash_api.cpp), q [T, H, d], k and v [T, K, d].

    Gradients of queries in fp32 and a sum for each of them, rows rounded up for each sequence; where K < H those of keys and
    values for all heads.
    """
    tokens, heads, width = q.shape
    rows = tokens + 128 * (len(borders) - 1)
    rounded = -(-width // 32) * 32 if width <= 128 else -(-width // 64) * 64
    expanded = 2 * tokens * heads * width * q.element_size() if k.shape[1] < heads else 0
    return 4 * rows * heads * (rounded + 1) + expanded


def _shifted(z: Tensor, *_: object) -> int:
    """Bytes of logsumexp's own copy of what it is given (ReduceOps.cpp)."""
    return z.nbytes


WITHIN: Mapping[object, Callable[..., int]] = {
    aten.logsumexp.default: _shifted,
    torch.ops.torch_attn._varlen_attn_backward.default: _flash_backward,
}
"""Bytes that operators hold while they run, where that is as large as what they are given: no tensor shows it."""


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor, *_: object) -> Tensor:
    """What `_grouped_mm` gives for G groups: of rows [S, n] and [G, n, m] the rows [S, m]; of two of rows, as in backward of
    weights that train, [G, n, m]. However many rows each group has, and in every format, as its kernels do."""
    shape = (len(offs), len(a), b.shape[1]) if b.dim() == 2 else (len(a), b.shape[2])
    return torch.empty(shape, dtype=a.dtype, device=a.device)


def _itself(x: Tensor, *_: object, **__: object) -> Tensor:
    """Of operators that write into what they are given first."""
    return x


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What `torch.empty_like` gives, which takes 700 us on the meta device."""
    return x.clone() if x.dtype == dtype else x.to(dtype)


def _logsumexp(x: Tensor, dims: list[int], keepdim: bool = False) -> Tensor:
    return x.sum(dims, keepdim)


def _log_softmax(x: Tensor, dim: int, wide: bool) -> Tensor:
    return _like(x, torch.float32 if wide else x.dtype)


def _softmax_backward(gradient: Tensor, out: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return _like(gradient, dtype)


def _elementwise(operator: Any) -> Callable[..., Tensor]:
    """One that gives a tensor of the largest shape that it takes, in a type that holds all."""

    def given(*args: Any, **how: Any) -> Tensor:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        whole = max(tensors, key=lambda t: (t.dim(), t.numel()))
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors if t.dim() == whole.dim() or t.dim()))
        plain = dtype.is_floating_point and all(isinstance(arg, Tensor | int | float) for arg in args)
        return _like(whole, dtype) if plain and all(_stretches(t, whole) for t in tensors) else operator(*args, **how)

    return given


def _stretches(part: Tensor, whole: Tensor) -> bool:
    """Whether `part`, of no more dimensions, is of the shape of `whole` or is taken for one (broadcast)."""
    shape = whole.shape[whole.dim() - part.dim() :]
    return part.shape == shape or all(a in (1, b) for a, b in zip(part.shape, shape, strict=True))


_ELEMENTWISE = (
    *(aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.neg.default, aten.rsqrt.default),
    *(aten.pow.Tensor_Scalar, aten.exp.default),
)
_IN_PLACE = (
    *(aten.mul_.Tensor, aten.add_.Tensor, aten.sub_.Tensor, aten.exp_.default, aten.addcmul_.default),
    *(aten.addmm_.default, aten.masked_fill_.Scalar),
)
GIVEN: Mapping[object, Callable[..., Tensor]] = {
    aten._grouped_mm.default: _grouped_product,
    aten.logsumexp.default: _logsumexp,
    aten._log_softmax.default: _log_softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    **{operator: _elementwise(operator) for operator in _ELEMENTWISE},
    **dict.fromkeys(_IN_PLACE, _itself),
}
"""Stand-ins on the meta device. `_grouped_mm`, which multiplies all experts of a mixture (transformers' integrations/moe.py, on
every device unless one asks for something else), takes bf16 alone there. The others' shapes torch finds in Python, which took two
thirds of a trace's time."""
