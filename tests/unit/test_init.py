"""`snugtune init`: what it writes is a config, says of every field what it is, and is refused in the config's own words."""

import io
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console as RichConsole

from snugtune import init
from snugtune.complete import SCHEMA
from snugtune.config import RunConfig, read_config, to_config
from snugtune.console import Console
from snugtune.errors import InputError

SHORT = {"model": "demo", "data": ["talk.jsonl"]}
COMMENTED = re.compile(r"^(\s*)#(\S|  +\S)", re.MULTILINE)  # a field, not a sentence: those begin with "# "


def quiet() -> Console:
    console = Console()
    console.out = RichConsole(file=io.StringIO(), width=200)
    console.err = RichConsole(file=io.StringIO(), width=200)
    return console


def written(place: Path, given: Mapping[str, Any], answers: list[str] | None = None, force: bool = False) -> str:
    """The text that is written; with `answers` to the questions, all of which must be asked."""
    pending = None if answers is None else iter(answers)
    ask = None if pending is None else (lambda question, default: next(pending) or default)
    init.write_config(place / "config.yaml", given, ask, force, quiet())
    assert pending is None or next(pending, "all asked") == "all asked"
    return (place / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"model": "./folder: of # mine", "output": "runs/a b"},
        {"data": ["a.jsonl", "shop/b.csv"]},
        {"method": "full"},
        {"method": "freeze", "objective": "clm", "epochs": 0.5},
        {"method": "lora", "objective": "sft"},
    ],
    ids=lambda given: "-".join(given) or "shortest",
)
def test_what_is_written_is_what_was_given(tmp_path: Path, given: dict[str, Any]) -> None:
    """As written, and with every default put in force: both are the config that the flags say."""
    text = written(tmp_path, SHORT | given)
    fields = {"model": "demo", "data": ["talk.jsonl"], "output": "runs/config"} | given
    if given.get("method") == "freeze":
        fields["method"] = {"type": "freeze", "last_blocks": 2}
    truth = to_config(fields)
    assert read_config(tmp_path / "config.yaml") == truth
    everything = COMMENTED.sub(r"\1\2", text)
    (tmp_path / "all.yaml").write_text(everything, encoding="utf-8")
    assert read_config(tmp_path / "all.yaml") == truth
    assert list(yaml.safe_load(everything)) == [*init.FIRST, *(n for n in RunConfig.model_fields if n not in init.FIRST)]


def test_every_field_is_explained(tmp_path: Path) -> None:
    """Top-level fields above, those inside groups behind."""
    lines = written(tmp_path, SHORT).splitlines()
    for name, field in RunConfig.model_fields.items():
        at = next(i for i, line in enumerate(lines) if line.startswith((f"{name}:", f"#{name}:")))
        assert str(field.description).split()[-1] in lines[at - 1], name
        assert lines[at - 1].startswith("# ")
    values = RunConfig.model_validate({"model": "demo", "data": "d", "output": "o"})
    for group in (values.method, values.optimizer, values.schedule, values.plan, values.data[0]):
        for name, field in type(group).model_fields.items():
            line = next(line for line in lines if re.match(rf"[#\s-]+{name}:", line))
            assert line.endswith(f"  # {field.description}") or not field.description or name in ("type", "path")
    assert any("lora | full | freeze" in line for line in lines)


def test_plain_text_is_learned_as_such(tmp_path: Path) -> None:
    written(tmp_path, {"data": ["book.txt.gz"]})
    assert read_config(tmp_path / "config.yaml").objective.type == "clm"


def told(place: Path, given: Mapping[str, Any]) -> str:
    """What is said while a config is written."""
    console = quiet()
    init.write_config(place / "config.yaml", given, None, True, console)
    return console.err.file.getvalue()  # type: ignore[attr-defined]


FOUND = {
    "talks": ('{"instruction": "a", "output": "b"}', "1 conversation among its first records", "sft"),
    "texts": ('{"text": "a"}\n{"text": "b"}', "2 documents among its first records", "clm"),
    "other names": ('{"question": "a", "reply": "b"}', "columns: {instruction: question, output: reply}", "sft"),
    "broken": ('{"text": "a"', "d.jsonl:1: not valid JSON", "sft"),
    "nothing": ("", "it holds no records", "sft"),
}


