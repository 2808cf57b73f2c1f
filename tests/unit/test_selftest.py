"""The gradient self-test: silent where all is well, and it names the linear for every fault that is planted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import lora_gradients, nll_packed, packed, sequences, shake
from quantised import KINDS, loaded, saved
from snugtune.errors import GradientError
from snugtune.methods.lora import Lora, LoraAttached, LoraConfig
from snugtune.model import reference, selftest
from snugtune.model.base import Base
from snugtune.model.formats import Parts
from snugtune.model.frozen import FrozenLinear
from snugtune.model.head import Logits
from snugtune.model.selftest import check_gradients
from snugtune.model.stream import FileSource, StreamedLinear

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
    assert check_gradients(base) == (14, 14)


@pytest.mark.parametrize("arch", ["gpt2", "mixtral", "hunyuan", "mamba", "bloom", "gemma3n", "zamba2", "modernbert"])
def test_other_architectures_pass(arch: str, tmp_path: Path) -> None:
    """Conv1D, experts that few tokens reach, a block used twice, rows that cannot be shared, a head of the model's own.

    All linears that are called take part, but for a head that snugtune takes itself.
    """
    base = loaded(saved(tmp_path / arch, arch), "nf4", "bf16")
    Lora().attach(base, "j", LoraConfig(r=2), 0)
    called = len(base.linear_names) - len(base.read_past) - (not base.own_head)
    assert check_gradients(base) == (called, called)


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


class _Widest(TorchDispatchMode):
    """Notes how many numbers the largest tensor in fp32 or wider had that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype in (torch.float32, torch.float64):
            self.numel = max(self.numel, out.numel())
        return out


def test_no_weight_is_decoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 a linear of a large model would take more than a training step does; the head still more."""
    monkeypatch.setattr(reference, "PIECE", 4096)
    base = loaded(saved(tmp_path / "wide", intermediate_size=512), "nf4", "bf16")
    weights = min(base.model.get_submodule(n).weight.numel() for n in (UP, "lm_head"))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    Lora().attach(base, "j", LoraConfig(r=2, target_modules=(UP,)), 0)
    with _Widest() as widest:
        check_gradients(base)
    assert 4096 <= widest.numel < weights


# ---------------------------------------------------------------- large models


@pytest.fixture
def deep(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of 5 blocks, which is taken for a large one."""
    monkeypatch.setattr(selftest, "WHOLE", 0)
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    return saved(tmp_path_factory.getbasetemp() / "deep" / "llama", num_hidden_layers=5)


def _deep(deep: Path, offload: str) -> Base:
    base = loaded(deep, "nf4", "bf16", offload=offload)
    Lora().attach(base, "j", LoraConfig(r=2), 0)
    base.configure(True, 512)
    return base


@pytest.mark.parametrize("offload", ["none", "weights"])
def test_three_of_each_kind_stand_for_a_large_model(offload: str, deep: Path) -> None:
    checked = check_gradients(_deep(deep, offload))
    assert checked == (3 * 7, 5 * 7)
    assert "gradients of 21 of 35 linears and of the head agree" in str(checked)


@pytest.mark.parametrize("block", [0, 2, 4])
def test_a_fault_in_one_of_the_three_is_found(block: int, deep: Path) -> None:
    base, name = _deep(deep, "none"), f"model.layers.{block}.mlp.down_proj"
    layer = base.sites[name].frozen
    layer.matmul_t = lambda dy: dy @ layer.weight.roll(1, 0)
    with pytest.raises(GradientError, match=f"self-test: {name}: its gradient of the input differs"):
        check_gradients(base)


def test_a_fault_of_a_class_of_its_own_is_found_anywhere(deep: Path) -> None:
    base, name = _deep(deep, "none"), "model.layers.3.mlp.up_proj"
    _plant(base, name, OtherWeights)
    with pytest.raises(GradientError, match=f"self-test: {name}: its gradient of the input differs"):
        check_gradients(base)


def test_another_weight_in_backward_is_found_anywhere(deep: Path) -> None:
    """The disk gives other bytes when a block that is not compared is read again for its backward."""
    base = _deep(deep, "weights")
    stream = next(m for m in base.model.modules() if isinstance(m, StreamedLinear)).stream
    source, reads = stream.source, 0
    assert isinstance(source, FileSource)
    first, length = source.index.runs[1][0]

    def read(view: memoryview, offset: int) -> int:
        nonlocal reads
        count = plain(view, offset)
        if offset == first and len(view) == length:
            reads += 1
            view[0] ^= 17 if reads == 2 else 0
        return count

    plain, source.read = source.read, read
    stream.slots.clear()
    with pytest.raises(GradientError, match=r"self-test: model\.layers\.1\.\S+: the weight that it computes with is not"):
        check_gradients(base)
    assert reads == 2


def test_a_weight_that_an_evaluation_changes_is_found_anywhere(deep: Path) -> None:
    base, name = _deep(deep, "none"), "model.layers.1.mlp.up_proj"
    layer = base.sites[name].frozen

    def corrupt(module: object, inputs: object) -> None:
        if not layer.training:
            layer.parts()["packed"][0] ^= 17

    base.sites[name].register_forward_pre_hook(corrupt)
    with pytest.raises(GradientError, match=f"self-test: {name} after an evaluation: the weight that it computes with is not"):
        check_gradients(base)


# ---------------------------------------------------------------- the head


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
def test_a_wrong_head_is_found(adapted: bool, folder: Path) -> None:
    base, _ = _tuned(folder, "nf4", "bf16")
    if adapted:
        Lora().attach(base, "k", LoraConfig(r=2, target_modules=("lm_head",)), 0)
        assert check_gradients(base) == (15, 15)
    layer = base.sites["lm_head"].frozen if adapted else base.head.project
    assert isinstance(layer, FrozenLinear)
    layer.matmul_t = lambda dy: dy @ layer.weight.roll(1, 0)
    with pytest.raises(GradientError, match=r"self-test: lm_head: its gradient of the (hidden states|input) differs"):
        check_gradients(base)
    del layer.matmul_t
    layer.matmul = lambda x: FrozenLinear.matmul(layer, x) * 1.2
    with pytest.raises(GradientError, match=r"self-test: lm_head: its (loss|output) differs"):
        check_gradients(base)


class _Uncapped(Logits):
    """Its gradient forgets the cap."""

    def derivative(self, dz: Tensor, z: Tensor) -> Tensor:
        return dz


def test_a_wrong_derivative_of_logits_is_found(tmp_path: Path) -> None:
    base = loaded(saved(tmp_path / "gemma2", "gemma2"), "nf4", "bf16")
    Lora().attach(base, "j", LoraConfig(r=2), 0)
    base.head.shape = _Uncapped(base.head.shape.scale, base.head.shape.softcap)
    with pytest.raises(GradientError, match="self-test: lm_head: its gradient of the hidden states differs"):
        check_gradients(base)


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
    OneBuffer: r": its output in recompute differs",
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
    base, _ = _tuned(folder)
    make = selftest._random_slot

    def spoilt(*args: object) -> object:
        slot = make(*args)  # pyright: ignore[reportArgumentType]
        slot.b.register_hook(spoil)
        return slot

    monkeypatch.setattr(selftest, "_random_slot", spoilt)
    with pytest.raises(GradientError, match=r"its gradient of the adapter's B differs by 50(\.0)?%"):
        check_gradients(base)
