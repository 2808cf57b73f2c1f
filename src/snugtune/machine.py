"""Facts about this machine and this process: processor, memory, disks, threads, allocator, devices, and the settings of the last.

Nothing here computes.

Each function takes the place it reads from, so that other machines can be shown to it. Sizes are in bytes.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch

from snugtune.allocator import KNOWN

ROOT = Path("/")
FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimd", "asimdhp", "bf16", "i8mm", "sve"),
)
"""What decides how fast matrix products are, in the kernel's names: x86-64, then ARM."""
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""What bounds the compiled products that are kept: by oneDNN, and by torch's bridge to it (ideep). 1024 each, if not set."""
KERNELS = 64
"""Compiled products to keep for a job in a forward: SmolLM2 under LoRA uses 40 to 60, with those of attention for each length."""
_KERNELS_BY_DEFAULT = 1024
_UNLIMITED = 2**60
"""cgroup v1 says "no limit" with a number near 2^63."""


@dataclass(frozen=True)
class Processor:
    """`features`: those of `FEATURES` it has; `capability`: the widest vectors torch's own kernels use."""

    model: str
    features: tuple[str, ...]
    capability: str
    cores: int  # of the machine
    usable: int  # that this process may run on


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    capability: str
    total: int
    free: int


@dataclass(frozen=True)
class Memory:
    """Of the machine; `limit` is the container's (cgroup), where it is lower, and `limit_free` what it leaves."""

    total: int
    available: int
    limit: int | None
    limit_free: int | None


@dataclass(frozen=True)
class Folder:
    """A folder that fills up: what is in it, and what its disk has left."""

    name: str
    path: str
    used: int | None  # None: not counted
    free: int


@dataclass(frozen=True)
class Threads:
    """torch's threads inside an operation, and the variables that set them."""

    torch: int
    interop: int
    omp_num_threads: str | None
    mkl_num_threads: str | None
    cpu_quota: float | None  # cores' worth of time that the container allows; None: all


@dataclass(frozen=True)
class Allocator:
    """Which malloc this process has, and its settings. `arenas`: glibc's, at most."""

    name: str
    ld_preload: str | None
    malloc_arena_max: str | None
    arenas: int | None
    kernels: tuple[str | None, ...]  # the values of `KERNEL_CACHES`


def processor(root: Path = ROOT) -> Processor:
    """From /proc/cpuinfo where there is one."""
    entries = _fields(root / "proc/cpuinfo")
    flags = set((entries.get("flags") or entries.get("Features") or "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Processor(
        entries.get("model name") or platform.processor() or platform.machine(),
        tuple(f for f in FEATURES if f in flags),
        torch.backends.cpu.get_cpu_capability(),
        os.cpu_count() or 1,
        usable,
    )


def memory(root: Path = ROOT) -> Memory:
    """From /proc/meminfo and the cgroups this process is in; elsewhere what the system says of its pages."""
    entries = _fields(root / "proc/meminfo")
    if "MemTotal" in entries:
        total, available = (int(entries[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = total
    limits = [(limit, limit - used) for limit, used in _cgroups(root) if limit < min(total, _UNLIMITED)]
    limit, limit_free = min(limits, key=lambda pair: pair[1], default=(None, None))
    return Memory(total, available, limit, None if limit_free is None else max(0, limit_free))


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of every memory cgroup around this process, v2 and v1."""
    for version, folder in _cgroup_folders(root, "memory"):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_read(folder / name) for name in names)
        if limit and used and limit.strip().isdigit():
            yield int(limit), int(used)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that the tightest cgroup around this process allows, v2 and v1; None where none does."""
    found = []
    for version, folder in _cgroup_folders(root, "cpu"):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        fields = " ".join(_read(folder / name) or "" for name in names).split()
        if len(fields) == 2 and all(field.isdigit() for field in fields):  # else "max", or -1
            found.append(int(fields[0]) / int(fields[1]))
    return min(found, default=None)


def _cgroup_folders(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(1 or 2, folder) of every cgroup around this process with `controller`. Inside a container its own stands at the top."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        inner = mount / path.strip("/")
        for folder in (inner, *inner.parents):
            yield (1 if controllers else 2), folder
            if folder == mount:
                break


def gpus() -> tuple[Gpu, ...]:
    """Every CUDA device that torch finds."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        capability = ".".join(str(n) for n in torch.cuda.get_device_capability(index))
        found.append(Gpu(torch.cuda.get_device_name(index), capability, total, free))
    return tuple(found)


def folder(name: str, path: Path, count: bool = False) -> Folder:
    """`count` adds up what lies below `path`, links not followed."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return Folder(name, str(path), _size(path) if count else None, shutil.disk_usage(there).free)


def _size(path: Path) -> int:
    total = 0
    for place, _, files in os.walk(path):
        for file in files:
            try:
                total += os.lstat(os.path.join(place, file)).st_size
            except OSError:  # gone since it was listed
                continue
    return total


def threads(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> Threads:
    omp, mkl = environ.get("OMP_NUM_THREADS"), environ.get("MKL_NUM_THREADS")
    return Threads(torch.get_num_threads(), torch.get_num_interop_threads(), omp, mkl, cpu_quota(root))


def allocator(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> Allocator:
    """What is mapped into the process counts; LD_PRELOAD where that cannot be seen."""
    preload, most = environ.get("LD_PRELOAD"), environ.get("MALLOC_ARENA_MAX")
    loaded = f"{_read(root / 'proc/self/maps') or ''} {preload or ''}"
    own = platform.libc_ver()[0] or sys.platform
    name = next((a for a in KNOWN if f"lib{a}" in loaded), own)
    arenas = None
    if name == "glibc":
        arenas = int(most) if most and most.isdigit() and int(most) else 8 * (os.cpu_count() or 1)  # mallopt(3), M_ARENA_MAX
    return Allocator(name, preload, most, arenas, tuple(environ.get(cache) for cache in KERNEL_CACHES))


def keep_few_kernels(jobs: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Bound the compiled products that are kept, for a run whose forwards hold so many jobs. What is set already stays.

    oneDNN compiles one for each shape, of a quarter to half a MiB, in half a millisecond; and most forwards have a number of rows
    that never comes again. By themselves its caches grow to 1024 each, half a GiB. Both are sized at the first product of a
    process: after that this does nothing.
    """
    for cache in KERNEL_CACHES:
        environ.setdefault(cache, str(min(KERNELS * jobs, _KERNELS_BY_DEFAULT)))


def _fields(path: Path) -> dict[str, str]:
    """`name: value` lines; the first of each name."""
    found: dict[str, str] = {}
    for line in (_read(path) or "").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
