"""What overrides a config, before it is checked: `--set` the file's fields, a job's own fields those of all jobs.

Both write the short forms that a person may: a path for a source of data, a `type` for any other group.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import yaml

from snugtune.config_yaml import parse_yaml
from snugtune.data.sources import as_sources
from snugtune.errors import InputError

_SOURCES = ("data", "validation")
"""Fields whose short form is a path; that of the others is a type."""


def overlaid(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `shared`. A nested config is merged field by field unless its `type` changes; epochs replace steps."""
    merged = dict(shared)
    for key, value in own.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, str) and key not in _SOURCES:
            value = {"type": value}
        same_kind = isinstance(old, dict) and isinstance(value, dict) and value.get("type", old.get("type")) == old.get("type")
        merged[key] = {**old, **value} if same_kind and isinstance(old, dict) and isinstance(value, dict) else value
    for given, other in (("epochs", "steps"), ("steps", "epochs")):
        if own.get(given) is not None and other not in own:
            merged[other] = None
    return merged


def apply(raw: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` (the value in YAML) in a nested mapping; list items go by their index.

    Raises `InputError` naming the override.
    """
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise InputError(f"--set {override}: expected field=value, for example --set optimizer.lr=1e-4")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: the value is not valid YAML") from error
    *parents, leaf = (name.strip() for name in path.split("."))
    if not all((*parents, leaf)):
        raise InputError(f"--set {override}: a name is empty; write field=value or group.field=value")
    place: Any = raw
    for key, below in pairwise([*parents, leaf]):
        place = _child(place, key, below, override)
    if isinstance(place, list):
        place[_index(place, leaf, override)] = value
    elif isinstance(place, dict):
        place[leaf] = value
    else:
        raise InputError(f"--set {override}: '{'.'.join(parents)}' is not a group of fields")


def _child(place: Any, key: str, below: str, override: str) -> Any:
    """What stands at `key`, made ready for a field or position `below`."""
    if isinstance(place, list):
        return place[_index(place, key, override)]
    if not isinstance(place, dict):
        raise InputError(f"--set {override}: '{key}' is not inside a group of fields")
    inner = place.get(key)
    if key == "data" and below.isdecimal() and isinstance(inner, (str, dict)):
        inner = place[key] = list(as_sources(inner))  # one source is a list of one
    elif inner is None and below.isdecimal():
        raise InputError(
            f"--set {override}: '{key}' is no list, so it has no position {below}; give it whole: --set '{key}=[...]'"
        )
    elif inner is None:
        inner = place[key] = {}
    elif isinstance(inner, str):
        inner = place[key] = {"path" if key in _SOURCES else "type": inner}  # `schedule: cosine`, --set schedule.warmup=0.1
    return inner


def _index(place: list[Any], key: str, override: str) -> int:
    if not (key.isascii() and key.isdigit()) or int(key) >= len(place):
        raise InputError(f"--set {override}: '{key}' is not one of the list's {len(place)} positions (from 0)")
    return int(key)
