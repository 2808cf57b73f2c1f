"""Data that cannot be used: encodings, cut and lying files, tables, folders, hub ids, mixtures, columns."""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from common import messages, write_lines
from spoil import RECORDS, config, refused

pytest_plugins = ("places",)

TEXT = "\n".join(json.dumps(record) for record in RECORDS)
CSV = "instruction,output\nWhy?,Because.\n"
PRETTY = json.dumps(RECORDS[0], indent=1).encode()
WORDS = json.dumps(messages("d\xe9j\xe0", "vu"), ensure_ascii=False)


def parquet(**columns: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


TABLE = parquet(instruction=["Why?"] * 50, output=["Because."] * 50)

FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    # encodings
    "utf-16": ("d.jsonl", WORDS.encode("utf-16"), ("d.jsonl", "UTF-8", "UTF-16")),
    "utf-16-without-a-mark": ("d.jsonl", TEXT.encode("utf-16-le"), ("d.jsonl:1", "NUL", "UTF-16")),
    "utf-32": ("d.json", WORDS.encode("utf-32"), ("d.json", "UTF-8", "UTF-32")),
    "latin-1-csv": ("d.csv", "instruction,output\nd\xe9j\xe0,vu\n".encode("latin-1"), ("d.csv", "not UTF-8 (byte 20)")),
    "utf-16-csv": ("d.csv", CSV.encode("utf-16"), ("d.csv", "UTF-16")),
    "utf-16-tsv": ("d.tsv", CSV.replace(",", "\t").encode("utf-16-le"), ("d.tsv", "UTF-16")),
    "latin-1-text": ("d.txt", "d\xe9j\xe0 vu".encode("latin-1"), ("d.txt", "not UTF-8 (byte 1)")),
    "zeros-in-json": ("d.jsonl", TEXT.encode() + b"\n\x00\x00\x00", ("d.jsonl:7", "NUL")),
    "a-zero-in-a-table": ("d.csv", CSV.encode() + b"Wh\x00y?,Bec\x00ause\n", ("d.csv:3", "NUL")),
    "only-zeros": ("d.jsonl", bytes(4096), ("d.jsonl:1", "NUL")),
    "half-characters-everywhere": (
        "d.jsonl",
        b'{"instruction": "\\ud83d", "output": "a"}\n{"instruction": "a", "output": "\\udc00"}\n',
        ("2 records with half a character", "d.jsonl:1, d.jsonl:2"),
    ),
    "surrogates-as-bytes": ("d.txt", "a\ud83db".encode("utf-8", "surrogatepass"), ("d.txt", "UTF-8")),
    # cut off
    "gzip-cut-off": ("d.jsonl.gz", gzip.compress(TEXT.encode() * 50)[:-20], ("d.jsonl.gz", "not a whole gzip")),
    "gzip-with-a-flipped-bit": (
        "d.jsonl.gz",
        (raw := gzip.compress(TEXT.encode()))[:40] + bytes([raw[40] ^ 255]) + raw[41:],
        ("d.jsonl.gz", "not a whole gzip"),
    ),
    "gzip-of-another-length": ("d.csv.gz", gzip.compress(CSV.encode())[:-1] + b"\x07", ("d.csv.gz", "not a whole gzip")),
    "gzip-then-rubbish": ("d.jsonl.gz", gzip.compress(TEXT.encode()) + b"rubbish", ("d.jsonl.gz", "not a whole gzip")),
    "gzip-in-name-only": ("d.jsonl.gz", TEXT.encode(), ("d.jsonl.gz", "not a whole gzip")),
    "gzip-twice": ("d.jsonl.gz", gzip.compress(gzip.compress(TEXT.encode())), ("d.jsonl.gz", "compressed twice")),
    "gzip-without-the-name": ("d.jsonl", gzip.compress(TEXT.encode()), ("d.jsonl", "gzip", "d.jsonl.gz")),
    "empty-gzip": ("d.jsonl.gz", b"", ("d.jsonl.gz", "no records")),
    "parquet-cut-off": ("d.parquet", TABLE[:-100], ("d.parquet", "not a whole parquet")),
    "parquet-begins-late": ("d.parquet", TABLE[100:], ("d.parquet", "not a whole parquet")),
    "parquet-with-a-hole": ("d.parquet", TABLE[:4] + bytes(200) + TABLE[204:], ("d.parquet", "parquet")),
    "parquet-that-is-a-page": ("d.parquet", b"<!DOCTYPE html><html>404</html>", ("d.parquet", "HTML")),
    "parquet-of-nothing": ("d.parquet", b"", ("d.parquet", "not a whole parquet")),
    "parquet-of-no-rows": ("d.parquet", parquet(instruction=pa.array([], pa.string())), ("d.parquet", "no records")),
    "parquet-of-bytes": (
        "d.parquet",
        parquet(instruction=[b"\xff\x00"], output=[b"b"]),
        ("d.parquet:1", "'instruction' is not text"),
    ),
    "parquet-of-numbers": ("d.parquet", parquet(text=[1.5, 2.5]), ("d.parquet:1", "'text' is not text")),
    # lying endings
    "json-that-is-a-page": ("d.json", b"<!DOCTYPE html><html><body>Not found</body></html>", ("d.json ", "HTML")),
    "jsonl-that-is-a-page": ("d.jsonl", b"\n<html><body>Not found</body></html>", ("d.jsonl ", "HTML")),
    "csv-that-is-a-page": ("d.csv", b"<!DOCTYPE html>\n<html>Not found</html>\n", ("d.csv ", "HTML")),
    "text-that-is-a-page-of-bytes": ("d.txt", b"\x89PNG\r\n\x1a\n" + bytes(50), ("d.txt", "UTF-8")),
    "jsonl-that-is-a-pointer": (
        "d.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n",
        ("d.jsonl", "Git LFS"),
    ),
    "parquet-that-is-a-pointer": (
        "d.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n",
        ("d.parquet", "Git LFS"),
    ),
    "jsonl-that-is-an-array": ("d.jsonl", json.dumps(RECORDS, indent=1).encode(), ("d.jsonl:1", "array", ".json")),
    "jsonl-with-an-array-a-line": ("d.jsonl", json.dumps(RECORDS).encode(), ("d.jsonl:1", "array", ".json")),
    "json-that-is-one-pretty-record": ("d.json", PRETTY, ("d.json:1", "one object over several lines")),
    "json-with-nan": ("d.jsonl", b'{"text": NaN}', ("d.jsonl:1", "'text' is not text")),
    "json-with-a-comment": ("d.json", b"[\n// the best ones\n{}]", ("d.json:2", "not valid JSON")),
    "json-quoted-like-python": ("d.jsonl", b"{'instruction': 'a', 'output': 'b'}", ("d.jsonl:1", "double quotes")),
    # tables
    "csv-with-an-open-quote": ("d.csv", CSV.encode() + b'"Why,oh why\nand so\non', ("d.csv:3", "not valid CSV")),
    "csv-with-one-name-twice": ("d.csv", b"output,output\na,b\n", ("d.csv:1", "a name of its own")),
    "csv-with-a-nameless-column": ("d.csv", b"instruction,\na,b\n", ("d.csv:1", "a name of its own")),
    "csv-without-a-header": ("d.csv", b"Why?,Because.\nHow?,So.\n", ("d.csv:2", "they have Why?, Because.", "output: NAME}")),
    "csv-with-a-cell-too-few": ("d.csv", b"instruction,input,output\nWhy?,Because.\n", ("d.csv:2", "header's 3")),
    "csv-with-a-blank-header": ("d.csv", b"\n\n\na,b\n", ("d.csv:1", "blank", "header")),
    "csv-with-a-weight-in-words": ("d.csv", b"text,weight\na,much\n", ("d.csv:2", "'weight' is not a number")),
    "tsv-of-commas": ("d.tsv", b"question,answer\na,b\n", ("d.tsv:2", "no known form", "they have question, answer;")),
    # records
    "history-of-numbers": ("d.jsonl", b'{"instruction": "a", "output": "b", "history": [1]}', ("d.jsonl:1", "'history'")),
    "turns-that-are-text": ("d.jsonl", b'{"messages": "hello"}', ("d.jsonl:1", "'messages' is not a list of turns")),
    "turns-without-a-role": ("d.jsonl", b'{"messages": [{"content": "a"}]}', ("d.jsonl:1", "without 'role'")),
    "tools-that-are-no-json": (
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "[{"}',
        ("d.jsonl:1", "'tools' is not JSON"),
    ),
    "weight-of-nan": ("d.jsonl", b'{"text": "a", "weight": NaN}', ("d.jsonl:1", "'weight' is not a number")),
    "weight-below-zero": ("d.jsonl", b'{"text": "a", "weight": -1}', ("d.jsonl:1", "'weight' is not a number")),
    "weight-of-nothing": ("d.jsonl", b'{"instruction": "a", "output": "b", "weight": 0}', ("d.jsonl:1", "nothing to learn")),
    "preferences": ("d.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}', ("d.jsonl:1", "objective sft does not learn")),
    "answers-of-zero-width": ("d.jsonl", b'{"instruction": "a", "output": "\\n\\t "}', ("d.jsonl:1", "without an answer")),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files(place: Path, case: str) -> None:
    name, raw, named = FILES[case]
    (place / name).write_bytes(raw)
    config(place, data=name)
    refused(place, "train", "config.yaml", named=("data", *named))


def a_socket(place: Path) -> None:
    os.mkfifo(place / "pipe.jsonl")


def loop(place: Path) -> None:
    (place / "loop").mkdir()
    (place / "loop/again").symlink_to(place / "loop")


def dangling(place: Path) -> None:
    (place / "away.jsonl").symlink_to(place / "nowhere.jsonl")


def folder_with_one_bad_file(place: Path) -> None:
    (place / "mixed").mkdir()
    write_lines(place / "mixed/a.jsonl", RECORDS)
    (place / "mixed/b.csv.gz").write_bytes(b"\x1f\x8b")


def only_hidden(place: Path) -> None:
    (place / "hidden/.git").mkdir(parents=True)
    write_lines(place / "hidden/.git/a.jsonl", RECORDS)


def nothing(place: Path) -> None:
    """The mistake is in the config."""


GOOD = {"path": "data.jsonl"}
PLACES: dict[str, tuple[Callable[[Path], object], Any, tuple[str, ...]]] = {
    "pipe": (a_socket, "pipe.jsonl", ("pipe.jsonl", "no regular file")),
    "folder-that-holds-itself": (loop, "loop", ("folder loop", "no file")),
    "link-to-nowhere": (dangling, "away.jsonl", ("no file away.jsonl",)),
    "folder-with-one-bad-file": (folder_with_one_bad_file, "mixed", ("mixed/b.csv.gz", "gzip")),
    "folder-of-hidden-files": (only_hidden, "hidden", ("folder hidden", "no file")),
    "folder-with-a-slash": (nothing, "no-such/", ("no-such",)),
    "nothing-to-open": (nothing, "/proc/self/mem.jsonl", ("no file /proc/self/mem.jsonl",)),
    "file-as-a-folder": (nothing, "data.jsonl/deeper.jsonl", ("no file data.jsonl/deeper.jsonl",)),
    "web-address": (nothing, "https://example.com/data.jsonl", ("https://example.com/data.jsonl", "download")),
    "hub-with-a-scheme": (nothing, "hf://datasets/a/b", ("hf://datasets/a/b",)),
    "pattern": (nothing, "*.gone", ("no file is named like *.gone",)),
    "zero": (nothing, "a\x00b", ("data", "cannot be a path")),
    "hub-subset-of-a-file": (nothing, GOOD | {"subset": "en"}, ("data", "'subset'", "data.jsonl")),
    "hub-split-of-a-file": (nothing, GOOD | {"split": "test"}, ("data", "'split'", "data.jsonl")),
    "hub-streaming-of-a-file": (nothing, GOOD | {"streaming": True}, ("data", "'streaming'", "data.jsonl")),
    "empty-path": (nothing, "", ("data.0.path", "must not be empty")),
    "empty-list": (nothing, [], ("data: nothing to train on",)),
    "list-of-lists": (nothing, [["data.jsonl"]], ("data.0",)),
    "no-path": (nothing, {"format": "alpaca"}, ("data.0.path: required",)),
    "number-among-paths": (nothing, ["data.jsonl", 7], ("data.1",)),
    "none-among-paths": (nothing, ["data.jsonl", None], ("data.1",)),
    "unknown-format": (nothing, GOOD | {"format": "alpacca"}, ("data.0.format", "'alpacca'", "alpaca")),
    "weight-of-zero": (nothing, GOOD | {"weight": 0}, ("data.0.weight", "above 0")),
    "weight-without-end": (nothing, GOOD | {"weight": float("inf")}, ("data.0.weight", "inf")),
    "no-examples": (nothing, GOOD | {"max_examples": 0}, ("data.0.max_examples", "got 0")),
    "columns-as-a-list": (nothing, GOOD | {"columns": ["question"]}, ("data.0.columns",)),
    "columns-of-numbers": (nothing, GOOD | {"columns": {"input": 5}}, ("data.0.columns.input", "5")),
    "one-column-for-two": (nothing, GOOD | {"columns": {"instruction": "q", "output": "q"}}, ("data.0.columns", "same column")),
    "text-of-the-messages": (nothing, GOOD | {"columns": {"text": "messages"}}, ("data.jsonl:1", "'text' is not text")),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_places(place: Path, case: str) -> None:
    act, data, named = PLACES[case]
    act(place)
    config(place, data=data)
    pipe = place / "pipe.jsonl"
    before = pipe.is_fifo()
    if before:  # contents() would wait for it, as the command must not
        pipe.rename(place.parent / "pipe.jsonl")
        (place / "pipe.jsonl").symlink_to(place.parent / "pipe.jsonl")
    refused(place, "train", "config.yaml", named=named)


MIXTURES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "weights-without-turns": ({"data": [GOOD | {"weight": 2.0}, GOOD]}, ("data.0.weight", "mixing: interleave")),
    "unknown-end": ({"mixing": {"type": "interleave", "until": "middle"}}, ("mixing.until", "'middle'", "'first'")),
    "end-of-another-kind": ({"mixing": {"type": "concat", "until": "first"}}, ("mixing", "'until'")),
    "unknown-mixture": ({"mixing": "interleaved"}, ("mixing", "'interleaved'", "'interleave'")),
    "number-as-mixture": ({"mixing": 3}, ("mixing",)),
    "weights-too-far-apart": (
        {"data": [GOOD | {"weight": 1e9}, GOOD], "mixing": {"type": "interleave", "until": "last"}},
        ("data", "weight"),
    ),
    "weight-never-due": (
        {"data": [GOOD | {"weight": 1e-300}, GOOD], "mixing": {"type": "interleave", "until": "last"}},
        ("data", "weight"),
    ),
    "validation-of-a-folder": ({"validation": "model"}, ("model/config.json",)),
    "validation-below-zero": ({"validation": -0.1}, ("validation", "between 0 and 1")),
    "validation-as-a-switch": ({"validation": True}, ("validation", "got true")),
    "validation-of-nothing": ({"validation": ""}, ("validation",)),
    "validation-as-a-list": ({"validation": ["a.jsonl"]}, ("validation",)),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXTURES)
def test_mixtures(place: Path, case: str) -> None:
    fields, named = MIXTURES[case]
    config(place, **fields)
    refused(place, "train", "config.yaml", named=named)


# --- next steps -------------------------------------------------------------------------------------------------------

KINDS = {"c.yaml": "is it a config?", "t.xlsx": "save the table as .csv", "a.zip": "unpack it", "l.ndjson": "name it .jsonl",
         "r.md": "name it .txt", "b.pdf": "save its text as .txt"}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_files_of_other_kinds(place: Path, name: str) -> None:
    (place / name).write_text("model: demo\n")
    config(place, data=name)
    refused(place, "train", "config.yaml", named=("data", f"{name}: unknown ending", KINDS[name]))


@pytest.mark.parametrize("validation", ["gone.jsonl", {"path": "gone.jsonl"}, "gone/*.jsonl"])
def test_what_is_held_out_is_named_by_its_field(place: Path, validation: Any) -> None:
    config(place, validation=validation)
    said = refused(place, "train", "config.yaml", named=("error: validation: no file", "gone"))
    assert "data:" not in said
