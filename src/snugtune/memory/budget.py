"""How much memory this process has used and may use."""

import os
import resource
import sys
from pathlib import Path

import torch

from snugtune import allocator, machine

_CLEAR = Path("/proc/self/clear_refs")
CONTEXT = 550 * 2**20
"""CUDA's own, with the kernels that a run loads: 2044 bytes for each thread that the device can hold, and 6 MiB (published sizes
of five GPUs lie within 15 MiB of that: 414 MiB on an A100), and 150 MiB of kernels, loaded lazily."""


class Watch:
    """Reads the peak since it was made: resident memory of the process on CPU, what the allocator holds on CUDA. In bytes.

    `budget`: what there is to use. On CUDA the allocator itself keeps what is left of it beside the context: it says that memory
    ran out, where more is wanted.
    """

    def __init__(self, device: str, budget: int | None = None):
        self.device, self.budget = device, budget
        self.largest = 0  # tokens of a forward so far
        self.highest = 0  # before it was last asked whether the budget was exceeded
        self.before = torch.cuda.memory_allocated() if device == "cuda" else resident()  # in use when this was made
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            if budget is not None:
                total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, budget - CONTEXT) / total))
        else:
            _forget_peak()

    def peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_reserved()
        return max(self.highest, peak_rss())

    def make_room(self, tokens: int) -> None:
        """Before a forward of so many tokens: where it is the largest so far, give back what smaller ones left.

        That lies in holes too small for it, which glibc would keep beside what it makes for this one, as mimalloc may.
        """
        if tokens > self.largest:
            self.largest = tokens
            allocator.give_back_freed()

    def give_back(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()
        else:
            allocator.give_back_freed()

    def exceeded(self) -> bool:
        """Whether the process had more in memory than the budget since this was last asked.

        Where the system does not let the peak be set back: whether it was higher than ever.
        """
        if self.budget is None or self.device == "cuda" or peak_rss() <= self.budget:
            return False
        told, self.highest = self.highest, self.peak()
        allocator.give_back_freed()
        return _forget_peak() or self.highest > told  # a peak that cannot be set back tells of itself once


def _forget_peak() -> bool:
    """Set VmHWM back to what is resident now (proc(5)); whether that can be done."""
    if os.access(_CLEAR, os.W_OK):
        _CLEAR.write_text("5")
        return True
    return False


def free_memory(device: str) -> int:
    """Bytes that this process could still have, within its container's limit and its own (RLIMIT_DATA)."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    ram = machine.memory()
    limits = [left for left in (ram.limit_free, _data_left()) if left is not None]
    return min([ram.available, *limits])


def _data_left() -> int | None:
    """Bytes of data that the process may still ask for; None where nobody set a limit, or the system does not hold it."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY or sys.platform != "linux":
        return None
    return max(0, limit - _told("VmData"))


def peak_rss() -> int:
    """The process's highest resident set so far (VmHWM), in bytes."""
    return _told("VmHWM")


def resident() -> int:
    """What of the process is in memory now, in bytes; where the system does not say, the highest so far."""
    return _told("VmRSS")


def _told(field: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
