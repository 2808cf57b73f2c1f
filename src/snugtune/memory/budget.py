"""How much memory this process has used and may use, and what its allocator gives back."""

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

import torch

from snugtune import machine

_CLEAR = Path("/proc/self/clear_refs")
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


class Watch:
    """Reads the peak since it was made: resident memory of the process on CPU, allocated memory on CUDA. In bytes."""

    def __init__(self, device: str):
        self.device = device
        self.largest = 0  # tokens of a forward so far
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif os.access(_CLEAR, os.W_OK):
            _CLEAR.write_text("5")  # sets VmHWM back to what is resident now (proc(5))

    def peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return peak_rss()

    def make_room(self, tokens: int) -> None:
        """Before a forward of so many tokens: where it is the largest so far, give back what smaller ones left.

        That lies in holes too small for it, which glibc would keep beside what it makes for this one.
        """
        if tokens > self.largest:
            self.largest = tokens
            give_back_freed()

    def give_back(self) -> None:
        """After work that memory was too short for: give back what it held."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
        else:
            give_back_freed()

    def exceeded(self) -> bool:
        """Whether more was used than there is to use since this was last asked: never, where nobody set a limit."""
        return False


def free_memory(device: str) -> int:
    """Bytes that this process could still have, within its container's limit."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    ram = machine.memory()
    return ram.available if ram.limit_free is None else min(ram.available, ram.limit_free)


def give_back_large_blocks() -> bool:
    """Let glibc return every freed block from 128 KiB on to the system at once; says whether it took the setting.

    By itself it raises that limit to the largest block freed so far, and keeps what weights that come and go leave behind:
    220 MiB of a streamed 7B's peak (mallopt(3), M_MMAP_THRESHOLD).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 128 * 1024))


def give_back_freed() -> None:
    """Let glibc return every page that nothing lies in to the system (malloc_trim(3))."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def peak_rss() -> int:
    """The process's highest resident set so far (VmHWM), in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
