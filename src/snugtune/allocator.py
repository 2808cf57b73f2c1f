"""Which malloc a process that trains has: mimalloc, where its library is installed (the package cmeel-mimalloc, on Linux).

glibc's puts small objects between large blocks, and aligned blocks need a little more than they have: a freed one rarely takes
the next of its size. mimalloc keeps large blocks apart. Of SmolLM2 under LoRA with 1024 tokens a forward in fp32, glibc held
490 MiB of such holes at its peak, 2261 MiB; with mimalloc the peak was 1905 MiB, and a step took 0.93 of the processor's time.

A process keeps the allocator that it was started with: the command starts itself anew, before anything is imported.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

KNOWN = ("jemalloc", "tcmalloc", "mimalloc")
"""Besides the system's own."""
CHOICE = "SNUGTUNE_MALLOC"
"""The variable that says `system` where the process is to stay as it is."""
SETTINGS: Mapping[str, str] = {
    "MIMALLOC_PURGE_DELAY": "100000000",  # ms: freed pages stay until given back; to clear new ones took a fifth of a step
    "MIMALLOC_ARENA_EAGER_COMMIT": "0",  # else a GiB counts at once against a limit on data memory (RLIMIT_DATA)
    "MIMALLOC_ALLOW_THP": "0",  # of a page of 2 MiB all is resident: 65 MiB more at that peak
}

_PACKAGE, _LIBRARY = "cmeel-mimalloc", "cmeel.prefix/lib/libmimalloc.so"
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def environment(environ: Mapping[str, str], library: Path | None) -> dict[str, str] | None:
    """The variables to start anew with; None where the process stays as it is: as asked, or as it has an allocator already."""
    preload = environ.get("LD_PRELOAD", "")
    if library is None or environ.get(CHOICE) == "system" or any(name in preload for name in KNOWN):
        return None
    return {**SETTINGS, **environ, "LD_PRELOAD": " ".join(filter(None, (str(library), preload)))}


def installed() -> Path | None:
    """mimalloc's library."""
    try:
        found = Path(str(metadata.distribution(_PACKAGE).locate_file(_LIBRARY)))
    except metadata.PackageNotFoundError:
        return None
    return found if sys.platform == "linux" and found.is_file() else None


def start_anew(argv: Sequence[str], started_as: Sequence[str]) -> None:
    """Let this command, of `argv`, begin again with mimalloc; nothing where that is so, or is not to be.

    Nor where the process was not started as this command (`started_as`), but runs it.
    """
    arguments = list(argv[1:])
    if list(started_as[len(started_as) - len(arguments) :]) != arguments:
        return
    chosen = environment(os.environ, installed())
    if chosen is not None:
        os.execve(sys.executable, [sys.executable, *started_as[1:]], chosen)


def name() -> str:
    """That of this process: one of `KNOWN` that it has mapped, else the system's own (glibc, ...)."""
    maps = Path("/proc/self/maps")
    mapped = maps.read_text(encoding="utf-8", errors="replace") if maps.exists() else ""
    return next((known for known in KNOWN if f"lib{known}" in mapped), platform.libc_ver()[0] or sys.platform)


def of_a_run(environ: Mapping[str, str] = os.environ) -> str:
    """That of a process which trains, started from here."""
    return name() if environment(environ, installed()) is None else "mimalloc"


def give_back_freed() -> None:
    """Return every page that nothing lies in to the system (malloc_trim(3), or what mimalloc has for it)."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mi_collect"):
        library.mi_collect(ctypes.c_bool(True))
    elif platform.libc_ver()[0] == "glibc":
        library.malloc_trim(0)


def give_back_large_blocks() -> bool:
    """Let glibc return every freed block from 128 KiB on to the system at once; says whether it took the setting.

    By itself it raises that limit to the largest block freed so far, and keeps what weights that come and go leave behind:
    220 MiB of a streamed 7B's peak (mallopt(3), M_MMAP_THRESHOLD). mimalloc needs no such word.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mi_collect") or platform.libc_ver()[0] != "glibc":
        return False
    return bool(library.mallopt(_MMAP_THRESHOLD, 128 * 1024))
