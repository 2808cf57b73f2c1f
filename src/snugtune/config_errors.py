"""What is wrong with a config, in a person's words: where, what is expected there, and what was given.

pydantic finds the mistakes; its words for them are a programmer's. Everything here reads its errors and the configs' own
declarations: no field is known by name.
"""

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from snugtune.errors import InputError

NEAR = 0.7
"""How alike a value is at least to the choice that is offered for it: 'gpu' is not 'cpu'."""
MOST_NAMED = 12
"""Fields of a group that are all named where none is near the one that was written."""

_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "a list"}
_KINDS[dict] = "a group of fields"
_TYPES = {"int": int, "float": float, "string": str, "bool": bool, "tuple": tuple, "list": tuple, "dict": dict, "model": dict}
_LIMITS = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be finite",
    "string_too_short": "must not be empty",
    "too_long": "expected at most {max_length} values, found {actual_length}",
    "too_short": "must not be empty",
}
_OURS = frozenset({"value_error", "unknown_field"})
"""Errors whose words are ours already."""


class ConfigError(InputError):
    """A config that cannot be used; `problems` are the messages about each field of it."""

    def __init__(self, origin: str, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__(f"{origin}: {'; '.join(problems)}")


def explain(error: ValidationError, root: type[BaseModel], whole: type[BaseModel] | None = None) -> list[str]:
    """One message for each bad field of a `root`; `whole` is the config that it is a part of, if it is one."""
    at: dict[_Place, list[Any]] = {}
    for found in error.errors():
        at.setdefault(_place(found, root), []).append(found)
    said = [(place.name, _text(place, errors, root, whole or root)) for place, errors in at.items()]
    return [f"{name}: {text}" if name else text for name, text in said]


@dataclass(frozen=True)
class _Place:
    """Where an error is. `kinds`: the configs that may stand there; `kind` the one that was chosen by its type."""

    name: str
    kinds: tuple[type[BaseModel], ...]
    kind: type[BaseModel] | None
    description: str


def _place(error: Any, root: type[BaseModel]) -> _Place:
    """Follow an error's location; what pydantic puts in it for the branch of a union is no field that a person wrote."""
    here: list[Any] = [root]
    names: list[str] = []
    kind, description = None, ""
    for part in error["loc"]:
        fields = _fields(here, part)
        if fields:
            here, description = [a for f in fields for a in _alternatives(f.annotation)], fields[0].description or ""
            kind = None
        elif isinstance(part, int):
            here = [a for kind_ in here if get_origin(kind_) is tuple for a in _alternatives(get_args(kind_)[0])]
        elif any(get_origin(a) is dict for a in here) and part != "[key]":
            here = [get_args(a)[1] for a in here if get_origin(a) is dict]
        else:
            kind = next((k for k in _configs(here) if _type_of(k) == part), kind)
            continue
        names.append(str(part))
    if error["type"] == "no_switch":
        names.append(str(error["ctx"]["key"]))
    return _Place(".".join(names), _configs(here), kind, description)


def _alternatives(annotation: Any) -> Iterator[Any]:
    """What a field may be, one by one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for branch in get_args(annotation):
            yield from _alternatives(branch)
    else:
        yield annotation


def _configs(alternatives: Sequence[Any]) -> tuple[type[BaseModel], ...]:
    return tuple(a for a in alternatives if isinstance(a, type) and issubclass(a, BaseModel))


def _fields(alternatives: Sequence[Any], name: object) -> list[FieldInfo]:
    return [kind.model_fields[name] for kind in _configs(alternatives) if isinstance(name, str) and name in kind.model_fields]


def _type_of(kind: type[BaseModel]) -> str | None:
    """What a union's `type` says for this config."""
    field = kind.model_fields.get("type")
    return None if field is None else field.default


def _text(place: _Place, errors: Sequence[Any], root: type[BaseModel], whole: type[BaseModel]) -> str:
    # Of a union's branches the one counts whose kind of value it is.
    first = next((e for e in errors if not _is_of_kind(e)), None)
    if first is None:
        return _expected(place, errors)
    kind, context = str(first["type"]), first.get("ctx", {})
    if kind == "unknown_field":
        return _unknown_field(place, str(context["key"]), context["near"], root, whole)
    if kind == "no_switch":
        return _no_switch(place, str(context["key"]), context["value"])
    if kind == "union_tag_invalid":
        return _unknown_type(str(context["tag"]), str(context["expected_tags"]))
    if kind == "missing":
        return "required, but not given"
    if kind == "string_pattern_mismatch":
        text = f"expected {place.description}"
    elif kind in _LIMITS:
        text = _LIMITS[kind].format(**context)
    else:
        text = str(first["msg"]).removeprefix("Value error, ")
        text = text if kind in _OURS else f"{text[:1].lower()}{text[1:]}"
    return text if kind in _OURS else text + _got(first["input"])


def _is_of_kind(error: Any) -> bool:
    """Whether it is the kind of value that is wrong."""
    kind, _, how = str(error["type"]).partition("_")
    return error["type"] == "literal_error" or (kind in _TYPES and how in ("type", "parsing", "from_float", "attributes_type"))


def _got(value: Any) -> str:
    """What was given, as YAML has it."""
    if isinstance(value, (dict, list, tuple)):
        return ""
    words = {None: "nothing", True: "true", False: "false"}
    shown = words[value] if value is None or isinstance(value, bool) else repr(value)
    percent = re.fullmatch(r"([0-9]{1,9}\.?[0-9]{0,9})\s*%", value) if isinstance(value, str) else None
    hint = f"; write {float(percent[1]) / 100:g}" if percent else "; nothing is written null" if value in ("None", "none") else ""
    return f" (got {shown}){hint}"


def _expected(place: _Place, errors: Sequence[Any]) -> str:
    """`expected a whole number or 'auto' (got 'one')`."""
    kinds: list[str] = []
    choices: list[str] = []
    for error in errors:
        if error["type"] == "literal_error":
            choices += str(error["ctx"]["expected"]).replace(" or ", ", ").split(", ")
        else:
            kind = _TYPES[str(error["type"]).partition("_")[0]]
            kinds.append(_group(place.kinds) if kind is dict else _KINDS[kind])
    given = errors[0]["input"]
    if errors[0]["loc"][-1:] == ("[key]",):
        return f"no such name; there are {', '.join(choices)}"
    plain = [choice.strip("'") for choice in choices]
    if len(several := str(given).split(",")) > 1 and {one.strip() for one in several} <= set(plain):
        return f"expected one of them a time (got {given!r}); a list is written [{', '.join(several)}]"
    near = difflib.get_close_matches(str(given), plain, n=1, cutoff=NEAR)
    kind = " (got a list)" if isinstance(given, (list, tuple)) else " (got a group of fields)" if isinstance(given, dict) else ""
    return f"expected {_listed([*kinds, *choices])}{kind or _got(given)}" + (f"; did you mean {near[0]!r}?" if near else "")


def _group(kinds: Sequence[type[BaseModel]]) -> str:
    """A group of fields, with one of them for an example."""
    fields = kinds[0].model_fields.items() if kinds else ()
    example = next((f"{n}: {f.default}" for n, f in fields if n != "type" and isinstance(f.default, (int, float, str))), None)
    return "a group of fields" + (f" like {{{example}}}" if example else "")


def _listed(words: Sequence[str]) -> str:
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} or {last}" if others else last


