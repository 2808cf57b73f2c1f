"""Norms that keep less for backward, against the models' own modules and autograd in fp64."""

import pytest
import torch
from torch import Tensor, nn

from conftest import relative, tiny_base
from snugtune.model.norms import LeanNorm, lean_norms

LEAN = {"llama": False, "qwen3": False, "mistral": False, "phi3": False, "gemma2": True, "gemma3": True, "granite": False}


def _norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if "norm" in name.lower() and not list(module.children())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", LEAN)
def test_states_are_the_models_own_and_gradients_as_good(arch: str, dtype: torch.dtype) -> None:
    """Gradients of states and weight: in fp32 autograd's to rounding; in bf16 no further from fp64 than autograd's own."""
    base, plain = tiny_base(arch, dtype), tiny_base(arch, dtype)
    base.freeze()
    own = dict(_norms(plain.model))
    found = [(name, module) for name, module in _norms(base.model) if isinstance(module, LeanNorm)]
    assert {name for name, _ in found} == own.keys()
    for name, lean in found:
        assert isinstance(lean, LeanNorm) and lean.plus_one == LEAN[arch]
        width = len(lean.weight)
        x, dy = (torch.randn(1, 7, width, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (1, 2))
        ours, y = _gradients(lean, x, dy)
        theirs, expected = _gradients(own[name], x, dy)
        truth, _ = _gradients(_wide(own[name]), x.double(), dy.double())
        assert torch.equal(y, expected)
        for mine, autograds, exact in zip(ours, theirs, truth, strict=True):
            if dtype == torch.float32:
                assert relative(mine, autograds) <= 1e-6
            assert relative(mine, exact) <= 1.05 * relative(autograds, exact) + 1e-6


def _gradients(norm: nn.Module, x: Tensor, dy: Tensor) -> tuple[list[Tensor], Tensor]:
    weight = norm.get_parameter("weight").requires_grad_()
    x = x.clone().requires_grad_()
    y = norm(x)
    found = torch.autograd.grad(y, [x, weight], dy)
    weight.requires_grad_(False)
    return list(found), y.detach()


def _wide(own: nn.Module) -> nn.Module:
    """The textbook's formula in fp64, with the same numbers."""

    class Textbook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(own.get_parameter("weight").double())

        def forward(self, x: Tensor) -> Tensor:
            eps = getattr(own, "variance_epsilon", getattr(own, "eps", None))
            normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
            return normed * (1.0 + self.weight if "Gemma" in type(own).__name__ else self.weight)

    return Textbook()


def test_it_keeps_the_states_as_they_came() -> None:
    base = tiny_base("llama", torch.bfloat16)
    base.freeze()
    lean = next(module for _, module in _norms(base.model))
    kept = dict[int, int]()

    def pack(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    x = torch.randn(1, 50, len(lean.get_parameter("weight")), dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        assert lean(x).requires_grad
    del kept[lean.get_parameter("weight").untyped_storage().data_ptr()]
    assert kept.pop(x.untyped_storage().data_ptr()) == x.nbytes
    assert list(kept.values()) == [4 * 50]


class _Odd(nn.Module):
    """A norm, but another."""

    def __init__(self, power: float, eps: float) -> None:
        super().__init__()
        self.weight, self.power, self.variance_epsilon = nn.Parameter(torch.ones(8)), power, 1e-6
        self.true_eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.true_eps) ** self.power)


@pytest.mark.parametrize(("power", "eps", "taken"), [(1.0, 1e-6, True), (1.01, 1e-6, False), (1.0, 2e-6, False)])
def test_what_computes_something_else_is_left_alone(power: float, eps: float, taken: bool) -> None:
    model = nn.Sequential(_Odd(power, eps), nn.LayerNorm(8))
    lean_norms(model, torch.float32)
    assert isinstance(model[0], LeanNorm) == taken
    assert isinstance(model[1], nn.LayerNorm)


class _Wide(nn.Module):
    """A norm whose weight stays in fp32, as transformers keeps some, and which rounds once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.linspace(0.5, 1.5, 64)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


@pytest.mark.parametrize(("dtype", "taken"), [(torch.float32, True), (torch.bfloat16, False)], ids=["fp32", "bf16"])
def test_it_is_tried_on_states_as_they_come(dtype: torch.dtype, taken: bool) -> None:
    model = nn.Sequential(_Wide())
    lean_norms(model, dtype)
    assert isinstance(model[0], LeanNorm) == taken
