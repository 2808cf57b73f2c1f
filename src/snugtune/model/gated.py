"""Gated feed-forward layers, down(act(gate(x)) * up(x)), without keeping what comes between their linears.

As the models write it, backward keeps the activation, its product with `up` and, for the adapter on `down`, that product once
more: four tensors of the inner width. Here it keeps `gate` and `up`, and makes the rest again (Shazeer 2020, arXiv 2002.05202,
has the layer; what it costs to make it again is a few passes over memory).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from snugtune.model.frozen import FrozenLinear
from snugtune.model.liger import Product, agrees
from snugtune.model.trial import drawn, kind_of, twin_of

_LINEARS = ("gate_proj", "up_proj", "down_proj")
_ROWS = 32
_WIDTH, _INNER = 64, 96


class GatedMLP(nn.Module):
    """In the place of a model's own module, with its children under their names.

    `kernel`: what computes the product instead of torch's operators; see `take_kernels`.
    """

    def __init__(self, own: nn.Module, activation: str):
        super().__init__()
        for name in (*_LINEARS, activation):
            self.add_module(name, own.get_submodule(name))
        self.activation = activation
        self.kernel: Product | None = None

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in _LINEARS)
        return down(gate(x), up(x), function=self._product)

    def _product(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(gate, up)
        active = getattr(self, self.activation)(gate)
        given_back = active.untyped_storage()._cdata == gate.untyped_storage()._cdata  # some activations do so
        in_place = not (torch.is_grad_enabled() or given_back)
        return active.mul_(up) if in_place else active * up


def lean_mlps(model: nn.Module, device: torch.device) -> None:
    """Put a `GatedMLP` in the place of every module of `model` that is seen to compute the same. Its linears are frozen."""
    seen = dict[object, bool]()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (activation := _activation_of(child)) is None:
                continue
            lean = GatedMLP(child, activation)
            kind = (kind_of(child), kind_of(child.get_submodule(activation)))
            if kind not in seen:
                seen[kind] = _same(child, activation, device)
            if seen[kind]:
                setattr(parent, name, lean)


def _activation_of(module: nn.Module) -> str | None:
    """The name of its activation, where a module consists of the three frozen linears and one function; else None."""
    children = dict(module.named_children())
    functions = [name for name in children if name not in _LINEARS]
    linears = [children.get(name) for name in _LINEARS]
    if len(functions) != 1 or not all(isinstance(linear, FrozenLinear) for linear in linears):
        return None
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False), *children[functions[0]].parameters())
    return functions[0] if not own and isinstance(module.get_submodule(functions[0]), nn.Module) else None


@torch.no_grad()
def _same(own: nn.Module, activation: str, device: torch.device) -> bool:
    """Tried with small linears in the place of its own, which may have no values; on states of very different sizes, as some

    models clamp what is large.
    """
    shapes = dict(zip(_LINEARS, ((_INNER, _WIDTH), (_INNER, _WIDTH), (_WIDTH, _INNER)), strict=True))
    gate = own.get_submodule(_LINEARS[0])
    assert isinstance(gate, FrozenLinear)
    twin = twin_of(own, {own.get_submodule(n): FrozenLinear.dense(drawn(s, gate.dtype, device)) for n, s in shapes.items()})
    x = torch.randn(1, _ROWS, _WIDTH, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 4, _ROWS)[:, None]
    x = x.to(twin.get_submodule(_LINEARS[0]).get_buffer("stored_dense"))
    theirs, ours = (module(x) for module in (twin, GatedMLP(twin, activation)))
    return theirs.dtype == ours.dtype and bool(((theirs == ours) | (theirs.isnan() & ours.isnan())).all())


def take_kernels(model: nn.Module, kernels: Mapping[str, Product], dtype: torch.dtype, device: torch.device) -> bool:
    """Let `kernels`, by the names of the classes of activations, compute the products of every `GatedMLP` of `model`.

    If they are there and agree with all of them, else none. Whether they do.
    """
    lean = [module for module in model.modules() if isinstance(module, GatedMLP)]
    kinds = {(kind_of(mlp.get_submodule(mlp.activation)), _width(mlp)): mlp for mlp in lean}
    if not all(_agrees(mlp, kernels.get(_name(mlp)), dtype, device) for mlp in kinds.values()):
        return False
    for mlp in lean:
        mlp.kernel = kernels[_name(mlp)]
    return bool(lean)


def _name(mlp: GatedMLP) -> str:
    return type(mlp.get_submodule(mlp.activation)).__name__


def _width(mlp: GatedMLP) -> int:
    gate = mlp.get_submodule(_LINEARS[0])
    assert isinstance(gate, FrozenLinear)
    return gate.out_features


def _agrees(mlp: GatedMLP, kernel: Product | None, dtype: torch.dtype, device: torch.device) -> bool:
    if kernel is None:
        return False
    generator, sizes = torch.Generator().manual_seed(0), torch.logspace(-2, 1, _ROWS)[:, None]
    gate, up = (torch.randn(_ROWS, _width(mlp), generator=generator) * sizes for _ in range(2))
    return agrees(kernel, mlp._product, [gate.to(device, dtype), up.to(device, dtype)])
