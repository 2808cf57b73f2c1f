"""Prints docs/reference.md: everything a config, a command and a run's folder can hold, from the code's own words.

python docs/make_reference.py > docs/reference.md
"""

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.models import OptionInfo

from snugtune import errors
from snugtune.cli import app
from snugtune.config import JobConfig, JobFields, RunConfig
from snugtune.data.sources import SourceConfig
from snugtune.observer import RunResult
from snugtune.schema import Config
from snugtune.training.metrics import Sample, StepMetrics

HEAD = """\
# Reference

<!-- Written by docs/make_reference.py from the code's own descriptions. Do not edit: change those, then run `make docs`. -->

What a config, a command and a run's folder can hold. For a first walk see [the tutorial](tutorial.md).

- [The config](#the-config)
- [Commands](#commands)
- [Python](#python)
- [Exit codes](#exit-codes)
- [The run folder](#the-run-folder)

## The config

A YAML file. Only `model`, `data` and `output` are required. Three short forms save typing:

- `data: file.jsonl` is short for `data: [{path: file.jsonl}]`.
- A group with a `type` may be its type alone: `schedule: cosine` is short for `schedule: {type: cosine}`.
- `type` may be left out where a default exists: `optimizer: {lr: 1.0e-3}` is AdamW.

Any field can be set on the command line: `--set optimizer.lr=1e-3`, and in a list by its position: `--set data.0.weight=2`.
Paths are relative to the folder that the command is run in. An unknown field is refused, with the nearest valid name.
`snugtune schema` prints a JSON schema of all this, for editors.
"""

PYTHON = """\
## Python

| call | what it does |
|---|---|
| `snugtune.train(config)` | trains; `config`: a mapping of the fields above, or the path of a YAML file; returns a `RunResult` |
| `snugtune.load(run, adapter=None, trust_remote_code=False)` | loads a run's or a PEFT adapter's folder; returns a `Tuned` |
| `RunResult` | {result} |
| `Tuned` | `reply(question)` answers a question or a list of messages; `replies([...], sampling)` several together |
| `snugtune.errors.SnugtuneError` | the base of every error that you can mend; its text is what the command prints |
"""

FILES = """\
## The run folder

| file | what it holds |
|---|---|
| `config.yaml` | the config, with every default written out |
| `plan.json` | the knobs that were chosen (`plan`), why (`reasons`), what was changed since for want of memory (`changes`); \
what was predicted (`estimate`) and, from the first step on, counted (`measured`), by category in bytes; \
`budget_bytes`, `rejected` plans, and `measured_peak_bytes` once the run is finished |
| `data.json` | of each job: how many examples, tokens and lengths; what was cut or left out, and where |
| `jobs.json` | of each job: its `status` (waiting, training, finished, stopped early, failed, parked), \
`step` of `total_steps`, the `reason` where it failed or is parked, and the `traceback` of a bug |
| `metrics.jsonl` | one JSON object for each job and step; see below |
| `samples.jsonl` | where a job is asked something while it trains: one JSON object for each answer; see below |
| `report.html` | all of this as one page, which needs no network |
| `tracking.json` | with `tracking`: how the trackers know this run |
| `adapters/<job>/` | with `method: lora`: a PEFT adapter folder with the tokenizer and a model card |
| `models/<job>/` | with `method: full` or `freeze`: a transformers model folder |
| `checkpoints/` | `step-*`: what resuming goes on from; `best-<job>`: with `keep_best`, the best state so far |

A run without `jobs` has one job, named `default`.
"""

COLUMNS = ("argument or option", "type", "default", "what it means")
SIMPLE_NUMBERS = {str: "text", int: "whole number", float: "number"}
SIMPLE = SIMPLE_NUMBERS | {bool: "true or false", dict: "mapping", type(None): "null"}
BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


# --- the config -------------------------------------------------------------------------------------------------------


