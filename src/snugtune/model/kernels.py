"""Which kernels compute what: a pure function of the device, the number format and what is installed. Nothing computes here.

On CPU everything is snugtune's own. On CUDA, where nothing of this was run or measured:

- norms, gated layers: Liger's (Hsu et al. 2024, arXiv 2410.10989), which read and write memory once where torch does so
  several times. They round otherwise, so each is tried against ours when a model is loaded (see `liger.agrees`).
- attention: torch's variable-length flash attention (see `attention.py`).
- adapters: torch's grouped products, one for all jobs of a forward (see `grouped.py`). torch takes them on compute capability
  9 and 10 alone in one kernel; elsewhere it multiplies in a loop, and waits for the device before it.
- the head: always ours. Liger's cross-entropy takes weights of classes, not of rows (ours would be one more pass, and one
  more rounding), gives the loss in the logits' own format, and waits for the device four times a chunk (`.item()`, asserts).
"""

from dataclasses import asdict, dataclass
from importlib import metadata, util
from typing import Literal

import torch

LIGER = "0.8.5"
"""The version whose calls are known here."""
UNMEASURED = "not measured by us"

_GROUPED_CAPABILITIES = (9, 10)
_LIGER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INSTALL = "pip install 'snugtune[cuda]'"


@dataclass(frozen=True)
class Setting:
    """What the choice depends on."""

    device: str  # torch's type of it
    dtype: torch.dtype  # of activations
    capability: tuple[int, int] | None = None  # compute capability, of a CUDA device
    liger: str | None = None  # version; None where it or Triton is missing, or not looked for


@dataclass(frozen=True)
class Kernels:
    """What computes each part of a model."""

    norms: Literal["own", "liger"] = "own"
    gated_layers: Literal["own", "liger"] = "own"
    head: Literal["own"] = "own"
    attention: Literal["own", "flash"] = "own"
    adapters: Literal["own", "grouped"] = "own"


def choose(setting: Setting) -> Kernels:
    """The kernels to try; what fails its trial when a model is loaded gives way to our own."""
    if setting.device != "cuda":
        return Kernels()
    liger = "liger" if setting.liger == LIGER and setting.dtype in _LIGER_DTYPES else "own"
    attention = "flash" if takes_flash(setting) else "own"
    return Kernels(liger, liger, "own", attention, "grouped" if takes_grouped(setting) else "own")


def takes_flash(setting: Setting) -> bool:
    """Whether torch's variable-length flash attention runs there: Ampere or newer, 16 bit."""
    narrow = setting.dtype in (torch.bfloat16, torch.float16)
    return setting.device == "cuda" and narrow and (setting.capability or (0, 0)) >= (8, 0)


def takes_grouped(setting: Setting) -> bool:
    """Whether torch has one kernel for a grouped product there."""
    major = (setting.capability or (0, 0))[0]
    return setting.device == "cuda" and setting.dtype == torch.bfloat16 and major in _GROUPED_CAPABILITIES


def setting_of(device: torch.device, dtype: torch.dtype) -> Setting:
    """That of this machine."""
    if device.type != "cuda":
        return Setting(device.type, dtype)
    return Setting(device.type, dtype, torch.cuda.get_device_capability(device), liger_version())


def liger_version() -> str | None:
    """Of the Liger that could be imported; it needs Triton, which comes with CUDA builds of torch."""
    if util.find_spec("liger_kernel") is None or util.find_spec("triton") is None:
        return None
    try:
        return metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return None


def described(setting: Setting) -> dict[str, str]:
    """Part of a model, as `Kernels` names it -> what computes it, for people."""
    names = {"liger": f"Liger {LIGER}", "flash": "torch's variable-length flash attention", "grouped": "torch's grouped products"}
    chosen = asdict(choose(setting))
    return {part: _line(names.get(kernel), part, setting) for part, kernel in chosen.items()}


def _line(name: str | None, part: str, setting: Setting) -> str:
    if setting.device != "cuda":
        return "snugtune's own"
    if name is not None:
        return f"{name}, {UNMEASURED}"
    why = _why_own(part, setting)
    return f"snugtune's own, {UNMEASURED}" + (f" ({why})" if why else "")


def _why_own(part: str, setting: Setting) -> str | None:
    if part == "attention":
        return "flash attention needs bf16 or fp16, and compute capability 8.0"
    if part == "adapters":
        return "grouped products need bf16, and compute capability 9 or 10"
    if part == "head" or setting.dtype not in _LIGER_DTYPES:
        return None
    if setting.liger is None:
        return f"Liger or Triton is not installed: {_INSTALL}"
    return f"Liger {setting.liger} is here, its calls are known for {LIGER}: {_INSTALL}"
