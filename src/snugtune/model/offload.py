"""The keeper of weights that stay on disk: those of the linears in blocks; all others stay in memory.

The file is made once for a checkpoint, a format and a compute dtype, and lies under `cache_dir()`. Where it is there, the
checkpoint's own weights are not read again.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from snugtune.errors import SnugtuneError, StorageError
from snugtune.files import cache_dir, claimed, lies_in_memory, make_folder, reason, remove_leftovers, whole_folder
from snugtune.model.blockfile import DATA, FORMAT, Index, Writer, room
from snugtune.model.formats import Format, Parts
from snugtune.model.frozen import FrozenLinear
from snugtune.model.quantize import InMemory, Site
from snugtune.model.stream import FileSource, HostSource, ReadInto, Stream, StreamedLinear

SOURCES = "sources.json"
"""Beside the weights: the files that they were made of, with the sizes and times those had."""
SPOKEN_OF = 1 << 30
"""Bytes from which on the writing takes long enough to tell how far it is."""


class OnDisk(InMemory):
    """Keeps the parts of blocks' linears in the file of `folder`, which `found` describes or which is written to `made`."""

    def __init__(self, folder: Path, format: Format, device: str, say: Callable[[str], None], found: Index | None, made: Path):
        super().__init__()
        self.folder, self.format, self.device, self.say = folder, format, device, say
        self.index, self.made = found, made
        self.writer: Writer | None = None
        self.block_of: dict[str, int] = {}
        self.stream: Stream | None = None
        self.needed = 0  # bytes of the file, before it is written

    @property
    def spared(self) -> frozenset[str]:
        """Tensors of the checkpoint that need not be read: what was made of them is here."""
        kept = [] if self.index is None else self.index.weights.values()
        return frozenset(k.source for k in kept if k.source is not None)

    @property
    def note(self) -> str:
        assert self.index is not None
        where = "read from there block by block" if self.device == "cpu" else "kept in host memory"
        lie = f"the blocks' weights lie in {self.folder} ({_gib(self.index.size)})"
        spared = "; but that is memory itself (tmpfs): set SNUGTUNE_CACHE to a folder on a disk"
        return f"{lie}, {where}; delete it when you no longer need it{spared if lies_in_memory(self.folder) else ''}"

    def begin(self, model: PreTrainedModel, sites: Mapping[str, Site]) -> None:
        """Find the blocks. Raises `StorageError` where there is no room for them, or where the file is of another model."""
        blocks = blocks_of(model)
        owner = {name: max((b for b in blocks if name.startswith(f"{b}.")), key=len, default=None) for name in sites}
        used = [b for b in blocks if b in owner.values()]
        self.block_of = {name: used.index(block) for name, block in owner.items() if block is not None}
        shapes = {name: sites[name].shape for name in self.block_of}
        if self.index is not None:
            if not _is_of(self.index, self.block_of, shapes):
                raise StorageError(f"{self.folder} holds the weights of another model; delete it, it is made again")
            return
        self.needed = room(self.format, list(shapes.values()))
        free = shutil.disk_usage(self.made).free
        if free < self.needed:
            raise StorageError(self._no_room(f"{_gib(free)} are free"))
        self.say(f"writing the blocks' weights to {self.folder} (once; {_gib(self.needed)})")
        self.writer = Writer(self.made, len(used))

    def known(self, name: str) -> bytes | None:
        kept = None if self.index is None else self.index.weights.get(name)
        return None if kept is None else kept.sample

    def keep(self, name: str, site: Site, format: Format, parts: Parts, sample: bytes, source: str | None) -> None:
        if name not in self.block_of:
            super().keep(name, site, format, parts, sample, source)
            return
        assert self.writer is not None
        try:
            self.writer.add(name, self.block_of[name], format, parts, sample, source)
        except OSError as error:
            raise StorageError(self._no_room(reason(error))) from error
        self._tell_progress(len(self.writer.index.weights))

    def end(self) -> None:
        if self.writer is not None:
            try:
                self.index = self.writer.finish()
            except OSError as error:
                raise StorageError(self._no_room(reason(error))) from error
        assert self.index is not None
        try:
            read = opened(self.made / DATA)  # where it lies now; it may be renamed while it is open
        except OSError as error:
            raise StorageError(f"{self.folder / DATA}: cannot be read: {reason(error)}") from error
        source = FileSource(self.folder / DATA, self.index, read)
        self.stream = Stream(source if self.device == "cpu" else HostSource(source, self.device), self.index.sizes())

    def linear(self, name: str, site: Site, bias: Tensor | None) -> FrozenLinear:
        if name not in self.block_of:
            return super().linear(name, site, bias)
        assert self.index is not None and self.stream is not None
        return StreamedLinear(self.stream, self.index.weights[name], site.shape, bias, site.dtype, site.transposed)

    def _no_room(self, why: str) -> str:
        return (
            f"cannot write {self.folder}: the blocks' weights need {_gib(self.needed)}, {why}; free space, or set "
            "SNUGTUNE_CACHE to a folder on another disk"
        )

    def _tell_progress(self, done: int) -> None:
        total = len(self.block_of)
        quarter, before = 4 * done // total, 4 * (done - 1) // total
        if quarter > before and done < total and self.needed >= SPOKEN_OF:
            self.say(f"writing the blocks' weights: {25 * quarter} %")


