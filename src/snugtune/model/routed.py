"""LoRA over a frozen linear, for any number of jobs at once: y = x W^T + b + s drop(x) A^T B^T, per segment.

Source: Hu et al., "LoRA" (arXiv 2106.09685); rank-stabilised scaling from Kalajdzievski (arXiv 2312.03732).
Each segment of a batch belongs to one job and meets that job's factors alone, through slices: a mask multiplication
would let a neighbour's NaN through (0 * NaN).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from snugtune.errors import InputError
from snugtune.model.frozen import FrozenLinear
from snugtune.model.remade import Function, Origin, again, origin_of, through
from snugtune.types import Segment


@dataclass(frozen=True)
class Slot:
    """One job's factors at one site. The factors are fp32 and are computed with in the dtype of x."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float
    dropout: float = 0.0


@dataclass
class Router:
    """Which segments the rows of the current forward, recompute and backward belong to. One per base.

    `absent`: jobs whose factors are not here for now; without them a forward would quietly be the bare base's.
    """

    segments: tuple[Segment, ...] = field(default_factory=tuple)
    absent: set[str] = field(default_factory=set)

    @contextmanager
    def routing(self, segments: tuple[Segment, ...]) -> Iterator[None]:
        """Route by `segments` inside the block. For training it must span forward and backward: recompute runs there.

        Raises `InputError` for a job at rest.
        """
        away = next((segment.job for segment in segments if segment.job in self.absent), None)
        if away is not None:
            raise InputError(f"job '{away}' is at rest on disk; wake it first")
        before, self.segments = self.segments, segments
        try:
            yield
        finally:
            self.segments = before


class Spare:
    """One buffer for gradients, handed from job to job. One per base.

    Fresh ones would leave holes in the heap that fill with what is smaller: with eight jobs in turns that was a gradient's
    memory for each of them.
    """

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

    def take(self, count: int, device: torch.device) -> Tensor:
        """Zeros, fp32 [count]."""
        held, self.buffer = self.buffer, None
        if held is None or len(held) < count or held.device != device:
            return torch.zeros(count, device=device)
        return held[:count].zero_()

    def give(self, used: Tensor) -> None:
        """It, whole, is nobody's any more. Only the larger of two is kept."""
        whole = used if used._base is None else used._base
        if self.buffer is None or len(self.buffer) < len(whole):
            self.buffer = whole


class RoutedLinear(nn.Module):
    """A frozen linear and the slots of every job. The slots live outside the module tree: adding the k-th is O(1)."""

    def __init__(self, frozen: FrozenLinear, router: Router, name: str):
        super().__init__()
        self.frozen = frozen
        self.router = router
        self.name = name
        self.slots: dict[str, Slot] = {}
        self.products: Callable[[Sequence[tuple[Segment, Slot]], Sequence[Mask | None]], LowRank] = Apart  # or see `grouped.py`
        self.in_features, self.out_features = frozen.in_features, frozen.out_features

    @property
    def shape(self) -> tuple[int, int]:
        return self.frozen.shape

    @property
    def weight(self) -> Tensor:
        return self.frozen.weight

    @property
    def bias(self) -> Tensor | None:
        return self.frozen.bias

    def forward(self, *inputs: Tensor, function: Function | None = None) -> Tensor:
        """As `FrozenLinear` does, and the adapters."""
        active = [(s, self.slots[s.job]) for s in self.router.segments if s.job in self.slots]
        if not active:
            return self.frozen(*inputs, function=function)
        origin = origin_of(inputs[0]) if function is None else None
        masks = [Mask(slot.dropout, segment.seed, self.name) if self.training else None for segment, slot in active]
        factors = [f for _, slot in active for f in (slot.a, slot.b)]
        rows = [x.flatten(0, -2) for x in inputs]
        y = _Routed.apply(self.frozen, self.products(active, masks), function, origin, len(rows), *rows, *factors)
        assert isinstance(y, Tensor)
        return y.view(*inputs[0].shape[:-1], self.out_features)


class RoutedFunction(nn.Module):
    """An elementwise function, taken of each segment's rows by themselves.

    Kernels share a tensor out among threads and work on several numbers at a time; what is left over at the end of a share
    goes another way, which may round otherwise (torch's SiLU). Alone or not, the same rows are shared out in the same way.
    """

    def __init__(self, function: nn.Module, router: Router):
        super().__init__()
        self.function = function
        self.router = router

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether `module` is an elementwise activation function; softmax and the like have a `dim`, PReLU a weight a channel."""
        known = type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations")
        return known and not hasattr(module, "dim") and all(p.numel() == 1 for p in module.parameters())

    def forward(self, x: Tensor) -> Tensor:
        sizes = self._sizes(x.shape[-2]) if x.dim() > 1 else []
        if len(sizes) < 2:
            return self.function(x)
        return torch.cat([self.function(part) for part in x.split(sizes, dim=-2)], dim=-2)

    def _sizes(self, rows: int) -> list[int]:
        """Of the segments, and of the filler behind them; [] where these are not the batch's rows."""
        stops = [segment.tokens.stop for segment in self.router.segments]
        if None in stops or not stops or stops[-1] > rows:
            return []
        borders = [0, *stops] if stops[-1] == rows else [0, *stops, rows]
        return [end - start for start, end in pairwise(borders)]


