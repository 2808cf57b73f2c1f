"""The sources of a job: files, folders and datasets of the hub, read into items, with what was left out counted."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from snugtune.data.forms import Form, Item, Unusable, read_form
from snugtune.data.records import ENDINGS, READERS, Records, data_files, kind, read_records, without_blanks
from snugtune.errors import InputError
from snugtune.files import user_path
from snugtune.hub import hub_trouble
from snugtune.schema import Config
from snugtune.words import counted

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# fmt: off
Ours = Literal["messages", "conversations", "instruction", "input", "output", "history", "system", "tools", "prompt",
               "completion", "chosen", "rejected", "text", "weight"]
# fmt: on


class SourceConfig(Config):
    """One source of data."""

    path: str = Field(
        min_length=1,
        description=f"a file ({ENDINGS}), a folder of such files, a pattern (data/*.jsonl), or a dataset's id on the hub",
    )
    format: Form | Literal["auto"] = Field(default="auto", description="the records' form; auto detects it")
    columns: dict[Ours, str] = Field(default={}, description="for records with other names: {instruction: question, ...}")
    weight: float = Field(default=1.0, gt=0, description="share of this source where sources are interleaved")
    max_examples: int | None = Field(default=None, ge=1, description="use only the first so many examples")
    split: str = Field(default="train", description="of a hub dataset")
    subset: str | None = Field(default=None, description="configuration of a hub dataset")
    streaming: bool = Field(default=False, description="read a hub dataset as it comes, up to max_examples, without its download")

    @field_validator("columns", mode="before")
    @classmethod
    def _ours_first(cls, value: Any) -> Any:
        """People write it the other way round."""
        names = get_args(Ours)
        turned = [k for k, v in value.items() if k not in names and v in names] if isinstance(value, dict) else []
        if turned:
            raise ValueError(f"the other way round: {{{value[turned[0]]}: {turned[0]}}}, the name it means before the file's own")
        return value

    @field_validator("columns")
    @classmethod
    def _one_name_each(cls, value: dict[Ours, str]) -> dict[Ours, str]:
        if len(set(value.values())) < len(value):
            raise ValueError("two names mean the same column")
        return value


def as_sources(value: Any) -> Any:
    """A path, a mapping, a list of either, or nothing: always a list of mappings."""
    items = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


SHOWN_PLACES = 3
SHOWN_REASONS = 12


@dataclass
class Drops:
    """What was not used or not used whole, and why: counts by reason, and where the first of each kind stand."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, source: str) -> None:
        self.counts[reason] += 1
        where = self.places.setdefault(reason, [])
        if len(where) < SHOWN_PLACES:
            where.append(source)

    def merge(self, others: "Drops") -> None:
        """Add what was counted elsewhere, later in the data."""
        for reason, count in others.counts.items():
            self.counts[reason] += count
            where = self.places.setdefault(reason, [])
            where += others.places[reason][: SHOWN_PLACES - len(where)]

    def lines(self) -> list[str]:
        """One sentence a reason, for people; of very many reasons the first."""
        lines = [
            f"{counted(count, reason)} ({', '.join(self.places[reason])}{', ...' if count > len(self.places[reason]) else ''})"
            for reason, count in self.counts.items()
        ]
        others = lines[SHOWN_REASONS:]
        return lines[:SHOWN_REASONS] + ([f"and {counted(len(others), 'reasons more, of the same kinds')}"] if others else [])


def read_sources(sources: Sequence[SourceConfig], drops: Drops, field: str = "data") -> list[list[Item]]:
    """The usable items of each source, in order. Raises `InputError` for a source that cannot be read or holds none.

    `field` is the config's that names them: what is wrong is said of it.
    """
    try:
        return [_read_source(source, drops) for source in sources]
    except InputError as error:
        raise InputError(f"{field}:{str(error).removeprefix('data:')}") from error


def look(source: SourceConfig, count: int) -> tuple[list[Item], Drops]:
    """What the first `count` records are, of a source on this disk. Raises `InputError`."""
    drops = Drops()
    return list(_items(source, drops, count)), drops


def on_disk(source: SourceConfig) -> bool:
    """Whether a source is no dataset of the hub. Raises `InputError` for what can be no path."""
    path = user_path(source.path, "data")
    return path.exists() or not _HUB_ID.fullmatch(source.path) or kind(path) in READERS


def _read_source(source: SourceConfig, drops: Drops) -> list[Item]:
    items = list(itertools.islice(_items(source, drops), source.max_examples))
    if not items:
        reasons = "; ".join(drops.lines()) or "it holds no records"
        raise InputError(f"data: {source.path}: no usable example: {reasons}")
    return items


def _items(source: SourceConfig, drops: Drops, most: int | None = None) -> Iterator[Item]:
    for place, record in itertools.islice(_records(source, drops), most):
        try:
            yield read_form(record, source.format, {str(ours): theirs for ours, theirs in source.columns.items()}, place)
        except Unusable as reason:
            drops.add(str(reason), place)


def _records(source: SourceConfig, drops: Drops) -> Records:
    if not on_disk(source):
        return _hub_records(source)
    path = user_path(source.path, "data")
    for name in ("split", "subset", "streaming"):
        if getattr(source, name) != SourceConfig.model_fields[name].default:
            raise InputError(f"data: '{name}' is for datasets of the hub, and {path} is no id of one; leave it out")
    files, others = data_files(path)
    for file in others:
        drops.add(f"files left out: snugtune does not read {kind(file) or 'files without an ending'}", str(file))
    return itertools.chain.from_iterable(map(read_records, files))


def _hub_records(source: SourceConfig) -> Records:
    """Rows of a dataset on the hub, by the `datasets` library, which runs no code that comes with them."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"data: no file {source.path} (looked from {Path.cwd()}); to read it as a dataset of the hub: "
            "pip install 'snugtune[data]'"
        ) from error
    try:
        rows = datasets.load_dataset(source.path, source.subset, split=source.split, streaming=source.streaming)
        for number, row in enumerate(rows, 1):  # a stream may break off at any row
            assert isinstance(row, Mapping)
            yield f"{source.path}:{source.split}:{number}", without_blanks(row)
    except Exception as error:  # the network, the file's form, the library: each has errors of its own
        reason = hub_trouble(error, "dataset") or (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"data: '{source.path}' is neither a file here nor a dataset that the hub gives: {reason}") from error
