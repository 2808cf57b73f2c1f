"""PEFT's adapter folders: what is read of them, and refused. A file of ours beside PEFT's says which weights it belongs to.

PEFT is imported where a folder is read or written, and not before: with what it imports it takes 60 MiB and a second or two.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from snugtune.errors import InputError
from snugtune.files import read_json
from snugtune.model.frozen import FrozenLinear

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
STAMP_FILE = "snugtune.json"
UNSTAMPED = "adapter: it does not say which weights it was trained on; it was matched by its names and shapes alone"
PREFIX = "base_model.model."
_FACTOR_ENDINGS = (".lora_A.weight", ".lora_B.weight")
_KEPT_BASE = ".base_layer.weight"
_UNSUPPORTED = ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices",
                "alora_invocation_tokens", "use_bdlora", "kasa_config", "arrow_config", "target_parameters")  # fmt: skip
_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva"})

Factors = tuple[Tensor, Tensor, float]
"""One site's A [r, in], B [out, r] and scale."""


def write_adapter(
    folder: Path, config: "PeftLoraConfig", tensors: Mapping[str, Tensor], base_name: str, fingerprint: str, job: str
) -> None:
    """PEFT's files, with the factors `tensors` under its names, and a stamp with the base's fingerprint."""
    replace(config, base_model_name_or_path=base_name, inference_mode=True).save_pretrained(str(folder))
    kept = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(kept, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    stamp = {"base": base_name, "base_fingerprint": fingerprint, "job": job}
    (folder / STAMP_FILE).write_text(json.dumps(stamp, indent=2) + "\n")


def read_adapter(
    folder: Path, layers: Mapping[str, nn.Module], base_name: str, fingerprint: str
) -> "tuple[PeftLoraConfig, dict[str, Factors]]":
    """A PEFT adapter folder's config and factors for the linears `layers` of a base, in their order.

    Raises `InputError` for another base's (by stamp, else by names and shapes), unknown keys, and features that LoRA here
    lacks.
    """
    config, tensors = _read_files(folder)
    _check_stamp(folder, base_name, fingerprint)
    _check_base_weights(folder, layers, base_name, tensors)
    found = {k.removeprefix(PREFIX).rpartition(".lora_")[0] for k in tensors if k.endswith(_FACTOR_ENDINGS)}
    if not found:
        raise InputError(f"{folder / WEIGHTS_FILE} holds no LoRA weights")
    unknown = sorted(found - layers.keys())
    if unknown:
        raise InputError(f"{folder}: '{base_name}' has no linear '{unknown[0]}' ({len(unknown)} such names); wrong base?")
    return config, {name: _matched(folder, base_name, name, layers[name], config, tensors) for name in layers if name in found}


def _read_files(folder: Path) -> "tuple[PeftLoraConfig, dict[str, Tensor]]":
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise InputError(f"{folder} is not a PEFT adapter folder (no {file})")
    raw = read_json(folder / CONFIG_FILE)
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{folder / CONFIG_FILE}: peft_type {raw.get('peft_type')!r}; snugtune loads LORA adapters")
    from peft import LoraConfig as PeftLoraConfig

    try:
        config = PeftLoraConfig.from_pretrained(str(folder))
        with safe_open(folder / WEIGHTS_FILE, "pt") as stored:
            tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118 (not a dict)
        assert isinstance(config, PeftLoraConfig)
        numbers = [config.lora_alpha, *(dict(config.alpha_pattern) if config.alpha_pattern else {}).values()]
        if not isinstance(config.r, int) or not all(isinstance(n, (int, float)) for n in numbers):
            raise ValueError(f"{CONFIG_FILE}: r, lora_alpha and alpha_pattern must be numbers")
    except (ValueError, TypeError, KeyError, AttributeError, SafetensorError, OSError) as error:
        raise InputError(f"{folder}: cannot be read as an adapter: {error}") from error
    if damaged := next((k for k, t in tensors.items() if not t.isfinite().all()), None):
        raise InputError(f"{folder / WEIGHTS_FILE}: '{damaged}' is not finite; the adapter is damaged or diverged")
    unsupported = [k for k in _UNSUPPORTED if getattr(config, k, None)]
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in _PLAIN_INITS:
        unsupported.append(f"init_lora_weights={config.init_lora_weights} (it changes the base)")
    strangers = [k for k in tensors if not k.endswith((*_FACTOR_ENDINGS, _KEPT_BASE))]
    if unsupported or strangers:
        raise InputError(f"{folder}: uses {', '.join(unsupported or strangers[:3])}, which snugtune does not support")
    return config, tensors


def _check_base_weights(folder: Path, layers: Mapping[str, nn.Module], base_name: str, tensors: Mapping[str, Tensor]) -> None:
    """PEFT stores the weight of an adapted head too; it must be the base's own."""
    for key, stored in tensors.items():
        if key.endswith(_KEPT_BASE):
            name = key.removeprefix(PREFIX).removesuffix(_KEPT_BASE)
            own = layers[name].weight if name in layers else None
            if not isinstance(own, Tensor) or not _equal_as_stored(own.cpu(), stored):
                raise InputError(f"{folder}: brings a weight for '{name}' that is not that of '{base_name}'; wrong base?")


def _equal_as_stored(a: Tensor, b: Tensor) -> bool:
    """Equality in the narrower of both number formats: either side may have been rounded on its way here."""
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return a.shape == b.shape and torch.equal(a.to(narrow), b.to(narrow))


def is_stamped(folder: Path) -> bool:
    """Whether an adapter folder says which weights it was trained on; others are judged by names and shapes alone."""
    return (folder / STAMP_FILE).is_file()


def _check_stamp(folder: Path, base_name: str, fingerprint: str) -> None:
    """Refuse an adapter that says it was trained on other weights."""
    stamp = folder / STAMP_FILE
    if is_stamped(folder):
        made_for = read_json(stamp)
        if made_for.get("base_fingerprint") != fingerprint:
            raise InputError(f"{stamp}: this adapter was trained on other weights ('{made_for.get('base')}') than '{base_name}'")


def _matched(
    folder: Path, base_name: str, name: str, layer: nn.Module, config: "PeftLoraConfig", tensors: Mapping[str, Tensor]
) -> Factors:
    """The stored A and B of one site, checked against the base's shapes, and their scale."""
    from peft.utils.other import get_pattern_key

    a, b = (tensors.get(f"{PREFIX}{name}.lora_{side}.weight") for side in "AB")
    width_out, width_in = FrozenLinear.shape_of(layer)
    rank = 0 if a is None or a.dim() == 0 else len(a)
    if a is None or b is None or not rank or a.shape != (rank, width_in) or b.shape != (width_out, rank):
        raise InputError(f"{folder}: the weights for '{name}' do not fit '{base_name}'; wrong base?")
    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(list(pattern), name), config.lora_alpha)
    scale = alpha / (math.sqrt(len(a)) if config.use_rslora else len(a))
    return a, b, float(scale)
