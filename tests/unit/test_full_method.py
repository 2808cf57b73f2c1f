"""Full fine-tuning: plain autograd's gradients, fp32 master weights, a transformers folder. Truth: an untouched model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import nll_alone, nll_packed, packed, relative, sequences, tiny_base, tiny_model
from snugtune.methods.full import Full, FullAttached, FullConfig
from snugtune.model.base import Base

ARCHS = ["llama", "gpt2", "gemma2", "phi", "qwen3moe"]  # untied, tied Conv1D, tied with softcap, biases, experts


def _attached(base: Base) -> FullAttached:
    return Full().attach(base, "j", FullConfig(), 0)


def _gradients(attached: FullAttached) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in zip(attached.state(), attached.parameters(), strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        gradients[name] = parameter.grad
    return gradients


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("arch", ARCHS)
def test_fp32_gradients_are_plain_autograds(arch: str, recompute: bool) -> None:
    """Of every weight, from a packed row with a chunked head; twice, since gradients add up over a step's chunks."""
    base, native, rows = tiny_base(arch), tiny_model(arch), [sequences(9, 1, 14), sequences(5, 6, seed=1)]
    attached = _attached(base)
    base.configure(recompute=recompute, head_rows=4)
    base.model.train()
    for row in rows:
        with base.routed(packed(row, "j")):
            nll_packed(base, row, "j").backward()
    nll_alone(native, [part for row in rows for part in row]).backward()
    ours, truth = _gradients(attached), {n: p.grad for n, p in native.named_parameters()}
    assert ours.keys() == truth.keys()
    for name, gradient in ours.items():
        expected = truth[name]
        assert expected is not None and relative(gradient, expected) <= 2e-5, name


@pytest.mark.parametrize("arch", ARCHS)
def test_fp32_steps_are_plain_adamws(arch: str) -> None:
    """Three steps over the attached parameters against three over an untouched model's."""
    base, native, parts = tiny_base(arch), tiny_model(arch), sequences(9, 14)
    attached = _attached(base)
    base.model.train()
    # a large eps: with the usual one, the sign of a rounding error would decide where a gradient is nearly zero
    settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-2}
    optimizers = [
        torch.optim.AdamW(attached.parameters(), fused=True, **settings),
        torch.optim.AdamW(native.parameters(), **settings),
    ]
    for _ in range(3):
        attached.zero_grad()
        nll_packed(base, parts).backward()
        optimizers[0].step()
        attached.publish()
        optimizers[1].zero_grad()
        nll_alone(native, parts).backward()
        optimizers[1].step()
    start = tiny_model(arch)
    for (name, weight), truth, before in zip(base.model.named_parameters(), native.parameters(), start.parameters(), strict=True):
        assert relative(weight, truth) <= 1e-5, name
        assert not torch.equal(truth, before), name


def test_fp32_needs_no_second_copy() -> None:
    """The masters are the weights themselves."""
    base = tiny_base()
    attached = _attached(base)
    weights = {p.data_ptr() for p in base.model.parameters()}
    assert {p.data_ptr() for p in attached.parameters()} == weights


# ---------------------------------------------------------------- bf16


@pytest.mark.parametrize("arch", ARCHS)
def test_bf16_has_fp32_masters_equal_to_the_weights(arch: str) -> None:
    base = tiny_base(arch, torch.bfloat16)
    attached = _attached(base)
    state = attached.state()
    assert list(state) == [n for n, _ in base.model.named_parameters()]
    for (name, weight), parameter in zip(base.model.named_parameters(), attached.parameters(), strict=True):
        assert weight.dtype == torch.bfloat16 and state[name].dtype == parameter.dtype == torch.float32
        assert torch.equal(state[name], weight.float())


def test_updates_too_small_for_bf16_accumulate() -> None:
    """A weight near 0.125 has neighbours 2^-10 away; a step of 1e-4 alone rounds back, ten of them do not."""
    base = tiny_base(dtype=torch.bfloat16)
    attached = _attached(base)
    weight = base.model.get_submodule("model.layers.0.self_attn.q_proj").weight
    master = attached.masters["model.layers.0.self_attn.q_proj.weight"]
    with torch.no_grad():
        master.fill_(0.125)
    attached.publish()
    assert isinstance(weight, Tensor)
    for step in range(1, 11):
        with torch.no_grad():
            master.add_(1e-4)
        attached.publish()
        assert torch.equal(weight, torch.full_like(weight, 0.125 + 1e-4 * step))
        if step == 1:
            assert (weight == 0.125).all()  # plain bf16 training would stay here for ever
    assert (weight.float() > 0.1255).all()


