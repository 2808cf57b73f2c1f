"""Reading records from files. A record is whatever a line of JSON, a row of a table or a text document holds.

Each record comes with its place, `file:line` (`file:row` in tables without lines). Syntax errors are refused with it.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from snugtune.errors import InputError

Records = Iterator[tuple[str, Any]]
Numbered = Iterator[tuple[int, Any]]


def read_records(path: Path) -> Records:
    """(place, record) of a file, or of all readable files in a folder, by name. Raises `InputError`."""
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _ending(p) in READERS)
        if not found:
            raise InputError(f"data: folder {path} holds no file that snugtune reads ({ENDINGS})")
        for file in found:
            yield from read_records(file)
        return
    if not path.is_file():
        raise InputError(f"data: no file {path} (looked from {Path.cwd()})")
    if _ending(path) not in READERS:
        raise InputError(f"data: {path}: unknown ending '{path.suffix}'; snugtune reads {ENDINGS}")
    for line, record in READERS[_ending(path)](_read(path), path):
        yield f"{path}:{line}", record


def _ending(path: Path) -> str:
    """The ending that tells the form, less `.gz`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"data: {path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise InputError(f"data: {path} cannot be read: {error.strerror}") from error


def _decoded(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"data: {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _json_lines(raw: bytes, path: Path) -> Numbered:
    yield from _lines_of_json(_decoded(raw, path), path)


def _csv_rows(raw: bytes, path: Path) -> Numbered:
    """Rows as mappings by the header's names. Separated by commas, semicolons or tabs: what the header has most of."""
    text = _decoded(raw, path)
    header = text.split("\n", 1)[0]
    csv.field_size_limit(sys.maxsize)  # the default refuses cells over 128 KiB
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    line = 1
    try:
        names = rows.fieldnames or []
        if len(set(names)) < len(names) or "" in names:
            raise InputError(f"data: {path}:1: the header needs a name of its own for each column")
        line = rows.line_num + 1
        for row in rows:
            if None in row or None in row.values():
                raise InputError(f"data: {path}:{line}: not as many cells as the header's {len(names)}")
            yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise InputError(f"data: {path}:{line}: not valid CSV: {error}") from error


def _parquet_rows(raw: bytes, path: Path) -> Numbered:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"data: {path}: parquet files need an extra: pip install 'snugtune[data]'") from error
    try:
        batches = pyarrow.parquet.ParquetFile(io.BytesIO(raw)).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(rows, 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data: {path} is not a whole parquet file: {error}") from error


def _document(raw: bytes, path: Path) -> Numbered:
    """A text file is one document."""
    yield 1, {"text": _decoded(raw, path)}


def _lines_of_json(text: str, path: Path) -> Numbered:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _decode(line, path, number)


def _decode(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"data: {path}:{number}: not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"data: {path}:{number}: {_odd_json(error)}") from error


def _odd_json(error: Exception) -> str:
    """What is wrong with JSON that is well-formed but that nothing sensible would write."""
    return "JSON nested too deeply" if isinstance(error, RecursionError) else f"not usable JSON: {error}"


def _json_array(raw: bytes, path: Path) -> Numbered:
    """The records of a JSON array with the line each starts on; a file of JSON lines named .json is read as such."""
    text = _decoded(raw, path)
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "{":
        yield from _lines_of_json(text, path)
        return
    if text[start : start + 1] != "[":
        raise InputError(f"data: {path}:1: expected a JSON array of records ('[')")
    decoder, at, line, counted = json.JSONDecoder(), start + 1, 1, 0
    while True:
        at = _skip(text, at, " \t\r\n")
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            rest = _skip(text, at + 1, " \t\r\n")
            if rest < len(text):
                raise InputError(f"data: {path}:{text.count(chr(10), 0, rest) + 1}: something follows the array's end")
            return
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise InputError(f"data: {path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"data: {path}:{line}: {_odd_json(error)}") from error
        yield line, record
        at = _skip(text, at, " \t\r\n")
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            raise InputError(f"data: {path}:{text.count(chr(10), 0, at) + 1}: the array breaks off here (expected ',' or ']')")


def _skip(text: str, at: int, blanks: str) -> int:
    while at < len(text) and text[at] in blanks:
        at += 1
    return at


READERS: dict[str, Callable[[bytes, Path], Numbered]] = {
    ".json": _json_array,
    ".jsonl": _json_lines,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _document,
}
ENDINGS = ", ".join(sorted(READERS)) + ", each also with .gz"
