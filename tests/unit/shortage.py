"""Memory that runs out where a test wants it to: at a chosen operator of those that torch's dispatcher is given."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SAID = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."


class RunsOut(TorchDispatchMode):
    """The allocator's error at the n-th operator inside the block, once; n = 0: never. `count` are those there were.

    Backward's are among them, as it runs in the thread that calls it.
    """

    def __init__(self, at: int = 0):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise RuntimeError(SAID)
        return func(*args, **(kwargs or {}))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The L2 distance of `a` from `b`, as a share of `b`'s norm."""
    return float((a - b).norm() / b.norm())
