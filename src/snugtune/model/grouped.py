"""LoRA's low-rank products for all jobs of a forward at once: a few grouped products instead of some for each job.

As `routed.Apart`, within rounding. To end as it does alone, a job must meet the same arithmetic whoever is beside it:

- Groups are of equal rank, filled up with zeros to a power of two, and of equal scale. A job with no equal is a group of one.
- What a kernel makes of a group could still depend on the others (torch chooses tiles by the mean number of rows), so that
  is tried when a model is loaded, with NaN in the others: `groups_are_independent`.

Only torch's operator on compute capability 9 and 10 is worth it, and there nothing was measured; on CPU the same operator
computes it in a loop, which the tests use. Shapes: t rows of a group of J jobs, r their filled-up rank.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from snugtune.model.liger import close
from snugtune.model.routed import Mask, Slot, drop
from snugtune.types import MIN_ROWS, Segment

RANKS = (8, 16, 32, 64, 128, 256)
"""Filled-up ranks that are tried and grouped; a job of a higher rank is a group by itself."""
_ALIGNED = 16  # bytes that rows of every operand begin at
_TRIALS = ((MIN_ROWS, 400, 61), (400, MIN_ROWS, 17, MIN_ROWS))  # rows of groups: their mean is above 128, and below


Masks = Sequence[Mask | None]


def takes(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether the operator takes rows of these widths."""
    return all(width * dtype.itemsize % _ALIGNED == 0 for width in shape)


@dataclass(frozen=True)
class Grouped:
    """In the place of `Apart`, given the same."""

    active: Sequence[tuple[Segment, Slot]]
    masks: Masks

    def add(self, y: Tensor, x: Tensor) -> None:
        for group in _groups(self.active, self.masks, len(x)):
            a, b, ends = group.factors(x)
            low = F.grouped_mm(group.rows(x, group.masks), a.mT, offs=ends)  # [t, r]
            group.add(y, F.grouped_mm(low, b.mT, offs=ends), group.scale)

    def back(self, x: Tensor, dy: Tensor, dx: Tensor | None) -> list[Tensor]:
        found = dict[int, Tensor]()
        for group in _groups(self.active, self.masks, len(dy)):
            a, b, ends = group.factors(dy)
            xs, dys = group.rows(x, group.masks), group.rows(dy)
            low = F.grouped_mm(xs, a.mT, offs=ends)  # [t, r]
            dlow = F.grouped_mm(dys, b, offs=ends).mul_(group.scale)  # [t, r]
            grad_a, grad_b = F.grouped_mm(dlow.t(), xs, offs=ends), F.grouped_mm(dys.t(), low, offs=ends)
            found |= group.gradients(grad_a, grad_b)
            if dx is not None:
                group.add(dx, F.grouped_mm(dlow, a, offs=ends), masks=group.masks)
        return [found[n] for n in range(len(found))]


@dataclass(frozen=True)
class _Group:
    """Segments whose jobs have one filled-up rank and one scale, with their dropout masks."""

    places: list[int]  # in the list of all that are active
    spans: list[tuple[int, int]]
    slots: list[Slot]
    masks: list[Mask | None]

    @property
    def scale(self) -> float:
        return self.slots[0].scale

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A [J, r, in], B [J, out, r] and where each job's rows end, int32 [J]."""
        rank = _filled_up(self.slots[0])
        a, b = ([f.to(like.dtype) for f in factors] for factors in zip(*((s.a, s.b) for s in self.slots), strict=True))
        ends = list(accumulate(stop - start for start, stop in self.spans))
        return (
            torch.stack([F.pad(f, (0, 0, 0, rank - f.shape[0])) for f in a]),
            torch.stack([F.pad(f, (0, rank - f.shape[1])) for f in b]),
            torch.tensor(ends, dtype=torch.int32, device=like.device),
        )

    def rows(self, x: Tensor, masks: Masks = ()) -> Tensor:
        """[t, n]: those of the group, of [T, n]; without a copy where they follow one another and nothing is dropped."""
        adjacent = all(a[1] == b[0] for a, b in pairwise(self.spans))
        if adjacent and not any(mask is not None and mask.p for mask in masks):
            return x[self.spans[0][0] : self.spans[-1][1]].contiguous()
        return torch.cat([drop(x[start:stop], m) for (start, stop), m in self._with(masks)])

    def add(self, to: Tensor, parts: Tensor, scale: float = 1.0, masks: Masks = ()) -> None:
        """Add rows [t, n] of the group to where they belong in [T, n]."""
        sizes = [stop - start for start, stop in self.spans]
        for ((start, stop), mask), part in zip(self._with(masks), parts.split(sizes), strict=True):
            to[start:stop].add_(drop(part, mask), alpha=scale)

    def gradients(self, grad_a: Tensor, grad_b: Tensor) -> dict[int, Tensor]:
        """Of every job's own A and B, at their places among all factors; from those of the stacked ones."""
        found = dict[int, Tensor]()
        for place, slot, da, db in zip(self.places, self.slots, grad_a, grad_b, strict=True):
            rank = slot.a.shape[0]
            found[2 * place] = da[:rank].to(slot.a.dtype, copy=True)
            found[2 * place + 1] = db[:, :rank].to(slot.b.dtype, copy=True).contiguous().mul_(slot.scale)
        return found

    def _with(self, masks: Masks) -> Iterable[tuple[tuple[int, int], Mask | None]]:
        return zip(self.spans, masks or [None] * len(self.spans), strict=True)


