"""`snugtune data show`: the examples as the model will see them."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.text import Text

from snugtune.config import JobConfig, RunConfig
from snugtune.console import Console, printable
from snugtune.data.mix import total_steps
from snugtune.data.render.controls import Barred, Controls
from snugtune.model.load import load_tokenizer
from snugtune.model.source import find_model
from snugtune.training.examples import JobData, histogram, read_job, tokenize_job
from snugtune.types import Example
from snugtune.words import counted

BUCKETS = 8
TRAINED = ("«", "»")  # around what is trained, where there are no colours
PLAIN = ("⟦", "⟧")  # around text that only reads like a control token
LEGEND = "«...» trained; ⟦...⟧ text that reads like a control token and is none"
COLOURS = "green: trained; cyan: control tokens; ⟦...⟧: text that reads like a control token and is none"


def show_data(config: RunConfig, examples: int, console: Console) -> None:
    """Print `examples` rendered examples of each job with their loss mask, then counts and a histogram of lengths."""
    texts = {job.name: read_job(job) for job in config.resolved_jobs()}
    tokenizer, notes = load_tokenizer(find_model(config.model, console.note), config.trust_remote_code)
    for note in notes:
        console.note(note)
    for job in config.resolved_jobs():
        data = tokenize_job(job, texts[job.name], tokenizer, console.track, console.note)
        controls = Controls(tokenizer, tokenizer.get_chat_template()).all
        if data.train[:examples]:
            console.say(COLOURS if console.out.is_terminal else LEGEND, style="dim")
        for example in data.train[:examples]:
            _show_example(example, tokenizer, controls, console)
        _show_counts(job, data, console)


def _show_example(example: Example, tokenizer: Any, controls: Barred, console: Console) -> None:
    trained = int((example.weights > 0).sum())
    console.say(f"{example.source}: {counted(len(example.tokens), 'tokens')}, {trained:,} trained", style="bold")
    coloured = console.out.is_terminal
    line, marked = Text(), False
    for ids, before, is_trained, is_control in _runs(example, controls):
        text = _decoded(tokenizer, ids, before)
        if is_trained != marked and not coloured:
            line.append(TRAINED[0] if is_trained else TRAINED[1])
            marked = is_trained
        colour = "cyan" if is_control else "green" if is_trained else ""
        line.append(text if is_control else _told_apart(text, controls), style=f"bold {colour}" if is_trained else colour)
    if marked:
        line.append(TRAINED[1])
    if line.plain.endswith("\n"):
        line.right_crop(1)
    console.out.print(line, soft_wrap=True)
    console.say()


def _runs(example: Example, controls: Barred) -> Iterator[tuple[list[int], list[int], bool, bool]]:
    """The tokens in stretches of (ids, the token before them, whether they are trained, whether they are control tokens)."""
    tokens, start = example.tokens.tolist(), 0
    kinds = [(weight > 0, token in controls.ids) for token, weight in zip(tokens, example.weights.tolist(), strict=True)]
    for kind, stretch in groupby(kinds):
        end = start + len(list(stretch))
        yield tokens[start:end], tokens[max(0, start - 1) : start], *kind
        start = end


def _decoded(tokenizer: Any, ids: list[int], before: list[int]) -> str:
    """The text of a stretch: as it stands after the token before it, since tokenizers drop the blank that begins a text."""
    lead, whole = (tokenizer.decode(part, skip_special_tokens=False) for part in (before, before + ids))
    return printable(whole[len(lead) :] if whole.startswith(lead) else tokenizer.decode(ids, skip_special_tokens=False))


def _told_apart(text: str, controls: Barred) -> str:
    for low, high in reversed(controls.words(text)):
        text = text[:low] + PLAIN[0] + text[low:high] + PLAIN[1] + text[high:]
    return text


def _show_counts(job: JobConfig, data: JobData, console: Console) -> None:
    for remark in data.remarks:
        console.say(f"{job.name}: {remark}")
    lengths = sorted(len(e.tokens) for e in data.train)
    steps = total_steps(len(data.train), job.batch_size, job.epochs, job.steps)
    console.say(f"{job.name}: lengths {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}; "
                f"{counted(steps, 'optimizer steps')} of {counted(job.batch_size, 'examples')}")  # fmt: skip
    for low, high, count in histogram(lengths, BUCKETS):
        console.say(f"  {low:>6} - {high:<6} {'█' * max(1, round(40 * count / len(lengths))) if count else ''} {count}")
