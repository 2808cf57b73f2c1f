"""Which examples a step holds: a deterministic order without any state to save.

The training stream of a job is its epochs one after the other, each a fresh permutation that is a pure function of
(seed, epoch). Step k takes examples k * batch_size ... of that stream, so every step has exactly `batch_size` examples,
also across an epoch's border. With `epochs` set, the very last step takes what is left; its loss is divided by its own
label count, like any other's.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from pydantic import Field

from snugtune.data.pack import derive_seed
from snugtune.errors import InputError
from snugtune.schema import Config

T = TypeVar("T")
MOST_REPEATS = 1000
"""An epoch of a mixture is at most so many times as long as its sources together."""


class ConcatConfig(Config):
    """All sources, one after the other."""

    type: Literal["concat"] = "concat"


class InterleaveConfig(Config):
    """Sources in turns, in proportion to their weights."""

    type: Literal["interleave"] = "interleave"
    until: Literal["first", "last"] = Field(
        default="first", description="an epoch ends when the first source is used up, or the last (the others repeat)"
    )


def interleave(sizes: Sequence[int], weights: Sequence[float], until: Literal["first", "last"]) -> list[tuple[int, int]]:
    """(source, index) of an epoch's examples. After any number of turns each source had its share, to within one turn.

    Of the sources that are behind their share, the one whose next turn is due first (Tijdeman 1980, "The chairman
    assignment problem"). All sizes are at least 1. Raises `InputError` for weights that would repeat a source without end.
    """
    shares = [weight / max(weights) for weight in weights]
    shares = [share / sum(shares) for share in shares]  # in two steps: the sum of huge weights is not finite
    if until == "last" and any(size > MOST_REPEATS * sum(sizes) * share for size, share in zip(sizes, shares, strict=True)):
        raise InputError(f"data: with these weights an epoch repeats sources over {MOST_REPEATS} times; bring each weight nearer "
                         "to the others, or set mixing.until: first")  # fmt: skip
    taken = [0] * len(sizes)
    order: list[tuple[int, int]] = []
    while until == "first" or any(t < size for t, size in zip(taken, sizes, strict=True)):
        behind = [s for s, share in enumerate(shares) if taken[s] < (len(order) + 1) * share]
        due = min(behind, key=lambda s: ((taken[s] + 1) / shares[s], s))
        if until == "first" and taken[due] == sizes[due]:
            break
        order.append((due, taken[due] % sizes[due]))
        taken[due] += 1
    return order


def total_steps(examples: int, batch_size: int, epochs: float | None, steps: int | None) -> int:
    """Optimizer steps of a job: `steps` if given, else what `epochs` passes over the examples take."""
    if steps is not None:
        return steps
    return max(1, math.ceil(_stream_length(examples, epochs or 1) / batch_size))


def step_indices(step: int, examples: int, batch_size: int, epochs: float | None, steps: int | None, seed: int) -> list[int]:
    """Indices of the examples of step `step` (from 0)."""
    end = (step + 1) * batch_size
    if steps is None:
        end = min(end, max(1, _stream_length(examples, epochs or 1)))
    positions = range(step * batch_size, end)
    orders = {epoch: epoch_order(examples, epoch, seed) for epoch in {p // examples for p in positions}}
    return [orders[p // examples][p % examples] for p in positions]


def epoch_order(examples: int, epoch: int, seed: int) -> list[int]:
    """The permutation of epoch `epoch`."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch, 1))
    return torch.randperm(examples, generator=generator).tolist()


def split(items: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(training, validation): a random but fixed `fraction` held out, at least one item on either side."""
    held = min(len(items) - 1, max(1, round(fraction * len(items))))
    generator = torch.Generator().manual_seed(derive_seed(seed, 0, 2))
    chosen = set(torch.randperm(len(items), generator=generator)[:held].tolist())
    return [x for i, x in enumerate(items) if i not in chosen], [x for i, x in enumerate(items) if i in chosen]


def _stream_length(examples: int, epochs: float) -> int:
    return round(examples * epochs)
