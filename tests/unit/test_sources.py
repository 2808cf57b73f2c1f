"""Reading conversations from files: every form, every line number, every mistake named."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snugtune.data.sources import Drops, SourceConfig, read_sources
from snugtune.errors import InputError


@pytest.fixture
def data_file(tmp_path: Path):
    """Write a data file and give its path."""

    def write(content: str | bytes, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def read(*paths: Path, form: Any = "auto", drops: Drops | None = None):
    sources = tuple(SourceConfig(path=str(path), format=form) for path in paths)
    return [item for items in read_sources(sources, Drops() if drops is None else drops) for item in items]


def lines_of(path: Path, drops: Drops | None = None) -> list[int]:
    """The line numbers of the usable records."""
    return [int(c.source.removeprefix(f"{path}:").split(" item ")[0]) for c in read(path, drops=drops)]


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def said(who: str, text: str) -> dict[str, str]:
    """A turn in ShareGPT's form."""
    return {"from": who, "value": text}


GOOD = {"instruction": "Say hi.", "output": "Hi."}
GOOD_LINE = json.dumps(GOOD)
GOOD_MESSAGES = (user("Say hi."), assistant("Hi."))
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALLED = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


# Forms -----------------------------------------------------------------------------------------------------------------

FORMS = {
    "alpaca": ({"instruction": "Q", "output": "A"}, [user("Q"), assistant("A")]),
    "alpaca with input": ({"instruction": "Add.", "input": "1 2", "output": "3"}, [user("Add.\n1 2"), assistant("3")]),
    "alpaca with empty input": ({"instruction": "Q", "input": "", "output": "A"}, [user("Q"), assistant("A")]),
    "alpaca with nulls": (
        {"instruction": "Q", "input": None, "output": "A", "system": None, "history": None},
        [user("Q"), assistant("A")],
    ),
    "alpaca with input alone": ({"instruction": "", "input": "Q", "output": "A"}, [user("Q"), assistant("A")]),
    "alpaca with system": ({"system": "S", "instruction": "Q", "output": "A"}, [system("S"), user("Q"), assistant("A")]),
    "alpaca with history": (
        {"instruction": "Q3", "output": "A3", "history": [["Q1", "A1"], ["Q2", "A2"]], "system": "S"},
        [system("S"), user("Q1"), assistant("A1"), user("Q2"), assistant("A2"), user("Q3"), assistant("A3")],
    ),
    "sharegpt": (
        {"conversations": [said("human", "Q"), said("gpt", "A")]},
        [user("Q"), assistant("A")],
    ),
    "sharegpt with a system turn": (
        {"conversations": [said("system", "S"), said("human", "Q"), said("gpt", "A")]},
        [system("S"), user("Q"), assistant("A")],
    ),
    "sharegpt with a system field": (
        {"system": "S", "conversations": [said("human", "Q"), said("gpt", "A")]},
        [system("S"), user("Q"), assistant("A")],
    ),
    "sharegpt with both": (
        {"system": "no", "conversations": [said("system", "S"), said("human", "Q"), said("gpt", "A")]},
        [system("S"), user("Q"), assistant("A")],
    ),
    "sharegpt in other words": (
        {"conversations": [said("user", "Q"), said("model", "A"), said("human", "Q"), said("assistant", "A")]},
        [user("Q"), assistant("A"), user("Q"), assistant("A")],
    ),
    "sharegpt with OpenAI's turns": ({"conversations": [user("Q"), assistant("A")]}, [user("Q"), assistant("A")]),
    "messages": ({"messages": [user("Q"), assistant("A")]}, [user("Q"), assistant("A")]),
    "messages with system and more fields": (
        {"id": 7, "messages": [system("S"), user("Q"), {**assistant("A"), "id": "x"}, user("Q2"), assistant("A2")]},
        [system("S"), user("Q"), assistant("A"), user("Q2"), assistant("A2")],
    ),
    "messages in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]},
                assistant("A"),
            ]
        },
        [user("Q?"), assistant("A")],
    ),
    "messages with a tool": (
        {"messages": [user("Q"), {"role": "tool", "content": "T"}, assistant("A")]},
        [user("Q"), {"role": "tool", "content": "T"}, assistant("A")],
    ),
    "messages with a call and a weight": (
        {"messages": [user("Q"), {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0}]},
        [user("Q"), {**assistant(""), "tool_calls": [CALLED], "weight": 0.0}],
    ),
    "sharegpt with a call": (
        {
            "conversations": [
                said("human", "Q"),
                said("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                said("observation", "2"),
                said("gpt", "A"),
            ]
        },
        [
            user("Q"),
            {**assistant(""), "tool_calls": [{"type": "function", "function": CALLED["function"]}]},
            {"role": "tool", "content": "2"},
            assistant("A"),
        ],
    ),
    "sharegpt with a call that is text": (
        {"conversations": [said("human", "Q"), said("function_call", "f(1)")]},
        [user("Q"), assistant("f(1)")],
    ),
    "prompt": ({"prompt": "Q", "completion": "A"}, [user("Q"), assistant("A")]),
    "prompt of messages": (
        {"prompt": [system("S"), user("Q")], "completion": [assistant("A")]},
        [system("S"), user("Q"), assistant("A")],
    ),
    "messages before all else": (
        {"messages": [user("Q"), assistant("A")], "instruction": "no", "output": "no"},
        [user("Q"), assistant("A")],
    ),
}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_detected_and_read(data_file, form: str, name: str):
    record, messages = FORMS[form]
    path = data_file(json.dumps([record]) if name == "data.json" else json.dumps(record), name)
    [conversation] = read(path)
    assert list(conversation.messages) == messages
    assert conversation.source == f"{path}:1"


