"""Dynamic RoPE, whose frequencies follow the length of a sequence: of that sequence alone, not of the longest seen before."""

from functools import partial
from typing import Any

from torch import nn


def forget_lengths(model: nn.Module) -> None:
    """Let every rotary module of dynamic RoPE begin each forward as at first.

    Transformers keeps the longest length seen in the module: a neighbour's sequence or a sample would change what a job
    learns later, and so would a resume.
    """
    for module in model.modules():
        prefixes = _dynamic(getattr(module, "rope_type", None))
        if prefixes:
            module.register_forward_pre_hook(partial(_restore, prefixes))


def _dynamic(kind: object) -> tuple[str, ...]:
    """What the names of dynamic frequencies begin with; a kind for each type of layer, or one for all."""
    if isinstance(kind, dict):
        return tuple(f"{layer}_" for layer, k in kind.items() if "dynamic" in str(k))
    return ("",) if isinstance(kind, str) and "dynamic" in kind else ()


def _restore(prefixes: tuple[str, ...], rotary: Any, _: object) -> None:
    for prefix in prefixes:
        frequencies = getattr(rotary, f"{prefix}inv_freq")
        original = getattr(rotary, f"{prefix}original_inv_freq").to(frequencies.device)
        rotary.register_buffer(f"{prefix}inv_freq", original, persistent=False)
        setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)
