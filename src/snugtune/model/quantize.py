"""Loading a base into fewer bits: each weight is encoded as it arrives, and the wide one is let go before the next.

Transformers reads the checkpoint, with all it knows of names and shapes; what becomes of the weights of linears is said by
a quantizer of our own (its documented extension point). Files are read with pread: mapped pages would count as memory.
"""

import json
import re
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.quantization_config import QuantizationConfigMixin

from snugtune.errors import InputError, SnugtuneError
from snugtune.model.formats import CODES, Bits4, Dense, Format, Int8, Parts
from snugtune.model.frozen import FrozenLinear
from snugtune.model.source import ModelSource

METHOD = "snugtune"
ROUTER_NAME = re.compile(r"(^|\.)(gate|router|wg)(\.|$)")
"""What MoE families call the linear that chooses experts."""
_STATE = ".quant_state.bitsandbytes__"
_PARTS_OF_INT8 = (".SCB", ".weight_format")
_BLOCKS = frozenset(2**n for n in range(5, 13))
_WHOLE = frozenset({"I8", "U8", "I16", "I32", "I64"})
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Lazy(Protocol):
    """A tensor of a file, read when it is asked for."""

    def __getitem__(self, index: Any) -> Tensor: ...
    def get_shape(self) -> Sequence[int]: ...
    def get_dtype(self) -> str: ...


@dataclass(frozen=True)
class Site:
    """One linear of the model, before its weight is there."""

    shape: tuple[int, int]  # (out, in)
    transposed: bool
    dtype: torch.dtype  # of its products


class Keeper(Protocol):
    """Where the parts of weights go. Any method may raise a `SnugtuneError`, which ends the loading."""

    @property
    def spared(self) -> Collection[str]:
        """Tensors of the checkpoint that need not be read, since what becomes of them is known."""
        ...

    def begin(self, model: PreTrainedModel, sites: Mapping[str, Site]) -> None:
        """The linears to come."""
        ...

    def known(self, name: str) -> bytes | None:
        """The sample of a linear's weight that is kept from an earlier time, and need not be encoded; else None."""
        ...

    def keep(self, name: str, site: Site, format: Format, parts: Parts, sample: bytes, source: str | None) -> None:
        """Take the parts of one weight, made of the checkpoint's tensor `source` if of just one."""
        ...

    def end(self) -> None:
        """That was the last."""
        ...

    def linear(self, name: str, site: Site, bias: Tensor | None) -> FrozenLinear:
        """The layer over what was kept, after the end."""
        ...


class InMemory:
    """Keeps the parts in the layers themselves."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Format, Parts]] = {}

    @property
    def spared(self) -> Collection[str]:
        return ()

    def begin(self, model: PreTrainedModel, sites: Mapping[str, Site]) -> None: ...

    def known(self, name: str) -> bytes | None:
        return None

    def keep(self, name: str, site: Site, format: Format, parts: Parts, sample: bytes, source: str | None) -> None:
        self.kept[name] = format, parts

    def end(self) -> None: ...

    def linear(self, name: str, site: Site, bias: Tensor | None) -> FrozenLinear:
        format, parts = self.kept.pop(name)
        return FrozenLinear(format, parts, site.shape, bias, site.dtype, site.transposed)


@dataclass
class Checkpoint:
    """The tensors of a model's files. `stored`: what bitsandbytes kept beside the weights that it quantised, by weight."""

    tensors: dict[str, Lazy]
    stored: dict[str, dict[str, Lazy]]
    files: list[str]

    def without(self, spared: Collection[str]) -> Mapping[str, "Lazy | _Spared"]:
        """The tensors, with stand-ins of no size for those that need not be read."""
        return {name: _Spared(lazy) if name in spared else lazy for name, lazy in self.tensors.items()}


