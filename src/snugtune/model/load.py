"""Loading a base: from a `ModelSource` to a transformers model and tokenizer, with every doubt said or refused."""

from contextlib import suppress
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from snugtune.errors import InputError, StorageError
from snugtune.hub import hub_trouble
from snugtune.model.formats import W8A8, Bits4, Dense, Format, Int8, Outliers
from snugtune.model.frozen import FrozenLinear
from snugtune.model.offload import on_disk
from snugtune.model.quantize import InMemory, Keeper, Request, kept_in_fp32, sample
from snugtune.model.source import ModelSource, Say, mute
from snugtune.model.stored import Checkpoint, open_checkpoint
from snugtune.model.stream import StreamedLinear
from snugtune.types import NARROW, Plan, Width

DTYPES: dict[Width, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Named like noise of training, but part of the model: how far behind the best an expert may score and still be chosen.
_NO_NOISE = frozenset({("phimoe", "router_jitter_noise")})

MENTIONED_SHARE = 0.25
"""Of weights that stay wide though the plan says narrow, from which on it is worth a note."""
_LYING = "config.json says that bitsandbytes quantised it, but its files hold plain weights; take quantization_config out of it"
_UNSAID = "its files are quantised by bitsandbytes, but config.json does not say so; bring back its quantization_config"

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
    notes = silence_dropouts(config)
    # weights that lie in the files as they are computed with stay there, mapped; of others the pages would come on top
    checkpoint = _opened(source, mapped=config.dtype == DTYPES[width])
    if checkpoint.stored:
        raise InputError(f"model: cannot load the weights of '{source.name}': {_UNSAID}")
    try:
        model, info = _filled(config, trust_remote_code, dtype=DTYPES[width], state_dict=checkpoint.tensors)
    except Exception as error:  # an odd config.json can trip any model's constructor up in any way
        raise InputError(f"model: cannot load the weights of '{source.name}': {_first_line(error)}") from error
    notes += _check_whole(source, info)
    return _ready(model, source, device), notes


def load_frozen(
    source: ModelSource, config: PretrainedConfig, plan: Plan, trust_remote_code: bool, say: Say = mute
) -> tuple[PreTrainedModel, dict[str, bytes], list[str]]:
    """The model with the weights of its linears frozen in the plan's format, encoded one by one as they are read.

    Also the samples of all weights (see `fingerprint`). Head, embeddings and norms are dense. Under plan.offload: weights
    those of the blocks stay on disk (see `offload`). Raises `InputError` and `StorageError`.
    """
    notes = silence_dropouts(config)
    said = config.__dict__.pop("quantization_config", None)  # what the checkpoint keeps in fewer bits is read below
    checkpoint = _opened(source)
    if bool(checkpoint.stored) != bool(said):
        raise InputError(f"model: cannot load the weights of '{source.name}': {_LYING if said else _UNSAID}")
    if plan.offload != "weights":
        model, samples, more = _load_into(InMemory(), checkpoint, source, config, plan, trust_remote_code)
        return model, samples, [*notes, *more]
    about = f"{plan.compute} {config.to_json_string()}"
    with on_disk(checkpoint.files, about, format_of(plan), plan.device, say) as keeper:
        model, samples, more = _load_into(keeper, checkpoint, source, config, plan, trust_remote_code)
    return model, samples, [*notes, *more, keeper.note, *_experts_that_stay(model)]


def _opened(source: ModelSource, mapped: bool = False) -> Checkpoint:
    try:
        return open_checkpoint(source, mapped)
    except Exception as error:  # safetensors raises its own for broken files, and the hub many
        raise InputError(f"model: cannot load the weights of '{source.name}': {_first_line(error)}") from error


def _filled(config: PretrainedConfig, trust_remote_code: bool, **how: Any) -> tuple[PreTrainedModel, Any]:
    """A model of `config` with the weights that `how` gives transformers, and what it tells of them."""
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return type(hollow).from_pretrained(  # pyright: ignore[reportReturnType]
        None,
        config=hollow.config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused by name
        **how,
    )


def _ready(model: PreTrainedModel, source: ModelSource, device: str) -> PreTrainedModel:
    """The model on its device, with how it is to generate."""
    model.to(device)  # pyright: ignore[reportArgumentType]
    with suppress(OSError):  # it has none
        model.generation_config = GenerationConfig.from_pretrained(source.location)
    return model


def _load_into(
    keeper: Keeper, checkpoint: Checkpoint, source: ModelSource, config: PretrainedConfig, plan: Plan, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, bytes], list[str]]:
    # fp16 comes last: what its rounding loses would be missed by the fingerprint
    read_as = torch.float32 if plan.compute == "fp16" else DTYPES[plan.compute]
    request = Request(format_of(plan), keeper, checkpoint, DTYPES[plan.compute])
    try:
        given = checkpoint.without(keeper.spared)
        model, info = _filled(config, trust_remote_code, dtype=read_as, state_dict=given, quantization_config=request)
        unread = sorted(checkpoint.stored.keys() - request.used)
        if unread:
            raise InputError(f"{unread[0]} is quantised, which snugtune reads of linears within the blocks only")
    except StorageError:
        raise
    except Exception as error:  # as above
        if isinstance(request.refusal, StorageError):
            raise request.refusal from error
        why = str(request.refusal or _first_line(error))
        raise InputError(f"model: cannot load the weights of '{source.name}': {why}") from error
    notes = [*_check_whole(source, info), *_told_of_widths(model, plan, bool(checkpoint.stored))]
    samples = request.samples | {name: sample(p) for name, p in model.named_parameters()}
    if plan.compute == "fp16":
        wide = kept_in_fp32(model, torch.float16)
        for name, parameter in model.named_parameters():
            if not wide(name):
                parameter.data = parameter.data.half()
    return _ready(model, source, plan.device), samples, notes


