"""Gated feed-forward layers keep less for backward, and compute what the model's own do, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from conftest import nll_packed, packed, sequences, shake, tiny_base
from snugtune.methods.lora import Lora, LoraAttached, LoraConfig
from snugtune.model import base as base_module
from snugtune.model.base import Base
from snugtune.model.frozen import FrozenLinear, freeze_linears
from snugtune.model.gated import GatedMLP, lean_mlps

LEAN = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "cohere", "granite"]
OTHER = ["gpt2", "neox", "phi3", "opt"]
MLP_ONLY, ATTENTION_ONLY = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "v_proj")


def _lean(model: nn.Module) -> list[GatedMLP]:
    return [module for module in model.modules() if isinstance(module, GatedMLP)]


def _trained(base: Base, targets: tuple[str, ...], dropout: float = 0.0) -> tuple[LoraAttached, dict[str, Tensor]]:
    """An adapter, and the gradients of a packed row."""
    attached = Lora().attach(base, "j", LoraConfig(r=3, target_modules=targets, lora_dropout=dropout), seed=0)
    shake(attached)
    base.model.train()
    rows = sequences(17, 5, 11)
    with base.routed(packed(rows, "j", seed=3)):
        nll_packed(base, rows, "j").backward()
    return attached, {name: factor.grad for name, factor in _factors(attached)}


def _factors(attached: LoraAttached) -> Iterator[tuple[str, Tensor]]:
    return ((f"{site}.{n}", f) for n, site in enumerate(attached.sites) for f in (attached.matrices()[2 * n : 2 * n + 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("targets", [MLP_ONLY, ATTENTION_ONLY], ids=["on it", "below it"])
@pytest.mark.parametrize("arch", LEAN)
def test_gradients_are_those_of_the_models_own_module(
    arch: str, targets: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bits, with adapters (and their dropout) on its linears, and with none of them."""
    base = tiny_base(arch, dtype)
    _, ours = _trained(base, targets, dropout=0.3)
    monkeypatch.setattr(base_module, "lean_mlps", lambda *_: None)
    plain = tiny_base(arch, dtype)
    _, theirs = _trained(plain, targets, dropout=0.3)
    assert _lean(base.model) and not _lean(plain.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].any() for name in ours)


@pytest.mark.parametrize("targets", [MLP_ONLY, ATTENTION_ONLY], ids=["on it", "below it"])
def test_an_activation_that_gives_back_what_it_is_given(targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """`up` must not be multiplied into what is kept for backward."""
    base = tiny_base("llama", hidden_act="linear")
    _, ours = _trained(base, targets)
    monkeypatch.setattr(base_module, "lean_mlps", lambda *_: None)
    _, theirs = _trained(tiny_base("llama", hidden_act="linear"), targets)
    assert _lean(base.model)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].any() for name in ours)


@contextmanager
def _kept() -> Iterator[dict[int, int]]:
    """Bytes of each storage that is kept for backward."""
    found = dict[int, int]()

    def pack(saved: Tensor) -> Tensor:
        found[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        yield found


def test_it_keeps_its_input_gate_and_up_alone() -> None:
    base = tiny_base("llama")
    Lora().attach(base, "j", LoraConfig(r=3), seed=0)
    mlp = _lean(base.model)[0]
    x = torch.randn(1, 32, mlp.get_submodule("gate_proj").in_features, requires_grad=True)  # pyright: ignore
    with base.routed(packed(sequences(32), "j")), _kept() as kept:
        y = mlp(x)
    inner = mlp.get_submodule("gate_proj").out_features
    factors = {slot.a.untyped_storage().data_ptr() for site in base.sites.values() for slot in site.slots.values()}
    tensors = {at: count for at, count in kept.items() if at not in factors}
    assert y.requires_grad
    assert sorted(tensors.values()) == sorted([x.nbytes, 4 * 32 * inner, 4 * 32 * inner])  # pyright: ignore


@pytest.mark.parametrize("arch", OTHER)
def test_other_feed_forward_layers_stay_as_they_are(arch: str) -> None:
    base = tiny_base(arch)
    base.freeze()
    assert not _lean(base.model)


class _Odd(nn.Module):
    """Has the children of a gated layer, but may compute something else."""

    def __init__(self, scale: float = 1.0, limit: float = float("inf")) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn, self.scale, self.limit = nn.SiLU(), scale, limit

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x) * self.scale, self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ([{}], [True]),
        ([{"scale": 1.001}], [False]),
        ([{"limit": 16.0}], [False]),  # as Step 3 and DeepSeek V4 clamp
        ([{}, {"limit": 10.0}, {}, {"scale": 2.0}], [True, False, True, False]),  # each layer by its own settings
    ],
)
def test_what_computes_something_else_is_left_alone(settings: list[dict[str, float]], taken: list[bool]) -> None:
    model = nn.Sequential(*(_Odd(**how) for how in settings))
    freeze_linears(model)
    lean_mlps(model, torch.device("cpu"))
    assert [isinstance(layer, GatedMLP) for layer in model] == taken


def test_a_module_with_weights_of_its_own_is_left_alone() -> None:
    model = nn.Sequential(_Odd())
    model[0].bias = nn.Parameter(torch.zeros(8), requires_grad=False)
    freeze_linears(model)
    lean_mlps(model, torch.device("cpu"))
    assert not _lean(model)


def test_names_and_weights_stay_where_they_were() -> None:
    base = tiny_base("llama")
    before = set(base.linear_names)
    base.freeze()
    assert before == {name for name, module in base.model.named_modules() if isinstance(module, FrozenLinear)}