COLUMNS_TO_WRITE = {
    "instruction: Question, output: response": {"id": 1, "Question": "a", "response": "b"},
    "messages: dialogue": {"dialogue": []},
    "text: body": {"title": "a", "body": "b"},
    "instruction: NAME, output: NAME": {"x": 1, "y": 2},
}


@pytest.mark.parametrize("line", COLUMNS_TO_WRITE)
def test_the_line_to_write_for_other_names_is_shown(data_file, line: str):
    record, drops = COLUMNS_TO_WRITE[line], Drops()
    read(data_file(GOOD_LINE + "\n" + json.dumps(record)), drops=drops)
    [said] = drops.lines()
    assert f"(they have {', '.join(record)}; say which is which with columns: {{{line}}})" in said


def test_forms_may_be_mixed_in_one_file(data_file):
    records = [FORMS[form] for form in ("alpaca", "sharegpt", "messages")]
    path = data_file("\n".join(json.dumps(record) for record, _ in records))
    assert [list(c.messages) for c in read(path)] == [messages for _, messages in records]


def test_a_named_format_overrules_detection(data_file):
    """The record could be either; the config says which."""
    sharegpt, messages = [said("human", "s"), said("gpt", "s")], [user("m"), assistant("m")]
    path = data_file(json.dumps({"instruction": "a", "output": "a", "conversations": sharegpt, "messages": messages}))
    for form, letter in (("alpaca", "a"), ("sharegpt", "s"), ("messages", "m")):
        [conversation] = read(path, form=form)
        assert conversation.messages == (user(letter), assistant(letter))


@pytest.mark.parametrize("form", ["sharegpt", "messages"])
def test_records_of_another_form_than_named_are_counted(data_file, form: str):
    """Never guessed at when the config says what they are."""
    sound = FORMS[form][0]
    drops = Drops()
    path = data_file(f"{GOOD_LINE}\n{json.dumps(sound)}")
    assert [c.source for c in read(path, form=form, drops=drops)] == [f"{path}:2"]
    assert sum(drops.counts.values()) == 1


