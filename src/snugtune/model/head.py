"""The output head: from hidden states to losses, without ever holding all the logits.

Shapes: n scored rows, D model width, V vocabulary. Only scored rows come here, and at most `rows_at_once` of them have
their V logits alive at a time. The negative log likelihood of target t is logsumexp(z) - z_t with z in fp32.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from snugtune.model.frozen import FrozenLinear
from snugtune.model.pieces import PIECE, starts
from snugtune.model.routed import RoutedLinear, Router
from snugtune.types import HEAD_ROWS, MIN_ROWS, Segment

_CACHED = 200_000
"""Logits in fp32 that are passed over at a time: of SmolLM2's vocabulary 4 rows, with 5 it took up to 1.8 times as long."""


@dataclass(frozen=True)
class Logits:
    """What models do to the head's output besides a matrix product: z = softcap(scale * (h W^T + b))."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """[n, V] in the model's dtype -> fp32 logits. Follows the models: scale in their dtype, then the cap."""
        z = raw * self.scale if self.scale != 1.0 else raw
        if self.softcap is not None:
            z = torch.tanh(z / self.softcap) * self.softcap
        return _wide(z)

    def derivative(self, dz: Tensor, z: Tensor) -> Tensor:
        """The gradient with respect to `raw`, from that of the logits and the logits themselves (fp32)."""
        if self.softcap is not None:
            dz = dz * (1.0 - (z / self.softcap) ** 2)
        return dz * self.scale if self.scale != 1.0 else dz


