"""Optimizer state in 8 bits, by blocks (Dettmers et al. 2021, arXiv 2110.02861), around any elementwise optimizer.

A step goes through each weight in pieces: the state of a piece becomes fp32, the optimizer itself steps the piece, its state
goes back to 8 bits. What is learned differs from the optimizer's own by the rounding of its state alone, and memory holds one
piece in fp32, where bitsandbytes' step on CPU makes whole weights' states fp32 again: 20 bytes a weight at once. The numbers
that 8 bits stand for are bitsandbytes' dynamic map. They are found here, since its quantizer on CPU looks values up on a
uniform grid of 2^-15: it takes all that is below 1.5e-5 of a block's largest for +2.1e-5, zeros and negative numbers too.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Weights that share a scale."""
SMALLEST = 4096
"""Elements below which a weight's state stays in fp32 (norms, biases): it is small, and they are sensitive."""
PIECE = 1 << 18  # elements; whole blocks

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


class NarrowState(torch.optim.Optimizer):
    """The optimizer that `make` gives, its state kept in 8 bits: a byte and 4/256 of one for each number of a weight.

    `kept`: the entries of its state that are kept so, each as large as the weight -> whether they can be negative.
    `paged`: they lie in (pinned) host memory, and a piece at a time is fetched to where the weight is.
    """

    def __init__(self, parameters: Iterable[Tensor], make: Make, kept: Mapping[str, bool], paged: bool = False):
        self.inner = make([torch.zeros(1, requires_grad=True)])  # it is shown one piece at a time
        super().__init__(parameters, self.inner.defaults)
        self.kept, self.paged = dict(kept), paged

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the loss is not evaluated here"
        for group in self.param_groups:
            settings = {k: v for k, v in group.items() if k != "params"}
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(weight, settings)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would make fp32 of the codes. Raises `ValueError` for the state of other weights."""
        super().load_state_dict(state_dict | {"state": {}})
        weights = [w for group in self.param_groups for w in group["params"]]
        if not set(state_dict["state"]) <= set(range(len(weights))):
            raise ValueError("the optimizer's state is of more weights than there are")
        for index, entry in state_dict["state"].items():
            weight = weights[index]
            fresh = self._room(weight)
            told = {k: (v.shape, v.dtype) for k, v in entry.items() if k in fresh}
            if told != {k: (v.shape, v.dtype) for k, v in fresh.items()}:
                raise ValueError(f"the optimizer's state of weight {index} is not what is kept of it in 8 bits")
            for name, part in fresh.items():
                part.copy_(entry[name])
            rest = {k: v for k, v in entry.items() if k not in fresh}
            moved = {k: v.to(weight.device, copy=True) if isinstance(v, Tensor) else v for k, v in rest.items()}
            self.state[weight] = fresh | moved

    def _step(self, weight: Tensor, settings: Mapping[str, Any]) -> None:
        assert weight.grad is not None
        flat, gradient, state = weight.detach().reshape(-1), weight.grad.reshape(-1), self.state[weight]
        if flat.numel() < SMALLEST:
            state.update(self._inner_step(flat, gradient, state, settings))
        else:
            self._step_in_pieces(weight, flat, gradient, state, settings)
        if not weight.is_contiguous():  # flat is a copy then
            weight.copy_(flat.view_as(weight))

    def _step_in_pieces(
        self, weight: Tensor, flat: Tensor, gradient: Tensor, state: dict[str, Any], settings: Mapping[str, Any]
    ) -> None:
        first = not state
        if first:
            state.update(self._room(weight))
        rest = {k: v for k, v in state.items() if k.removesuffix(".scale") not in self.kept}  # counts of steps
        after: dict[str, Any] = {}
        for at in range(0, flat.numel(), PIECE):
            part, blocks = slice(at, at + PIECE), slice(at // BLOCK, (at + PIECE) // BLOCK)
            wide = {name: self._widened(state, name, part, blocks, flat.device) for name in ({} if first else self.kept)}
            copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in rest.items()}  # each piece counts for itself
            after = self._inner_step(flat[part], gradient[part], wide | copies, settings)
            for name, signed in self.kept.items():
                codes, scales = quantize(after.pop(name), signed)
                state[name][part].copy_(codes)
                state[f"{name}.scale"][blocks].copy_(scales)
        state.update(after)

    def _inner_step(
        self, flat: Tensor, gradient: Tensor, state: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The optimizer's own step of some numbers, in place. Returns its state after."""
        flat.grad = gradient
        group = self.inner.param_groups[0]
        group.update(settings, params=[flat])
        self.inner.state[flat].update(state)
        self.inner.step()
        group["params"] = []  # else it would hold on to the weights and the gradient
        return dict(self.inner.state.pop(flat))

    def _widened(self, state: Mapping[str, Tensor], name: str, part: slice, blocks: slice, device: torch.device) -> Tensor:
        codes, scales = (t.to(device, non_blocking=True) for t in (state[name][part], state[f"{name}.scale"][blocks]))
        return dequantize(codes, scales, self.kept[name])

    def _room(self, weight: Tensor) -> dict[str, Tensor]:
        """Where the kept state of a weight goes; nothing for a small one."""
        count = weight.numel()
        if count < SMALLEST:
            return {}
        sizes = {name: (count, torch.uint8) for name in self.kept}
        sizes |= {f"{name}.scale": (math.ceil(count / BLOCK), torch.float32) for name in self.kept}
        device = torch.device("cpu") if self.paged else weight.device
        pinned = self.paged and weight.is_cuda
        return {k: torch.zeros(n, dtype=dtype, device=device, pin_memory=pinned) for k, (n, dtype) in sizes.items()}


