"""Which models may share a row: decided by rule, proved at load, and trained right either way. The truth is PEFT."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, PreTrainedModel

from conftest import (
    ARCHS,
    VOCAB,
    lora_gradients,
    nll_alone,
    nll_packed,
    packed,
    peft_twin,
    relative,
    sequences,
    shake,
    tiny_base,
    tiny_model,
    tiny_tokenizer,
)
from snugtune.errors import InputError
from snugtune.methods.lora import Lora, LoraConfig
from snugtune.model.attention import NAME
from snugtune.model.base import Base

UNPACKABLE = {
    "bloom": "attention is not replaceable",
    "mpt": "attention is not replaceable",
    "stablelm": "attention is not replaceable",
    "nemotron": "does not pass the sequence borders on",
    "falcon": "attention is not replaceable",
    "gpt_neo": "attention is not replaceable",
    "mamba2": "state along the row",
    "recurrent_gemma": "state along the row",
    "falcon_h1": "state along the row",
    "qwen3next": "state along the row",
    "lfm2": "conv layers",
    "mamba": "state along the row",
    "falcon_alibi": "ALiBi",
    "jamba": "state along the row",
    "gptj": "attention is not replaceable",
    "zamba2": "state along the row",
    "dynamic": "dynamic RoPE",
    "longrope": "longrope RoPE",
    "llama4": "chunked_attention",
}
OWN_HEAD = {"modernbert"}
MOE = {"gptoss", "mixtral", "qwen3moe", "qwen2moe", "hunyuan", "phimoe", "afmoe", "deepseek_v3"}
PACKABLE = [arch for arch in ARCHS if arch not in UNPACKABLE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", PACKABLE)
def test_packable_models_are_found_packable(arch: str, dtype: torch.dtype) -> None:
    """Silently, with their own plain head, and known as a mixture of experts where they are one.

    A false alarm would cost the user several times the speed.
    """
    base = tiny_base(arch, dtype)
    assert base.moe is (arch in MOE)
    assert base.packable and base.own_head is (arch in OWN_HEAD)
    assert base.own_head or base.notes == () or arch == "phimoe"


@pytest.mark.parametrize(
    ("arch", "window"),
    [
        ("phimoe", {"sliding_window": 20}),
        ("qwen2moe", {"sliding_window": 20, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}),
    ],
)
def test_windows_that_live_in_masks_alone_are_found(arch: str, window: dict[str, Any]) -> None:
    """The proof's sequences are shorter than any real window: it has to look at what reaches the attention."""
    base = tiny_base(arch, **window)
    assert not base.packable
    assert any("sliding window" in note for note in base.notes)
    assert base.model.config._attn_implementation == base.native_attention
    assert tiny_base("mistral").packable


def test_drawing_experts_at_random_is_said() -> None:
    """PhiMoE does so in training, from the global generator."""
    assert any("at random" in note for note in tiny_base("phimoe").notes)


@pytest.mark.parametrize(("arch", "reason"), UNPACKABLE.items())
def test_unpackable_models_are_found_and_said_aloud(arch: str, reason: str) -> None:
    base = tiny_base(arch)
    assert not base.packable
    assert len(base.notes) == 1
    assert reason in base.notes[0] and "one per forward" in base.notes[0]
    assert base.model.config._attn_implementation == base.native_attention != NAME


