"""Linear layers whose weights are not in memory: they come block by block, the next one while this one computes.

On CPU a block's bytes are read from its file into one of two buffers (never mapped: mapped pages count as memory). On
CUDA they wait in pinned host memory and are copied to one of two buffers on the device; that part was never run.
"""

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from snugtune.errors import UnreadableError
from snugtune.files import reason
from snugtune.model.blockfile import Index, Kept, Part, bytes_of
from snugtune.model.formats import Dense, Parts
from snugtune.model.frozen import FrozenLinear

Wait = Callable[[], object]
ReadInto = Callable[[memoryview, int], int]
"""Fill a buffer from an offset of the file on; returns the bytes that came, 0 at the end. Raises OSError."""


class Source(Protocol):
    """Where blocks come from."""

    def buffer(self, size: int) -> Tensor:
        """Uninitialised bytes [size] where blocks are computed with."""
        ...

    def start(self, block: int, buffer: Tensor) -> Wait:
        """Begin to fill `buffer` with a block; the returned call ends when it is there. Starts are served in turn."""
        ...

    def again(self, block: int, part: Part) -> Tensor:
        """One tensor of a block, read anew past every buffer."""
        ...


class FileSource:
    """Blocks from a file, read by a thread of its own. `name` is what messages call the file; `read` what reads it."""

    def __init__(self, name: Path, index: Index, read: ReadInto):
        self.name, self.index, self.read = name, index, read
        self.checked: set[int] = set()
        self.worker = ThreadPoolExecutor(1, "snugtune-stream")

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def start(self, block: int, buffer: Tensor) -> Wait:
        return self.worker.submit(self.fill, block, buffer).result

    def again(self, block: int, part: Part) -> Tensor:
        buffer, skipped = torch.empty(part.nbytes, dtype=torch.uint8), 0
        for offset, size in self.index.runs[block]:
            if skipped <= part.offset < skipped + size:  # a part lies in one run
                self.worker.submit(self._read, bytes_of(buffer), offset + part.offset - skipped).result()
            skipped += size
        return replace(part, offset=0).of(buffer)

    def fill(self, block: int, buffer: Tensor) -> None:
        """Read a block. Raises `UnreadableError`, also where its bytes, seen for the first time, are not those written."""
        view, done = bytes_of(buffer), 0
        for offset, size in self.index.runs[block]:
            self._read(view[done : done + size], offset)
            done += size
        if block not in self.checked:
            if zlib.crc32(view[:done]) != self.index.checksums[block]:
                raise UnreadableError(
                    f"{self.name}: block {block} is not what was written (checksum); delete {self.name.parent}, it is made again"
                )
            self.checked.add(block)

    def _read(self, view: memoryview, offset: int) -> None:
        while len(view):
            try:
                count = self.read(view, offset)
            except OSError as error:
                raise UnreadableError(f"{self.name}: cannot be read: {reason(error)}") from error
            if not count:
                raise UnreadableError(f"{self.name}: ends early; it was changed while it was in use")
            view, offset = view[count:], offset + count


class HostSource:
    """Blocks that wait in pinned memory of the host, and are copied to a CUDA device on a stream of their own."""

    def __init__(self, file: FileSource, device: str):
        self.file, self.device = file, torch.device(device)
        self.copies = torch.cuda.Stream(self.device)
        self.waiting: dict[int, Tensor] = {}

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def again(self, block: int, part: Part) -> Tensor:
        return self.file.again(block, part).to(self.device)

    def start(self, block: int, buffer: Tensor) -> Wait:
        if block not in self.waiting:
            pinned = torch.empty(self.file.index.sizes()[block], dtype=torch.uint8, pin_memory=True)
            self.file.fill(block, pinned)
            self.waiting[block] = pinned
        there, done = self.waiting[block], torch.cuda.Event()
        self.copies.wait_stream(torch.cuda.current_stream(self.device))  # who used the buffer before is done with it
        with torch.cuda.stream(self.copies):
            buffer[: len(there)].copy_(there, non_blocking=True)
            done.record(self.copies)
        return lambda: torch.cuda.current_stream(self.device).wait_event(done)


@dataclass
class _Slot:
    """A buffer, the block that it holds or is being filled with, and what waits for that."""

    buffer: Tensor
    block: int | None = None
    wait: Wait | None = None


class Stream:
    """Two buffers: the block in use, and the next one on the way (or the one before, where the way turns round)."""

    def __init__(self, source: Source, sizes: Sequence[int]):
        self.source, self.sizes = source, sizes
        self.slots: list[_Slot] = []  # the one in use first; made when the first block is asked for
        self.step = 1

    @property
    def buffers(self) -> list[Tensor]:
        """Those that there are by now."""
        return [slot.buffer for slot in self.slots]

    def fetch(self, block: int, returns: bool) -> Tensor:
        """The bytes of a block, valid until another is fetched. Raises `UnreadableError`.

        `returns`: whether the way turns round at the last block, as it does in training; else it begins anew.
        """
        if not self.slots:
            self.slots = [_Slot(self.source.buffer(max(self.sizes))) for _ in range(min(2, len(self.sizes)))]
        if self.slots[0].block != block:
            before = self.slots[0].block
            self.slots.reverse()
            if self.slots[0].block != block:
                self._start(self.slots[0], block)
            self._wait(self.slots[0])
            ahead = self._ahead(block, before, returns)
            if ahead not in (None, block, before):
                self._start(self.slots[1], ahead)
        return self.slots[0].buffer

    def _start(self, slot: _Slot, block: int) -> None:
        slot.block = None
        slot.wait = self.source.start(block, slot.buffer)
        slot.block = block

    @staticmethod
    def _wait(slot: _Slot) -> None:
        if slot.wait is not None:
            try:
                slot.wait()
            except BaseException:
                slot.block = None  # whoever asks again reads again
                raise
            finally:
                slot.wait = None

    def _ahead(self, block: int, before: int | None, returns: bool) -> int | None:
        """The block that will be asked for after this one; None: one that is at hand, or nobody knows."""
        last = len(self.sizes) - 1
        if before is not None and abs(block - before) == 1:
            self.step = block - before
        elif block in (0, last):
            self.step = 1 if block == 0 else -1
        if 0 <= block + self.step <= last:
            return block + self.step
        return 0 if self.step == 1 and not returns else None


class StreamedLinear(FrozenLinear):
    """A frozen linear whose parts are in a `Stream`'s buffer while they are used."""

    def __init__(
        self,
        stream: Stream,
        kept: Kept,
        shape: tuple[int, int],
        bias: Tensor | None,
        dtype: torch.dtype,
        transposed: bool = False,
    ):
        super().__init__(kept.format, {}, shape, bias, dtype, transposed)
        self.stream, self.kept = stream, kept

    def parts(self) -> Parts:
        block = self.stream.fetch(self.kept.block, returns=self.training)
        return {name: part.of(block) for name, part in self.kept.parts.items()}

    def fresh_parts(self) -> Parts:
        return {name: self.stream.source.again(self.kept.block, part) for name, part in self.kept.parts.items()}

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[out, in] in the compute dtype; a copy, which outlives the buffer."""
        weight = self.format.decode(self.parts(), self.shape, self.dtype)
        return weight.clone() if isinstance(self.format, Dense) else weight

    @property
    def nbytes(self) -> int:
        """Bytes at rest, wherever that is; bias included."""
        return super().nbytes + self.kept.nbytes
