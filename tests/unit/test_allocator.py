"""A process that trains starts anew with mimalloc, where that is installed and nothing else is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from snugtune import allocator

LIBRARY = Path("/lib/libmimalloc.so")
ANEW = """
import sys
from snugtune import allocator
allocator.start_anew(sys.argv, sys.orig_argv)
import ctypes, os
from pathlib import Path
mapped = "libmimalloc" in Path("/proc/self/maps").read_text()
print(mapped, hasattr(ctypes.CDLL(None), "mi_collect"), os.environ.get("MIMALLOC_ALLOW_THP"), sys.argv[1:])
"""
FREED = """
import os, torch
from pathlib import Path
from snugtune import allocator
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
blocks = [torch.ones(600_000) for _ in range(100)]
full = resident()
del blocks
kept = resident()
allocator.give_back_freed()
print(full, kept, resident())
"""
installed = pytest.mark.skipif(allocator.installed() is None, reason="cmeel-mimalloc has no library for this system")


def run(code: str, *arguments: str, **variables: str) -> str:
    own = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", allocator.CHOICE)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=own | variables, capture_output=True, text=True, check=True, timeout=60).stdout


@installed
def test_it_begins_again_with_the_same_arguments() -> None:
    assert run(ANEW, "train", "a b", "--set") == "True True 0 ['train', 'a b', '--set']\n"


@installed
def test_not_when_the_system_is_asked_for() -> None:
    assert run(ANEW, "train", **{allocator.CHOICE: "system"}) == "False False None ['train']\n"


@installed
def test_what_is_freed_stays_until_it_is_given_back() -> None:
    chosen = allocator.environment({}, allocator.installed())
    assert chosen is not None
    full, kept, after = map(int, run(FREED, **chosen).split())
    assert kept > full - 10 and after < full - 200  # MiB, of 229


def test_settings_of_the_user_stay() -> None:
    chosen = allocator.environment({"MIMALLOC_ALLOW_THP": "1", "LD_PRELOAD": "/lib/libother.so"}, LIBRARY)
    assert chosen is not None
    assert chosen["MIMALLOC_ALLOW_THP"] == "1" and chosen["LD_PRELOAD"] == f"{LIBRARY} /lib/libother.so"
    assert chosen["MIMALLOC_PURGE_DELAY"] == allocator.SETTINGS["MIMALLOC_PURGE_DELAY"]


@pytest.mark.parametrize("present", ["/usr/lib/libjemalloc.so.2", str(LIBRARY)])
def test_an_allocator_that_is_there_stays(present: str) -> None:
    assert allocator.environment({"LD_PRELOAD": present}, LIBRARY) is None
    assert allocator.environment({}, None) is None


def test_who_only_runs_the_command_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = list[object]()
    monkeypatch.setattr(os, "execve", lambda *how: begun.append(how))
    monkeypatch.setattr(allocator, "installed", lambda: LIBRARY)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv(allocator.CHOICE, raising=False)
    allocator.start_anew(["snugtune", "train", "c.yaml"], ["python", "-c", "from server import main"])
    assert not begun
    allocator.start_anew(["snugtune", "train", "c.yaml"], ["python", "-m", "snugtune", "train", "c.yaml"])
    assert len(begun) == 1