def _mean_over_the_row(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output + output.cumsum(1) / 10


def test_a_leak_that_no_rule_knows_is_found_by_the_proof() -> None:
    """A Llama whose embeddings run along the row; nothing in its config says so."""
    model = tiny_model("llama")
    model.get_input_embeddings().register_forward_hook(_mean_over_the_row)
    base = Base(model, tiny_tokenizer(), "leaky")
    assert not base.packable
    assert "packed and separate differ" in base.notes[0]
    assert model.config._attn_implementation == base.native_attention != NAME


def test_positions_that_do_not_restart_are_found_by_the_proof() -> None:
    """A GPT-2 that numbers the row itself: each sequence sees no neighbour, but stands in the wrong place."""
    model = tiny_model("gpt2")
    model.get_decoder().register_forward_pre_hook(lambda m, args, kw: (args, kw | {"position_ids": None}), with_kwargs=True)
    base = Base(model, tiny_tokenizer(), "counting")
    assert not base.packable
    assert "packed and separate differ" in base.notes[0]


def _with_extra_keyword(module: torch.nn.Module, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, keywords | {"position_bias": torch.zeros(1)}


def test_a_model_that_asks_more_of_attention_than_we_know_is_unpackable() -> None:
    """It loads and says which keyword, instead of crashing or ignoring it."""
    model = tiny_model("llama")
    model.get_submodule("model.layers.1.self_attn").register_forward_pre_hook(_with_extra_keyword, with_kwargs=True)
    base = Base(model, tiny_tokenizer(), "asking")
    assert not base.packable
    assert "position_bias" in base.notes[0]
    assert model.config._attn_implementation == base.native_attention != NAME


def test_a_model_whose_packed_forward_breaks_is_unpackable() -> None:
    """Whatever breaks with rows of several sequences: such a model trains the slow way, it does not refuse to load."""
    model = tiny_model("llama")

    def no_borders(module: torch.nn.Module, args: Any, keywords: dict[str, Any]) -> None:
        if "cu_seq_lens_q" in keywords:
            raise RuntimeError("shapes do not fit")

    model.get_decoder().register_forward_pre_hook(no_borders, with_kwargs=True)
    base = Base(model, tiny_tokenizer(), "breaking")
    assert not base.packable
    assert "shapes do not fit" in base.notes[0]


def _bert(is_decoder: bool) -> PreTrainedModel:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 96}
    return AutoModelForCausalLM.from_config(BertConfig(vocab_size=VOCAB, is_decoder=is_decoder, **sizes)).eval()


def test_a_model_that_sees_what_comes_after_is_refused() -> None:
    """transformers offers BERT as a causal model; as an encoder it would learn to copy the next token and nothing else."""
    with pytest.raises(InputError, match=r"'bert-ish'.*not a causal"):
        Base(_bert(is_decoder=False), tiny_tokenizer(), "bert-ish")
    assert Base(_bert(is_decoder=True), tiny_tokenizer(), "bert-ish").own_head


def test_an_unpackable_base_takes_one_sequence_at_a_time() -> None:
    base = tiny_base("dynamic")
    with pytest.raises(AssertionError, match="one sequence"):
        base.hidden(packed(sequences(4, 5)))


@pytest.mark.parametrize("arch", UNPACKABLE)
def test_an_unpackable_base_has_the_models_own_logits(arch: str) -> None:
    """dynamic and longrope at a length where their angles differ from plain RoPE's, bloom where ALiBi is strong."""
    (part,) = sequences(160 if arch == "dynamic" else 40)
    native, base = tiny_model(arch), tiny_base(arch)
    with torch.no_grad():
        truth = native(input_ids=part[None], use_cache=False).logits[0]
        torch.testing.assert_close(base.head.logits(base.hidden(packed([part]))), truth, rtol=1e-5, atol=1e-5)


def _train_rows(base: Base, rows: list[list[torch.Tensor]], **knobs: Any) -> float:
    """Loss and accumulated gradients of job "j" over `rows`, as the trainer makes them."""
    base.configure(**knobs)
    base.model.train()
    total = 0.0
    for row in rows:
        with base.routed(packed(row, "j")):
            loss = nll_packed(base, row, "j")
            loss.backward()
        total += loss.item()
    return total


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# PEFT reads gate_proj as part of the fused experts of these, so it cannot be the truth about their shared experts.
TARGETS = {"hunyuan": ATTENTION, "afmoe": ATTENTION}


def _check_against_peft(arch: str, rows: list[list[torch.Tensor]]) -> None:
    """With activations kept, and with them recomputed."""
    base = tiny_base(arch)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS.get(arch, "all-linear"))
    attached = Lora().attach(base, "j", config, seed=0)
    shake(attached)
    twin = peft_twin(tiny_model(arch), attached)
    truth = nll_alone(twin, [part for row in rows for part in row])
    truth.backward()
    for recompute in (False, True):
        attached.zero_grad()
        loss = _train_rows(base, rows, recompute=recompute, head_rows=5)
        assert loss == pytest.approx(truth.item(), rel=1e-5)
        for name, gradient in lora_gradients(attached).items():
            expected = twin.get_parameter(name).grad
            assert expected is not None, f"{name} does not take part in the forward: it must not be a target"
            assert relative(gradient, expected) <= 2e-5, f"{name}, {recompute=}"


