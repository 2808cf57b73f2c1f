"""A job's data, from the files its config names to tokens."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from snugtune.config import JobConfig
from snugtune.data.mix import split
from snugtune.data.render import render_all
from snugtune.data.sources import Conversation, Drops, SourceConfig, read_conversations
from snugtune.errors import InputError
from snugtune.types import Example

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Shows progress over a sequence: `track(items, what)` yields the items."""


@dataclass(frozen=True)
class JobText:
    """A job's conversations, before any tokens."""

    train: tuple[Conversation, ...]
    held_out: tuple[Conversation, ...]
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
    conversations = read_conversations(job.data, drops)
    if job.validation is None:
        return JobText(tuple(conversations), (), drops)
    if isinstance(job.validation, str):
        held_out = read_conversations((SourceConfig(path=job.validation, format="auto"),), drops)
        return JobText(tuple(conversations), tuple(held_out), drops)
    if len(conversations) < 2:
        raise InputError(f"validation: {len(conversations)} example cannot be split; give more data or no validation")
    train, held_out = split(conversations, job.validation, job.seed)
    return JobText(tuple(train), tuple(held_out), drops)


def tokenize_job(job: JobConfig, text: JobText, tokenizer: Any, track: Track) -> JobData:
    """Render and tokenise; the remarks say what was dropped or cut, and how much is left."""
    train, held_out = (
        tuple(render_all(track(part, f"tokenising {job.name}"), tokenizer, job.max_seq_len, text.drops)) if part else ()
        for part in (text.train, text.held_out)
    )
    tokens, labels = sum(len(e.tokens) for e in train), sum(int((e.weights > 0).sum()) for e in train)
    size = f"{len(train):,} training examples, {tokens:,} tokens ({labels:,} trained)"
    return JobData(train, held_out, (*text.drops.lines(), size + (f"; {len(held_out):,} held out" if held_out else "")))
