"""A base without weights: everything it does can be traced, and nothing is loaded.

The model is built on torch's meta device: tensors have shapes there, operators and autograd run, and nothing has memory.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from snugtune.errors import InputError
from snugtune.model import attention, proofs
from snugtune.model.base import Base, find_body
from snugtune.model.frozen import FrozenLinear
from snugtune.model.kernels import Setting, takes_flash
from snugtune.model.load import DTYPES, format_of, silence_dropouts
from snugtune.model.offload import blocks_of
from snugtune.model.quantize import kept_in_fp32, narrowable
from snugtune.types import NARROW, Plan

_AMPERE = (8, 0)
"""The compute capability that is taken for granted where a GPU is planned for: of those that still train language models, the
older ones (Turing, Volta) go without flash attention, and need more than is said."""


def hollow_model(
    config: PretrainedConfig, plan: Plan, trust_remote_code: bool = False, blocks: int | None = None
) -> PreTrainedModel:
    """The model of a config on the meta device, its linears in the plan's format. Raises `InputError` for an odd config.

    `blocks`: with the first so many of them alone.
    """
    config = copy.deepcopy(config)
    if blocks is not None:
        _shorten(config.get_text_config(), blocks)
    silence_dropouts(config)
    config.__dict__.pop("quantization_config", None)
    dtype = DTYPES[plan.compute]
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # an odd config.json can trip any model's constructor up in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"model: cannot build a {config.model_type} of its config: {reason}") from error
    model.config.pad_token_id = None  # where there is one, some models look for it among the tokens, which have no values
    wide = kept_in_fp32(model, dtype)
    for name, parameter in model.named_parameters():
        if wide(name):
            parameter.data = parameter.data.float()
    if blocks is not None:
        _keep_blocks(model, blocks)
    if plan.weights in NARROW or plan.offload == "weights":
        _narrow(model, plan)
    return model


def _shorten(config: PretrainedConfig, blocks: int) -> None:
    """Ask for fewer blocks, where the config has the usual words for that: to build a hundred takes a while."""
    depth = getattr(config, "num_hidden_layers", None)
    if isinstance(depth, int) and depth > blocks:
        for name, value in vars(config).items():
            if isinstance(value, (list, tuple)) and len(value) == depth:
                setattr(config, name, value[:blocks])
        config.num_hidden_layers = blocks


def _narrow(model: PreTrainedModel, plan: Plan) -> None:
    format = format_of(plan)
    for name, site in narrowable(model, DTYPES[plan.compute]).items():
        parts = {k: torch.empty(shape, dtype=d, device="meta") for k, (d, shape) in format.layout(*site.shape).items()}
        parent, _, leaf = name.rpartition(".")
        bias = model.get_submodule(name).bias
        layer = FrozenLinear(format, parts, site.shape, bias if isinstance(bias, Tensor) else None, site.dtype, site.transposed)
        setattr(model.get_submodule(parent), leaf, layer)


def _keep_blocks(model: PreTrainedModel, count: int) -> None:
    """Leave out all blocks but the first `count`."""
    for name in reversed(blocks_of(model)[count:]):
        parent, _, index = name.rpartition(".")
        del cast(nn.ModuleList, model.get_submodule(parent))[int(index)]


def hollow_base(model: PreTrainedModel, plan: Plan, name: str) -> Base:
    """A `Base` of `hollow_model`'s. It has no tokenizer."""
    base = Base(model, cast(Any, None), name, identity="hollow", proved=proofs.presume(model, find_body(model)))
    base.head.cached = plan.device == "cpu"
    if base.packable and takes_flash(Setting(plan.device, DTYPES[plan.compute], _AMPERE)):
        model.set_attn_implementation(attention.FLASH)
    return base