def test_files_follow_one_another(data_file):
    """In the config's order, each with its own format and places."""
    first, second = data_file(GOOD_LINE, "b.jsonl"), data_file(f"[{GOOD_LINE}, {GOOD_LINE}]", "a.json")
    assert [c.source for c in read(first, second)] == [f"{first}:1", f"{second}:1", f"{second}:1 item 2"]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_any_text_arrives_unchanged(tmp_path_factory, pairs, escaped: bool, lines: bool):
    """Line separators, controls, emoji: whatever JSON can hold, raw or escaped, in either kind of file."""
    path = tmp_path_factory.mktemp("data") / ("d.jsonl" if lines else "d.json")
    records = [{"messages": [user(q), assistant(a)]} for q, a in pairs]
    each = "\n".join(json.dumps(r, ensure_ascii=escaped) for r in records)
    path.write_bytes((each if lines else json.dumps(records, ensure_ascii=escaped, indent=1)).encode())
    assert [c.messages for c in read(path)] == [(user(q), assistant(a)) for q, a in pairs]


# Lines -----------------------------------------------------------------------------------------------------------------


def pretty(records: list[Any]) -> str:
    return json.dumps(records, indent=2, ensure_ascii=False)


def lines_of_braces(text: str) -> list[int]:
    """Where a pretty-printed array opens its records: the lines that hold just two spaces and a brace."""
    return [i for i, line in enumerate(text.split("\n"), 1) if line.rstrip("\r") == "  {"]


def test_records_of_a_pretty_array_stand_where_they_open(data_file):
    """Also behind a line separator inside a string, which is no line break to an editor or to JSON."""
    text = pretty([GOOD, {"messages": [user("a\u2028b\u2029c\x85d"), assistant("x\n\ny")]}, GOOD])
    assert lines_of(data_file(text, "d.json")) == lines_of_braces(text) == [2, 6, 18]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(f"[{GOOD_LINE}, {GOOD_LINE}]", [1, 1], id="one line"),
        pytest.param(f"\n\n [\n\n{GOOD_LINE}\n,\n\n{GOOD_LINE}\n]\n\n", [5, 8], id="blank lines"),
        pytest.param(f"[{GOOD_LINE},\n{GOOD_LINE}\n,{GOOD_LINE}]", [1, 2, 3], id="commas first"),
        pytest.param(f"{GOOD_LINE}\n{GOOD_LINE}\n", [1, 2], id="JSON lines under another name"),
        pytest.param(f"\n{GOOD_LINE}\n\n{GOOD_LINE}", [2, 4], id="JSON lines after a blank one"),
        pytest.param(f"\ufeff[\n{GOOD_LINE}]", [2], id="byte order mark"),
        pytest.param(f"[\r\n{GOOD_LINE},\r\n\r\n{GOOD_LINE}\r\n]\r\n", [2, 4], id="Windows line ends"),
    ],
)
def test_lines_in_json(data_file, content: str, expected: list[int]):
    assert lines_of(data_file(content, "d.json")) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(f"{GOOD_LINE}\n{GOOD_LINE}", [1, 2], id="no last line end"),
        pytest.param(f"\n \n{GOOD_LINE}\n\t\n\n{GOOD_LINE}\n\n", [3, 6], id="blank lines"),
        pytest.param(f"\ufeff{GOOD_LINE}\n{GOOD_LINE}", [1, 2], id="byte order mark"),
        pytest.param(f"{GOOD_LINE}\r\n\r\n{GOOD_LINE}\r\n", [1, 3], id="Windows line ends"),
        pytest.param(f'{{"instruction": "a\u2028b\x85c\u2029d", "output": "x"}}\n{GOOD_LINE}', [1, 2], id="U+2028"),
    ],
)
def test_lines_in_jsonl(data_file, content: str, expected: list[int]):
    assert lines_of(data_file(content)) == expected


