"""What all tests share: tiny random models of many architectures, a tiny real tokenizer, a model folder, truths.

Functions are imported (`from conftest import tiny_base`), fixtures are asked for by name. Nothing here needs a network.
"""

import functools
import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Threads that hardly spin while they wait: tests share their cores with the processes they start (read when torch loads).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: a test that wants the hub must fail at once

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from snugtune.methods.lora import LoraAttached
from snugtune.model.base import Base
from snugtune.types import Batch, Segment

VOCAB = 320
PAD, EOS = 0, 2  # the tokenizer's <|endoftext|> and <|im_end|>

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.12,  # about 1 / sqrt(64): the default of 0.02 would leave attention nearly uniform
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_HEADS = _GROUPED | {"head_dim": 16}
_WINDOW = _HEADS | {"sliding_window": 5}
_GEMMA2 = _WINDOW | {"query_pre_attn_scalar": 25, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.12}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
             "original_max_position_embeddings": 16}  # fmt: skip
_GEMMA3N = {"layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": VOCAB, "laurel_rank": 8,
            "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0, 0.0], "final_logit_softcapping": 4.0}  # fmt: skip
_GEMMA4 = {"layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": VOCAB, "global_head_dim": 16,
           "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}  # fmt: skip
_GPT_NEO = {"vocab_size": VOCAB, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128, "window_size": 5,
            "initializer_range": 0.12}  # fmt: skip
_DEEPSEEK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 1,
             "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
             "first_k_dense_replace": 1}  # fmt: skip
_MAMBA2 = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 16,
           "n_groups": 2, "chunk_size": 16}  # fmt: skip
_RECURRENT_GEMMA = {"lru_width": 64, "attention_window_size": 8, "num_hidden_layers": 3, "logits_soft_cap": 4.0}
_FALCON_H1 = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
              "mamba_chunk_size": 16, "lm_head_multiplier": 0.3, "embedding_multiplier": 3.0}  # fmt: skip
_QWEN3_NEXT = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
               "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
               "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
