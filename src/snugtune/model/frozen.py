"""Linear layers whose weights do not train.

A `FrozenLinear` fetches its weight when it needs it (in forward, in recompute and again in backward) and never leaves it
on the autograd context. That one rule is what makes quantised and streamed weights safe: nothing holds on to a transient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from snugtune.model.formats import W8A8, Dense, Format, Int8, Parts
from snugtune.model.remade import Function, again, through
from snugtune.model.trial import drawn, twin_of

_TRIED = (24, 16)


class FrozenLinear(nn.Linear):
    """y = x W^T + b with W [out, in] frozen, kept in any `Format`. Subclasses keep its parts elsewhere: see `parts`.

    `dtype` is the format it is computed with. `transposed`: it was a Conv1D (GPT-2), whose weight is [in, out].
    """

    def __init__(
        self,
        format: Format,
        parts: Parts,
        shape: tuple[int, int],
        bias: Tensor | None,
        dtype: torch.dtype,
        transposed: bool = False,
    ):
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a weight of its own
        self.format, self.dtype, self.transposed = format, dtype, transposed
        self.out_features, self.in_features = shape
        for name, part in parts.items():
            self.register_buffer(f"stored_{name}", part.detach(), persistent=False)
        self.part_names = tuple(parts)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @classmethod
    def dense(cls, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> "FrozenLinear":
        """W [out, in] as it is, without a copy."""
        shape = (weight.shape[0], weight.shape[1])
        return cls(Dense(weight.dtype), {"dense": weight}, shape, bias, weight.dtype, transposed)

    @classmethod
    def of(cls, linear: nn.Linear | Conv1D) -> "FrozenLinear":
        """Take over the weight of a linear, without a copy; a Conv1D as a transposed view."""
        turned = isinstance(linear, Conv1D)
        return cls.dense(linear.weight.t() if turned else linear.weight, linear.bias, turned)

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether `of` can take over `module`: a linear, a Conv1D, or a subclass seen to compute the same."""
        if type(module) in (nn.Linear, Conv1D):
            return True
        return isinstance(module, nn.Linear) and not isinstance(module, FrozenLinear) and _computes_linear(module)

    @staticmethod
    def shape_of(module: nn.Module) -> tuple[int, int]:
        """(out, in) of a linear, before or after it was taken over."""
        if isinstance(module, Conv1D):
            return module.nf, module.nx
        assert isinstance(module.out_features, int) and isinstance(module.in_features, int)
        return module.out_features, module.in_features

    def parts(self) -> Parts:
        """What is kept of the weight, where it can be computed with. Transient, like `weight`."""
        return {name: self.get_buffer(f"stored_{name}") for name in self.part_names}

    def fresh_parts(self) -> Parts:
        """The same, read anew from where they are at rest, past whatever `parts` may still hold: to check it."""
        return self.parts()

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[out, in] in the compute dtype. Transient: use it and let it go."""
        return self.format.decode(self.parts(), self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes at rest, bias included."""
        return sum(b.nbytes for b in self.buffers())

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] -> x W^T + b [..., out]."""
        return self.format.matmul(x, self.parts(), self.shape, self.bias)

    def matmul_t(self, dy: Tensor) -> Tensor:
        """dy [..., out] -> dy W [..., in], the gradient with respect to x."""
        return self.format.matmul_t(dy, self.parts(), self.shape, self.dtype)

    def forward(self, input: Tensor, *others: Tensor, function: Function | None = None) -> Tensor:
        """Of `function(input, *others)`, where there is one: backward makes it again instead of keeping it. It is elementwise."""
        return _Frozen.apply(self, function, input, *others)  # pyright: ignore[reportReturnType]


class _Frozen(torch.autograd.Function):
    """Saves the layer, not its weight; x is not needed at all, but where it is made of something."""

    @staticmethod
    def forward(ctx: Any, layer: FrozenLinear, function: Function | None, *inputs: Tensor) -> Tensor:
        ctx.layer, ctx.function = layer, function
        if function is None:
            return layer.matmul(inputs[0])
        ctx.save_for_backward(*inputs)
        return layer.matmul(function(*inputs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx = ctx.layer.matmul_t(grads[0])
        if ctx.function is None:
            return None, None, dx
        inputs, x = again(ctx.function, ctx.saved_tensors)
        return None, None, *through(x, inputs, dx, ctx.needs_input_grad[2:])


def _computes_linear(module: nn.Linear) -> bool:
    """Tried with a small weight in the place of its own, which may have no values."""
    own, bias = module.weight, module.bias
    weight = drawn(_TRIED, own.dtype, own.device)
    twin = twin_of(module, {own: weight} | ({} if bias is None else {bias: drawn(_TRIED[:1], bias.dtype, bias.device, seed=1)}))
    with torch.no_grad():
        x = torch.linspace(-1, 1, _TRIED[1]).to(weight)[None]
        try:
            out = twin(x)
        except RuntimeError:  # it takes its weight for something of a certain shape
            return False
        return isinstance(out, Tensor) and torch.allclose(out, F.linear(x, weight, twin.bias), rtol=1e-2, atol=1e-4)  # pyright: ignore[reportArgumentType]


def take_products(model: nn.Module, format: Int8) -> None:
    """Let linears in int8 multiply as `format` says; not before the model was tried, which rounding would disturb."""
    for layer in model.modules():
        if isinstance(layer, FrozenLinear) and isinstance(layer.format, Int8):
            fits = not isinstance(format, W8A8) or not any(side % W8A8.ALIGNED for side in layer.shape)
            layer.format = format if fits else Int8()


def thaw_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Put plain linears (and Conv1Ds) in the places of all `FrozenLinear`s, with the weights that these compute with."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FrozenLinear):
                setattr(parent, name, _plain(child, dtype))


def _plain(layer: FrozenLinear, dtype: torch.dtype) -> nn.Linear | Conv1D:
    with torch.device("meta"):
        plain = Conv1D(*layer.shape) if layer.transposed else nn.Linear(layer.in_features, layer.out_features)
    weight = layer.weight.t() if layer.transposed else layer.weight
    plain.weight = nn.Parameter(weight.to(dtype, copy=True).contiguous(), requires_grad=False)
    plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype), requires_grad=False)  # pyright: ignore[reportAttributeAccessIssue]
    return plain


def freeze_linears(model: nn.Module) -> None:
    """Replace every linear of `model` by a `FrozenLinear` that shares its storage, and stop all other gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if FrozenLinear.takes(child):
                setattr(parent, name, FrozenLinear.of(child))  # pyright: ignore[reportArgumentType]
