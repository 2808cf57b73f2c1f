"""Reading records from files. A record is whatever a line of JSON, a row of a table or a text document holds.

Each record comes with its place, `file:line` (`file:row` in tables without lines). Syntax errors are refused with it.
"""

import codecs
import csv
import glob
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from snugtune.errors import InputError
from snugtune.files import LFS_POINTER

Records = Iterator[tuple[str, Any]]
Numbered = Iterator[tuple[int, Any]]


def data_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The files that `path` means, by name, and those beside them of kinds that are not read.

    A file, a folder with all in it, or a pattern such as `data/*.jsonl`. Raises `InputError`.
    """
    if not path.is_dir() and (path.exists() or not any(c in str(path) for c in "*?[")):
        return [path], []
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and not _hidden(p, path)]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not found:
            raise InputError(f"data: no file is named like {path} (looked from {Path.cwd()})")
    read = sorted(p for p in found if kind(p) in READERS)
    if not read:
        what = f"folder {path} holds" if path.is_dir() else f"{path} finds"
        raise InputError(f"data: {what} no file that snugtune reads ({ENDINGS})")
    return read, sorted(set(found) - set(read))


def read_records(path: Path) -> Records:
    """(place, record) of a file. Raises `InputError`."""
    if not path.is_file():
        wrong = f"{path} is no regular file" if path.exists() else f"no file {path} (looked from {Path.cwd()})"
        raise InputError(f"data: {wrong}")
    if kind(path) not in READERS:
        advice = _INSTEAD.get(path.suffix.lower(), "")
        raise InputError(f"data: {path}: unknown ending '{path.suffix}'; snugtune reads {ENDINGS}{advice}")
    number, before = 1, 0
    for line, record in READERS[kind(path)](_read(path), path):
        number, before = (number + 1 if line == before else 1), line
        yield f"{path}:{line}" + (f" item {number}" if number > 1 else ""), record


_INSTEAD = {
    **dict.fromkeys((".yaml", ".yml"), "; is it a config? Data is what a config names"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "; save the table as .csv"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".xz", ".bz2", ".zst"), "; unpack it, and give the folder"),
    **dict.fromkeys((".ndjson", ".jsonlines", ".jl"), "; name it .jsonl"),
    **dict.fromkeys((".md", ".rst", ".text", ".log"), "; name it .txt where it is plain text"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".html", ".htm", ".epub"), "; save its text as .txt"),
}
"""What to do with files of other kinds."""


def kind(path: Path) -> str:
    """The ending that tells the form, less `.gz`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _hidden(file: Path, folder: Path) -> bool:
    """Whether `file` is none of the user's own: of `.git`, `.ipynb_checkpoints`, `.cache` and the like."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"data: {path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise InputError(f"data: {path} cannot be read: {error.strerror}") from error
    if mistaken := _mistaken_for_data(raw, path):
        raise InputError(f"data: {path} is {mistaken}")
    return raw


def _mistaken_for_data(raw: bytes, path: Path) -> str | None:
    """What a file is that has the right name and yet cannot be data, and what to do."""
    if raw.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'"
    if raw.startswith(b"\x1f\x8b"):
        return "compressed twice; unpack it once" if path.suffix == ".gz" else f"gzip-compressed; name it {path.name}.gz"
    if raw.startswith(b"PAR1") and kind(path) != ".parquet":
        return "a parquet file; name it .parquet"
    if kind(path) != ".txt" and raw[:200].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page (HTML), not data; download the file itself"
    return None


def _decoded(raw: bytes, path: Path) -> str:
    try:
        text = raw.decode("utf-8").lstrip("\ufeff")  # byte order marks, which some tools add once more
    except UnicodeDecodeError as error:
        wide = " (it looks like UTF-16 or UTF-32)" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
        raise InputError(f"data: {path} is not UTF-8 (byte {error.start}); save it as UTF-8{wide}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"data: {path}:{line}: a NUL, which no text has; save it as UTF-8 (is it UTF-16, or damaged?)")
    return text


def _json_lines(raw: bytes, path: Path) -> Numbered:
    text = _decoded(raw, path)
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        line = text.count("\n", 0, start) + 1
        raise InputError(f"data: {path}:{line}: a JSON array, where one record a line is expected; name it .json")
    yield from _lines_of_json(text, path)


def _csv_rows(raw: bytes, path: Path) -> Numbered:
    """Rows as mappings by the header's names. Separated by commas, semicolons or tabs: what the header has most of."""
    text = _decoded(raw, path)
    header = text.split("\n", 1)[0]
    csv.field_size_limit(sys.maxsize)  # the default refuses cells over 128 KiB
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    line = 1
    try:
        names = rows.fieldnames or []
        if rows.fieldnames == []:
            raise InputError(f"data: {path}:1: blank, where the header's names are expected")
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
        rows = (without_blanks(row) for batch in batches for row in _python_rows(batch, path))
        yield from enumerate(rows, 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data: {path} is not a whole parquet file: {str(error).splitlines()[0]}") from error


def _python_rows(batch: Any, path: Path) -> list[dict[str, Any]]:
    """The rows of a pyarrow batch. Text that is not UTF-8 and dates beyond Python's are found only now."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.to_pylist()
            except (ValueError, OverflowError) as error:
                why = "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"beyond Python's range ({error})"
                raise InputError(f"data: {path}: column '{name}' cannot be read: {why}; mend it, or leave it out") from error
        raise


def without_blanks(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table without what Arrow puts in: its columns' structs have all fields of all rows, None where a row had none.

    A record and its turns stay as they are (their forms know None); what they hold, as arguments of calls, loses such fields.
    """
    return {name: _pruned(value, 0 if _are_turns(value) else 1) for name, value in row.items()}


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(v, dict) and ("role" in v or "from" in v) for v in value)


def _pruned(value: Any, depth: int) -> Any:
    if isinstance(value, list):
        return [_pruned(inner, depth) for inner in value]
    if isinstance(value, dict):
        return {k: _pruned(v, depth + 1) for k, v in value.items() if v is not None or depth == 0}
    return value


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
        _check_not_one(text, path)
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


def _check_not_one(text: str, path: Path) -> None:
    """Refuse one object over several lines, of which JSON lines would only say that the first is broken off."""
    first = text.strip().split("\n", 1)
    if len(first) > 1 and not first[0].rstrip().endswith("}"):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return
        raise InputError(f"data: {path}:1: one object over several lines; an array of records is expected ('[')")


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