def config_chapter() -> Iterator[str]:
    yield HEAD
    yield from section(
        RunConfig, "The run", "The fields of the file.", [n for n in RunConfig.model_fields if n in own(RunConfig)]
    )
    about = "At the top level these are the defaults of every job; an entry of `jobs` may set any of them for itself."
    yield from section(JobFields, "The job", about)
    yield from section(JobConfig, "An entry of `jobs`", "All fields of the job, and:", own(JobConfig))
    for group, members in groups().items():
        for member in members:
            kind = tag(member)
            title = f"`{group}`" + (f": `type: {kind}`" if kind else "")
            default = kind is not None and any(
                tag(type(f.default)) == kind
                for n, f in JobFields.model_fields.items()
                if n == group and isinstance(f.default, Config)
            )
            about = (member.__doc__ or "").strip() + (" The default." if default else "")
            yield from section(member, title, about, [n for n in member.model_fields if n != "type"])


def own(kind: type[BaseModel]) -> list[str]:
    """The fields that a config does not have from what it is built on."""
    return [name for name in kind.model_fields if name not in JobFields.model_fields]


def groups() -> dict[str, list[type[Config]]]:
    """Field -> the configs that can stand there, of all fields that hold configs."""
    fields = {**JobFields.model_fields, **RunConfig.model_fields}
    found = {name: list(configs(field.annotation)) for name, field in fields.items()}
    return {name: members for name, members in found.items() if members}


def configs(annotation: Any) -> Iterator[type[Config]]:
    """The config classes inside an annotation."""
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, Config):
        yield annotation
    for part in get_args(annotation):
        if get_origin(annotation) is not Literal:
            yield from configs(part)


def tag(kind: type) -> str | None:
    """The `type` that a config is chosen by."""
    field = getattr(kind, "model_fields", {}).get("type")
    return None if field is None else str(field.default)


def section(kind: type[Config], title: str, about: str, names: Sequence[str] | None = None) -> Iterator[str]:
    names = list(kind.model_fields) if names is None else names
    yield f"### {title}\n\n{paragraph(about)}\n"
    if not names:
        yield "No fields of its own.\n"
        return
    yield table(("field", "type", "default", "what it means"), (row(n, kind.model_fields[n]) for n in names))


def row(name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    if not field.description:
        raise SystemExit(f"the field '{name}' has no description; give it one where it is defined")
    if any(configs(field.annotation)):
        return f"`{name}`", kinds_in_words(field.annotation), default_of(field), field.description
    return f"`{name}`", in_words(field.annotation, field.metadata), default_of(field), field.description


def kinds_in_words(annotation: Any) -> str:
    """A field that holds configs: which, by their `type`."""
    found = list(configs(annotation))
    if SourceConfig in found:
        return "number, path, source or null" if type(None) in get_args(annotation) else "path, source, or a list of these"
    tags = [f"`{tag(kind)}`" for kind in found if tag(kind)]
    return "group: " + ", ".join(tags) if tags else "group" + (" or null" if type(None) in get_args(annotation) else "")


def in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type as a person would say it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(parts[0], [*metadata, *parts[1:]])
    if origin is Literal:
        return " \\| ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(part, metadata if part is not type(None) else ()) for part in parts))
    if origin is tuple:
        many = "list of " if parts[-1] is Ellipsis else f"list of {len(parts)}: "
        return many + in_words(parts[0])
    if origin in (dict, Mapping):
        return "mapping of name to name" if parts[1] is str else "mapping"
    return SIMPLE[annotation] + bounds(metadata if annotation in (int, float) else ())


def bounds(metadata: Sequence[Any]) -> str:
    """The limits of a number. Limits that nobody reaches are left out."""
    flat = [c for m in metadata for c in (getattr(m, "metadata", None) or [m])]
    found = [text.format(f"{value:g}") for m in flat for key, text in BOUNDS.items()
             if (value := getattr(m, key, None)) is not None and abs(value) < 2**16]  # fmt: skip
    return f" ({', '.join(found)})" if found else ""


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, Config):
        return f"`{value.type}`" if hasattr(value, "type") else "as below"  # pyright: ignore[reportAttributeAccessIssue]
    return plain(value)


