"""Liger's kernels (liger-kernel 0.8.5, Triton, CUDA), called as our layers need them, and how they are tried against ours.

Imported from its modules, not its package: there `LIGER_KERNEL_IMPL` would choose others. Nothing here was run on a GPU;
the tests run it on stand-ins with Liger's signatures, which are compared with its source.
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

Norm = Callable[[Tensor, Tensor, float, bool], Tensor]
Product = Callable[[Tensor, Tensor], Tensor]

TOLERANCE = MappingProxyType({torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3})
"""The relative L2 difference of a row, of values or gradients, that rounding elsewhere explains: a few last bits."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """x [..., D] as `LeanNorm` does.

    Not in place: the gradient that comes in may be a residual's too. `row_mode`: or else the kernel would depend on how many
    rows there are, and with it a row's last bits on its neighbours.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

    offset, casting = (1.0, "gemma") if plus_one else (0.0, "llama")
    return LigerRMSNormFunction.apply(x, weight, eps, offset, casting, False, True)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Backward writes over gate and up: it can be taken once, and nobody else may keep them."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

    return LigerSiLUMulFunction.apply(gate, up)


def gelu_product(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, by the tanh formula. Backward writes over gate and up, as above."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction  # pyright: ignore[reportMissingImports]

    return LigerGELUMulFunction.apply(gate, up)


PRODUCTS = MappingProxyType(
    {
        "SiLU": silu_product,  # by the name of the activation's class
        "SiLUActivation": silu_product,
        "GELUTanh": gelu_product,
        "NewGELUActivation": gelu_product,
    }
)


def agrees(theirs: Callable[..., Tensor], ours: Callable[..., Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether they give the same to rounding, forth and back, of inputs [rows, width], each row as if it were alone.

    The last must hold to the bit, or a job would depend on its neighbours. Whatever breaks does not agree.
    """
    try:
        found, expected, few = _both(theirs, inputs), _both(ours, inputs), _both(theirs, [x[5:8] for x in inputs])
    except Exception:  # what a compiler of kernels may raise on a device it was not made for is not known
        return False
    same = all(close(a, b) for a, b in zip(found, expected, strict=True))
    return same and all(torch.equal(a[5:8], b) for a, b in zip(found, few, strict=True))


def close(theirs: Tensor, ours: Tensor) -> bool:
    """Whether every row is within `TOLERANCE`."""
    if theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        return False
    a, b = theirs.float(), ours.float()
    error = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)
    return bool((error <= TOLERANCE[ours.dtype]).all())  # NaN is not


def _both(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The value and the gradients of all inputs, which are left as they are."""
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        direction = torch.linspace(-1.0, 1.5, y.shape[-1], device=y.device).to(y.dtype).expand_as(y).contiguous()
        return [y.detach(), *torch.autograd.grad(y, leaves, direction)]