class Head:
    """Scores hidden states with the model's own output embeddings.

    `project` is the module that turns [n, D] into [n, V]; None means that the rows are logits already (the model's own
    unchunked head, for models whose head is more than `Logits` can say). `segment` says whose rows these are, for heads
    that carry adapters; `for_segment` gives the head of another chunk. `cached`: logits in fp32 are made of a few rows at a time,
    which stay in a processor's cache; of all at once for a GPU.
    """

    def __init__(
        self,
        project: nn.Module | None,
        shape: Logits,
        rows_at_once: int = HEAD_ROWS,
        router: Router | None = None,
        segment: Segment | None = None,
        cached: bool = True,
    ):
        self.project = project
        self.shape = shape
        self.rows_at_once = rows_at_once
        self.router = router
        self.segment = segment
        self.cached = cached

    def for_segment(self, segment: Segment, rows_at_once: int | None = None) -> "Head":
        """This head for the rows of one chunk, whatever slice of them comes at a time. `rows_at_once`: another number of them."""
        covering = replace(segment, tokens=slice(None))
        return Head(self.project, self.shape, rows_at_once or self.rows_at_once, self.router, covering, self.cached)

    def logits(self, h: Tensor, offset: int = 0) -> Tensor:
        """[n, D] -> [n, V] in fp32, at once. `offset` is where these rows stand in their chunk (it seeds dropout)."""
        if self.project is None:
            return _wide(h)
        if self.router is None or self.segment is None:
            scope = nullcontext()
        else:
            scope = self.router.routing((replace(self.segment, seed=self.segment.seed + offset),))
        with scope:
            return self.shape(self._projected(self.project, h))

    def _projected(self, project: nn.Module, h: Tensor) -> Tensor:
        """[n, D] -> [n, V], as the model's module gives it."""
        narrow = type(project) is nn.Linear and project.weight.dtype in (torch.bfloat16, torch.float16)
        if narrow and self.cached and project.weight.requires_grad:
            return _Projected.apply(h, project.weight, project.bias)  # pyright: ignore[reportReturnType]
        return project(h)

    def nll(self, h: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
        """Weighted sum of negative log likelihoods: h [n, D], targets int64 [n], weights fp32 [n] -> fp32 scalar.

        `smoothing` e: (1 - e) of the target's and e of the mean over the vocabulary.
        """
        frozen = self._frozen()
        if frozen is not None:
            return _FrozenNll.apply(h, targets, weights, self, frozen, smoothing)  # pyright: ignore[reportReturnType]
        return -(self.logprobs(h, targets, smoothing) * weights).sum()

    def _frozen(self) -> FrozenLinear | None:
        """The projection, where it is frozen and these rows meet no adapter in it; others' jobs may have theirs there."""
        adapted = isinstance(self.project, RoutedLinear) and (self.segment is None or self.segment.job in self.project.slots)
        layer = self.project.frozen if isinstance(self.project, RoutedLinear) and not adapted else self.project
        return layer if isinstance(layer, FrozenLinear) else None

    def logprobs(self, h: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Log probability of each target: [n], fp32. Any head, training or adapted; chunks are recomputed in backward."""

        def score(rows: Tensor, wanted: Tensor, offset: int) -> Tensor:
            z = self.logits(_at_least_min(rows), offset)
            return -F.cross_entropy(z[: len(rows)], wanted, reduction="none", label_smoothing=smoothing)

        starts = range(0, max(len(h), 1), self.rows_at_once)
        parts = [slice(start, start + self.rows_at_once) for start in starts]
        return torch.cat([_recomputed(score, h[part], targets[part], part.start) for part in parts])


def _at_least_min(rows: Tensor) -> Tensor:
    """Rows of zeros added up to `MIN_ROWS`; such rows are cut off again or weigh nothing."""
    return F.pad(rows, (0, 0, 0, MIN_ROWS - len(rows))) if len(rows) < MIN_ROWS else rows


def _wide(z: Tensor) -> Tensor:
    """At least fp32; fp64 stays, so that gradients can be checked in it."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _recomputed(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    out = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, Tensor)
    return out


class _Projected(torch.autograd.Function):
    """A linear whose weight's gradient is made a few rows at a time.

    Processors that have no products in 16 bits sum this one up in fp32, all of it at once: twice its size, 108 MiB of SmolLM2's
    head, and far more than a cache holds (gemm_transb_ of ATen/native/cpu/BlasKernel.cpp).
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(h, weight)
        return F.linear(h, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dz,), (h, weight) = grads, ctx.saved_tensors
        dh = dz @ weight if ctx.needs_input_grad[0] else None
        dw = torch.empty_like(weight)
        rows = max(1, PIECE // weight.shape[1])
        for start in starts(len(dw), rows, dw):
            part = slice(start, start + rows)
            dw[part] = dz[:, part].t() @ h
        return dh, dw, dz.sum(0) if ctx.needs_input_grad[2] else None


class _FrozenNll(torch.autograd.Function):
    """The same sum for a frozen head, in one pass: dh is made while the logits are there, and they are not kept."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, targets: Tensor, weights: Tensor, head: Head, layer: FrozenLinear, smoothing: float
    ) -> Tensor:
        total = torch.zeros((), device=h.device, dtype=torch.promote_types(h.dtype, torch.float32))
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        pieces = -(-len(h) // head.rows_at_once)
        rows = -(-len(h) // max(1, pieces))  # about equal: a few rows take nearly as long as many
        for start in starts(len(h), rows, h):
            part = slice(start, start + rows)
            raw = layer.matmul(_at_least_min(h[part]))
            for few in _few(raw, head.cached):
                total += _nll(raw[few], targets[part][few], weights[part][few], head.shape, smoothing, dh is not None)
            if dh is not None:
                dh[part] = layer.matmul_t(raw)[: len(h[part])]
            del raw  # before the next piece's
        ctx.save_for_backward(dh)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dh,) = ctx.saved_tensors
        # In fp32: 1 / (step size) rounded to bf16 would scale every gradient by up to 0.4 %.
        return (None if dh is None else (_wide(dh) * grads[0]).to(dh.dtype)), None, None, None, None, None


def _few(raw: Tensor, cached: bool) -> Iterator[slice]:
    """Rows whose logits in fp32 stay in the processor's cache: passing over them again and again costs little there."""
    count = max(2, _CACHED // raw.shape[1]) if cached else len(raw)
    return (slice(start, start + count) for start in starts(len(raw), count, raw))


def _nll(raw: Tensor, targets: Tensor, weights: Tensor, shape: Logits, smoothing: float, backward: bool) -> Tensor:
    """The weighted sum over some rows [n, V] of what the head gave; their gradient takes its place, if `backward`.

    Rows that have no target, which fill up `raw`, weigh nothing.
    """
    rows = len(targets)
    z = shape(raw[:rows])
    wanted, w = targets[:, None], weights[:, None].to(z.dtype)
    lse = z.logsumexp(dim=-1, keepdim=True)  # more exact than torch's log_softmax over a large vocabulary
    aimed = z.gather(1, wanted)
    if smoothing:
        aimed = (1 - smoothing) * aimed + smoothing * z.mean(dim=-1, keepdim=True)
    if backward:
        dz = torch.exp(z - lse) if shape.softcap is not None else z.sub_(lse).exp_()
        if smoothing:
            dz.sub_(smoothing / dz.shape[-1])
        dz.scatter_add_(1, wanted, torch.full_like(w, smoothing - 1.0)).mul_(w)
        raw[:rows] = shape.derivative(dz, z)
        raw[rows:] = 0
    return ((lse - aimed) * w).sum()