def _told_of_widths(model: PreTrainedModel, plan: Plan, stored: bool) -> list[str]:
    """What is not in the format that the plan names, or was not."""
    if plan.weights not in NARROW:
        return (
            [f"its quantised weights are dequantised to {plan.weights}: their error stays, their size does not"] if stored else []
        )
    layers = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    wide = {name: p.numel() for name, p in model.named_parameters()}
    kept = sum(m.out_features * m.in_features for m in layers if m.format.name not in DTYPES)
    dense = sum(m.out_features * m.in_features for m in layers if m.format.name in DTYPES) + sum(wide.values())
    share, largest = dense / (dense + kept), max(wide, key=lambda name: wide[name])
    what = f"of the weights stay in {plan.compute}: they are no linears of the blocks (the largest: {largest})"
    return [f"{share:.0%} {what}"] if share > MENTIONED_SHARE else []


def _experts_that_stay(model: PreTrainedModel) -> list[str]:
    """What to say of a mixture's fused experts: they are no linears."""
    experts = sum(p.nbytes for p in model.parameters() if p.dim() == 3)
    linears = sum(module.nbytes for module in model.modules() if isinstance(module, StreamedLinear))
    share = 100 * experts / max(1, experts + linears)
    return [f"its fused experts stay in memory: {share:.0f} % of the blocks' bytes"] if experts else []


def format_of(plan: Plan) -> Format:
    """How the plan keeps the weights of linears."""
    if plan.weights == "nf4":
        return Bits4(double=plan.double_quant)
    return Int8() if plan.weights in ("int8", "w8a8") else Dense(DTYPES[plan.weights])


def products_of(plan: Plan) -> Int8:
    """How weights that are kept in int8 are multiplied."""
    if plan.weights == "w8a8":
        return W8A8()
    return Outliers(plan.outlier_threshold) if plan.outlier_threshold else Int8()


def stored_width(source: ModelSource, config: PretrainedConfig) -> Width | None:
    """The narrow format that a checkpoint keeps its weights in, by its config; None for a plain one.

    Raises `InputError` for formats that are not read.
    """
    about = getattr(config, "quantization_config", None)
    if not about:
        return None
    fields = about if isinstance(about, dict) else about.to_dict()
    method = str(fields.get("quant_method", "bitsandbytes" if "load_in_4bit" in fields else "unknown"))
    if method != "bitsandbytes":
        raise InputError(
            f"model: '{source.name}' is kept in {method}'s format, which snugtune does not read yet; take the plain model "
            "(plan.weights: nf4 or int8 quantises it while it loads), or one that bitsandbytes quantised"
        )
    return "int8" if fields.get("load_in_8bit") else "nf4"


def _check_whole(source: ModelSource, info: Any) -> list[str]:
    """Refuse missing weights; tell of those left over."""
    unused = sorted(str(k) for k in info["unexpected_keys"])
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        raise InputError(f"model: '{source.name}' lacks {len(missing)} weights its config asks for (first: {missing[0]})")
    what = "of its stored weights are not used, since its config does not ask for them"
    return [f"{len(unused)} {what} ({unused[0]}, ...)"] if unused else []


def silence_dropouts(config: Any) -> list[str]:
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
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
