"""Work that is done piece by piece, so that what it takes meanwhile is as large as a piece."""

from torch import Tensor


def starts(count: int, step: int, like: Tensor) -> range:
    """Where pieces of at most `step` of so many begin.

    Where tensors have no values (`like` is one of them) the last two alone, of which one is whole: nothing of a piece is left
    when the next begins, so two take what all do, and a model of any size is gone through as quickly as a small one.
    """
    all_ = range(0, count, max(1, step))
    return all_[-2:] if like.is_meta else all_