def narrow_bytes(numbers: int, shape: Sequence[int]) -> int:
    """Bytes of so many numbers that are remembered of a weight."""
    return 4 * numbers if math.prod(shape) < SMALLEST else numbers + 4 * math.ceil(numbers / BLOCK)


def widened_bytes(shape: Sequence[int]) -> int:
    """What the step of a weight makes meanwhile: of a piece some tensors in fp32, and the codes of its numbers as indices."""
    return 32 * min(math.prod(shape), PIECE)


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """fp32 [n] -> (codes uint8 [n], the largest magnitude of each block fp32 [ceil(n / 256)]).

    Each goes to the nearest number of the map, after a rounding to fp16 that moves it by at most 2^-11 of itself, or 3e-8 of
    its block's largest. Of the unsigned (squared gradients) none goes to zero: a step would divide by its epsilon alone.
    """
    tail = -values.numel() % BLOCK
    padded = torch.nn.functional.pad(values, (0, tail)).view(-1, BLOCK)
    scales = padded.abs().amax(1)
    scaled = padded / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    halves = scaled.half().view(torch.int16).view(-1)[: values.numel()]
    return _nearest(signed, values.device).index_select(0, halves.int() + 32768), scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The inverse of `quantize`, fp32 [n]."""
    numbers = dynamic_map(signed, codes.device).index_select(0, codes.int())
    tail = -codes.numel() % BLOCK
    return torch.nn.functional.pad(numbers, (0, tail)).view(-1, BLOCK).mul_(scales[:, None]).view(-1)[: codes.numel()]


@functools.cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers that codes stand for, ascending, at most 1."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=signed).to(device)


@functools.cache
def _nearest(signed: bool, device: torch.device) -> Tensor:
    """The code of every fp16 number, by its bits plus 2^15."""
    numbers = dynamic_map(signed, torch.device("cpu"))
    halves = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16).float().nan_to_num(0.0)
    codes = torch.bucketize(halves, (numbers[1:] + numbers[:-1]) / 2).to(torch.uint8)
    if not signed:
        codes.clamp_min_(1)
    return codes.to(device)
