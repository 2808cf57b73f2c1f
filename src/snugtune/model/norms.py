"""RMSNorm with less kept for backward and fewer passes over memory (Zhang and Sennrich 2019, arXiv 1910.07467).

As the models write it, the states are widened to fp32 and kept so. Here backward keeps the states as they came, and the inverse
root mean square of each; linears that are given the result make it again of these (see `remade.py`). x [..., D], weight w [D];
y = w * x / rms(x), in the two ways the models round it.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from snugtune.model.liger import Norm, agrees
from snugtune.model.remade import Origin, Remade, made_of
from snugtune.model.trial import drawn, kind_of, twin_of

_EPSILONS = ("variance_epsilon", "eps")
_ROWS = 16


class LeanNorm(nn.Module):
    """In the place of a model's own norm, with its weight. `plus_one`: the weight is around zero (Gemma).

    `kernel`: what computes it instead of torch's operators; see `take_kernel`.
    """

    def __init__(self, own: nn.Module, eps: float, plus_one: bool):
        super().__init__()
        self.weight = own.get_parameter("weight")
        self.eps, self.plus_one = eps, plus_one
        self.kernel: Norm | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(x, self.weight, self.eps, self.plus_one)
        remade = Remade(functools.partial(_again, self.plus_one))
        y, scale = _RmsNorm.apply(x, self.weight, self.eps, self.plus_one, remade)  # pyright: ignore[reportGeneralTypeIssues]
        return made_of(y, Origin(remade, (x.detach(), scale, self.weight.detach()))) if torch.is_grad_enabled() else y


def _again(plus_one: bool, x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return _weighted(x.to(scale.dtype, copy=True).mul_(scale), weight, plus_one, x.dtype)


def _weighted(wide: Tensor, weight: Tensor, plus_one: bool, dtype: torch.dtype) -> Tensor:
    """The normed states in `dtype`, over the wide ones."""
    if plus_one:
        return wide.mul_(1.0 + weight.to(wide.dtype)).to(dtype)
    return wide.to(dtype).mul_(weight)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool, remade: Remade) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # [..., 1]
        ctx.save_for_backward(x, scale, weight)
        ctx.plus_one, ctx.remade = plus_one, remade
        ctx.mark_non_differentiable(scale)
        return _weighted(wide.mul_(scale), weight, plus_one, x.dtype), scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """d/dx of w x / rms(x): with g = w dy and n = x / rms(x), (g - n mean(g n)) / rms(x)."""
        ctx.remade.forget()  # whom it was given to have had it
        x, scale, weight = ctx.saved_tensors
        wide = scale.dtype
        n = x.to(wide, copy=True).mul_(scale)
        dw = (grads[0] * n).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = grads[0].to(wide) * (1.0 + weight.to(wide)) if ctx.plus_one else (grads[0] * weight).to(wide)
        mean = torch.linalg.vecdot(g, n).unsqueeze(-1).div_(x.shape[-1])
        return g.addcmul_(n, mean, value=-1.0).mul_(scale).to(x.dtype), dw, None, None, None


def lean_norms(model: nn.Module, dtype: torch.dtype) -> None:
    """Put a `LeanNorm` in the place of every norm of `model` that is seen to compute the same. States come in `dtype`."""
    seen = dict[object, bool | None]()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (eps := _epsilon(child)) is None:
                continue
            weight = child.get_parameter("weight")
            kind = (kind_of(child), weight.shape, weight.dtype)
            if kind not in seen:
                seen[kind] = _way(child, eps, dtype)
            if (plus_one := seen[kind]) is not None:
                setattr(parent, name, LeanNorm(child, eps, plus_one))


def _epsilon(own: nn.Module) -> float | None:
    """That of a module which may be a norm as these are; else None."""
    names = [name for name, _ in (*own.named_parameters(), *own.named_buffers(), *own.named_children())]
    eps = next((getattr(own, name) for name in _EPSILONS if isinstance(getattr(own, name, None), float)), None)
    if names != ["weight"] or eps is None or own.get_parameter("weight").dim() != 1 or isinstance(own, nn.LayerNorm):
        return None
    if len(inspect.signature(own.forward).parameters) != 1:  # Zamba's is given a gate, too
        return None
    return eps


def _way(own: nn.Module, eps: float, dtype: torch.dtype) -> bool | None:
    """How to compute the same as `own`, to the bit: whether with `plus_one`; None if neither does.

    Tried with a weight of its own making: that of `own` may have no values.
    """
    weight = own.get_parameter("weight")
    twin = twin_of(own, {weight: drawn(tuple(weight.shape), weight.dtype, weight.device)})
    kinds = (dtype, weight.dtype)  # some weights are kept in fp32
    return next((way for way in (False, True) if all(_same(twin, LeanNorm(twin, eps, way), kind) for kind in kinds)), None)


@torch.no_grad()
def _same(own: nn.Module, lean: LeanNorm, dtype: torch.dtype) -> bool:
    x = _trial_states(len(lean.weight)).to(lean.weight.device, dtype)[None]
    theirs, ours = own(x), lean(x)
    return theirs.dtype == ours.dtype and torch.equal(theirs, ours)


def _trial_states(width: int) -> Tensor:
    """[n, width] of very different sizes, down to where eps counts."""
    sizes = torch.logspace(-4, 2, _ROWS)[:, None]
    return torch.randn(_ROWS, width, generator=torch.Generator().manual_seed(0)) * sizes


def take_kernel(model: nn.Module, kernel: Norm, dtype: torch.dtype) -> bool:
    """Let `kernel` compute every `LeanNorm` of `model` if it agrees with all of them, else none. Whether it does."""
    lean = [module for module in model.modules() if isinstance(module, LeanNorm)]
    kinds = {(len(norm.weight), norm.weight.dtype, norm.eps, norm.plus_one): norm for norm in lean}
    if not all(_agrees(norm, kernel, dtype) for norm in kinds.values()):
        return False
    for norm in lean:
        norm.kernel = kernel
    return bool(lean)


def _agrees(norm: LeanNorm, kernel: Norm, dtype: torch.dtype) -> bool:
    x = _trial_states(len(norm.weight)).to(norm.weight.device, dtype)
    return agrees(lambda x: kernel(x, norm.weight, norm.eps, norm.plus_one), norm, [x])