# Refusals --------------------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000
HUGE_NUMBER = f'{{"id": {"1" * 5000}, "instruction": "a", "output": "b"}}'  # more digits than Python converts
BROKEN = {
    "d.jsonl": [
        pytest.param(f'{GOOD_LINE}\n\n{{"instruction": "a",, "output": "b"}}', 3, id="syntax"),
        pytest.param(f'{GOOD_LINE}\r\n\r\n{{"instruction": "a" "output"}}\r\n', 3, id="Windows line ends"),
        pytest.param(f'{GOOD_LINE}\n{{"instruction": "a", "out', 2, id="breaks off"),
        pytest.param(f"{GOOD_LINE}\n{GOOD_LINE} {GOOD_LINE}", 2, id="two records on a line"),
        pytest.param(f"{GOOD_LINE}\n{{'instruction': 'a', 'output': 'b'}}", 2, id="single quotes"),
        pytest.param(f"{GOOD_LINE}\n{pretty([GOOD])}", 2, id="an array over several lines"),
        pytest.param(f"{GOOD_LINE}\n{DEEP}", 2, id="nested too deeply"),
        pytest.param(f"{GOOD_LINE}\n{HUGE_NUMBER}", 2, id="a number of 5000 digits"),
    ],
    "d.json": [
        pytest.param(f'[\n{GOOD_LINE},\n{{"instruction": "a",,}}\n]', 3, id="syntax"),
        pytest.param(f'[\r\n{GOOD_LINE},\r\n{{"instruction": "a",,}}\r\n]', 3, id="Windows line ends"),
        pytest.param('[{"instruction": "a\u2028b", "output": "x"},\n{"instruction": }]', 2, id="after a U+2028"),
        pytest.param(f"[\n{GOOD_LINE}\n{GOOD_LINE}\n]", 3, id="no comma"),
        pytest.param(f"[\n{GOOD_LINE},\n", 3, id="breaks off after a comma"),
        pytest.param(f"[\n{GOOD_LINE}", 2, id="breaks off after a record"),
        pytest.param(f'[\n{GOOD_LINE},\n{{"instruction": "a",\n"output', 4, id="breaks off inside a record"),
        pytest.param("\n[", 2, id="opens and breaks off"),
        pytest.param(f"[\n{GOOD_LINE}\n]\n[\n{GOOD_LINE}\n]", 4, id="a second array"),
        pytest.param(f"[\n{GOOD_LINE}]]", 2, id="a bracket too many"),
        pytest.param('"text"', 1, id="a text"),
        pytest.param("", 1, id="empty"),
        pytest.param(f'{GOOD_LINE}\n{{"instruction": ', 2, id="JSON lines under another name"),
        pytest.param(f"[\n{GOOD_LINE},\n{DEEP}", 3, id="nested too deeply"),
        pytest.param(f"[\n{GOOD_LINE},\n{HUGE_NUMBER}]", 3, id="a number of 5000 digits"),
    ],
}


@pytest.mark.parametrize(("content", "line"), BROKEN["d.jsonl"])
def test_broken_json_lines_name_file_and_line(data_file, content: str, line: int):
    path = data_file(content)
    with pytest.raises(InputError) as error:
        read(path)
    assert f"data: {path}:{line}: " in str(error.value)
    assert len(str(error.value)) < 400, "the message must not repeat the file"


@pytest.mark.parametrize(("content", "line"), BROKEN["d.json"])
def test_broken_json_names_file_and_line(data_file, content: str, line: int):
    path = data_file(content, "d.json")
    with pytest.raises(InputError) as error:
        read(path)
    assert f"data: {path}:{line}: " in str(error.value)
    assert len(str(error.value)) < 400, "the message must not repeat the file"


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_refused(data_file, encoding: str, name: str):
    path = data_file(json.dumps([{"instruction": "Grüße", "output": "x"}], ensure_ascii=False).encode(encoding), name)
    with pytest.raises(InputError, match=r"d\.jsonl? is not UTF-8 \(byte \d+\); save it as UTF-8"):
        read(path)