@contextmanager
def on_disk(files: Sequence[str], about: str, format: Format, device: str, say: Callable[[str], None]) -> Iterator[OnDisk]:
    """The keeper for a model of these `files`, of which `about` is all else that what is kept depends on.

    What is written inside the block is there for others when the block ends well. Raises `StorageError`.
    """
    stats = [_stat(Path(file).resolve()) for file in files]
    key = repr((FORMAT, transformers.__version__, stats, about, format))
    folder = Path(files[0]).parent
    name = folder.parents[1].name if folder.parent.name == "snapshots" else folder.name  # as the hub's cache calls a model
    name = re.sub(r"[^\w.-]", "_", name)[:60]
    place = cache_dir() / "streamed" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    target = place / "blocks"
    found = Index.read(target)
    if found is None:
        make_folder(place)
        with claimed(place, waiting=say):
            found = Index.read(target)  # another process may have made it meanwhile
            if found is None:
                remove_leftovers(place)
                _remove_outdated(place, name, say)
                with whole_folder(target) as made:
                    keeper = OnDisk(target, format, device, say, None, made)
                    try:
                        yield keeper
                    finally:
                        if keeper.writer is not None:
                            keeper.writer.close()
                    (made / SOURCES).write_text(json.dumps(stats), encoding="utf-8")
                return
    yield OnDisk(target, format, device, say, found, target)


def _stat(path: Path) -> tuple[str, int, int]:
    about = path.stat()
    return str(path), about.st_size, about.st_mtime_ns


def _remove_outdated(place: Path, name: str, say: Callable[[str], None]) -> None:
    """Remove what was made for the model `name` of files that have changed since, or are gone.

    What another process is writing stays. A process that reads one goes on: it has the file open.
    """
    freed = 0
    for other in set(place.parent.glob(f"{name}-{12 * '[0-9a-f]'}")) - {place}:
        outdated = _is_outdated(other / "blocks")
        with suppress(OSError, SnugtuneError), claimed(other):
            before = _bytes_below(other)
            remove_leftovers(other)
            if outdated:
                shutil.rmtree(other / "blocks", ignore_errors=True)
            freed += before - _bytes_below(other)
        if outdated:
            with suppress(OSError):  # it still holds something
                other.rmdir()
    if freed:
        say(f"removed what was kept in {place.parent} of earlier files of {name} ({_gib(freed)})")


def _is_outdated(folder: Path) -> bool:
    try:
        sources = [(str(path), size, time) for path, size, time in json.loads((folder / SOURCES).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):  # nobody knows what this was made of
        return False
    try:
        return any(_stat(Path(source[0])) != source for source in sources)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def opened(path: Path) -> ReadInto:
    """Reads that file, straight into buffers."""
    file = path.open("rb", buffering=0)

    def read(view: memoryview, offset: int) -> int:
        file.seek(offset)
        return file.readinto(view)

    return read


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the model's blocks, in their order: what transformers recomputes one by one, else the longest list of modules."""
    modules = dict(model.named_modules())
    blocks = [name for name, module in modules.items() if isinstance(module, GradientCheckpointingLayer)]
    if blocks:
        return [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    lists = [(len(module), name) for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    length, name = max(lists, default=(0, ""))
    return [f"{name}.{i}" for i in range(length)]


def _is_of(index: Index, block_of: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> bool:
    if {name: kept.block for name, kept in index.weights.items()} != dict(block_of):
        return False
    layouts = {name: {n: (p.dtype, p.shape) for n, p in kept.parts.items()} for name, kept in index.weights.items()}
    return all(layouts[name] == dict(index.weights[name].format.layout(*shape)) for name, shape in shapes.items())


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 28 else f"{count / 2**20:.1f} MiB"
