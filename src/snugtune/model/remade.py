"""What backward makes again instead of keeping it: what a linear is given, where little work makes it of what is kept anyhow."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[..., Tensor]

_ORIGIN = "_snugtune_origin"


class Remade:
    """A tensor as it was in forward, made again by `function` in backward: once for all who need it, until one forgets it."""

    def __init__(self, function: Function):
        self.function = function
        self._tensor: Tensor | None = None
        self.marked: Callable[[], Tensor | None] = lambda: None  # what says so of itself: a weak reference

    def of(self, kept: Sequence[Tensor]) -> Tensor:
        """It, of what was kept."""
        if self._tensor is None:
            self._tensor = self.function(*kept)
        return self._tensor

    def forget(self) -> None:
        """All have had it: neither it nor what it is made of is held any more, though the first one may live on."""
        self._tensor, marked = None, self.marked()
        if marked is not None:
            vars(marked).pop(_ORIGIN, None)  # gone already where one goes back twice


@dataclass(frozen=True)
class Origin:
    """What a tensor was made of: who keeps `inputs` for backward need not keep it.

    They are kept by who made it anyhow, if that has a backward.
    """

    remade: Remade
    inputs: tuple[Tensor, ...]


def made_of(tensor: Tensor, origin: Origin) -> Tensor:
    """Say of a tensor what it was made of. It holds for this object as it is now, not for views, nor once it is written to."""
    setattr(tensor, _ORIGIN, (origin, tensor._version))
    origin.remade.marked = weakref.ref(tensor)
    return tensor


def origin_of(tensor: Tensor) -> Origin | None:
    """What `made_of` said of it, where that holds still."""
    said = getattr(tensor, _ORIGIN, None)
    return said[0] if said is not None and said[1] == tensor._version else None


def another(tensor: Tensor) -> Tensor:
    """A view of all of it that is one more use to autograd; made of the same."""
    view, origin = tensor.view_as(tensor), origin_of(tensor)
    return view if origin is None else made_of(view, origin)


def again(function: Function | None, saved: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
    """In backward: what came in, and what the linear was given, with the way back from one to the other; see `through`."""
    if function is None:
        return saved, saved[0]
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in saved]
        return leaves, function(*leaves)


def through(x: Tensor, inputs: Sequence[Tensor], dx: Tensor | None, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of `inputs`, from `again`, given that of x. Those of inputs that are not wanted are None."""
    if dx is None or x is inputs[0]:
        return [dx] * len(inputs)
    found = iter(torch.autograd.grad(x, [tensor for tensor, want in zip(inputs, wanted, strict=True) if want], dx))
    return [next(found) if want else None for want in wanted]