def _groups(active: Sequence[tuple[Segment, Slot]], masks: Masks, count: int) -> Iterable[_Group]:
    """What of `active` goes together, of a row of `count` tokens: equal filled-up ranks and scales."""
    found = dict[object, _Group]()
    for place, ((segment, slot), mask) in enumerate(zip(active, masks, strict=True)):
        rank = _filled_up(slot)
        key = (rank, slot.scale) if rank in RANKS else place
        group = found.setdefault(key, _Group([], [], [], []))
        start, stop, _ = segment.tokens.indices(count)
        group.places.append(place)
        group.spans.append((start, stop))
        group.slots.append(slot)
        group.masks.append(mask)
    return found.values()


def _filled_up(slot: Slot) -> int:
    """The next power of two from its rank on, at least the least of `RANKS`: rows of r numbers must be aligned."""
    return max(RANKS[0], 1 << (slot.a.shape[0] - 1).bit_length())


@torch.no_grad()
def groups_are_independent(device: torch.device, dtype: torch.dtype, shapes: Iterable[tuple[int, int]]) -> bool:
    """Whether all products of every group have the bits they have alone, whatever the others hold, and the right values.

    For linears of `shapes` (out, in). What the operator refuses is not.
    """
    kinds = [(out, into, rank) for out, into in sorted(set(shapes)) if takes((out, into), dtype) for rank in RANKS]
    try:
        return all(_independent(*kind, sizes, device, dtype) for kind in kinds for sizes in _TRIALS)
    except RuntimeError:
        return False


def _independent(out: int, into: int, rank: int, sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> bool:
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, dy = drawn(sum(sizes), into), drawn(sum(sizes), out)
    a, b = drawn(len(sizes), rank, into), drawn(len(sizes), out, rank)
    for n, (start, stop) in enumerate(pairwise([0, *accumulate(sizes)])):
        rows, job = slice(start, stop), slice(n, n + 1)
        alone = _products(x[rows], dy[rows], a[job], b[job], sizes[job])[0]
        among_nan = _products(_only(x, rows), _only(dy, rows), _only(a, job), _only(b, job), sizes)
        if not _equal(alone, among_nan[n]):
            return False
        if not all(close(*pair) for pair in zip(alone, _plain(x[rows], dy[rows], a[n], b[n]), strict=True)):
            return False
    return True


def _products(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, sizes: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    """Of each group: all that forward and backward multiply."""
    ends = torch.tensor(list(accumulate(sizes)), dtype=torch.int32, device=x.device)
    low, dlow = F.grouped_mm(x, a.mT, offs=ends), F.grouped_mm(dy, b, offs=ends)
    up, back = F.grouped_mm(low, b.mT, offs=ends), F.grouped_mm(dlow, a, offs=ends)
    grad_a, grad_b = F.grouped_mm(dlow.t(), x, offs=ends), F.grouped_mm(dy.t(), low, offs=ends)
    by_rows = [t.split(sizes) for t in (low, dlow, up, back)]
    return list(zip(*by_rows, grad_a, grad_b, strict=True))


def _plain(x: Tensor, dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The same of one group, by plain products."""
    low, dlow = x @ a.t(), dy @ b
    return low, dlow, low @ b.t(), dlow @ a, dlow.t() @ x, dy.t() @ low


def _only(t: Tensor, own: slice) -> Tensor:
    """NaN but for its own."""
    kept = torch.full_like(t, float("nan"))
    kept[own] = t[own]
    return kept


def _equal(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
