"""A job's data, from the files its config names to tokens."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from snugtune.config import JobConfig
from snugtune.data.forms import Item
from snugtune.data.mix import InterleaveConfig, interleave, split
from snugtune.data.sources import Drops, SourceConfig, read_sources
from snugtune.errors import InputError
from snugtune.objectives import OBJECTIVES
from snugtune.types import Example

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Shows progress over a sequence: `track(items, what)` yields the items."""


@dataclass(frozen=True)
class JobText:
    """A job's conversations or documents, before any tokens."""

    train: tuple[Item, ...]
    held_out: tuple[Item, ...]
    drops: Drops


@dataclass(frozen=True)
class JobData:
    """A job's tokenised examples, and what was cut or left out on the way."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...] = ()
    remarks: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the examples, their order and what is trained in them."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.held_out):
            digest.update(len(part).to_bytes(8, "little"))
            for example in part:
                digest.update(len(example.tokens).to_bytes(8, "little"))
                digest.update(example.tokens.numpy().tobytes())
                digest.update(example.weights.numpy().tobytes())
        return digest.hexdigest()


def read_job(job: JobConfig) -> JobText:
    """Read the job's files and hold out its validation part. Raises `InputError`; loads no model."""
    drops = Drops()
    sources = read_sources(job.data, drops)
    if job.validation is None:
        return JobText(_mixed(job, sources), (), drops)
    if isinstance(job.validation, str):
        (held_out,) = read_sources((SourceConfig(path=job.validation),), drops)
        return JobText(_mixed(job, sources), tuple(held_out), drops)
    if all(len(items) < 2 for items in sources):
        raise InputError("validation: 1 example cannot be split; give more data or no validation")
    # Each source is split by itself: what is held out never comes back as a repeat of the mixture.
    parts = [split(items, job.validation, job.seed) if len(items) > 1 else (items, []) for items in sources]
    return JobText(_mixed(job, [train for train, _ in parts]), tuple(item for _, held in parts for item in held), drops)


def _mixed(job: JobConfig, sources: Sequence[Sequence[Item]]) -> tuple[Item, ...]:
    if not isinstance(job.mixing, InterleaveConfig):
        return tuple(item for items in sources for item in items)
    order = interleave([len(items) for items in sources], [source.weight for source in job.data], job.mixing.until)
    return tuple(sources[source][index] for source, index in order)


def tokenize_job(job: JobConfig, text: JobText, tokenizer: Any, track: Track) -> JobData:
    """Render and tokenise; the remarks say what was dropped or cut, and how much is left."""
    tokenise = OBJECTIVES[type(job.objective)].tokenise
    train, held_out = (
        tuple(tokenise(track(part, f"tokenising {job.name}"), tokenizer, job.max_seq_len, text.drops)) if part else ()
        for part in (text.train, text.held_out)
    )
    tokens, labels = sum(len(e.tokens) for e in train), sum(int((e.weights > 0).sum()) for e in train)
    size = f"{len(train):,} training examples, {tokens:,} tokens ({labels:,} trained)"
    return JobData(train, held_out, (*text.drops.lines(), size + (f"; {len(held_out):,} held out" if held_out else "")))
