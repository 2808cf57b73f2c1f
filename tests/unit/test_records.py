"""Tables, documents, folders and packed files: what each holds, and where each record stands."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from snugtune.config import JobConfig
from snugtune.data.forms import Conversation, Document, Preference
from snugtune.data.records import read_records
from snugtune.data.sources import Drops, SourceConfig, read_sources
from snugtune.errors import InputError
from snugtune.training.examples import read_job

ROWS = [{"question": "Q1", "reply": "A1, or so"}, {"question": 'Say "hi"\nand bye', "reply": "hi; bye"}]
COLUMNS = {"instruction": "question", "output": "reply"}


def as_table(path: Path, separator: str = ",") -> Path:
    quoted = [[cell.replace('"', '""') for cell in (row["question"], row["reply"])] for row in ROWS]
    lines = [separator.join(("question", "reply")), *(separator.join(f'"{c}"' for c in cells) for cells in quoted)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def as_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def packed(path: Path) -> Path:
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return target


def read(path: Path, **fields: Any) -> list[Any]:
    (items,) = read_sources((SourceConfig(path=str(path), **fields),), Drops())
    return items


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("kind", ["csv", "semicolons", "tsv", "parquet", "jsonl", "json"])
def test_the_same_rows_from_every_kind_of_file(tmp_path: Path, kind: str, gz: bool) -> None:
    """Quotes, separators and line breaks inside cells included; the place is the line, or the row where there are none."""
    if kind == "parquet":
        path = as_parquet(tmp_path / "d.parquet")
    elif kind in ("json", "jsonl"):
        path = tmp_path / f"d.{kind}"
        path.write_text(json.dumps(ROWS) if kind == "json" else "".join(json.dumps(r) + "\n" for r in ROWS))
    else:
        path = as_table(tmp_path / ("d.tsv" if kind == "tsv" else "d.csv"), {"semicolons": ";", "tsv": "\t"}.get(kind, ","))
    path = packed(path) if gz else path
    records = list(read_records(path))
    assert [record for _, record in records] == ROWS
    lines = {"parquet": [1, 2], "json": [1, "1 item 2"], "jsonl": [1, 2]}.get(kind, [2, 3])
    assert [place for place, _ in records] == [f"{path}:{line}" for line in lines]
    found = read(path, columns=COLUMNS)
    assert [[m["content"] for m in c.messages] for c in found] == [[r["question"], r["reply"]] for r in ROWS]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("One.\n\nTwo.\n")
    assert read(tmp_path / "d.txt") == [Document("One.\n\nTwo.\n", f"{tmp_path / 'd.txt'}:1")]


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    """Also below, by name; what is of no known kind is passed over."""
    (tmp_path / "b").mkdir()
    for name in ("b/2.txt", "a.txt", "c.jsonl", "notes.md"):
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert [d.text for d in read(tmp_path)] == ["a.txt", "b/2.txt", "c.jsonl"]


def test_max_examples_counts_usable_ones(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": ""}\n' + '{"text": "a"}\n' * 5)
    assert [d.source.rpartition(":")[2] for d in read(tmp_path / "d.jsonl", max_examples=2)] == ["2", "3"]


@pytest.mark.parametrize(
    ("record", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, ["Q"], ["A"], ["B"]),
        ({"instruction": "Q", "input": "I", "chosen": "A", "rejected": "B"}, ["Q\nI"], ["A"], ["B"]),
        (
            {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"},
             "rejected": {"from": "gpt", "value": "B"}},
            ["Q"], ["A"], ["B"],
        ),
        (
            {"chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
             "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}]},
            ["Q"], ["A"], ["B"],
        ),
    ],
    ids=["texts", "alpaca", "sharegpt", "whole conversations"],
)  # fmt: skip
def test_preferences_are_read(tmp_path: Path, record: Any, prompt: list[str], chosen: list[str], rejected: list[str]) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    (found,) = read(tmp_path / "d.jsonl")
    assert isinstance(found, Preference)
    assert [[m["content"] for m in part] for part in (found.prompt, found.chosen, found.rejected)] == [prompt, chosen, rejected]
    assert [m["role"] for m in (*found.prompt, *found.chosen)] == ["user", "assistant"]


def test_tools_and_weights_come_along(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0.5}]
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"messages": turns, "tools": [tool], "weight": 2}) + "\n" + json.dumps({"messages": turns, "tools": "[]"})
    )
    first, second = read(tmp_path / "d.jsonl")
    assert isinstance(first, Conversation)
    assert (first.tools, first.weight, first.messages[1]["weight"]) == ((tool,), 2.0, 0.5)
    assert (second.tools, second.weight) == ((), 1.0)


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "more cells": ("d.csv", b"a,b\n1,2\n1,2,3\n", r"d\.csv:3: not as many cells as the header's 2"),
    "fewer cells": ("d.csv", b"a,b\n1\n", r"d\.csv:2: not as many cells"),
    "open quote": ("d.csv", b'a,b\n1,"2\n', r"d\.csv:2: not valid CSV"),
    "same names": ("d.csv", b"a,a\n1,2\n", r"d\.csv:1: the header needs a name of its own"),
    "nameless column": ("d.csv", b"a,\n1,2\n", r"d\.csv:1: the header needs a name"),
    "latin csv": ("d.csv", "a,b\n\xe9,2\n".encode("latin-1"), r"d\.csv is not UTF-8"),
    "latin text": ("d.txt", b"\xff\xfe", r"d\.txt is not UTF-8"),
    "not parquet": ("d.parquet", b"PAR1 or so", r"d\.parquet is not a whole parquet file"),
    "not gzip": ("d.jsonl.gz", b"{}", r"d\.jsonl\.gz is not a whole gzip file"),
    "half a gzip": ("d.txt.gz", gzip.compress(b"x" * 1000)[:-9], r"d\.txt\.gz is not a whole gzip file"),
    "gzip gone bad": ("d.txt.gz", gzip.compress(b"x" * 1000)[:15] + b"\0" * 12, r"d\.txt\.gz is not a whole gzip file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    name, raw, message = BROKEN[case]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=message):
        list(read_records(tmp_path / name))


def test_half_a_parquet_file_is_refused(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "d.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a whole parquet file"):
        list(read_records(path))


ODD_CELLS: dict[str, Any] = {
    "text that is not UTF-8": pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    ),
    "beyond Python's range": pyarrow.array([2**31 - 1], pyarrow.int32()).cast(pyarrow.date32()),
}


@pytest.mark.parametrize("words", ODD_CELLS)
def test_a_column_of_what_python_has_not_is_named(tmp_path: Path, words: str) -> None:
    table = pyarrow.table({"text": ["a"], "odd": ODD_CELLS[words]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(InputError, match=rf"d\.parquet: column 'odd' cannot be read: .*{words}"):
        list(read_records(tmp_path / "d.parquet"))


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 records without the column 'answer' \(they have question, reply\)"):
        read(as_table(tmp_path / "d.csv"), columns={"instruction": "question", "output": "answer"})


def test_a_cell_of_a_megabyte_is_read(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text\n" + "x" * 2**20 + "\n")
    assert len(read(tmp_path / "d.csv")[0].text) == 2**20


def test_held_out_records_may_have_names_of_their_own(tmp_path: Path) -> None:
    """A path alone takes nothing over from `data`; a source says what it needs."""
    table = as_table(tmp_path / "d.csv")
    held = tmp_path / "held.jsonl"
    held.write_text('{"q": "Q", "a": "A", "text": "t"}\n' * 2)
    source = {"path": str(held), "columns": {"instruction": "q", "output": "a"}, "format": "alpaca", "max_examples": 1}
    data = {"path": str(table), "columns": COLUMNS}
    named, plain = (JobConfig.model_validate({"data": [data], "validation": v}) for v in (source, str(held)))
    assert [[m["content"] for m in c.messages] for c in read_job(named).held_out if isinstance(c, Conversation)] == [["Q", "A"]]
    assert len(read_job(named).train) == len(ROWS)
    assert [type(item) for item in read_job(plain).held_out] == [Document, Document]


def calling(**arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]


def describing(**parameters: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": {"properties": parameters}}}]


@pytest.mark.parametrize("column", ["tools", "functions"])
def test_calls_in_a_table_have_the_arguments_they_were_written_with(tmp_path: Path, column: str) -> None:
    """Arrow gives each row's structs the fields of all rows; learned, they would be arguments that nobody gave."""
    calls = [calling(city="P", days=[{"at": 1}]), calling(day="Mon", content="x", days=[{"to": 2}])]
    tools = [describing(city={"type": "string"}), describing(day={"type": "string", "enum": ["Mon"]})]
    rows = [{"messages": c, column: t} for c, t in zip(calls, tools, strict=True)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = read(tmp_path / "d.parquet", columns={} if column == "tools" else {"tools": column})
    assert [c.messages[1]["tool_calls"] for c in found] == [turns[1]["tool_calls"] for turns in calls]
    assert [list(c.tools) for c in found] == tools
    assert [c.messages[1]["content"] for c in found] == ["", ""]
