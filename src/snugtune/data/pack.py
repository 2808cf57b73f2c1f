"""From examples to chunks to batches: which sequences share a row. Pure functions.

Shapes: T tokens of a row, n scored positions, D model width.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

from snugtune.types import Batch, Chunk, Example, Segment


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: indices into `lengths`, grouped so that no group exceeds `capacity`.

    A sequence longer than the capacity gets a group of its own. Ties are broken by index, so the result is a pure
    function of its arguments.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for i in order:
        tightest = bisect_left(rooms, (lengths[i], -1))
        if tightest < len(rooms):
            room, b = rooms.pop(tightest)
        else:
            room, b = capacity, len(bins)
            bins.append([])
        bins[b].append(i)
        insort(rooms, (room - lengths[i], b))
    return bins


def even_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """As few groups as `best_fit` makes, within the least capacity for which it makes so few: a step peaks at its largest."""
    bins = best_fit(lengths, capacity)
    fitting = [length for length in lengths if length <= capacity] or [0]
    sizes = range(max(*fitting, sum(fitting) // max(1, len(bins)), 0), capacity)
    least = bisect_left(sizes, True, key=lambda size: len(best_fit(lengths, size)) <= len(bins))
    return best_fit(lengths, sizes[least]) if least < len(sizes) else bins


def cut_step(examples: Sequence[Example], capacity: int, job: str, step: int, job_seed: int) -> list[Chunk]:
    """One optimizer step's examples as chunks of at most `capacity` tokens, about equal ones. 0: one sequence a chunk."""
    bins = even_fit([len(e.tokens) for e in examples], capacity)
    return [make_chunk([examples[i] for i in group], job, step, index, job_seed) for index, group in enumerate(bins)]


def make_chunk(examples: Sequence[Example], job: str, step: int, index: int, job_seed: int) -> Chunk:
    """Lay whole sequences side by side. Position i is scored when token i + 1 of the same sequence carries weight."""
    lengths = tuple(len(e.tokens) for e in examples)
    tokens = torch.cat([e.tokens for e in examples])
    weights = torch.cat([e.weights for e in examples])
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    weights = weights.index_fill(0, starts, 0.0)  # a first token has no predecessor in its own sequence
    scored = weights.nonzero().squeeze(1)
    return Chunk(
        job=job,
        step=step,
        index=index,
        seed=derive_seed(job_seed, step, index),
        tokens=tokens,
        lengths=lengths,
        rows=scored - 1,
        targets=tokens[scored],
        weights=weights[scored],
    )


def derive_seed(*parts: int) -> int:
    """A 62-bit seed that is a pure function of its parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def collate(chunks: Sequence[Chunk], min_rows: int, device: torch.device | str = "cpu") -> Batch:
    """Chunks side by side in one row, positions restarting at each sequence, filled up to `min_rows` tokens."""
    tokens = [c.tokens for c in chunks]
    lengths = [n for c in chunks for n in c.lengths]
    total = sum(lengths)
    if total < min_rows:
        tokens.append(torch.zeros(min_rows - total, dtype=torch.long))
        lengths.append(min_rows - total)
    segments: list[Segment] = []
    at = 0
    for chunk in chunks:
        segments.append(Segment(chunk.job, slice(at, at + len(chunk.tokens)), chunk.seed, chunk.lengths))
        at += len(chunk.tokens)
    return Batch(
        input_ids=torch.cat(tokens)[None].to(device),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None].to(device),
        lengths=tuple(lengths),
        segments=tuple(segments),
    )


def scored(states: Tensor, chunk: Chunk, segment: Segment) -> Tensor:
    """Of the states of a batch's row, [T, D], those of one chunk's scored positions, [n, D]."""
    return states[segment.tokens].index_select(0, chunk.rows.to(states.device))