def plain(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    if isinstance(value, (tuple, dict)) and not value:
        return "none"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


# --- commands ---------------------------------------------------------------------------------------------------------


def commands_chapter() -> Iterator[str]:
    yield "## Commands\n\n`snugtune COMMAND --help` says the same. Progress goes to stderr, results go to stdout.\n"
    assert app.registered_callback is not None and app.registered_callback.callback is not None
    yield "### `snugtune`\n"
    yield table(COLUMNS, parameters(app.registered_callback.callback))
    for path, function in walk(app, "snugtune"):
        found = list(parameters(function))
        words = [
            name.strip("`") if default == "required" else f"[{name.strip('`')}]"
            for name, _, default, _ in found
            if "-" not in name
        ]
        yield f"### `{' '.join([path, *words])}`\n\n{paragraph(function.__doc__ or '')}\n"
        if found:
            yield table(COLUMNS, found)


def walk(group: typer.Typer, path: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    for command in group.registered_commands:
        assert command.callback is not None
        yield f"{path} {command.name or command.callback.__name__}", command.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from walk(inner.typer_instance, f"{path} {inner.name}")


def parameters(function: Callable[..., Any]) -> Iterator[tuple[str, str, str, str]]:
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = get_args(hints[name])
        if not info.help:
            raise SystemExit(f"{function.__name__}: '{name}' has no help; give it one in cli.py")
        written = names_of(info, name) if isinstance(info, OptionInfo) else [name.upper()]
        default = "none" if parameter.default is None or parameter.default is False else f"`{parameter.default}`"
        if parameter.default is inspect.Parameter.empty:
            default = "required"
        yield ", ".join(f"`{w}`" for w in written), value_of(kind, info), default, info.help


def names_of(info: OptionInfo, name: str) -> list[str]:
    """The ways an option is written: those it was given (Typer takes the first for a default), or its parameter's name."""
    given = [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str) and word.startswith("-")]
    return given or [f"--{name.replace('_', '-')}"]


def value_of(kind: Any, info: Any) -> str:
    present = [part for part in get_args(kind) if part is not type(None)] if type(None) in get_args(kind) else [kind]
    (first,) = present
    if get_origin(first) is list:
        return "text, repeatable"
    limits = [f"at least {info.min:g}"] if info.min is not None else []
    limits += [f"at most {info.max:g}"] if info.max is not None else []
    words = {Path: "path", bool: "switch"} | SIMPLE_NUMBERS
    return words[first] + (f" ({', '.join(limits)})" if limits else "")


# --- the rest ---------------------------------------------------------------------------------------------------------


def python_chapter() -> str:
    names = ", ".join(f"`{field.name}`" for field in fields(RunResult))
    return PYTHON.format(result=f"{paragraph(RunResult.__doc__ or '')} Fields: {names}")


def exit_codes_chapter() -> Iterator[str]:
    yield "## Exit codes\n"
    rows = [("0", "done", "")]
    for kind in errors.SnugtuneError.__subclasses__():
        rows.append((str(kind.exit_code), f"`{kind.__name__}`", paragraph(kind.__doc__ or "")))
    rows.append(("1", "a bug of ours", "The traceback is shown. Please report it."))
    yield table(("code", "error", "when"), rows)


def folder_chapter() -> Iterator[str]:
    yield FILES
    for kind, file in ((StepMetrics, "metrics.jsonl"), (Sample, "samples.jsonl")):
        yield f"### Keys of `{file}`\n\n{paragraph(kind.__doc__ or '')} A key that says nothing is left out.\n"
        yield table(("key", "type", "what it means"), fields_of(kind))


def fields_of(kind: type) -> Iterator[tuple[str, str, str]]:
    """The fields of a dataclass, with the comment that stands after each."""
    source, hints = inspect.getsource(kind), get_type_hints(kind)
    for field in fields(kind):
        annotation = hints[field.name]
        said = re.search(rf"^    {field.name}: .*?#\s*(.+)$", source, re.MULTILINE)
        if said is None:
            raise SystemExit(f"the field '{field.name}' of {kind.__name__} has no comment; give it one in metrics.py")
        present = [part for part in (get_args(annotation) or (annotation,)) if part is not type(None)]
        yield f"`{field.name}`", in_words(present[0]), paragraph(said.group(1))


def paragraph(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("None", "null")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(cell.replace(chr(10), ' ') for cell in cells)} |" for cells in rows]
    return "\n".join(lines) + "\n"


def reference() -> str:
    chapters = (config_chapter(), commands_chapter(), [python_chapter()], exit_codes_chapter(), folder_chapter())
    return "\n".join(part for chapter in chapters for part in chapter)


if __name__ == "__main__":
    sys.stdout.write(reference())
