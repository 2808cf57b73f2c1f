"""One file with the weights of a model's blocks, block after block, each ready to be read into memory in one go.

`weights.bin` holds the bytes, `about.json` what they are: written last, and with a checksum of itself, so that a folder
whose `about.json` is sound was written to the end. Parts lie on 64 bytes (what kernels load at a time), blocks on 4096
(what disks read at a time). A block is a few runs of bytes, in practice one: weights are written in the order in which a
checkpoint gives them, and those of a block follow one another there.
"""

import json
import math
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snugtune.model.formats import Bits4, Dense, Format, Int8, Parts

FORMAT = 1
DATA, ABOUT = "weights.bin", "about.json"
PART, BLOCK = 64, 4096
_FORMATS: dict[str, Any] = {kind.__name__: kind for kind in (Bits4, Dense, Int8)}
_DTYPES = {str(d).removeprefix("torch."): d for d in
           (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """Where one tensor lies in its block. `turned`: what lies there is its transpose (the weight of a Conv1D)."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    turned: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, block: Tensor) -> Tensor:
        """The tensor as a view of its block's bytes."""
        flat = block[self.offset : self.offset + self.nbytes].view(self.dtype)
        return flat.view(self.shape[::-1]).t() if self.turned else flat.view(self.shape)


@dataclass(frozen=True)
class Kept:
    """One weight in the file."""

    block: int
    format: Format
    parts: dict[str, Part]
    sample: bytes  # of the weight before it was encoded
    source: str | None  # the tensor of the checkpoint that it was made of, where there is just one

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


@dataclass
class Index:
    """What the file holds."""

    weights: dict[str, Kept] = field(default_factory=dict)
    runs: list[list[tuple[int, int]]] = field(default_factory=list)  # of each block: (offset in the file, bytes)
    checksums: list[int] = field(default_factory=list)  # CRC32 of each block
    size: int = 0

    def sizes(self) -> list[int]:
        """Bytes of each block."""
        return [sum(size for _, size in runs) for runs in self.runs]

    def to_json(self) -> str:
        weights = {name: _kept_to_dict(kept) for name, kept in self.weights.items()}
        about = {"format": FORMAT, "size": self.size, "runs": self.runs, "checksums": self.checksums, "weights": weights}
        return json.dumps({"about": about, "checksum": _checksum(about)})

    @classmethod
    def read(cls, folder: Path) -> "Index | None":
        """What the file in `folder` holds; None unless it is there, whole, and what it says of itself agrees."""
        try:
            found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            about = found["about"]
            runs = [[(int(a), int(b)) for a, b in block] for block in about["runs"]]
            weights = {name: _kept_of(fields) for name, fields in about["weights"].items()}
            index = cls(weights, runs, about["checksums"], about["size"])
            sound = about["format"] == FORMAT and found["checksum"] == _checksum(about) and index._agrees()
            return index if sound and (folder / DATA).stat().st_size == index.size else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _agrees(self) -> bool:
        sizes = self.sizes()
        ends = [part.offset + part.nbytes <= sizes[k.block] for k in self.weights.values() for part in k.parts.values()]
        return all(ends) and all(a >= 0 and a + b <= self.size for runs in self.runs for a, b in runs)


class Writer:
    """Writes weights as they come. Every method raises OSError where the disk refuses."""

    def __init__(self, folder: Path, blocks: int):
        self.index = Index(runs=[[] for _ in range(blocks)], checksums=[0] * blocks)
        self.folder = folder
        self._file = (folder / DATA).open("wb")
        self._last = -1

    def add(self, name: str, block: int, format: Format, parts: Parts, sample: bytes, source: str | None) -> None:
        """Append one weight's parts to its block."""
        if block != self._last:
            self._fill(BLOCK)
            self.index.runs[block].append((self._file.tell(), 0))
            self._last = block
        lie = {part: self._append(block, tensor) for part, tensor in parts.items()}
        self.index.weights[name] = Kept(block, format, lie, sample, source)

    def finish(self) -> Index:
        """Everything was written: say what."""
        self._fill(BLOCK)
        self.index.size = self._file.tell()
        self._file.close()
        (self.folder / ABOUT).write_text(self.index.to_json(), encoding="utf-8")
        return self.index

    def close(self) -> None:
        """Let go of the file, however far it came."""
        with suppress(OSError):  # what it still had to write does not matter now
            self._file.close()

    def _append(self, block: int, tensor: Tensor) -> Part:
        turned = tensor.dim() == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous()
        lying = (tensor.t() if turned else tensor).detach().cpu().contiguous()
        *before, (start, size) = self.index.runs[block]
        part = Part(sum(n for _, n in before) + size, tensor.dtype, tuple(tensor.shape), turned)
        data = bytes_of(lying.flatten().view(torch.uint8))
        for piece in (data, bytes(-len(data) % PART)):
            self._file.write(piece)
            self.index.checksums[block] = zlib.crc32(piece, self.index.checksums[block])
        self.index.runs[block][-1] = (start, size + len(data) + -len(data) % PART)
        return part

    def _fill(self, multiple: int) -> None:
        self._file.write(bytes(-self._file.tell() % multiple))


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a uint8 tensor on the CPU, to write from or to read into."""
    return memoryview(tensor.numpy())  # pyright: ignore[reportArgumentType]


def room(format: Format, shapes: Sequence[tuple[int, int]]) -> int:
    """Bytes that weights of these shapes take in the file, but for the padding of blocks."""
    layouts = [format.layout(*shape).values() for shape in shapes]
    sizes = [dtype.itemsize * math.prod(shape) for layout in layouts for dtype, shape in layout]
    return sum(-(-size // PART) * PART for size in sizes)


def _checksum(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _kept_to_dict(kept: Kept) -> dict[str, Any]:
    fields = {k: _NAMES.get(v, v) for k, v in asdict(kept.format).items()}  # pyright: ignore[reportArgumentType]
    parts = {name: [p.offset, _NAMES[p.dtype], p.shape, p.turned] for name, p in kept.parts.items()}
    return {
        "block": kept.block,
        "format": {"type": type(kept.format).__name__, **fields},
        "parts": parts,
        "sample": kept.sample.hex(),
        "source": kept.source,
    }


def _kept_of(fields: dict[str, Any]) -> Kept:
    about = dict(fields["format"])
    kind = _FORMATS[about.pop("type")]
    format = kind(**{k: _DTYPES[v] if k == "dtype" else v for k, v in about.items()})
    parts = {name: Part(at, _DTYPES[dtype], tuple(shape), turned) for name, (at, dtype, shape, turned) in fields["parts"].items()}
    if any(part.offset % PART for part in parts.values()):
        raise ValueError("a part that does not lie on 64 bytes")
    return Kept(fields["block"], format, parts, bytes.fromhex(fields["sample"]), fields["source"])