_JAMBA = {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2, "num_experts": 4,
          "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}  # fmt: skip
_ZAMBA2 = {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_mem_blocks": 1, "attention_hidden_size": 128,
           "attention_head_dim": 32, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16,
           "chunk_size": 16}  # fmt: skip

ARCHS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _HEADS),
    "qwen3": ("Qwen3Config", _HEADS),
    "mistral": ("MistralConfig", _WINDOW),
    "phi": ("PhiConfig", _SIZES),
    "phi3": ("Phi3Config", _GROUPED),
    "gemma2": ("Gemma2Config", _GEMMA2),
    "gemma3": ("Gemma3TextConfig", _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3n": ("Gemma3nTextConfig", _WINDOW | _GEMMA3N),
    "gpt2": ("GPT2Config", _GPT2),
    "opt": ("OPTConfig", _SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "neox": ("GPTNeoXConfig", _SIZES),
    "cohere": ("CohereConfig", _GROUPED | {"logit_scale": 0.3}),
    "hyperclovax": ("HyperCLOVAXConfig", _HEADS | {"logits_scaling": 3.0}),
    "granite": ("GraniteConfig", _GROUPED | {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    "gptoss": (
        "GptOssConfig",
        _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "olmo2": ("Olmo2Config", _GROUPED),
    "starcoder2": ("Starcoder2Config", _GROUPED | {"sliding_window": 5}),
    "cohere2": ("Cohere2Config", _WINDOW | {"logit_scale": 0.3, "layer_types": ["sliding_attention", "full_attention"]}),
    "glm4": ("Glm4Config", _HEADS),
    "smollm3": ("SmolLM3Config", _GROUPED | {"no_rope_layer_interval": 2}),
    "exaone4": ("Exaone4Config", _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "gemma4": ("Gemma4TextConfig", _WINDOW | _GEMMA4),
    "persimmon": ("PersimmonConfig", _SIZES),
    # experts
    "deepseek_v3": ("DeepseekV3Config", _SIZES | _DEEPSEEK),
    "mixtral": ("MixtralConfig", _HEADS | {"num_local_experts": 4}),
    "qwen3moe": ("Qwen3MoeConfig", _HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "qwen2moe": (
        "Qwen2MoeConfig",
        _HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "hunyuan": ("HunYuanMoEV1Config", _HEADS | {"num_experts": 4, "moe_topk": 2}),
    "phimoe": ("PhimoeConfig", _GROUPED | {"num_local_experts": 4}),
    "afmoe": (
        "AfmoeConfig",
        _HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1},
    ),
    # a head that transforms before it projects
    "modernbert": ("ModernBertDecoderConfig", _SIZES | {"local_attention": 10, "global_attn_every_n_layers": 2}),
    # models whose rows cannot be shared
    "llama4": ("Llama4TextConfig", _HEADS | {"num_local_experts": 4, "intermediate_size_mlp": 96}),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.12}),
    "mpt": ("MptConfig", {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2}),
    "stablelm": ("StableLmConfig", _GROUPED),
    "nemotron": ("NemotronConfig", _HEADS),
    "falcon": ("FalconConfig", {k: v for k, v in _SIZES.items() if k != "intermediate_size"}),
    "gpt_neo": ("GPTNeoConfig", _GPT_NEO),
    "mamba2": ("Mamba2Config", _MAMBA2),
    "recurrent_gemma": ("RecurrentGemmaConfig", _HEADS | _RECURRENT_GEMMA),
    "falcon_h1": ("FalconH1Config", _HEADS | _FALCON_H1),
    "qwen3next": ("Qwen3NextConfig", _HEADS | _QWEN3_NEXT),
    "lfm2": ("Lfm2Config", _GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "mamba": ("MambaConfig", {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "falcon_alibi": ("FalconConfig", {k: v for k, v in _SIZES.items() if k != "intermediate_size"} | {"alibi": True}),
    "jamba": ("JambaConfig", _GROUPED | _JAMBA),
    "gptj": ("GPTJConfig", _GPT2 | {"rotary_dim": 8}),
    "zamba2": ("Zamba2Config", _GROUPED | _ZAMBA2),  # one block of attention, used again with adapters of its own
    "dynamic": ("LlamaConfig", _HEADS | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    "longrope": ("Phi3Config", _GROUPED | {"rope_parameters": _LONGROPE}),
}
"""Architecture name -> (transformers config class, its arguments)."""


def tiny_config(arch: str, **overrides: Any) -> PretrainedConfig:
    """A fresh config of `ARCHS[arch]` without dropouts; `overrides` go over its arguments."""
    kind, arguments = ARCHS[arch]
    ids = {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
    config = getattr(transformers, kind)(**{**ids, **arguments, **overrides})
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def tiny_model(arch: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model in eval mode; equal arguments give equal weights, and dtypes differ by rounding alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(arch, **overrides), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms, biases, sinks: away from the ones and zeros they start with
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if dtype != torch.float32:  # not model.to(dtype): that would round rotary buffers, which loading leaves in fp32
            weights = model.state_dict()
            model = AutoModelForCausalLM.from_config(tiny_config(arch, **overrides), dtype=dtype)
            model.load_state_dict(weights)
    return model.eval()


def tiny_base(arch: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Base:
    """A `Base` over `tiny_model` with the tiny tokenizer."""
    return Base(tiny_model(arch, dtype, seed, **overrides), tiny_tokenizer(), f"tiny-{arch}")


@functools.cache
def _trained_bpe() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = "system user assistant Hello there, how are you today? The quick brown fox jumps over the lazy dog. What is it?"
    bpe.train_from_iterator([text] * 3, trainer)
    return bpe.to_str()


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB` tokens with ChatML: any text goes through it and back."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not go through its half a million objects again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache is not the tests'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNUGTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")  # before what modules compute once, whose bits depend on it
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Unit tests compute on tiny tensors: more threads only make them wait for each other, badly so on a busy machine."""
    before = torch.get_num_threads()
    if "unit" in request.path.parts:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "max_position_embeddings": 512}


def wide_folder(folder: Path) -> Path:
    """`folder`, with a model whose step takes memory that can be seen in a process."""
    tiny_model("llama", **WIDE).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer as a transformers folder (safetensors). Shared by the session: do not write into it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sequences(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Random token sequences of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]


def packed(parts: Sequence[Tensor], job: str | None = None, seed: int = 0) -> Batch:
    """Sequences side by side in one row; all of it belongs to `job`, or to nobody."""
    lengths = tuple(len(p) for p in parts)
    segments = () if job is None else (Segment(job, slice(0, sum(lengths)), seed),)
    return Batch(torch.cat(list(parts))[None], torch.cat([torch.arange(n) for n in lengths])[None], lengths, segments)


def relative(ours: Tensor, truth: Tensor) -> float:
    """||ours - truth|| / ||truth|| in fp64; not a number when either holds one, so that every comparison fails."""
    difference, size = (ours.detach().double() - truth.detach().double()).norm(), truth.detach().double().norm()
    return float(difference / size) if size > 0 else float(difference)


def shake(attached: LoraAttached, seed: int = 1, size: float = 0.1) -> None:
    """Random factors: fresh ones have B = 0, which hides every mistake about A."""
    generator = torch.Generator().manual_seed(seed)
    for factor in attached.tensors().values():
        factor.copy_(torch.randn(factor.shape, generator=generator) * size)


class NoWatch:
    """A memory watch for tests that do not look at memory."""

    def peak(self) -> int:
        return 0

    def make_room(self, tokens: int) -> None:
        """Nothing is given back."""

    def give_back(self) -> None:
        """Nothing is."""

    def exceeded(self) -> bool:
        return False


def peft_twin(model: PreTrainedModel, attached: LoraAttached) -> PeftModel:
    """`model` under PEFT's own LoRA, with the targets, settings and factors of `attached`."""
    config = attached.to_peft().to_dict() | {"target_modules": list(attached.sites), "inference_mode": False}
    twin = get_peft_model(model, PeftLoraConfig(**{k: v for k, v in config.items() if k not in ("peft_type", "auto_mapping")}))
    with torch.no_grad():
        for name, factor in attached.tensors().items():
            twin.get_parameter(name.replace(".weight", ".default.weight")).copy_(factor)
    return twin


def lora_gradients(attached: LoraAttached) -> dict[str, Tensor]:
    """The accumulated gradients of one job's factors, under the names of PEFT's parameters."""
    gradients = {}
    for site in attached.sites:
        slot = attached.base.sites[site].slots[attached.job]
        for side, factor in (("A", slot.a), ("B", slot.b)):
            assert factor.grad is not None
            gradients[f"base_model.model.{site}.lora_{side}.default.weight"] = factor.grad.clone()
    return gradients


def nll_alone(model: nn.Module, parts: Sequence[Tensor]) -> Tensor:
    """The truth about a loss: each sequence through the model by itself, all logits, torch's cross entropy, summed."""
    logits = [model(input_ids=p[None], use_cache=False).logits[0, :-1] for p in parts]
    return torch.stack([F.cross_entropy(z, p[1:], reduction="sum") for z, p in zip(logits, parts, strict=True)]).sum()


def nll_packed(base: Base, parts: Sequence[Tensor], job: str | None = None) -> Tensor:
    """The same loss over one row of `base`. For gradients, call it and backward inside `base.routed(...)`."""
    batch = packed(parts, job)
    starts = torch.tensor([0, *batch.lengths]).cumsum(0)[:-1]
    targets = torch.ones(batch.input_ids.shape[1], dtype=torch.bool).index_fill(0, starts, False).nonzero().squeeze(1)
    hidden = base.hidden(batch)[targets - 1]
    head = base.head if job is None else base.head.for_segment(batch.segments[0])
    return head.nll(hidden, batch.input_ids[0, targets], torch.ones(len(targets)))
