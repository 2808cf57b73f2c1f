"""A job's data, from the files its config names to tokens."""

import hashlib
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from snugtune.config import JobConfig
from snugtune.data.cache import TokenCache, tokenizer_identity
from snugtune.data.forms import Conversation, Document, Item, Unusable, read_form
from snugtune.data.mix import InterleaveConfig, interleave, split
from snugtune.data.sources import Drops, SourceConfig, read_sources
from snugtune.errors import InputError
from snugtune.files import cache_dir, code_of
from snugtune.objectives import objective_of
from snugtune.objectives.clm import Clm, ClmConfig
from snugtune.objectives.sft import Sft, SftConfig
from snugtune.types import Example, Prompt
from snugtune.words import counted

SUMMARY_BUCKETS = 24

_READERS = {Conversation: (Sft, SftConfig()), Document: (Clm, ClmConfig())}
_NOTHING_LOST = ("conversations split", "documents cut into pieces", "lists of tools left out")
"""How remarks begin on examples that are used whole."""

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Shows progress over a sequence: `track(items, what)` yields the items."""


@dataclass(frozen=True)
class JobText:
    """A job's conversations or documents, before any tokens."""

    train: tuple[Item, ...]
    held_out: tuple[Item, ...]
    drops: Drops
    mixture: str = ""  # how much of each source, where they are interleaved


@dataclass(frozen=True)
class JobData:
    """A job's tokenised examples; `drops`: what was cut or left out on the way; `prompts`: what it is asked meanwhile.

    `mixture` says how much an epoch takes of each source, where they are interleaved.
    """

    train: tuple[Example, ...]
    held_out: tuple[Example, ...] = ()
    drops: Drops = field(default_factory=Drops)
    prompts: tuple[Prompt, ...] = ()
    mixture: str = ""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was left out or cut, and how much is left, in words."""
        size = (
            f"{counted(len(self.train), 'training examples')}, {counted(self.tokens, 'tokens')} ({self.label_tokens:,} trained)"
        )
        mixture = (self.mixture,) if self.mixture else ()
        return (*self.drops.lines(), *mixture, size + (f"; {len(self.held_out):,} held out" if self.held_out else ""))

    @property
    def tokens(self) -> int:
        return sum(len(e.tokens) for e in self.train)

    @property
    def label_tokens(self) -> int:
        return sum(int((e.weights > 0).sum()) for e in self.train)

    def summary(self) -> dict[str, Any]:
        """The same as numbers, for `data.json`; `lengths` are [shortest, longest, count] of equally wide buckets."""
        remarks = {r: {"count": n, "places": self.drops.places[r]} for r, n in self.drops.counts.items()}
        return {
            "examples": len(self.train),
            "held_out": len(self.held_out),
            "tokens": self.tokens,
            "label_tokens": self.label_tokens,
            "lengths": histogram([len(e.tokens) for e in self.train], SUMMARY_BUCKETS),
            "remarks": remarks,
        }

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
        return _mixed(job, sources, (), drops)
    if isinstance(job.validation, (str, SourceConfig)):
        source = SourceConfig(path=job.validation) if isinstance(job.validation, str) else job.validation
        (held_out,) = read_sources((source,), drops, "validation")
        return _mixed(job, sources, held_out, drops)
    if all(len(items) < 2 for items in sources):
        raise InputError("validation: 1 example cannot be split; give more data or no validation")
    # Each source is split by itself: what is held out never comes back as a repeat of the mixture.
    parts = [split(items, job.validation, job.seed) if len(items) > 1 else (items, []) for items in sources]
    return _mixed(job, [train for train, _ in parts], [item for _, held in parts for item in held], drops)


def _mixed(job: JobConfig, sources: Sequence[Sequence[Item]], held_out: Sequence[Item], drops: Drops) -> JobText:
    if not isinstance(job.mixing, InterleaveConfig):
        return JobText(tuple(item for items in sources for item in items), tuple(held_out), drops)
    order = interleave([len(items) for items in sources], [source.weight for source in job.data], job.mixing.until)
    taken = Counter(source for source, _ in order)
    told = (f"{taken[n]:,} of {source.path} (it has {len(sources[n]):,})" for n, source in enumerate(job.data))
    train = tuple(sources[source][index] for source, index in order)
    return JobText(train, tuple(held_out), drops, f"an epoch takes {', '.join(told)}")


def tokenize_job(
    job: JobConfig, text: JobText, tokenizer: Any, track: Track, note: Callable[[str], None], identity: str | None = None
) -> JobData:
    """Render and tokenise, or find what was tokenised before. Raises `InputError` if nothing is left to train on.

    `identity`: that of the tokenizer, where it is known: to take it goes through the whole vocabulary.
    """
    objective = objective_of(job.objective)
    code = code_of(Path(inspect.getfile(type(objective))).parent)
    settings = (code, objective.tokenises_by, job.max_seq_len, identity or tokenizer_identity(tokenizer))
    cache = TokenCache(cache_dir() / "tokens", settings)

    def tokenise(items: Iterable[Item], drops: Drops) -> list[Example]:
        return objective.tokenise(items, tokenizer, job.max_seq_len, drops)

    def examples(items: Sequence[Item]) -> tuple[Example, ...]:
        found = cache.tokenised(items, track(items, f"tokenising {job.name}"), tokenise, text.drops)
        if items and not found:
            raise InputError(f"data: no example is left to train on: {'; '.join(text.drops.lines())}")
        return tuple(found)

    asked = _prompts(job, text, tokenizer) if job.samples.wanted else ()
    if job.samples.wanted and not asked:
        note(f"samples ({job.name}): no example has a question that leaves room for an answer; give samples.prompts")
    data = JobData(examples(text.train), examples(text.held_out), text.drops, asked, text.mixture)
    if cache.problem:
        note(f"data ({job.name}): {cache.problem}")
    return data


def _prompts(job: JobConfig, text: JobText, tokenizer: Any) -> tuple[Prompt, ...]:
    """What the job is asked while it trains: the user's prompts, else beginnings of its own examples."""
    objective, items = objective_of(job.objective), text.held_out or text.train
    if job.samples.prompts:
        return tuple(objective.ask(prompt, tokenizer) for prompt in job.samples.prompts)
    asked = (objective.ask_as(item, tokenizer) for item in items)
    fitting = (prompt for prompt in asked if prompt is not None and len(prompt.tokens) < job.max_seq_len)
    return tuple(islice(fitting, job.samples.count))


