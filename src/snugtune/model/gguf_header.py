"""What a GGUF file says of itself, checked against its size before anything is built from it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Little-endian; a text is its length (u64) and its bytes.
"""

import math
import struct
from pathlib import Path
from typing import BinaryIO

from snugtune.errors import InputError
from snugtune.files import LFS_POINTER

VERSIONS = (2, 3)
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # kind of value -> bytes
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_MOST_NESTED = 8


class _Header:
    """A reader that never passes the file's end: whatever a length claims, no more is read than there is."""

    def __init__(self, stream: BinaryIO, size: int):
        self.stream, self.size, self.at = stream, size, 0

    def take(self, count: int) -> bytes:
        self._claim(count)
        return self.stream.read(count)

    def skip(self, count: int) -> None:
        self._claim(count)
        self.stream.seek(count, 1)

    def number(self, form: str) -> int:
        return struct.unpack("<" + form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def _claim(self, count: int) -> None:
        if self.at + count > self.size:
            raise ValueError(f"it ends after {self.size} bytes, in the middle of its header")
        self.at += count


def check_gguf(file: Path) -> None:
    """Raises `InputError` unless `file` has a whole header of a known version, and all the tensors that it lists."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(len(LFS_POINTER))
            if first == LFS_POINTER:
                raise InputError(f"model: {file} is a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'")
            if first[:4] != b"GGUF":
                raise InputError(f"model: {file} is not a GGUF file (its first bytes are not 'GGUF')")
            stream.seek(0)
            _check(_Header(stream, size))
    except OSError as error:
        raise InputError(f"model: {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"model: {file} could not be read as GGUF: {error}; get the file anew") from error


def _check(header: _Header) -> None:
    header.skip(4)
    version, tensors, keys = header.number("I"), header.number("Q"), header.number("Q")
    if version not in VERSIONS:
        raise ValueError(f"version {version} (known: {', '.join(map(str, VERSIONS))})")
    alignment = 32
    for _ in range(keys):
        name, kind = header.text(), header.number("I")
        if name == "general.alignment" and kind == 4:
            alignment = header.number("I")
        else:
            _skip_value(header, kind, 0)
    needed = [_end_of_tensor(header) for _ in range(tensors)]
    if not needed or alignment < 1:
        raise ValueError("it holds no tensors" if not needed else "an alignment of 0")
    start = -(-header.at // alignment) * alignment
    if start + max(needed) > header.size:
        raise ValueError(f"its tensors take {start + max(needed)} bytes, but it has {header.size} (cut off?)")


def _skip_value(header: _Header, kind: int, depth: int) -> None:
    if kind in _SCALARS:
        header.skip(_SCALARS[kind])
    elif kind == _TEXT:
        header.skip(header.number("Q"))
    elif kind == _ARRAY and depth < _MOST_NESTED:
        inner, count = header.number("I"), header.number("Q")
        if inner in _SCALARS:
            header.skip(count * _SCALARS[inner])
        else:
            for _ in range(count):
                _skip_value(header, inner, depth + 1)
    else:
        raise ValueError(f"a value of unknown kind {kind}")


def _end_of_tensor(header: _Header) -> int:
    """Bytes from the start of the data to the end of the next listed tensor."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name, dimensions = header.text(), header.number("I")
    if not 0 < dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"tensor '{name}' has {dimensions} dimensions")
    items = math.prod(header.number("Q") for _ in range(dimensions))
    kind, offset = header.number("I"), header.number("Q")
    if kind not in [known.value for known in GGMLQuantizationType]:
        raise ValueError(f"tensor '{name}' is of unknown number format {kind}")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return offset + items // block * size
