"""`snugtune init`: a config of one's own, by asking or by flags, with every field explained where it stands."""

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from snugtune.complete import SCHEMA
from snugtune.config import RunConfig, to_config
from snugtune.console import Console
from snugtune.data.forms import Document
from snugtune.data.records import kind
from snugtune.data.sources import SourceConfig, look, on_disk
from snugtune.errors import InputError
from snugtune.files import make_folder, write_whole
from snugtune.schema import Config
from snugtune.words import counted

WIDTH = 118
FIRST = ("model", "data", "output", "objective", "method")
"""The fields that stand first in a written config."""
HOW_TO_READ = "What begins with # directly before a name is a default: take the # away to change it."

LOOKED_AT = 100
"""Records of each source that are opened."""

Objective = Literal["sft", "clm"]

Answer = Callable[[str, str], str]
"""Asks a person: question, and the answer that stands if nothing is said."""


def write_config(path: Path, given: Mapping[str, Any], ask: Answer | None, force: bool, console: Console) -> None:
    """Write a config with the fields `given`, asking for others if there is somebody to `ask`.

    Raises `InputError` for bad values (in the words of `train`) and for a file that is there, unless `force`; `StorageError`.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the file to write, such as {path / 'config.yaml'}")
    if path.exists() and not force:
        raise InputError(f"{path} exists already; give another path, or --force to replace it")
    fields = {name: value for name, value in given.items() if value is not None}
    if ask is not None:
        _interview(fields, path, ask, console)
    found = look_at([str(source) for source in fields.get("data") or ()], console) if ask is None else None
    _fill(fields, path, found)
    text = render(to_config(fields, "init"), fields)
    make_folder(path.parent)
    write_whole(path, text)
    console.say(f"written: {path}")
    console.say(f"next:    snugtune data show {path}   |   snugtune train {path}")


# --- asking -----------------------------------------------------------------------------------------------------------


def _interview(fields: dict[str, Any], path: Path, ask: Answer, console: Console) -> None:
    """Ask for what is not given yet. An answer that the config refuses, or data that cannot be read, is asked for again."""
    found = look_at(fields["data"], console) if fields.get("data") else None
    for name, default, question in (
        ("model", "demo", "Which model? A hub id, a folder, a .gguf file, or 'demo'"),
        ("data", "", "Which data? A file, a folder, or a dataset's id on the hub"),
        ("objective", "", "What to learn? sft: the answers of conversations; clm: whole plain texts"),
        ("method", "lora", "How? lora: an adapter, least memory; freeze: the last blocks; full: every weight, most memory"),
        ("epochs", "1", "How long? Passes over the data (1 is quickest)"),
        ("output", "", "Where do the results go?"),
    ):
        while name not in fields:
            answer = ask(question, default or _likely(name, path, found))
            value = [answer] if name == "data" else answer
            try:
                _check(name, value)
                if name == "data":
                    found = _opened(answer, console)
            except InputError as error:
                console.error(str(error))
            else:
                fields[name] = value


def _check(name: str, value: Any) -> None:
    """Whether one field is good, whatever the others will be. Raises `InputError`."""
    to_config({"model": "any", "data": "any", "output": "any"} | _spelt_out({name: value}), "that will not do")


def _likely(name: str, path: Path, found: Objective | None) -> str:
    """A default that follows from what is known: the objective from the data, the output from the config's own name."""
    return {"objective": found or "sft", "output": f"runs/{path.name.partition('.')[0] or 'first'}"}.get(name, "")


def look_at(data: Sequence[str], console: Console) -> Objective | None:
    """Say what the data is, or what is wrong with it; what it can teach, if that is known."""
    found: list[Objective | None] = []
    for path in filter(None, data):  # an empty one is refused as the config's own mistake
        try:
            found.append(_opened(path, console))
        except InputError as error:
            console.note(f"{error}; the config names it all the same")
            found.append("clm" if kind(Path(path)) == ".txt" else None)
    return next(filter(None, found), None)


