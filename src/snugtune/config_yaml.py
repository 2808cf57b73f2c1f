"""The text of a config: YAML without its surprises, and what a file is that is no config."""

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml

from snugtune.errors import InputError

MOST_FIELDS = 1000
"""More than any mapping of a config has."""

_DATA = (".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz")
_WEIGHTS = (".gguf", ".safetensors", ".bin", ".pt")
_HINTS = {
    "mapping values are not allowed": "; a text with ': ' in it needs quotes, and fields of a group the same indentation",
    "found character '\\t'": "; indent with blanks, not with tabs",
    "found character '@'": "; put the text in quotes",
    "found character '%'": "; put the text in quotes",
    "expected ',' or ']'": "; a '[' is not closed",
    "expected ',' or '}'": "; a '{' is not closed",
    "found unexpected end of stream": "; a quote is not closed",
    "could not find expected ':'": "; a field is written 'name: value'",
    "expected <block end>": "; the fields of a group need the same indentation",
}
"""What to do about some of YAML's complaints."""


class _Loader(yaml.SafeLoader):
    """Safe YAML without three surprises: `1e-4` is a number, a date is the text it was written as, no field comes twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as the base class declares it)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"'{key.value}' is given twice (first in line {seen[key.value]})"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_FIELDS:  # merges of merges grow without bounds
            raise yaml.constructor.ConstructorError(None, None, "too many fields merged", node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """Raises `yaml.YAMLError`."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:  # values that belie their tag, bombs
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields that stand in a file. Raises `InputError` naming it, with its line where there is one."""
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no config file {path}{_instead(path)}") from error
    except IsADirectoryError as error:
        raise InputError(_of_folder(path)) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {_of_file(path) or 'cannot be read: it is not text in UTF-8'}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {os.strerror(error.errno or 0).lower()}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = str(getattr(error, "problem", None) or error)
        hint = next((hint for sign, hint in _HINTS.items() if sign in problem), "")
        what = _of_file(path)
        raise InputError(f"{path}: {what}" if what else f"{where}: not valid YAML: {problem}{hint}") from error
    if isinstance(raw, dict) and not (path.suffix in _DATA or _is_record(raw)):
        return raw
    if what := _of_file(path):
        raise InputError(f"{path}: {what}")
    found = {type(None): "nothing", list: "a list", str: "text without fields (a blank must follow each colon)"}
    raise InputError(f"{path}: expected fields like 'model: ...', found {found.get(type(raw), type(raw).__name__)}")


def _is_record(raw: dict[Any, Any]) -> bool:
    """Whether this is rather an example to learn from than a config."""
    return "model" not in raw and not raw.keys().isdisjoint(("messages", "conversations", "instruction", "prompt", "text"))


def _instead(path: Path) -> str:
    """What to do where there is no such file."""
    try:
        around = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, around, n=1)
    if near:
        return f"; did you mean '{path.with_name(near[0])}'?"
    return "" if around else "; 'snugtune init' writes one"


def _of_file(path: Path) -> str | None:
    """What a file is that is no config, by the ending of its name."""
    if path.suffix in (*_DATA, ".json"):
        return f"this is data, not a config; 'snugtune init --data {path}' writes a config for it"
    if path.suffix in _WEIGHTS:
        return "this is a model, not a config; 'snugtune init --model ... --data ...' writes a config"
    return None


def _of_folder(path: Path) -> str:
    if (path / "config.yaml").is_file():
        if (path / "plan.json").is_file():
            return f"{path} is a run's folder, not a config; the run goes on with 'snugtune train {path / 'config.yaml'}'"
        return f"{path} is a folder, not a config; there is one in it: {path / 'config.yaml'}"
    if (path / "adapter_config.json").is_file():
        return f"{path} is an adapter's folder, not a config; 'snugtune chat {path}' talks to it"
    if (path / "config.json").is_file():
        return f"{path} is a model's folder, not a config; 'snugtune init --model {path} --data ...' writes a config for it"
    return f"{path} is a folder, not a config; give the YAML file"
