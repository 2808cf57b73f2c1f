"""The adapter worked into the base: a plain transformers model folder. The merging itself is PEFT's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from snugtune.data.render import Renderer
from snugtune.errors import InputError
from snugtune.files import whole_folder
from snugtune.folder import locate
from snugtune.memory.plan import Kept
from snugtune.methods.adapter_folder import UNSTAMPED, is_stamped, read_adapter
from snugtune.model.base import fingerprint, samples_of
from snugtune.model.frozen import FrozenLinear, thaw_linears
from snugtune.model.load import DTYPES, load_config, load_frozen, load_model, load_tokenizer, stored_width
from snugtune.model.source import find_model
from snugtune.types import HEAD_ROWS, Plan, Width

BASES = ("original", "dequantized")


def export_merged(
    run: Path,
    target: Path,
    adapter: str | None,
    dtype: str | None,
    say: Callable[[str], None],
    trust_remote_code: bool,
    onto: str | None,
) -> None:
    """Merge in fp32 and write in `dtype` (default: the base's own). Raises `InputError`, `StorageError`.

    `onto`: one of `BASES`, which differ where the run kept the base's weights in fewer bits; None: the original, if there is one.
    """
    if onto not in (None, *BASES):
        raise InputError(f"--base {onto}: unknown; valid: {', '.join(BASES)}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: unknown; valid: {', '.join(DTYPES)}")
    found = locate(run, adapter)
    found.check_trust(trust_remote_code)
    if found.adapter is None:
        what = "tuned the whole model" if found.origin != found.model else "holds no adapter"
        raise InputError(f"{run} {what}; {found.model} is a model folder already")
    source = find_model(found.model, say)
    config = load_config(source, trust_remote_code)
    kept = DTYPES[dtype] if dtype is not None else (config.dtype or torch.float32)  # pyright: ignore[reportArgumentType]
    plan = _narrow_base(onto, found.kept, stored_width(source, config), say)
    if plan is None:
        model, _ = load_model(source, config, "fp32", "cpu", trust_remote_code)
        made_of = fingerprint(samples_of(model))
    else:
        model, samples, _ = load_frozen(source, config, plan, trust_remote_code)
        made_of = fingerprint(samples)
        thaw_linears(model, torch.float32)
        model.float()
    layers = {name: module for name, module in model.named_modules() if FrozenLinear.takes(module)}
    _, factors = read_adapter(found.adapter, layers, source.name, made_of)  # PEFT takes another base's in silence
    if not is_stamped(found.adapter):
        say(UNSTAMPED)
    _untie_adapted_head(model, set(factors))
    say("merging the adapter into the base")
    merged = PeftModel.from_pretrained(model, str(found.adapter)).merge_and_unload()  # pyright: ignore[reportCallIssue]
    merged.to(kept)
    tokenizer, _ = load_tokenizer(source, trust_remote_code)
    stops = Renderer(tokenizer).stop_ids
    merged.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(stops), pad_token_id=tokenizer.pad_token_id
    )
    with whole_folder(target) as made:
        merged.save_pretrained(made)
        tokenizer.save_pretrained(made)


def _narrow_base(onto: str | None, kept: Kept, stored: Width | None, say: Callable[[str], None]) -> Plan | None:
    """How to load a base that is dequantized, and None for the original; says which it is where they differ."""
    plan = Plan("cpu", "fp32", 1, "none", HEAD_ROWS, torch.get_num_threads(), "fp32")
    if stored is not None:
        if onto == "original":
            raise InputError(f"--base original: the base exists in {stored} alone; leave it out to merge onto that, dequantized")
        say(f"the base exists in {stored} alone: merging onto its weights dequantized")
        return plan
    if not kept.narrow:
        if onto == "dequantized":
            raise InputError("--base dequantized: no run says that the base's weights were in fewer bits; leave it out")
        return None
    assert kept.weights is not None
    if onto == "dequantized":
        say(f"merging onto the base's weights as the adapter was trained on them: with the error of {kept.weights}")
        how = {"double_quant": kept.double_quant, "outlier_threshold": kept.outlier_threshold}
        return replace(plan, weights=kept.weights, compute=kept.compute or "fp32", **how)
    say(
        f"merging onto the original base: its weights lack the error of {kept.weights} that the adapter was trained with, so "
        "answers will differ a little; --base dequantized merges onto the weights as trained"
    )
    return None


def _untie_adapted_head(model: PreTrainedModel, adapted: set[str]) -> None:
    """A head that shares the input embeddings' weight gets its own, or merging would change the embeddings too."""
    head = model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is head), None)
    if head is not None and name in adapted and model.config.tie_word_embeddings:
        head.weight = nn.Parameter(head.weight.detach().clone())  # pyright: ignore[reportCallIssue, reportOptionalCall]
        model.config.tie_word_embeddings = False
