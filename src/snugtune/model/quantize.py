"""Loading a base into fewer bits: each weight is encoded as it arrives, and the wide one is let go before the next.

Transformers reads the checkpoint, with all it knows of names and shapes; what becomes of the weights of linears is said by
a quantizer of our own (its documented extension point). `stored` reads the files.
"""

import re
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, build_glob_alternation
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from snugtune.errors import InputError, SnugtuneError
from snugtune.model.formats import Dense, Format, Parts
from snugtune.model.frozen import FrozenLinear
from snugtune.model.stored import Checkpoint, read_stored

METHOD = "snugtune"
ROUTER_NAME = re.compile(r"(^|\.)(gate|router|wg)(\.|$)")
"""What MoE families call the linear that chooses experts."""


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
            format, parts = read_stored(weight, value, stored, site.shape)
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

    Nor those that the model wants in fp32. But all that are `stored` in fewer bits already.
    """
    tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
    head, wide, sites = model.get_output_embeddings(), kept_in_fp32(model, dtype), {}
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, Conv1D) or module is head or name in tied:
            continue
        shape = FrozenLinear.shape_of(module)
        encoded = shape[1] % 2 == 0 and not ROUTER_NAME.search(name) and not wide(f"{name}.weight")
        if f"{name}.weight" in stored or encoded:
            sites[name] = Site(shape, isinstance(module, Conv1D), dtype)
    return sites


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether a parameter stays in fp32 where the others are in `dtype`, as transformers' own loading decides it."""
    plan = model._get_dtype_plan(dtype)
    pattern, _, _ = build_glob_alternation(list(plan))
    return lambda name: bool(plan) and pattern.search(name) is not None


def _oriented(name: str, value: Tensor, site: Site) -> Tensor:
    """A loaded weight as [out, in]. Raises `InputError` where its shape is not that of the model."""
    weight = value.t() if site.transposed else value
    if tuple(weight.shape) != site.shape:
        raise InputError(f"{name} has shape {tuple(value.shape)}, the config asks for {site.shape}")
    return weight


def sample(weight: Tensor) -> bytes:
    """Shape and 16 numbers of a weight in bf16: the same whether it was loaded in fp32 or in bf16."""
    flat = weight.detach().reshape(-1)
    few = flat[:: max(1, flat.numel() // 16)][:16].to("cpu", torch.bfloat16).float()
    return f"{tuple(weight.shape)}".encode() + few.numpy().tobytes()
