"""Loading a base: from a `ModelSource` to a transformers model and tokenizer, with every doubt said or refused."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from snugtune.errors import InputError
from snugtune.hub import hub_trouble
from snugtune.model.source import ModelSource
from snugtune.types import Width

DTYPES: dict[Width, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Named like noise of training, but part of the model: how far behind the best an expert may score and still be chosen.
_NO_NOISE = frozenset({("phimoe", "router_jitter_noise")})

FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""The plain template of models that bring none: `### User:`, `### Assistant:` with the end-of-text token after answers (and the
beginning-of-text token before all, where the tokenizer puts one)."""


def load_config(source: ModelSource, trust_remote_code: bool) -> PretrainedConfig:
    """The model's config. Raises `InputError` unless it is a decoder-only causal language model."""
    try:
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config.json can trip transformers up in any way
        if "custom code" in str(error):
            raise InputError(
                f"model: '{source.name}' brings code of its own; set trust_remote_code: true if you trust its source"
            ) from error
        raise InputError(f"model: cannot load '{source.name}': {_first_line(error)}{source.hint}") from error
    if config.is_encoder_decoder:
        raise InputError(f"model: '{source.name}' ({config.model_type}) is an encoder-decoder, not a decoder-only model")
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not remote:
        raise InputError(f"model: '{source.name}' ({config.model_type}) is not a causal language model")
    return config


def load_tokenizer(source: ModelSource, trust_remote_code: bool) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer and what to say about it. Refuses one that cannot map tokens to text or that has no end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception for broken files
        raise InputError(f"model: cannot load the tokenizer of '{source.name}': {_first_line(error)}{source.hint}") from error
    if not tokenizer.is_fast:
        raise InputError(f"model: the tokenizer of '{source.name}' gives no character offsets; a tokenizer.json is needed")
    if not tokenizer("Hello", add_special_tokens=False)["input_ids"]:
        raise InputError(f"model: the tokenizer of '{source.name}' makes no tokens of text; its vocabulary is empty or damaged")
    if tokenizer.eos_token_id is None:
        raise InputError(f"model: the tokenizer of '{source.name}' has no eos_token; answers could never end")
    notes = []
    if not tokenizer.chat_template:
        begins = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + FALLBACK_TEMPLATE
        notes.append("the model has no chat template; using a plain one (### User: / ### Assistant:)")
    return tokenizer, notes


def load_model(
    source: ModelSource, config: PretrainedConfig, width: Width, device: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[str]]:
    """The model with its dropouts off, in `width` on `device`, from safetensors alone. Refuses missing weights."""
    notes = _silence_dropouts(config)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            source.location,
            config=config,
            dtype=DTYPES[width],
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except Exception as error:  # an odd config.json can trip any model's constructor up in any way
        raise InputError(f"model: cannot load the weights of '{source.name}': {_first_line(error)}") from error
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        raise InputError(f"model: '{source.name}' lacks {len(missing)} weights its config asks for (first: {missing[0]})")
    unused = sorted(str(k) for k in info["unexpected_keys"])
    if unused:
        notes.append(
            f"{len(unused)} of its stored weights are not used, since its config does not ask for them ({unused[0]}, ...)"
        )
    model.to(device)  # pyright: ignore[reportArgumentType]
    return model, notes


def _silence_dropouts(config: Any) -> list[str]:
    """Set the base's own dropouts to 0: they draw from the global generator, which would tie jobs to one another."""
    named = {k: v for k, v in config.to_dict().items() if "drop" in k or "jitter" in k}
    alive = [k for k, v in named.items() if isinstance(v, float) and v > 0 and (config.model_type, k) not in _NO_NOISE]
    for name in alive:
        setattr(config, name, 0.0)
    return [f"the base's own dropouts are off ({', '.join(sorted(alive))})"] if alive else []


def _first_line(error: Exception) -> str:
    """What went wrong, shortly; of the hub, what it or the network said, which transformers hides."""
    if (reason := hub_trouble(error, "model")) is not None:
        return reason
    if str(error).startswith("Can't load the model for"):  # transformers' word for a hub that fails: it drops the status
        return "its files did not come from the hub, which may be in trouble; run the command again later"
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