def _unknown_type(given: str, valid: str) -> str:
    near = difflib.get_close_matches(given, valid.replace("'", "").split(", "), n=1, cutoff=NEAR)
    return f"unknown type '{given}'; {f'did you mean {near[0]!r}? ' if near else ''}valid types: {valid}"


def _no_switch(place: _Place, key: str, value: str) -> str:
    found = [a for f in _fields([place.kind] if place.kind else place.kinds, key) for a in _alternatives(f.annotation)]
    kinds = [_group(_configs([a])) if _configs([a]) else _KINDS.get(get_origin(a) or a, "") for a in found]
    expected = _listed([k for k in kinds if k] or ["a value"])
    hint = "; yes, no, on and off mean true and false in YAML: put text in quotes" if "text" in kinds else ""
    return f"expected {expected} (got {value.lower()}){hint}"


def _unknown_field(place: _Place, key: str, near: str | None, root: type[BaseModel], whole: type[BaseModel]) -> str:
    """Where the field is that was meant: of another type, at the top, in a group, or just spelt otherwise."""
    text = f"unknown field '{key}'"
    own = place.kind or (place.kinds[0] if len(place.kinds) == 1 else None)
    having = [_type_of(k) for k in place.kinds if k is not own and key in k.model_fields]
    if own is not None and having and _type_of(own):
        which = " or ".join(f"{place.name}.type: {t}" for t in having)
        return f"'{key}' is not a field of type '{_type_of(own)}'; it belongs to {which}"
    meant = getattr(own, "elsewhere", {}).get(key) or getattr(root, "elsewhere", {}).get(key)
    if meant is not None:
        return f"{text}; did you mean '{meant.removeprefix(f'{place.name}.')}'?"
    if place.name and key in root.model_fields:
        return f"{text}; it stands at the top level, not in {place.name}"
    if key in whole.model_fields and key not in root.model_fields:
        return f"{text} of a job; it is the whole run's: give it once, at the top level"
    part = next((name for name, kind in getattr(own, "parts", {}).items() if key in kind.model_fields), None)
    if part is not None:
        return f"{text} of a whole run; it belongs into an entry of '{part}'"
    groups = (name for name, field in root.model_fields.items() if _fields(list(_alternatives(field.annotation)), key))
    if not place.name and (group := next(groups, None)):
        return f"{text}; did you mean '{group}.{key}'?"
    if near:
        return f"{text}; did you mean '{near}'?"
    names = own.model_fields if own is not None else {}
    if 0 < len(names) <= MOST_NAMED:
        return f"{text}; there are {', '.join(names)}"
    return f"{text}; 'snugtune init' writes a config with every field explained"
