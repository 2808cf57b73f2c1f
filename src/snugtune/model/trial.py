"""Trying what a module computes without its weights: they may be large, or a model may be looked at before it has any."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))


def kind_of(module: nn.Module) -> object:
    """What decides what a module computes, besides its weights: its code, and the settings of this one."""
    return type(module), frozenset((k, v) for k, v in vars(module).items() if isinstance(v, _PLAIN) and k != "training")


def twin_of(module: nn.Module, instead: Mapping[nn.Module | Tensor, nn.Module | Tensor]) -> nn.Module:
    """A copy with other modules or parameters in the places of some of its own."""
    return copy.deepcopy(module, {id(own): other for own, other in instead.items()})


def drawn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Parameter:
    """Random numbers, scaled as weights are; on cpu, where `device` is meta: there are no values there."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).div_(shape[-1] ** 0.5)
    return nn.Parameter(values.to("cpu" if device.type == "meta" else device, dtype), requires_grad=False)
