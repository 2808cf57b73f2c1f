"""Whatever bytes or values come in, readers and config end soon, with a result or the one kind of error a person can mend."""

import gzip
import io
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from snugtune.config import read_config, to_config
from snugtune.data.forms import Unusable, read_form
from snugtune.data.records import READERS, read_records
from snugtune.errors import InputError
from snugtune.model.gguf_header import check_gguf

few = settings(deadline=None, derandomize=True, max_examples=150)
ENDINGS = [ending + more for ending in READERS for more in ("", ".gz")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def _parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"instruction": ["a", "b"] * 9, "output": ["c", "d"] * 9}), stream, compression="none")
    return stream.getvalue()


LINES = b'{"instruction": "a\\u00e9", "output": "b", "history": [["c", "d"]]}\n{"text": "e", "weight": 1.5}\n'
WHOLE: dict[str, bytes] = {
    ".jsonl": LINES,
    ".json": b"[\n" + LINES.strip().replace(b"\n", b",\n") + b"\n]\n",
    ".csv": b'instruction,output\n"a, b",c\n"d\ne",f\n',
    ".tsv": b"instruction\toutput\na\tb\n",
    ".txt": "Once upon a time. \u00e9".encode(),
    ".parquet": _parquet(),
}
edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4), st.integers(0, 8)), min_size=1, max_size=4)


def mutated(raw: bytes, changes: list[tuple[float, bytes, int]]) -> bytes:
    """`raw` with bytes put in and taken out, each change at a fraction of its length."""
    for where, new, gone in changes:
        at = int(where * len(raw))
        raw = raw[:at] + new + raw[at + gone :]
    return raw


def read(folder: Path, name: str, raw: bytes) -> None:
    path = folder / name
    path.write_bytes(raw)
    try:
        for _, record in read_records(path):
            read_or_refuse(record)
    except InputError as error:
        assert str(path) in str(error)


def read_or_refuse(record: Any, form: Any = "auto", columns: Any = None) -> None:
    try:
        read_form(record, form, columns or {}, "f:1")
    except Unusable as error:
        assert str(error)


@few
@given(st.sampled_from(ENDINGS), st.binary(max_size=200))
def test_any_bytes_as_data(folder: Path, ending: str, raw: bytes) -> None:
    read(folder, "any" + ending, gzip.compress(raw) if ending.endswith(".gz") else raw)


@few
@given(st.sampled_from(list(WHOLE)), edits, st.booleans())
def test_damaged_data(folder: Path, ending: str, changes: Any, packed: bool) -> None:
    raw = WHOLE[ending]
    read(folder, "damaged" + ending, mutated(raw, changes))
    if packed:
        read(folder, f"damaged{ending}.gz", mutated(gzip.compress(raw), changes))


KEYS = st.sampled_from([
    "messages", "conversations", "instruction", "input", "output", "history", "system",
    "tools", "prompt", "completion", "chosen", "rejected", "text", "weight",
    "role", "content", "from", "value", "tool_calls",
])  # fmt: skip
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["user", "assistant", "[]"])
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=5)
)
turns = st.lists(
    st.fixed_dictionaries({"role": leaves, "content": values}, optional={"weight": values, "tool_calls": values}), max_size=3
)


@few
@given(
    st.dictionaries(KEYS, values | turns, max_size=5) | values,
    st.sampled_from(["auto", "alpaca", "sharegpt", "messages", "prompt", "preference", "text"]),
    st.dictionaries(KEYS, KEYS, max_size=2),
)
def test_any_record(record: Any, form: str, columns: dict[str, str]) -> None:
    read_or_refuse(record, form, columns)


FIELDS = st.sampled_from([
    "model", "data", "output", "method", "optimizer", "schedule", "mixing", "objective",
    "plan", "jobs", "name", "type", "r", "lr", "betas", "path",
    "columns", "weight", "steps", "epochs", "validation", "seed", "target_modules",
])  # fmt: skip
nested = st.recursive(
    leaves | st.sampled_from(["lora", "cosine", "freeze", "interleave", "d.jsonl"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | leaves, inner, max_size=4),
    max_leaves=12,
)
GOOD = {"model": "demo", "data": "d.jsonl", "output": "out"}


def refused_or(build: Any) -> None:
    try:
        build()
    except InputError as error:
        assert str(error)


@few
@given(st.dictionaries(FIELDS, nested, max_size=5))
def test_any_values_as_config(fields: dict[str, Any]) -> None:
    refused_or(lambda: to_config(GOOD | fields).to_yaml().encode())


TEXT = yaml.safe_dump(GOOD | {"jobs": [{"name": "a", "method": {"r": 4}}], "optimizer": {"betas": [0.9, 0.99]}}).encode()
odd = st.sampled_from(
    [b"&a ", b"*a", b"!!int ", b"<<: ", b"{", b"}", b"[", b"]", b"- ", b": ", b"? ", b"|\n", b"'", b'"\\ud83d"', b"\t"]
)
odd_edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), odd | st.binary(max_size=3), st.integers(0, 6)), max_size=4)


@few
@given(odd_edits)
def test_damaged_yaml(folder: Path, changes: Any) -> None:
    path = folder / "config.yaml"
    path.write_bytes(mutated(TEXT, changes))
    refused_or(lambda: read_config(path).to_yaml().encode())


@few
@given(
    st.lists(FIELDS | st.text(max_size=3) | st.just("0"), max_size=4),
    odd.map(lambda b: b.decode()) | st.text(max_size=6),
    st.text(max_size=3),
)
def test_any_override(folder: Path, keys: list[str], value: str, more: str) -> None:
    path = folder / "overridden.yaml"
    path.write_bytes(TEXT)
    refused_or(lambda: read_config(path, [f"{'.'.join(keys)}={value}{more}", f"{more}{value}"]))


def _gguf() -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    keys = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    keys += (
        text(b"general.alignment")
        + struct.pack("<II", 4, 32)
        + text(b"l")
        + struct.pack("<IIQ", 9, 8, 2)
        + text(b"a")
        + text(b"b")
    )
    tensor = text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 3) + keys + tensor
    return head + bytes(-len(head) % 32) + bytes(32)


def test_the_gguf_that_is_damaged_below_is_whole(folder: Path) -> None:
    path = folder / "whole.gguf"
    path.write_bytes(_gguf())
    check_gguf(path)
    path.write_bytes(_gguf()[:-1])
    with pytest.raises(InputError, match="cut off"):
        check_gguf(path)


@few
@given(edits)
def test_damaged_gguf(folder: Path, changes: Any) -> None:
    path = folder / "damaged.gguf"
    path.write_bytes(mutated(_gguf(), changes))
    refused_or(lambda: check_gguf(path))