def _opened(path: str, console: Console) -> Objective | None:
    """What the first records of a source are, and what can be learned from them. Raises `InputError`."""
    source = SourceConfig(path=path)
    if not on_disk(source):
        console.note(f"data: {path}: a dataset of the hub, looked at when it is trained")
        return None
    items, drops = look(source, LOOKED_AT)
    for line in drops.lines():
        console.note(f"data: {path}: {line}")
    kinds = Counter(type(item) for item in items)
    if not kinds:
        if not drops.counts:
            raise InputError(f"data: {path}: it holds no records")
        return None
    told = ", ".join(counted(count, f"{type_.__name__.lower()}s") for type_, count in kinds.most_common())
    console.note(f"data: {path}: {told} among its first records")
    return "clm" if kinds.most_common(1)[0][0] is Document else "sft"


def _fill(fields: dict[str, Any], path: Path, found: Objective | None) -> None:
    """What `train` needs and nobody said: the demo's model, a folder named after the config. Data there must be."""
    if not fields.get("data"):
        raise InputError("data: nothing to train on; give --data with a file, a folder, or a dataset's id on the hub")
    fields.setdefault("model", "demo")
    fields.setdefault("output", _likely("output", path, found))
    if "objective" not in fields and found == "clm":
        fields["objective"] = "clm"
    fields.update(_spelt_out(fields))


def _spelt_out(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Choices by name as the groups of fields they open."""
    spelt = dict(fields)
    for name in ("method", "objective"):
        if isinstance(spelt.get(name), str):
            spelt[name] = {"type": spelt[name]}
    if spelt.get("method") == {"type": "freeze"}:
        spelt["method"]["last_blocks"] = 2  # something has to train
    return spelt


# --- writing ----------------------------------------------------------------------------------------------------------


def render(config: RunConfig, given: Mapping[str, Any]) -> str:
    """The config as YAML: fields `given` stand, all others are commented out with their values; each says what it is."""
    lines = [f"# yaml-language-server: $schema={schema.as_uri()}"] if (schema := _schema()) is not None else []
    lines += ["# A run of snugtune: train it with `snugtune train`.", f"# {HOW_TO_READ}"]
    values = config.model_dump(mode="json")
    for name in (*FIRST, *(n for n in RunConfig.model_fields if n not in FIRST)):
        field, value = RunConfig.model_fields[name], getattr(config, name)
        lines += ["", *textwrap.wrap(field.description or "", WIDTH, initial_indent="# ", subsequent_indent="# ")]
        if name == "data":
            lines += _sources(config.data)
        elif isinstance(value, Config):
            own = given.get(name)
            types = [kind.model_fields["type"].default for kind in get_args(field.annotation)]
            block = [f"{name}:", *_indented(_group(value, value.model_fields if own is None else own, types))]
            lines += block if own is not None else ["#" + line for line in block]
        else:
            lines.append(f"{'' if name in given else '#'}{name}: {_plain(values[name])}")
    return "\n".join(lines) + "\n"


def _schema() -> Path | None:
    """The config's JSON schema, by which editors complete and check."""
    path = Path(str(files("snugtune").joinpath(SCHEMA)))
    return path if path.is_file() else None


def _sources(sources: Sequence[SourceConfig]) -> list[str]:
    lines = ["data:"]
    for index, source in enumerate(sources):
        group = _group(source, ("path",), ()) if index == 0 else [f"path: {_plain(source.path)}"]  # explained once
        lines += [("  - " if i == 0 else "    ") + line for i, line in enumerate(group)]
    return lines


def _group(config: Config, given: Mapping[str, Any] | Sequence[str], types: Sequence[str]) -> list[str]:
    """The fields of a nested config, one a line, each with its description after it."""
    values = config.model_dump(mode="json")
    kinds = {"type": " | ".join(types)}
    fields = [
        (f"{'' if name in given else '#'}{name}: {_plain(values[name])}", field.description or kinds.get(name, ""))
        for name, field in sorted(type(config).model_fields.items(), key=lambda item: item[0] not in ("type", "path"))
    ]
    width = max(len(text) for text, _ in fields)
    return [f"{text:<{width}}  # {what}" if what else text for text, what in fields]


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _plain(value: Any) -> str:
    """A value in YAML, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("\n...\n").strip()
