"""What this machine does in a second, measured once and kept: some seconds in a process of its own, of which nothing stays.

`python -m snugtune.memory.probe cpu fp32 FOLDER` prints it, for a device and a compute dtype; FOLDER is where streamed weights
and inputs of blocks would lie. On CPU one thread computes, which others at work on the machine hold up least.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from snugtune import machine
from snugtune.errors import StorageError
from snugtune.files import cache_dir, make_folder, write_whole
from snugtune.memory.speed import ASSUMED, Speed
from snugtune.model.formats import Bits4, Format, Int8
from snugtune.model.load import DTYPES
from snugtune.types import Dense, Width

_SIDE = 1024
"""Of the matrices that are multiplied and decoded."""
_FORMATS: Mapping[Width, Format] = {"int8": Int8(), "nf4": Bits4()}
_FILE = 64 << 20
_REPEATS = 9


def speed_of(device: str, compute: Dense, threads: int, here: bool = True) -> Speed:
    """That of this machine; what is assumed where the device is not `here`, or cannot be measured."""
    if not here:
        return ASSUMED[device]
    folder = cache_dir() / "speed"
    about = (machine.processor().model, device, compute, torch.__version__)
    path = folder / f"{hashlib.blake2b(repr(about).encode(), digest_size=16).hexdigest()}.json"
    try:
        return _of_threads(Speed(**json.loads(path.read_bytes())), threads)
    except (OSError, TypeError, ValueError):
        pass  # it is measured anew
    try:
        make_folder(folder)
        command = [sys.executable, "-P", "-m", "snugtune.memory.probe", device, compute, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = Speed(**json.loads(done.stdout))
    except (StorageError, subprocess.CalledProcessError, ValueError):
        return ASSUMED[device]  # a full disk, no memory: it decides an order, and stops nobody
    with suppress(StorageError):  # then it is measured again
        write_whole(path, json.dumps(asdict(found)))
    return _of_threads(found, threads)


def _of_threads(speed: Speed, threads: int) -> Speed:
    decoded = {name: threads * count for name, count in speed.decoded.items()}
    return replace(speed, flops=threads * speed.flops, decoded=decoded)


def measure(device: str, compute: Dense, folder: Path) -> Speed:
    """Measure this machine; some seconds."""
    cold, warm, written = _file_speeds(folder)
    return Speed(
        flops=_flops(device, DTYPES[compute]),
        decoded={name: _decoded(format, device, DTYPES[compute]) for name, format in _FORMATS.items()},
        read=cold,
        read_cached=warm,
        written=written,
        cache=machine.memory().available / 2,
    )


def _flops(device: str, dtype: torch.dtype) -> float:
    """Additions and multiplications a second, of a product."""
    a, b = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
    return 2 * _SIDE**3 / _seconds(lambda: torch.mm(a, b), device)


def _decoded(format: Format, device: str, dtype: torch.dtype) -> float:
    """Weights a second."""
    weight = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    parts = {name: part.to(device) for name, part in format.encode(weight).items()}

    return weight.numel() / _seconds(lambda: format.decode(parts, (_SIDE, _SIDE), dtype), device)


def _file_speeds(folder: Path) -> tuple[float, float, float]:
    """Bytes a second: read from the disk, read again, written to it."""
    content = bytearray(os.urandom(_FILE))
    with tempfile.NamedTemporaryFile(buffering=0, dir=folder, prefix=".part-") as file:
        begun = time.perf_counter()
        file.write(content)
        os.fsync(file.fileno())
        written = _FILE / (time.perf_counter() - begun)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, _FILE, os.POSIX_FADV_DONTNEED)

        def read() -> None:
            file.seek(0)
            file.readinto(content)

        begun = time.perf_counter()
        read()
        cold = _FILE / (time.perf_counter() - begun)
        return cold, _FILE / _seconds(read), written


def _seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """The shortest of some: what the machine can do, where others do not hold it up."""
    took = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begun)
    return min(took)


def main(device: str, compute: Dense, folder: str) -> None:
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(asdict(measure(device, compute, Path(folder)))))


if __name__ == "__main__":
    main(*sys.argv[1:])  # pyright: ignore[reportArgumentType]