@pytest.mark.parametrize("arch", UNPACKABLE)
def test_an_unpackable_model_trains_as_with_peft(arch: str) -> None:
    """One sequence per forward: the loss and the gradients of all its LoRA factors are PEFT's."""
    _check_against_peft(arch, [[part] for part in sequences(23, 9)])


@pytest.mark.parametrize("arch", [arch for arch in PACKABLE if arch != "phimoe"])  # it draws its experts while training
def test_a_packed_row_trains_as_its_sequences_with_peft(arch: str) -> None:
    """All of them in one row against PEFT with each alone; one has a single token, one is longer than the windows."""
    _check_against_peft(arch, [sequences(9, 1, 14, 2)])


@pytest.mark.parametrize(("arch", "overrides"), [("phimoe", {}), ("mixtral", {"router_jitter_noise": 0.3})])
def test_a_base_that_draws_while_training_draws_the_same_in_recompute(arch: str, overrides: dict[str, Any]) -> None:
    """PhiMoE samples its experts, jitter moves the router: other draws in recompute would corrupt gradients silently."""
    gradients = []
    for recompute in (False, True):
        base = tiny_base(arch, **overrides)
        attached = Lora().attach(base, "j", LoraConfig(r=3), seed=0)
        shake(attached)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _train_rows(base, [sequences(40)], recompute=recompute, head_rows=64)
        gradients.append(attached.flat.grad)
    kept, recomputed = gradients
    assert kept is not None and recomputed is not None and relative(recomputed, kept) <= 2e-5


@pytest.mark.parametrize("forward", [nll_packed, lambda base, parts: base.head.logits(base.hidden(packed(parts)))])
def test_constructing_a_base_leaves_the_model_as_it_was(forward: Callable[..., torch.Tensor]) -> None:
    """The proof runs the model; weights, mode and gradients are untouched by it."""
    model, fresh = tiny_model("gemma2"), tiny_model("gemma2")
    model.train()
    base = Base(model, tiny_tokenizer(), "g")
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not base.frozen and torch.isfinite(forward(base, sequences(4, 6))).all()


@pytest.mark.parametrize("layers", ["one kind", "kinds"])
@pytest.mark.parametrize("length", [40, 64, 70, 80])
def test_frequencies_follow_the_length_of_the_sequence_alone(length: int, layers: str) -> None:
    """Dynamic RoPE: not of a longer one that went before, in training or in a sample."""
    base = _dynamic_rope(layers)
    twin, ids = _dynamic_rope(layers).model, torch.arange(96)[None] % VOCAB
    with torch.no_grad():
        alone = twin(ids[:, :length]).logits
        base.model(ids)
        with base.answering(None):
            base.model.generate(ids[:, :70], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(base.model(ids[:, :length]).logits, alone)


def _dynamic_rope(layers: str) -> Base:
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    if layers == "one kind":
        return tiny_base("dynamic", max_position_embeddings=64)
    return tiny_base("gemma3", max_position_embeddings=64, rope_parameters={
        "full_attention": dynamic, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}})  # fmt: skip
