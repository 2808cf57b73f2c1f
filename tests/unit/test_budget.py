"""What the allocator is told: what forwards leave is given back before a larger one."""

import platform
import subprocess
import sys

import pytest

from snugtune.memory import budget

SCRIPT = """
import os, torch
from pathlib import Path
from snugtune.memory.budget import Watch
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
blocks = [torch.ones(100 << 10, dtype=torch.uint8) for _ in range(3000)]  # too small to be mapped by themselves
pins = blocks[::30]  # nor can the heap shrink
full = resident()
watch = Watch("cpu")
watch.make_room(10)
del blocks
left = resident()
watch.make_room(10)
same = resident()
watch.make_room(11)
print(full, left, same, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="it is glibc that is told")
def test_holes_are_given_back_before_a_larger_forward() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    full, left, same, after = map(int, done.stdout.split())
    assert left > full - 60 and same > full - 60  # MiB, of 300: what the heap keeps by itself
    assert after < full - 200


def test_nothing_is_given_back_before_one_of_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    times = []
    monkeypatch.setattr(budget.allocator, "give_back_freed", lambda: times.append(1))
    watch = budget.Watch("cpu")
    for tokens, before in ((100, 1), (100, 1), (50, 1), (101, 2), (100, 2), (300, 3)):
        watch.make_room(tokens)
        assert len(times) == before
