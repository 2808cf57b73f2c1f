"""What a checkpoint's files hold, bitsandbytes' own formats included.

Files are read with pread: mapped pages would count as memory, beside what is made of them.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from snugtune.errors import InputError
from snugtune.hub import hub_trouble
from snugtune.model.formats import CODES, Bits4, Format, Int8, Parts
from snugtune.model.source import ModelSource

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


def open_checkpoint(source: ModelSource, mapped: bool = False) -> Checkpoint:
    """Open the safetensors of `source`, on this disk or from the hub, and read nothing of the weights yet.

    `mapped`: tensors are the pages of their files.
    """
    files = _files(source)
    tensors: dict[str, Lazy] = {}
    for file in files:
        opened = safe_open(file, framework="pt", backend="mmap" if mapped else "pread")
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
    try:
        return [str(cached_file(source.location, _SINGLE))]
    except OSError as error:
        if hub_trouble(error, "model") is not None:
            raise
        raise InputError(f"there is no {_SINGLE}; snugtune reads safetensors only") from error


def read_stored(name: str, value: Tensor, stored: Mapping[str, Lazy], shape: tuple[int, int]) -> tuple[Format, Parts]:
    """What bitsandbytes wrote for one weight. Raises `InputError` unless every part is what it should be.

    `value` is the quantised weight, cast to floating point on its way here, which 8 bits survive; `shape` the linear's (out, in).
    """
    format: Format
    if "SCB" in stored:
        format = Int8()
        parts = {"int8": value.to(torch.int8), "scale": stored["SCB"][...].float()}
    elif "weight_format" in stored:
        raise InputError(f"{name}: is kept in 8 bits, but its scales (SCB) are missing")
    else:
        format, parts = _read_4bit(name, value, stored, shape)
    if "weight_format" in stored and int(stored["weight_format"][...]) != 0:
        raise InputError(f"{name}: its 8 bits lie in an order of old bitsandbytes; save the model again with a new one")
    for part, (dtype, size) in format.layout(*shape).items():
        found = parts[part]
        if found.dtype != dtype or tuple(found.shape) != size:
            raise InputError(f"{name}: its {part} is {found.dtype} {tuple(found.shape)}; it should be {dtype} {size}")
        if dtype.is_floating_point and not found.isfinite().all():
            raise InputError(f"{name}: its {part} is not finite; the file is damaged")
    return format, parts


def _read_4bit(name: str, value: Tensor, stored: Mapping[str, Lazy], shape: tuple[int, int]) -> tuple[Format, dict[str, Tensor]]:
    state = next((part for part in stored if f".{part}".startswith(_STATE)), None)
    if state is None:
        raise InputError(f"{name}: is kept in 4 bits, but how is not said (no {_STATE.strip('.')}*)")
    try:
        about = json.loads(bytes(stored[state][...].tolist()))
        kind, block, said = str(about["quant_type"]), about["blocksize"], tuple(about["shape"])
        parts = {"packed": value.to(torch.uint8).view(-1), "absmax": stored["absmax"][...]}
        double = "nested_absmax" in stored
        if double:
            parts |= {"nested_absmax": stored["nested_absmax"][...], "nested_code": stored["nested_quant_map"][...]}
            parts["offset"] = torch.tensor([float(about["nested_offset"])])
    except KeyError as error:
        raise InputError(f"{name}: there is no {error.args[0]} of its 4 bits; the files are incomplete") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{name}: {state} cannot be read ({error})") from error
    if kind not in CODES or type(block) is not int or block not in _BLOCKS or said != shape:
        raise InputError(f"{name}: is {kind} {said} in blocks of {block}; it should be nf4 or fp4 {shape}, in blocks of 64")
    if "quant_map" in stored and not _is_code(stored["quant_map"][...], kind):
        raise InputError(f"{name}: its quant_map is not the code of {kind}; the files are damaged")
    if double and about.get("nested_blocksize") != Bits4.nested_block:
        raise InputError(f"{name}: its scales lie in blocks of {about.get('nested_blocksize')}; only 256 is read")
    return Bits4(block, double, kind), parts


def _is_code(found: Tensor, kind: str) -> bool:
    code = torch.tensor(CODES[kind])
    return found.shape == code.shape and torch.allclose(found.float(), code, atol=1e-4)