def examples_of(records: Sequence[Any], job: JobConfig, tokenizer: Any, columns: Mapping[str, str]) -> list[Example]:
    """Records given in Python, rendered and tokenised as those of files are. Conversations and texts may be mixed.

    Raises `InputError` for the first of which anything would be lost. `columns`: our names -> the records' own.
    """
    items = [_item(record, columns, f"record {number}") for number, record in enumerate(records)]
    found: list[Example] = []
    drops = Drops()
    for kind, group in itertools.groupby(items, key=type):
        own, reader = objective_of(job.objective), _READERS.get(kind)
        objective = own if reader is None or isinstance(own, reader[0]) else objective_of(reader[1])
        found += objective.tokenise(group, tokenizer, job.max_seq_len, drops)
    lost = next((reason for reason in drops.counts if not reason.startswith(_NOTHING_LOST)), None)
    if lost is not None:
        raise InputError(f"examples: {drops.places[lost][0]}: {lost}")
    return found


def _item(record: Any, columns: Mapping[str, str], place: str) -> Item:
    try:
        return read_form(record, "auto", columns, place)
    except Unusable as error:
        raise InputError(f"examples: {place} cannot be used: {str(error).removeprefix('records ')}") from error


def histogram(lengths: Sequence[int], buckets: int) -> list[tuple[int, int, int]]:
    """(shortest, longest, count) of equally wide buckets. `lengths` must not be empty."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // buckets))
    starts = range(low, high + 1, width)
    counts = Counter((length - low) // width for length in lengths)
    return [(start, min(start + width - 1, high), counts[index]) for index, start in enumerate(starts)]