def test_files_that_are_none_are_refused(tmp_path: Path, data_file):
    with pytest.raises(InputError, match=r"data: no file .*nowhere\.jsonl"):
        read(tmp_path / "nowhere.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=r"folder .*folder\.json holds no file that snugtune reads \(\.csv, \.json"):
        read(tmp_path / "folder.json")


@pytest.mark.parametrize("name", ["d.xml", "d", "d.gz", "d.xml.gz", "json"])
def test_other_endings_are_refused(data_file, name: str):
    with pytest.raises(InputError, match=r"unknown ending '.*'; snugtune reads \.csv, \.json"):
        read(data_file(GOOD_LINE, name))


@pytest.mark.parametrize(("content", "name"), [("", "d.jsonl"), ("\n \n", "d.jsonl"), ("[]", "d.json"), ("[\n]\n", "d.json")])
def test_files_without_records_are_refused(data_file, content: str, name: str):
    with pytest.raises(InputError, match=r"no usable example: it holds no records"):
        read(data_file(content, name))


def test_a_file_with_nothing_usable_says_why(data_file):
    path = data_file('{"instruction": "a", "output": ""}\n{"instruction": "a", "output": "  "}')
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).endswith(f"no usable example: 2 records without an answer to learn ({path}:1, {path}:2)")


def test_one_empty_file_among_others_is_not_passed_over(data_file):
    """It would go unnoticed otherwise: the others have enough."""
    with pytest.raises(InputError, match=r"empty\.jsonl: no usable example"):
        read(data_file(GOOD_LINE, "good.jsonl"), data_file("", "empty.jsonl"))


# Records that cannot be used -------------------------------------------------------------------------------------------

UNUSABLE = [
    ({"messages": [user("Q"), {"role": "assistant", "tool_calls": {"name": "f"}}]}, "'tool_calls' is not a list"),
    ({"messages": [user("Q"), {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "without its name"),
    (
        {"messages": [user("Q"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "'arguments' are not JSON",
    ),
    pytest.param([1, 2], "other than JSON objects", id="a list"),
    pytest.param("text", "other than JSON objects", id="a text"),
    pytest.param(None, "other than JSON objects", id="null"),
    pytest.param({}, "no known form", id="empty"),
    pytest.param({"question": "a", "reply": "b"}, "columns: {instruction: question, output: reply}", id="another form"),
    pytest.param({"prompt": "a", "completion": " "}, "without an answer", id="blank completion"),
    pytest.param({"prompt": "a", "completion": 1}, "'completion' is not text", id="a number as completion"),
    pytest.param({"text": " "}, "without text", id="blank text"),
    pytest.param({"text": 5}, "'text' is not text", id="a number as text"),
    pytest.param({"prompt": "a", "chosen": "b", "rejected": ""}, "without two answers", id="one answer of two"),
    pytest.param({"chosen": "b", "rejected": "c"}, "without a prompt", id="answers to nothing"),
    pytest.param({"prompt": "a", "completion": "b", "weight": -1}, "'weight'", id="negative weight"),
    pytest.param({"prompt": "a", "completion": "b", "weight": "lots"}, "'weight'", id="text as weight"),
    pytest.param({"messages": [user("a"), {**assistant("b"), "weight": True}]}, "'weight'", id="a switch as weight"),
    pytest.param({"messages": [user("a"), assistant("b")], "tools": "{"}, "'tools' is not JSON", id="broken tools"),
    pytest.param({"messages": [user("a"), assistant("b")], "tools": ["f"]}, "'tools'", id="names as tools"),
    pytest.param({"instruction": "a"}, "no known form", id="alpaca without output"),
    pytest.param({"instruction": "a", "output": " \n"}, "without an answer", id="blank answer"),
    pytest.param({"instruction": "a", "output": None}, "without an answer", id="null answer"),
    pytest.param({"instruction": 5, "output": "b"}, "'instruction' is not text", id="a number to answer"),
    pytest.param({"instruction": "a", "output": ["b"]}, "'output' is not text", id="a list as answer"),
    pytest.param({"instruction": "a", "input": {}, "output": "b"}, "'input' is not text", id="an object as input"),
    pytest.param({"instruction": "a", "output": "b", "system": 1}, "'system' is not text", id="a number as system"),
    pytest.param({"instruction": "a", "output": "b", "history": [["q"]]}, "'history'", id="half a turn of history"),
    pytest.param({"instruction": "a", "output": "b", "history": [["q", 1]]}, "'history'", id="a number in history"),
    pytest.param({"instruction": "a", "output": "b", "history": "q"}, "'history'", id="text as history"),
    pytest.param({"instruction": "a", "output": "b", "history": {"q": "a"}}, "'history'", id="an object as history"),
    pytest.param({"messages": []}, "'messages' is not a list of turns", id="no turns"),
    pytest.param({"messages": "Hi"}, "'messages' is not a list of turns", id="text as turns"),
    pytest.param({"messages": None}, "'messages' is not a list of turns", id="null turns"),
    pytest.param({"messages": ["Hi"]}, "without 'role' and 'content'", id="texts as turns"),
    pytest.param({"messages": [{"role": "user"}, assistant("b")]}, "without 'role' and 'content'", id="no content"),
    pytest.param({"messages": [{"role": "oracle", "content": "a"}, assistant("b")]}, "unknown role", id="an oracle"),
    pytest.param({"messages": [{"role": 3, "content": "a"}, assistant("b")]}, "unknown role", id="a number as role"),
    pytest.param({"messages": [{"role": [], "content": "a"}, assistant("b")]}, "unknown role", id="a list as role"),
    pytest.param({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, assistant("b")]}, "not text", id="parts"),
    pytest.param({"messages": [user("a")]}, "without an answer", id="no answer"),
    pytest.param({"messages": [user("a"), assistant(" ")]}, "without an answer", id="blank turn"),
    pytest.param({"messages": [assistant("a"), user("b"), assistant("c")]}, "beginning with an answer", id="answer first"),
    pytest.param({"conversations": [said("gpt", "a")]}, "beginning with an answer", id="answer alone"),
    pytest.param(
        {"conversations": [{"speaker": "a", "said": "b"}]}, "without 'from' and 'value'", id="sharegpt with other names"
    ),
    pytest.param({"conversations": [said("oracle", "a")]}, "unknown role", id="sharegpt with an oracle"),
    pytest.param({"instruction": "half an emoji \ud83d", "output": "b"}, "Unicode", id="half an emoji asked"),
    pytest.param({"messages": [user("a"), assistant("half an emoji \ude00")]}, "Unicode", id="half an emoji answered"),
    pytest.param(
        {"messages": [user("a"), {**assistant("b"), "reasoning_content": "\ud83d"}]}, "Unicode", id="half an emoji thought"
    ),
    pytest.param({"messages": [{**user("a"), "name": "\ud83d"}, assistant("b")]}, "Unicode", id="half an emoji as name"),
    pytest.param({"messages": [user("a"), assistant("b")], "tools": [{"a": ["\ud83d"]}]}, "Unicode", id="half an emoji in tools"),
    pytest.param({"messages": [user("a"), assistant("b")], "tools": '[{"\\ud83d": 1}]'}, "Unicode", id="half an emoji as key"),
    pytest.param(
        {"messages": [user("a"), {**assistant(""), "tool_calls": [{"name": "f", "arguments": '"\\ud83d"'}]}]},
        "Unicode",
        id="half an emoji in a call",
    ),
    pytest.param({"text": "\ud83d"}, "Unicode", id="half an emoji as document"),
    pytest.param({"prompt": "a", "completion": "b", "weight": 10**400}, "'weight'", id="an endless weight"),
    pytest.param({"prompt": "a", "completion": "b", "weight": 1e-60}, "fp32", id="a weight that vanishes"),
    pytest.param({"prompt": "a", "completion": "b", "weight": 1e300}, "fp32", id="a weight that overflows"),
    pytest.param({"messages": [user("a"), {**assistant("b"), "weight": 1e-60}]}, "fp32", id="a turn that vanishes"),
]


@pytest.mark.parametrize(("record", "words"), UNUSABLE)
def test_unusable_records_are_counted_under_their_reason(data_file, record: Any, words: str):
    """The others are used; the drop says what is wrong and where."""
    drops = Drops()
    path = data_file("\n".join([GOOD_LINE, json.dumps(record), GOOD_LINE]))
    found = read(path, drops=drops)
    assert [(c.messages, c.source) for c in found] == [(GOOD_MESSAGES, f"{path}:1"), (GOOD_MESSAGES, f"{path}:3")]
    [(reason, count)] = drops.counts.items()
    assert words in reason and count == 1
    assert drops.places == {reason: [f"{path}:2"]}


def test_drops_name_the_first_places_of_each_reason(data_file):
    """People look at a few; thousands would bury them."""
    drops = Drops()
    blank = '{"instruction": "a", "output": ""}'
    path = data_file("\n".join([blank, "5", blank, GOOD_LINE, blank, blank, "6"]))
    assert lines_of(path, drops) == [4]
    assert drops.lines() == [
        f"4 records without an answer to learn ({path}:1, {path}:3, {path}:5, ...)",
        f"2 records other than JSON objects ({path}:2, {path}:7)",
    ]


def test_an_empty_answer_among_others_is_no_reason_to_drop(data_file):
    """The conversation still teaches something."""
    turns = [user("a"), assistant(""), user("b"), assistant("c")]
    [conversation] = read(data_file(json.dumps({"messages": turns})))
    assert list(conversation.messages) == turns


# Folders and patterns --------------------------------------------------------------------------------------------------


def test_a_pattern_is_the_files_it_finds_by_name(data_file, tmp_path: Path):
    """As in a folder; those it does not find are left."""
    for name in ("b.jsonl", "a.jsonl", "c.json"):
        data_file(GOOD_LINE, name)
    assert [c.source for c in read(tmp_path / "*.jsonl")] == [f"{tmp_path / name}:1" for name in ("a.jsonl", "b.jsonl")]
    (tmp_path / "deep").mkdir()
    data_file(GOOD_LINE, "deep/d.jsonl")
    assert [Path(c.source).name for c in read(tmp_path / "**" / "*.jsonl")] == ["a.jsonl:1", "b.jsonl:1", "d.jsonl:1"]


def test_an_ending_may_be_written_large(data_file):
    assert len(read(data_file(GOOD_LINE, "A.JSONL"))) == 1


def test_a_file_with_the_name_of_a_pattern_is_itself(data_file):
    path = data_file(GOOD_LINE, "a[1].jsonl")
    data_file(GOOD_LINE, "a1.jsonl")
    assert [c.source for c in read(path)] == [f"{path}:1"]


@pytest.mark.parametrize("pattern", ["", "*"])
def test_files_of_other_kinds_are_counted_by_kind(data_file, tmp_path: Path, pattern: str):
    for name in ("a.jsonl", "README.md", "notes.md", "table.xlsx", "LICENSE", ".hidden"):
        data_file(GOOD_LINE, name)
    drops = Drops()
    assert len(read(tmp_path / pattern, drops=drops)) == 1
    assert sorted(drops.lines()) == sorted([
        f"2 files left out: snugtune does not read .md ({tmp_path / 'README.md'}, {tmp_path / 'notes.md'})",
        f"1 file left out: snugtune does not read .xlsx ({tmp_path / 'table.xlsx'})",
        f"1 file left out: snugtune does not read files without an ending ({tmp_path / 'LICENSE'})",
    ])  # fmt: skip


def test_very_many_reasons_are_not_all_told(data_file):
    """Each record has other names: a message, not a page."""
    drops = Drops()
    path = data_file("\n".join([GOOD_LINE, *(json.dumps({f"x{i}": 1}) for i in range(500))]))
    read(path, drops=drops)
    assert len(drops.lines()) == 13 and drops.lines()[-1].startswith("and 488 reasons more")
    wide = Drops()
    read(data_file(GOOD_LINE + "\n" + json.dumps({f"{i}" * 100: 1 for i in range(100)})), drops=wide)
    assert len(wide.lines()[0]) < 1000
