"""The gradient self-test: silent where all is well, and it names the linear for every fault that is planted."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import lora_gradients, nll_packed, packed, sequences, shake
from quantised import KINDS, loaded, saved
from snugtune.errors import GradientError
from snugtune.methods.lora import Lora, LoraAttached, LoraConfig
from snugtune.model.base import Base
from snugtune.model.formats import Parts
from snugtune.model.frozen import FrozenLinear
from snugtune.model.selftest import check_gradients

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("base") / "llama")


def _tuned(folder: Path, kind: str = "nf4", compute: str = "fp32", recompute: bool = False) -> tuple[Base, LoraAttached]:
    """A base with a job whose adapter is everywhere but in the second block's feed-forward layer."""
    base = loaded(folder, kind, compute)
    attached = Lora().attach(base, "j", LoraConfig(r=2, target_modules=r".*self_attn.*|.*layers\.0\.mlp.*"), 0)
    shake(attached)
    base.configure(recompute, 512)
    return base, attached


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [*KINDS, "bf16"])
def test_a_sound_base_passes(kind: str, compute: str, recompute: bool, folder: Path) -> None:
    """All linears of the blocks, with an adapter (11) and without (3), whatever holds their weights."""
    base, _ = _tuned(folder, kind, compute, recompute)
    assert check_gradients(base) == 14


@pytest.mark.parametrize("arch", ["gpt2", "mixtral", "hunyuan", "mamba", "bloom", "gemma3n", "zamba2", "modernbert"])
def test_other_architectures_pass(arch: str, tmp_path: Path) -> None:
    """Conv1D, experts that few tokens reach, a block used twice, rows that cannot be shared, a head of the model's own.

    All linears that are called take part, but for a head that snugtune takes itself.
    """
    base = loaded(saved(tmp_path / arch, arch), "nf4", "bf16")
    Lora().attach(base, "j", LoraConfig(r=2), 0)
    assert check_gradients(base) == len(base.linear_names) - len(base.read_past) - (not base.own_head)


def _bits(base: Base, attached: LoraAttached) -> list[Tensor]:
    """A loss, its gradients and a draw from the global generator."""
    base.model.train()
    attached.zero_grad()
    with base.routed(packed(sequences(9, 14), "j")):
        loss = nll_packed(base, sequences(9, 14), "j")
        loss.backward()
    return [loss.detach(), *lora_gradients(attached).values(), torch.rand(3)]


def _hooks(base: Base) -> list[int]:
    return [len(hooks) for m in base.model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]


def test_it_leaves_no_trace(folder: Path) -> None:
    """The same bits with and without, no hook, slot or gradient; in the mode the model was in."""
    seen = []
    for checked in (False, True):
        base, attached = _tuned(folder, "nf4", "bf16", recompute=True)
        torch.manual_seed(3)
        hooks = _hooks(base)
        if checked:
            check_gradients(base)
            assert attached.flat.grad is not None and not attached.flat.grad.any()
            assert all(set(site.slots) == {"j"} for site in base.sites.values())
            assert not base.model.training and all(p.grad is None for p in base.model.parameters())
            assert _hooks(base) == hooks
        seen.append(_bits(base, attached))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


# ---------------------------------------------------------------- faults


class OtherWeights(FrozenLinear):
    """Right in forward; its backward takes the rows of its weight in another order, as another layer's would be."""

    def matmul_t(self, dy: Tensor) -> Tensor:
        return dy @ self.weight.flip(0)


class UntilEvaluated(FrozenLinear):
    """Sound until a pass without gradients, like bitsandbytes' Linear4bit on CPU, which then repacks its weight."""

    turned = False

    def matmul(self, x: Tensor) -> Tensor:
        self.turned = self.turned or not self.training
        return super().matmul(x)

    def matmul_t(self, dy: Tensor) -> Tensor:
        return dy @ (self.weight.roll(1, 1) if self.turned else self.weight)


class Corrupts(FrozenLinear):
    """Sound in itself, but an evaluation writes into what it keeps of its weight."""

    def matmul(self, x: Tensor) -> Tensor:
        if not self.training:
            self.stored_packed[0] ^= 17  # pyright: ignore[reportIndexIssue]
        return super().matmul(x)


class OneBuffer(FrozenLinear):
    """Reads its weight from disk into a buffer that is not filled again for backward: another layer's is there."""

    buffer: Parts | None = None

    def matmul(self, x: Tensor) -> Tensor:
        y = super().matmul(x)
        self.buffer = {name: part.flip(0) for name, part in super().parts().items()}
        return y

    def parts(self) -> Parts:
        return self.buffer or super().parts()

    def fresh_parts(self) -> Parts:
        return super().parts()


class WrongScale(FrozenLinear):
    """One block's scale is a tenth too large where it is computed with."""

    def parts(self) -> Parts:
        parts = dict(super().parts())
        parts["absmax"] = parts["absmax"].clone()
        parts["absmax"][5] *= 1.1
        return parts

    def fresh_parts(self) -> Parts:
        return super().parts()


def _plant(base: Base, name: str, fault: type[FrozenLinear]) -> None:
    old = base.sites[name].frozen if name in base.sites else base.model.get_submodule(name)
    assert isinstance(old, FrozenLinear)
    planted = fault(old.format, old.parts(), old.shape, old.bias, old.dtype, old.transposed)
    if name in base.sites:
        base.sites[name].frozen = planted
    else:
        parent, _, leaf = name.rpartition(".")
        setattr(base.model.get_submodule(parent), leaf, planted)


FAULTS: dict[type[FrozenLinear], str] = {
    OtherWeights: r": its gradient of the input differs by [1-9][0-9.]+%",
    UntilEvaluated: r" after an evaluation: its gradient of the input differs",
    Corrupts: r" after an evaluation: the weight it keeps has changed",
    OneBuffer: r": its gradient of the input differs",
    WrongScale: r": its output differs by",
}


@pytest.mark.parametrize("name", [UP, "model.layers.0.self_attn.v_proj"], ids=["bare", "adapted"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_found_and_named(fault: type[FrozenLinear], compute: str, name: str, folder: Path) -> None:
    base, _ = _tuned(folder, "nf4", compute, recompute=True)
    _plant(base, name, fault)
    with pytest.raises(GradientError, match="self-test: " + name + FAULTS[fault]) as error:
        check_gradients(base)
    assert error.value.exit_code == 2 and "nothing was trained" in str(error.value) and "\n" not in str(error.value)
    assert all("j" in site.slots and len(site.slots) == 1 for site in base.sites.values())


def _loses_b(gradient: Tensor) -> Tensor:
    return gradient * 0.5


@pytest.mark.parametrize("spoil", [_loses_b], ids=["half"])
def test_wrong_gradients_of_factors_are_found(
    spoil: Callable[[Tensor], Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's own part of the backward is held too."""
    from snugtune.model import selftest

    base, _ = _tuned(folder)
    make = selftest._random_slot

    def spoilt(*args: object) -> object:
        slot = make(*args)  # pyright: ignore[reportArgumentType]
        slot.b.register_hook(spoil)
        return slot

    monkeypatch.setattr(selftest, "_random_slot", spoilt)
    with pytest.raises(GradientError, match=r"its gradient of the adapter's B differs by 50(\.0)?%"):
        check_gradients(base)