@dataclass(frozen=True)
class _Spared:
    """A tensor that is not read."""

    lazy: Lazy

    def __getitem__(self, index: Any) -> Tensor:
        return torch.empty(0)

    def get_shape(self) -> Sequence[int]:
        return self.lazy.get_shape()


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Open the safetensors of `source`, on this disk or from the hub, and read nothing of the weights yet."""
    files = _files(source)
    tensors: dict[str, Lazy] = {}
    for file in files:
        opened = safe_open(file, framework="pt", backend="pread")
        tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    stored: dict[str, dict[str, Lazy]] = {}
    for name in list(tensors):
        weight, _, part = name.partition(".weight.")
        if part:
            stored.setdefault(f"{weight}.weight", {})[part] = tensors.pop(name)
        elif name.endswith(_PARTS_OF_INT8):
            weight, _, part = name.rpartition(".")
            stored.setdefault(f"{weight}.weight", {})[part] = tensors.pop(name)
    bare = next((n for n, t in tensors.items() if n.endswith(".weight") and n not in stored and t.get_dtype() in _WHOLE), None)
    if bare is not None:
        raise InputError(f"{bare} is kept in whole numbers, but their scales are missing; the files are incomplete")
    orphan = next((n for n in stored if n not in tensors), None)
    if orphan is not None:
        raise InputError(f"there are scales of {orphan}, but not the weight itself; the files are incomplete")
    return Checkpoint(tensors, stored, files)


def _files(source: ModelSource) -> list[str]:
    missing = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(source.location, _INDEX, **missing)
    if index is not None:
        return list(get_checkpoint_shard_files(source.location, index)[0] or ())
    single = cached_file(source.location, _SINGLE, **missing)
    if single is None:
        raise InputError(f"there is no {_SINGLE}; snugtune reads safetensors only")
    return [single]


class Request(QuantizationConfigMixin):
    """What is asked of the quantizer, and what it found. `format`: of weights that the checkpoint keeps as they are.

    `samples` are taken of every weight that is no parameter of the model afterwards (see `fingerprint`).
    """

    def __init__(self, format: Format, keeper: Keeper, checkpoint: Checkpoint, dtype: torch.dtype):
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.format, self.keeper, self.checkpoint, self.dtype = format, keeper, checkpoint, dtype
        self.samples: dict[str, bytes] = {}
        self.used: set[str] = set()  # of what the checkpoint keeps in fewer bits
        self.refusal: SnugtuneError | None = None  # transformers would hide it

    def __deepcopy__(self, memo: object) -> "Request":
        return self  # transformers copies its config; the files are open once

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


class _Quantizer(HfQuantizer):
    """Encodes the weights of linears while transformers loads, and puts `FrozenLinear`s in their places at the end."""

    def __init__(self, quantization_config: Request, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.request: Request = quantization_config
        self.sites: dict[str, Site] = {}
        self.done: set[str] = set()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.sites = narrowable(model, self.request.dtype, self.request.checkpoint.stored)
        self.request.keeper.begin(model, self.sites)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        name, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and name in self.sites

    def get_quantize_ops(self) -> ConversionOps:
        return _Encode(self)

    def take(self, weight: str, value: Tensor, source: str | None) -> None:
        """Keep the weight named `weight`, which `source` of the checkpoint alone holds if that is given."""
        if self.request.refusal is not None:
            raise self.request.refusal
        name = weight.removesuffix(".weight")
        try:
            if source in self.request.checkpoint.stored:
                self.request.used.add(source)
            known = self.request.keeper.known(name)
            self.request.samples[weight] = self._keep(name, value, source) if known is None else known
        except SnugtuneError as error:
            self.request.refusal = error
            raise
        self.done.add(name)

    def _keep(self, name: str, value: Tensor, source: str | None) -> bytes:
        """Encode a weight, or take it as it was stored. Returns its sample."""
        site, request, weight = self.sites[name], self.request, f"{name}.weight"
        stored = request.checkpoint.stored.get(source or "", {})
        if not stored:
            # what was left as it is by who quantised the others stays so
            format = Dense(site.dtype) if request.checkpoint.stored else request.format
            parts = format.encode(_oriented(weight, value, site))
        else:
            format, parts = read_stored(weight, value, stored, site)
            wide = torch.float32 if site.dtype == torch.float16 else site.dtype  # see `load_frozen`
            value = format.decode(parts, site.shape, wide)
            if isinstance(request.format, Dense):
                format, parts = request.format, request.format.encode(value)
        taken = sample(value)
        request.keeper.keep(name, site, format, parts, taken, source)
        return taken

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.request.keeper.end()
        for name in self.done:
            parent, _, leaf = name.rpartition(".")
            site, bias = self.sites[name], model.get_submodule(name).bias
            if isinstance(bias, Tensor):
                self.request.samples[f"{name}.bias"] = sample(bias)
                bias = bias.to(site.dtype)  # it may have been read in another: see `load_frozen`
            linear = self.request.keeper.linear(name, site, bias if isinstance(bias, Tensor) else None)
            setattr(model.get_submodule(parent), leaf, linear)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True


@dataclass
class _Encode(ConversionOps):
    """The step of transformers' loading that hands a weight over. What it returns is loaded as usual: nothing."""

    quantizer: _Quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        loaded, missing = {}, kwargs["missing_keys"]
        alone = source_patterns[0] if len(source_patterns) == 1 else None
        source = alone if alone in self.quantizer.request.checkpoint.tensors else None  # else a pattern of many
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if name.removesuffix(".weight") not in self.quantizer.sites or not name.endswith(".weight"):
                loaded[name] = value
                continue
            self.quantizer.take(name, tensor, source)
            missing.discard(name)
        return loaded


