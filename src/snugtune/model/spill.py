"""Block inputs kept out of memory between forward and backward: on disk for CPU, in the host's memory for CUDA.

With recompute a block needs nothing but its input to do its backward, and autograd saves nothing else of it. Those inputs,
layers x tokens x width numbers, are written away while the next block computes, and are read back in backward one block
ahead, in reverse. Numbers come back as they were, so gradients are those of recompute alone, bit for bit.
"""

import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from snugtune.errors import StorageError, UnreadableError
from snugtune.files import cache_dir, lies_in_memory, make_folder

SMALLEST = 1 << 12
"""Bytes below which a tensor stays where it is: it weighs less than the way there."""
WRITES_AHEAD = 2
"""Tensors that may wait to be written; a forward that is faster than the disk waits for it."""


class Kept(Protocol):
    """One tensor that was put away."""

    def fetch(self) -> None:
        """Begin to bring it back. Idempotent."""
        ...

    def tensor(self) -> Tensor:
        """It, where it was. Raises `UnreadableError`."""
        ...


class Place(Protocol):
    """Where tensors are put away."""

    def put(self, tensor: Tensor) -> Kept:
        """Begin to put a contiguous `tensor` away, and let go of it when that is done."""
        ...


class Spill:
    """Recompute whose block inputs wait in `place`."""

    def __init__(self, place: Place):
        self.place = place
        self.last: Callable[[], Kept | None] = lambda: None  # a weak reference

    def checkpoint(self, block: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
        """`block(*inputs)`, to be computed again in backward. The first, and others with a gradient, wait elsewhere for that.

        The rest is what all blocks share (masks, angles), which stays in memory anyhow.
        """
        tensors = [t for at, t in enumerate(inputs) if isinstance(t, Tensor) and (t.requires_grad or not at)]
        states = {_where(t) for t in tensors if t.nbytes >= SMALLEST}

        def pack(saved: Tensor) -> Tensor | _Packed:
            return self._put(saved) if _where(saved) in states and saved.is_contiguous() else saved

        with saved_tensors_hooks(pack, _unpack):  # within the block torch's own hooks of recompute hold
            return checkpoint(block, *inputs, use_reentrant=False, **settings)

    def _put(self, tensor: Tensor) -> "_Packed":
        packed = _Packed(self.place.put(tensor), self.last)
        self.last = weakref.ref(packed.kept)
        return packed


def _where(tensor: Tensor) -> tuple[int, int]:
    """The same for tensors that begin at the same place in memory, and where there is no memory (meta) too."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


@dataclass(frozen=True)
class _Packed:
    """What autograd holds instead of a tensor: where it is, and the one put away before, which backward wants next."""

    kept: Kept
    before: Callable[[], Kept | None]


def _unpack(packed: Tensor | _Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    packed.kept.fetch()
    before = packed.before()
    if before is not None:
        before.fetch()
    return packed.kept.tensor()


def place_for(device: torch.device) -> Place:
    """Where block inputs on `device` are put away. Raises `StorageError`."""
    if device.type == "meta":
        return Nowhere()
    return HostMemory() if device.type == "cuda" else Disk(cache_dir())


class Disk:
    """A file without a name in `folder`: it is gone with the process, however that ends.

    One thread writes and reads it, straight from and into the tensors' memory. Its room is used again when all that was put
    away is no longer wanted, after each backward.
    """

    def __init__(self, folder: Path):
        make_folder(folder)
        if lies_in_memory(folder):
            raise StorageError(
                f"plan.offload: activations writes to {folder}, which lies in memory itself (tmpfs); set SNUGTUNE_CACHE to a "
                "folder on a disk"
            )
        try:
            self.file = tempfile.TemporaryFile(dir=folder, prefix=".spill-")  # noqa: SIM115 (closed with this object)
        except OSError as error:
            raise StorageError(f"plan.offload: cannot write in {folder}: {error.strerror}; free space or fix it") from error
        self.folder = folder
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="snugtune-spill")
        self.writing: deque[Future[None]] = deque()
        self.wanted: weakref.WeakSet[OnDisk] = weakref.WeakSet()
        self.end = 0

    def put(self, tensor: Tensor) -> "OnDisk":
        if not len(self.wanted):  # their room is free; what is still to be done with it is done first, by the one worker
            self.end = 0
        while len(self.writing) >= WRITES_AHEAD:
            wait([self.writing.popleft()])  # whether it went well is said when it is wanted
        kept = OnDisk(self, self.end, tensor)
        self.end += tensor.nbytes
        self.wanted.add(kept)
        self.writing.append(kept.written)
        return kept

    def write(self, tensor: Tensor, version: int, at: int) -> None:
        """Raises `UnreadableError`."""
        data = memoryview(_bytes(tensor))
        try:
            while data:
                written = os.pwrite(self.file.fileno(), data, at)
                data, at = data[written:], at + written
        except OSError as error:
            raise self._refused("written", error) from error
        if tensor._version != version:  # recompute alone refuses that too
            raise RuntimeError("the input of a block was changed in place while it was put away")

    def read(self, shape: torch.Size, dtype: torch.dtype, at: int) -> Tensor:
        """Raises `UnreadableError`."""
        tensor = torch.empty(shape, dtype=dtype)
        data = memoryview(_bytes(tensor))
        try:
            while data:
                count = os.preadv(self.file.fileno(), [data], at)
                if not count:
                    raise OSError(0, "the file ends too early")
                data, at = data[count:], at + count
        except OSError as error:
            raise self._refused("read back", error) from error
        return tensor

    def _refused(self, what: str, error: OSError) -> UnreadableError:
        why = (error.strerror or str(error)).lower()
        return UnreadableError(
            f"plan.offload: activations cannot be {what} in {self.folder}: {why}; free space there, or set SNUGTUNE_CACHE to "
            "a folder on another disk"
        )


class OnDisk:
    """A tensor in the file of a `Disk`."""

    def __init__(self, disk: Disk, at: int, tensor: Tensor):
        self.disk, self.at, self.shape, self.dtype = disk, at, tensor.shape, tensor.dtype
        self.written = disk.worker.submit(disk.write, tensor, tensor._version, at)
        self.reading: Future[Tensor] | None = None

    def fetch(self) -> None:
        if self.reading is None:  # the one worker does it after the writing
            self.reading = self.disk.worker.submit(self.disk.read, self.shape, self.dtype, self.at)

    def tensor(self) -> Tensor:
        self.fetch()
        assert self.reading is not None
        reading, self.reading = self.reading, None
        self.written.result()
        return reading.result()


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor as a numpy array of bytes."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()


class Nowhere:
    """For tensors that have no memory: what is still held of them is as with `Disk`, where the disk is the slower one."""

    def __init__(self) -> None:
        self.writing: deque[Tensor] = deque(maxlen=WRITES_AHEAD)

    def put(self, tensor: Tensor) -> "OfNothing":
        self.writing.append(tensor)
        return OfNothing(self, tensor)


class OfNothing:
    """The shape of a tensor, from which it is made again."""

    def __init__(self, place: Nowhere, tensor: Tensor):
        self.place, self.shape, self.dtype = place, tensor.shape, tensor.dtype
        self.back: Tensor | None = None

    def fetch(self) -> None:
        self.place.writing.clear()
        if self.back is None:
            self.back = torch.empty(self.shape, dtype=self.dtype, device="meta")

    def tensor(self) -> Tensor:
        self.fetch()
        assert self.back is not None
        back, self.back = self.back, None
        return back


class HostMemory:
    """Pinned memory of the host, for tensors on CUDA, copied by a stream of their own. Never run: there was no GPU to try."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def put(self, tensor: Tensor) -> "InHostMemory":
        return InHostMemory(self.stream, tensor)


class InHostMemory:
    """A tensor of CUDA's in pinned memory of the host."""

    def __init__(self, stream: torch.cuda.Stream, tensor: Tensor):
        self.stream, self.device = stream, tensor.device
        self.copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self.copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given to others before the copy is made
        self.back: Tensor | None = None

    def fetch(self) -> None:
        if self.back is None:
            with torch.cuda.stream(self.stream):  # after the copy there, which this stream made
                self.back = self.copy.to(self.device, non_blocking=True)

    def tensor(self) -> Tensor:
        self.fetch()
        assert self.back is not None
        back, self.back = self.back, None
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        back.record_stream(current)
        return back