@pytest.mark.parametrize("case", FOUND)
def test_data_is_opened(tmp_path: Path, case: str) -> None:
    """What it is is said, and decides what is learned; what is wrong with it is said as well."""
    content, said, objective = FOUND[case]
    (tmp_path / "d.jsonl").write_text(content)
    assert said in told(tmp_path, {"data": [str(tmp_path / "d.jsonl")]})
    assert read_config(tmp_path / "config.yaml").objective.type == objective


def test_data_that_is_not_there_is_mentioned(tmp_path: Path) -> None:
    assert "no file gone.jsonl" in told(tmp_path, {"data": ["gone.jsonl"]})
    assert "of the hub" in told(tmp_path, {"data": ["org/talks"]})


def test_configs_of_the_same_data_have_outputs_of_their_own(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        init.write_config(tmp_path / name, SHORT, None, False, quiet())
    assert [read_config(tmp_path / name).output for name in ("a.yaml", "b.yaml")] == ["runs/a", "runs/b"]


def test_it_asks_for_what_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty answers take the default; answers that the config refuses and data that is not there are asked for again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.jsonl").write_text('{"instruction": "a", "output": "b"}')
    written(tmp_path, {"model": "demo"}, ["", "shopp.jsonl", "shop.jsonl", "dpo", "", "freeze", "-1", "many", "2", ""])
    config = read_config(tmp_path / "config.yaml")
    truth = {"model": "demo", "data": "shop.jsonl", "objective": "sft", "method": {"type": "freeze", "last_blocks": 2},
             "epochs": 2, "output": "runs/config"}  # fmt: skip
    assert config == to_config(truth)


def test_a_question_says_why_an_answer_will_not_do(tmp_path: Path) -> None:
    console, answers = quiet(), iter(["lorra", ""])
    given = {"model": "demo", "data": ["d"], "objective": "sft", "epochs": 1.0, "output": "o"}
    init.write_config(tmp_path / "c.yaml", given, lambda _, default: next(answers) or default, False, console)
    assert "method: unknown type 'lorra'; did you mean 'lora'?" in console.err.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "bad", [{"method": "lorra"}, {"objective": "dpo"}, {"epochs": -1.0}, {"model": ""}, {"output": ""}, {"data": [""]}], ids=str
)
def test_bad_values_are_refused_in_the_configs_words(tmp_path: Path, bad: dict[str, Any]) -> None:
    config = {"model": "demo", "data": ["d"], "output": "o"} | bad
    with pytest.raises(InputError) as truth:
        to_config(config, "init")
    with pytest.raises(InputError, match=re.escape(str(truth.value))):
        written(tmp_path, SHORT | bad)
    assert list(tmp_path.iterdir()) == []


def test_data_there_must_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data: nothing to train on; give --data"):
        written(tmp_path, {"model": "demo"})


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"exists already.*--force"):
        written(tmp_path, SHORT)
    assert (tmp_path / "config.yaml").read_text() == "mine"
    assert "model: demo" in written(tmp_path, SHORT, force=True)
    with pytest.raises(InputError, match="is a folder"):
        init.write_config(tmp_path, SHORT, None, True, quiet())
    assert written(tmp_path / "new/folders", SHORT), "folders are made"


def test_editors_find_the_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = tmp_path / "a folder" / SCHEMA
    monkeypatch.setattr(init, "files", lambda package: schema.parent)
    assert "yaml-language-server" not in written(tmp_path, SHORT)
    schema.parent.mkdir()
    schema.write_text("{}")
    assert written(tmp_path, SHORT, force=True).splitlines()[0] == f"# yaml-language-server: $schema={schema.as_uri()}"
    assert " " not in schema.as_uri()


def test_asking_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions go to stderr, the default is shown and taken; the end of the input ends it in one line."""
    console = quiet()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n  mine \n"))
    assert console.ask("Which?", "yours") == "yours"
    assert console.ask("Which?") == "mine"
    with pytest.raises(InputError, match="input ended"):
        console.ask("Which?")
    assert console.err.file.getvalue().startswith("Which? [yours]: Which? Which? ")  # type: ignore[attr-defined]
    assert console.out.file.getvalue() == ""  # type: ignore[attr-defined]