@dataclass(frozen=True)
class Mask:
    """A dropout mask as a recipe: a pure function of (chunk seed, site), drawn again in recompute and in backward."""

    p: float
    seed: int
    site: str

    def apply(self, x: Tensor) -> Tensor:
        if self.p == 0.0:
            return x
        digest = hashlib.blake2b(f"{self.seed}:{self.site}".encode(), digest_size=8).digest()
        generator = generator_of(int.from_bytes(digest, "little") >> 1, x.device)
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.p
        return torch.where(kept, x / (1.0 - self.p), 0.0)


class LowRank(Protocol):
    """The low-rank products of all adapters of a forward at one linear. Shapes: y, dy [T, out], x, dx [T, in]."""

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add to y what the adapters make of x."""
        ...

    def back(self, x: Tensor, dy: Tensor, dx: Tensor | None) -> list[Tensor]:
        """The gradients of A and B of each job, in turn; what goes back through them is added to dx."""
        ...


@dataclass(frozen=True)
class Apart:
    """Each job's by themselves. `masks`: dropout of each segment."""

    active: Sequence[tuple[Segment, Slot]]
    masks: Sequence[Mask | None]

    def add(self, y: Tensor, x: Tensor) -> None:
        for (segment, slot), mask in zip(self.active, self.masks, strict=True):
            low = drop(x[segment.tokens], mask) @ slot.a.to(x.dtype).t()  # [t, r]
            y[segment.tokens].addmm_(low, slot.b.to(x.dtype).t(), alpha=slot.scale)

    def back(self, x: Tensor, dy: Tensor, dx: Tensor | None) -> list[Tensor]:
        found = list[Tensor]()
        for (segment, slot), mask in zip(self.active, self.masks, strict=True):
            a, b = slot.a.to(x.dtype), slot.b.to(x.dtype)
            xs, dys = drop(x[segment.tokens], mask), dy[segment.tokens]
            dlow = (dys @ b).mul_(slot.scale)  # [t, r]
            grad_b = ((a @ xs.t()) @ dys).t().to(slot.b.dtype).mul_(slot.scale)  # in this order thin products are quick
            found += [(dlow.t() @ xs).to(slot.a.dtype), grad_b]
            if dx is not None and mask is None:
                dx[segment.tokens].addmm_(dlow, a)
            elif dx is not None:
                dx[segment.tokens] += drop(dlow @ a, mask)
        return found


class _Routed(torch.autograd.Function):
    """One node per linear. Saves x once, or what it is made of, and nothing else of its size.

    x A^T, the masks and what is made of something else are made again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        frozen: FrozenLinear,
        products: LowRank,
        function: Function | None,
        origin: Origin | None,
        count: int,
        *inputs_and_factors: Tensor,
    ) -> Tensor:
        inputs = inputs_and_factors[:count]
        x = inputs[0] if function is None else function(*inputs)
        y = frozen.matmul(x)
        products.add(y, x)
        ctx.frozen, ctx.products, ctx.function = frozen, products, function
        ctx.remade = None if origin is None else origin.remade
        ctx.save_for_backward(*(inputs if origin is None else origin.inputs))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept = ctx.saved_tensors
        if ctx.remade is not None:
            kept = [ctx.remade.of(kept).flatten(0, -2)]
        inputs, x = again(ctx.function, kept)
        before = ctx.needs_input_grad[5 : 5 + len(inputs)]
        dx = ctx.frozen.matmul_t(grads[0]) if any(before) else None
        factor_grads = ctx.products.back(x.detach(), grads[0], dx)
        return None, None, None, None, None, *through(x, inputs, dx, before), *factor_grads


def generator_of(seed: int, device: torch.device) -> torch.Generator | None:
    """What draws on a device, from a seed; None on meta, where numbers have no values."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def drop(x: Tensor, mask: Mask | None) -> Tensor:
    """Dropout of rows, where there is any."""
    return x if mask is None else mask.apply(x)


def route_functions(model: nn.Module, router: Router) -> None:
    """Put a `RoutedFunction` in the place of every activation function of `model`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if RoutedFunction.takes(child):
                setattr(parent, name, RoutedFunction(child, router))
