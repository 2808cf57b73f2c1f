"""Work that is done piece by piece, so that what it takes meanwhile is as large as a piece."""

from collections.abc import Iterator

from torch import Tensor

PIECE = 1 << 18
"""Numbers that are worked on at a time where what that makes is not to be as large as a weight: 1 MiB in fp32."""


def starts(count: int, step: int, like: Tensor) -> range:
    """Where pieces of at most `step` of so many begin.

    Where tensors have no values (`like` is one of them) the last three alone, of which two are whole: a piece may meet what the
    one before it left, but nothing older. So they take what all do, and a model of any size is gone through quickly.
    """
    all_ = range(0, count, max(1, step))
    return all_[-3:] if like.is_meta else all_


def alongside(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same pieces of tensors of one shape, each of at most `PIECE` numbers: views, whatever the strides."""
    first = tensors[0]
    if first.numel() <= PIECE:
        yield tensors
        return
    rows = max(1, PIECE // first[0].numel())
    for start in starts(len(first), rows, first):
        if rows > 1:
            yield tuple(tensor[start : start + rows] for tensor in tensors)
        else:
            yield from alongside(*(tensor[start] for tensor in tensors))
