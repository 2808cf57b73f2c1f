"""What the shell offers on Tab. It must answer at once: nothing heavy is imported, fields come from the shipped JSON schema."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import typer

SCHEMA = "config.schema.json"
FORMS = {"merged": "a transformers model folder with the adapter worked in"}
WIDTHS = ("fp32", "bf16", "fp16")
FORMATS = ("auto", *WIDTHS, "int8", "w8a8", "nf4")
BASES = {"original": "the base in full precision", "dequantized": "the base as it was trained on, dequantized"}
METHODS = ("lora", "freeze", "full", "rotate")
OBJECTIVES = ("sft", "clm")

Offers = list[tuple[str, str]]
"""What completes the word, and what it means."""


def forms(incomplete: str) -> Offers:
    return [(name, what) for name, what in FORMS.items() if name.startswith(incomplete)]


def widths(incomplete: str) -> list[str]:
    return _starting(WIDTHS, incomplete)


def formats(incomplete: str) -> list[str]:
    return _starting(FORMATS, incomplete)


def bases(incomplete: str) -> Offers:
    return [(name, what) for name, what in BASES.items() if name.startswith(incomplete)]


def methods(incomplete: str) -> list[str]:
    return _starting(METHODS, incomplete)


def objectives(incomplete: str) -> list[str]:
    return _starting(OBJECTIVES, incomplete)


def _starting(words: tuple[str, ...], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def adapters(context: typer.Context, incomplete: str) -> list[str]:
    """For `--adapter`: the finished jobs of the run that stands before it on the line."""
    words = [context.params.get("run"), *context.args]  # of a line that is not finished, not all words are taken in
    run = next((Path(word) for word in words if word and Path(word).is_dir()), None)
    found = [p.name for kind in ("adapters", "models") for p in run.glob(f"{kind}/*")] if run else []
    return _starting(tuple(sorted(name for name in found if not name.startswith("."))), incomplete)


def overrides(incomplete: str) -> Offers:
    """For `--set`: fields of the config as far as they are typed, then the values that a field can have."""
    return fields(_schema(), incomplete)


def place_of(name: str) -> str | None:
    """The field `name` at the top of a config or in one of its groups, as `a.b`; None where there is none."""
    schema = _schema()
    groups = [
        (f"{group}.{field}", field) for group, inner in _properties(schema, schema) for field, _ in _properties(schema, inner)
    ]
    tops = [(field, field) for field, _ in _properties(schema, schema)]
    return next((place for place, field in (*tops, *groups) if field == name), None)


def _schema() -> dict[str, Any]:
    source = files("snugtune").joinpath(SCHEMA)
    return json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}


def fields(schema: dict[str, Any], incomplete: str) -> Offers:
    """`a.b` -> `a.beta=`; groups end in a dot; `a.beta=t` -> `a.beta=true`."""
    path, equals, begun = incomplete.partition("=")
    *parents, leaf = path.split(".")
    places = [schema]
    for name in [*parents, leaf] if equals else parents:
        known = "0" if name.isdecimal() else name
        places = [p for place in places for found, p in _properties(schema, place) if found == known]
    if equals:
        values = dict.fromkeys(v for place in places for v in _values(schema, place))
        return [(f"{path}={v}", "") for v in values if v.startswith(begun)]
    before = "".join(f"{p}." for p in parents)
    offers: dict[str, str] = {}
    for place in places:
        for name, inner in _properties(schema, place):
            if name.startswith(leaf):
                ending = "." if any(_properties(schema, inner)) else "="
                offers.setdefault(f"{before}{name}{ending}", inner.get("description", ""))
    return list(offers.items())


def _branches(schema: dict[str, Any], place: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A place in the schema with what it refers to and all its alternatives."""
    yield place
    if "$ref" in place:
        yield from _branches(schema, schema["$defs"][place["$ref"].rpartition("/")[2]])
    for kind in ("anyOf", "oneOf", "allOf"):
        for branch in place.get(kind, ()):
            yield from _branches(schema, branch)


def _properties(schema: dict[str, Any], place: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fields of a group; a list of groups has its positions, of which the first stands for all."""
    for branch in _branches(schema, place):
        yield from branch.get("properties", {}).items()
        items = branch.get("items", {})
        if any("properties" in inner for inner in _branches(schema, items)):
            yield "0", {"description": "the first of the list", **items}


def _values(schema: dict[str, Any], place: dict[str, Any]) -> Iterator[str]:
    """The values that a field may have, where they can be listed; of a group, its types."""
    for branch in _branches(schema, place):
        yield from (str(v) for v in branch.get("enum", ()))
        yield from (str(branch[key]) for key in ("const",) if key in branch)
        yield from {"boolean": ("true", "false"), "null": ("null",)}.get(str(branch.get("type")), ())
        if "items" in branch:
            yield from _values(schema, branch["items"])
        if "type" in branch.get("properties", {}):
            yield from _values(schema, branch["properties"]["type"])