register_quantization_config(METHOD)(Request)
register_quantizer(METHOD)(_Quantizer)


def narrowable(model: PreTrainedModel, dtype: torch.dtype, stored: Container[str] = ()) -> dict[str, Site]:
    """The linears whose weights are encoded: all but the head, tied ones, routers of experts, and rows of odd length.

    Also those that are `stored` in fewer bits already.
    """
    tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
    head, sites = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, Conv1D) or module is head or name in tied:
            continue
        shape = FrozenLinear.shape_of(module)
        if f"{name}.weight" in stored or (shape[1] % 2 == 0 and not ROUTER_NAME.search(name)):
            sites[name] = Site(shape, isinstance(module, Conv1D), dtype)
    return sites


def _oriented(name: str, value: Tensor, site: Site) -> Tensor:
    """A loaded weight as [out, in]. Raises `InputError` where its shape is not that of the model."""
    weight = value.t() if site.transposed else value
    if tuple(weight.shape) != site.shape:
        raise InputError(f"{name} has shape {tuple(value.shape)}, the config asks for {site.shape}")
    return weight


def read_stored(name: str, value: Tensor, stored: Mapping[str, Lazy], site: Site) -> tuple[Format, Parts]:
    """What bitsandbytes wrote for one weight. Raises `InputError` unless every part is what it should be.

    `value` is the quantised weight, cast to floating point on its way here, which 8 bits survive.
    """
    format: Format
    if "SCB" in stored:
        format = Int8()
        parts = {"int8": value.to(torch.int8), "scale": stored["SCB"][...].float()}
    elif "weight_format" in stored:
        raise InputError(f"{name}: is kept in 8 bits, but its scales (SCB) are missing")
    else:
        format, parts = _read_4bit(name, value, stored, site)
    if "weight_format" in stored and int(stored["weight_format"][...]) != 0:
        raise InputError(f"{name}: its 8 bits lie in an order of old bitsandbytes; save the model again with a new one")
    for part, (dtype, shape) in format.layout(*site.shape).items():
        found = parts[part]
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise InputError(f"{name}: its {part} is {found.dtype} {tuple(found.shape)}; it should be {dtype} {shape}")
        if dtype.is_floating_point and not found.isfinite().all():
            raise InputError(f"{name}: its {part} is not finite; the file is damaged")
    return format, parts


def _read_4bit(name: str, value: Tensor, stored: Mapping[str, Lazy], site: Site) -> tuple[Format, dict[str, Tensor]]:
    state = next((part for part in stored if f".{part}".startswith(_STATE)), None)
    if state is None:
        raise InputError(f"{name}: is kept in 4 bits, but how is not said (no {_STATE.strip('.')}*)")
    try:
        about = json.loads(bytes(stored[state][...].tolist()))
        kind, block, shape = str(about["quant_type"]), about["blocksize"], tuple(about["shape"])
        parts = {"packed": value.to(torch.uint8).view(-1), "absmax": stored["absmax"][...]}
        double = "nested_absmax" in stored
        if double:
            parts |= {"nested_absmax": stored["nested_absmax"][...], "nested_code": stored["nested_quant_map"][...]}
            parts["offset"] = torch.tensor([float(about["nested_offset"])])
    except KeyError as error:
        raise InputError(f"{name}: there is no {error.args[0]} of its 4 bits; the files are incomplete") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{name}: {state} cannot be read ({error})") from error
    if kind not in CODES or type(block) is not int or block not in _BLOCKS or shape != site.shape:
        raise InputError(f"{name}: is {kind} {shape} in blocks of {block}; it should be nf4 or fp4 {site.shape}, in blocks of 64")
    if "quant_map" in stored and not _is_code(stored["quant_map"][...], kind):
        raise InputError(f"{name}: its quant_map is not the code of {kind}; the files are damaged")
    if double and about.get("nested_blocksize") != Bits4.nested_block:
        raise InputError(f"{name}: its scales lie in blocks of {about.get('nested_blocksize')}; only 256 is read")
    return Bits4(block, double, kind), parts


def _is_code(found: Tensor, kind: str) -> bool:
    code = torch.tensor(CODES[kind])
    return found.shape == code.shape and torch.allclose(found.float(), code, atol=1e-4)


def sample(weight: Tensor) -> bytes:
    """Shape and 16 numbers of a weight in bf16: the same whether it was loaded in fp32 or in bf16."""
    flat = weight.detach().reshape(-1)
    few = flat[:: max(1, flat.numel() // 16)][:16].to("cpu", torch.bfloat16).float()
    return f"{tuple(weight.shape)}".encode() + few.numpy().tobytes()
