"""Stand-ins for Liger's functions, which need a GPU: its signatures (0.8.5), its formulas and its habits, in torch's operators.

The habits: backward of the products writes over what was saved, past autograd's version counter, and that of the norm over
the gradient it is given, if `in_place`; without `row_mode` the norm's last bits depend on the number of rows.
`tests/unit/test_kernels.py` compares the signatures with Liger's source.
"""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


class LigerRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        W: Tensor,
        eps: float,
        offset: float = 0.0,
        casting_mode: str = "llama",
        in_place: bool = True,
        row_mode: bool | None = None,
    ) -> Tensor:
        wide = X.float()
        scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / X.shape[-1] + eps)
        ctx.save_for_backward(X, W, scale)
        ctx.settings = offset, casting_mode, in_place
        n = wide * scale * (1.0 if row_mode else 1.0 + 1e-7 * len(X.flatten(0, -2)))
        if casting_mode == "llama":
            n = n.to(X.dtype)
        return (n * (offset + W.float())).to(X.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        offset, casting, in_place = ctx.settings
        weight = offset + weight.float()
        m = (grads[0] * weight).float() if casting == "llama" else grads[0].float() * weight
        wide = x.float()
        dx = scale * m - scale**3 / x.shape[-1] * (m * wide).sum(-1, keepdim=True) * wide
        if in_place:
            return grads[0].data.copy_(dx), None, None, None, None, None, None
        return dx.to(x.dtype), None, None, None, None, None, None


class LigerSiLUMulFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, gate_multiplier: float = 1.0, down_multiplier: float = 1.0) -> Tensor:
        ctx.save_for_backward(a, b)
        wide = a.float()
        return (wide * torch.sigmoid(wide)).to(b.dtype) * b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        wide, dc = a.float(), grads[0]
        sig = torch.sigmoid(wide)
        da, db = dc * (wide * sig * (1 - sig) + sig) * b, dc * wide * sig
        return a.data.copy_(da), b.data.copy_(db), None, None


class LigerGELUMulFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.gelu(a.float(), approximate="tanh").to(b.dtype) * b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        wide, dc = a.float(), grads[0].float()
        db = dc * F.gelu(wide, approximate="tanh")
        da = torch.ops.aten.gelu_backward(dc * b, wide, approximate="tanh")
        return a.data.copy_(da), b.data.copy_(db)


STAND_INS = {"rms_norm": LigerRMSNormFunction, "swiglu": LigerSiLUMulFunction, "geglu": LigerGELUMulFunction}
"""Module of `liger_kernel.ops` -> what is imported from it."""


def stand_in(patch: pytest.MonkeyPatch, **others: type[torch.autograd.Function]) -> None:
    """Let imports of Liger find these; `others` by module instead."""
    for name in ("liger_kernel", "liger_kernel.ops"):
        patch.setitem(sys.modules, name, ModuleType(name))
    for name, function in STAND_INS.items():
        module = ModuleType(f"liger_kernel.ops.{name}")
        setattr(module, function.__name__, others.get(name, function))
        patch.setitem(sys.modules, module.__name__, module)
