"""Work that is done piece by piece, so that what it takes meanwhile is as large as a piece."""

from torch import Tensor


def starts(count: int, step: int, like: Tensor) -> range:
    """Where pieces of at most `step` of so many begin.

    Where tensors have no values (`like` is one of them) the last three alone, of which two are whole: a piece may meet what the
    one before it left, but nothing older. So they take what all do, and a model of any size is gone through quickly.
    """
    all_ = range(0, count, max(1, step))
    return all_[-3:] if like.is_meta else all_