def test_training_in_bf16_moves_what_bf16_alone_would_not() -> None:
    """Through a real optimizer: with steps of 1e-5 most bf16 weights cannot move, their masters do, by that much each."""
    base, parts = tiny_base(dtype=torch.bfloat16), sequences(9, 14)
    attached = _attached(base)
    start = {name: tensor.clone() for name, tensor in attached.state().items()}
    optimizer = torch.optim.AdamW(attached.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    for _ in range(4):
        attached.zero_grad()
        nll_packed(base, parts).backward()
        optimizer.step()
        attached.publish()
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (attached.state()[name] - start[name]).abs()
    assert float(moved.median()) > 1e-5  # several steps' worth, in fp32
    weight = dict(base.model.named_parameters())[name]
    assert float((weight.float() == start[name]).float().mean()) > 0.5  # while bf16 mostly cannot show it
    assert torch.equal(weight, attached.state()[name].bfloat16())


@pytest.mark.parametrize("head_rows", [4, 512])
@pytest.mark.parametrize("arch", ARCHS)
def test_bf16_gradients_are_no_worse_than_plain_bf16s(arch: str, head_rows: int) -> None:
    """Over all weights: error against fp32 on the same weights, next to that of an untouched bf16 model with full logits."""
    parts = sequences(20, 20, 20)
    base, plain, exact = tiny_base(arch, torch.bfloat16), tiny_model(arch, torch.bfloat16), tiny_model(arch)
    exact.load_state_dict(plain.state_dict())
    attached = _attached(base)
    base.configure(recompute=False, head_rows=head_rows)
    for part in parts:  # a step of several chunks
        nll_packed(base, [part]).backward()
        nll_alone(plain, [part]).backward()
        nll_alone(exact, [part]).backward()
    truth = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    theirs = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    ours = torch.cat([g.flatten() for g in _gradients(attached).values()])
    assert relative(ours, truth) <= 1.1 * relative(theirs, truth)


def test_bf16_gradients_leave_the_weights_at_once() -> None:
    """No second set of gradients stays on the base; they add up in fp32 on the masters."""
    base = tiny_base(dtype=torch.bfloat16)
    attached = _attached(base)
    rows = [sequences(9), sequences(14, seed=1)]
    single = []
    for row in rows:
        attached.zero_grad()
        nll_packed(base, row).backward()
        assert all(p.grad is None for p in base.model.parameters())
        single.append({n: g.clone() for n, g in _gradients(attached).items()})
    attached.zero_grad()
    for row in rows:
        nll_packed(base, row).backward()
    for name, gradient in _gradients(attached).items():
        assert torch.equal(gradient, single[0][name] + single[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zero_grad_keeps_the_buffers(dtype: torch.dtype) -> None:
    base = tiny_base(dtype=dtype)
    attached = _attached(base)
    nll_packed(base, sequences(9)).backward()
    before = {name: g.data_ptr() for name, g in _gradients(attached).items()}
    attached.zero_grad()
    assert all(not g.any() for g in _gradients(attached).values())
    assert {name: g.data_ptr() for name, g in _gradients(attached).items()} == before


# ---------------------------------------------------------------- state, files, the way out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_state_comes_back_exactly(dtype: torch.dtype) -> None:
    """Into a fresh base: masters with all their digits, and the weights that belong to them."""
    base, fresh, (part,) = tiny_base(dtype=dtype), tiny_base(dtype=dtype), sequences(12)
    attached, other = _attached(base), _attached(fresh)
    with torch.no_grad():
        for index, parameter in enumerate(attached.parameters()):
            parameter.add_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape), alpha=1e-3 * (index + 1))
    attached.publish()
    other.load_state({name: tensor.clone() for name, tensor in attached.state().items()})
    assert all(torch.equal(a, b) for a, b in zip(attached.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(fresh.hidden(packed([part])), base.hidden(packed([part])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_saved_model_loads_through_transformers(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Same logits with transformers' own attention, same dtype, its tokenizer beside it, no trace of ours in the config."""
    base, (part,) = tiny_base(arch, dtype), sequences(12)
    attached = _attached(base)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(0.01)
    attached.publish()
    attached.save(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    assert "snugtune" not in (tmp_path / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert model.dtype == dtype
    native = tiny_model(arch, dtype)
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.copy_(parameter.float() + 0.01)
        truth = native(input_ids=part[None]).logits
        assert torch.equal(model(input_ids=part[None]).logits, truth)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nHello<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == base.tokenizer.chat_template
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == base.vocab_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_detaching_stops_all_gradients(dtype: torch.dtype) -> None:
    """The base keeps what it learned, but nothing of it trains or collects any more."""
    base, (part,) = tiny_base(dtype=dtype), sequences(12)
    attached = _attached(base)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(0.01)
    attached.publish()
    nll_packed(base, [part]).backward()
    learned = base.hidden(packed([part])).detach()
    attached.detach()
    assert all(not p.requires_grad and p.grad is None for p in base.model.parameters())
    hidden = base.hidden(packed([part]))
    assert not hidden.requires_grad and torch.equal(hidden, learned)


def test_a_base_can_be_attached_to_again() -> None:
    """After `detach` a second job trains alone: the first one's hooks are gone."""
    base, parts = tiny_base(dtype=torch.bfloat16), sequences(9)
    first = _attached(base)
    first.detach()
    second = _attached(base)
    nll_packed(base, parts).backward()
    assert all(g.any() for n, g in _gradients(second).items() if "layers" in n)
    assert all(p.grad is None for p in first.parameters())
