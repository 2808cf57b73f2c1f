"""What linears are given by a norm: made again in backward instead of kept, with the bits it had."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from conftest import nll_packed, packed, sequences, shake, tiny_base
from snugtune.methods.lora import Lora, LoraConfig
from snugtune.model import norms, routed
from snugtune.model.base import Base
from snugtune.model.norms import LeanNorm
from snugtune.model.remade import Origin, Remade, another, made_of, origin_of

LENGTHS = (9, 14)


def _adapted(arch: str, dtype: torch.dtype) -> Base:
    base = tiny_base(arch, dtype)
    attached = Lora().attach(base, "j", LoraConfig(r=3), 0)
    shake(attached)
    return base


def _trained(base: Base) -> tuple[list[Tensor], int]:
    """Gradients of a step, and the bytes that its forward kept for backward, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*base.model.parameters(), *base.model.buffers())}
    kept = dict[int, int]()
    alive = list[Tensor]()  # or an address could come twice

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(saved.detach())
        return saved

    factors = [f for site in base.sites.values() for f in (site.slots["j"].a, site.slots["j"].b)]
    for factor in factors:
        factor.grad = None
    base.model.train()
    parts = sequences(*LENGTHS)
    with base.routed(packed(parts, "j")):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = nll_packed(base, parts, "j")
        loss.backward()
    return [f.grad.clone() for f in factors if f.grad is not None], sum(kept.values())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Remade]]:
    """Every `Remade` of the test."""
    found = list[Remade]()

    class Counted(Remade):
        def __init__(self, function: object):
            self.times = 0
            super().__init__(lambda *kept: self._again(function, *kept))
            found.append(self)

        def _again(self, function: object, *kept: Tensor) -> Tensor:
            self.times += 1
            assert callable(function)
            return function(*kept)

    monkeypatch.setattr(norms, "Remade", Counted)
    yield found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "phi3"])
def test_it_is_not_kept_and_gradients_have_the_same_bits(arch: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, kept = _trained(_adapted(arch, dtype))
    monkeypatch.setattr(routed, "origin_of", lambda tensor: None)
    base = _adapted(arch, dtype)
    theirs, before = _trained(base)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and len(ours) > 0
    given = 2 * base.model.config.num_hidden_layers  # by the norms before attention and before the feed-forward layer
    tensor = sum(LENGTHS) * base.model.config.hidden_size * dtype.itemsize
    embedded = tensor + sum(LENGTHS) * 4  # the first norm's states and scales: they have no gradient, nobody else keeps them
    assert before - kept == given * tensor - embedded


def test_it_is_made_once_for_all_and_let_go(counted: list[Remade]) -> None:
    """Queries, keys and values share one; nothing stays when the norm's own backward is through."""
    base = _adapted("llama", torch.float32)
    _trained(base)
    lean = sum(isinstance(module, LeanNorm) for module in base.model.modules())
    used = [remade for remade in counted[-lean:] if getattr(remade, "times", 0)]
    assert len(used) == 2 * base.model.config.num_hidden_layers
    assert all(getattr(remade, "times", 0) == 1 for remade in used)
    assert all(remade._tensor is None for remade in used[1:])  # the first norm has no backward: its goes with the graph


def test_with_recompute_too(counted: list[Remade], monkeypatch: pytest.MonkeyPatch) -> None:
    base = _adapted("llama", torch.float32)
    base.configure(recompute=True, head_rows=256)
    ours, _ = _trained(base)
    used = [remade for remade in counted if getattr(remade, "times", 0)]
    assert len(used) == 2 * base.model.config.num_hidden_layers
    assert all(getattr(remade, "times", 0) == 1 for remade in used)
    monkeypatch.setattr(routed, "origin_of", lambda tensor: None)
    theirs, _ = _trained(_adapted("llama", torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_it_is_made_of_is_let_go_in_backward() -> None:
    """Even where who asked for the backward still has the tensor, as the trainer has the last norm's."""
    base = _adapted("llama", torch.float32)
    states, held = list[Tensor](), list[object]()
    final = next(m for name, m in base.model.named_modules() if name.endswith("model.norm") or name == "norm")
    final.register_forward_hook(lambda module, given, y: states.append(given[0]))
    parts = sequences(*LENGTHS)
    with base.routed(packed(parts, "j")):
        hidden = base.hidden(packed(parts, "j"))
        before = StorageWeakRef(states.pop().untyped_storage())
        first = next(m for m in base.sites.values())
        first.slots["j"].a.register_hook(lambda gradient: held.append(before.expired()))  # the last to have its gradient
        hidden.sum().backward()
    assert held == [True] and hidden is not None


def test_one_can_go_back_twice() -> None:
    base = _adapted("llama", torch.float32)
    parts, factor = sequences(*LENGTHS), next(iter(base.sites.values())).slots["j"].a
    with base.routed(packed(parts, "j")):
        hidden = base.hidden(packed(parts, "j")).sum()
        first, second = (torch.autograd.grad(hidden, factor, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()


def test_it_can_be_asked_in_inference_mode() -> None:
    with torch.inference_mode():
        assert origin_of(torch.ones(2)) is None


def test_it_holds_for_the_tensor_as_it_is_alone() -> None:
    origin = Origin(Remade(torch.neg), (torch.ones(3),))
    y = made_of(-torch.ones(3), origin)
    assert origin_of(y) is origin_of(another(y)) is origin
    assert origin_of(y[:2]) is origin_of(y.clone()) is origin_of(torch.ones(3)) is None
    y[0] = 5.0
    assert origin_of(y) is None
