"""`snugtune data show`: the examples as the model will see them."""

from typing import Any

from rich.text import Text

from snugtune.config import JobConfig, RunConfig
from snugtune.console import Console, printable
from snugtune.data.mix import total_steps
from snugtune.model.load import load_tokenizer
from snugtune.model.source import find_model
from snugtune.training.examples import JobData, histogram, read_job, tokenize_job
from snugtune.types import Example

BUCKETS = 8
TRAINED = ("«", "»")  # around what is trained, where there are no colours


def show_data(config: RunConfig, examples: int, console: Console) -> None:
    """Print `examples` rendered examples of each job with their loss mask, then counts and a histogram of lengths."""
    texts = {job.name: read_job(job) for job in config.resolved_jobs()}
    tokenizer, notes = load_tokenizer(find_model(config.model, console.note), config.trust_remote_code)
    for note in notes:
        console.note(note)
    for job in config.resolved_jobs():
        data = tokenize_job(job, texts[job.name], tokenizer, console.track, console.note)
        for example in data.train[:examples]:
            _show_example(example, tokenizer, console)
        _show_counts(job, data, console)


def _show_example(example: Example, tokenizer: Any, console: Console) -> None:
    trained = int((example.weights > 0).sum())
    console.say(f"{example.source}: {len(example.tokens)} tokens, {trained} trained", style="bold")
    line = Text()
    for ids, is_trained in _runs(example):
        text = printable(tokenizer.decode(ids, skip_special_tokens=False))
        if not is_trained:
            line.append(text)
        elif console.out.is_terminal:
            line.append(text, style="bold green")
        else:
            line.append(TRAINED[0] + text + TRAINED[1])
    console.out.print(line, soft_wrap=True)
    console.say()


def _runs(example: Example) -> list[tuple[list[int], bool]]:
    """The tokens in stretches of trained and untrained."""
    runs: list[tuple[list[int], bool]] = []
    for token, weight in zip(example.tokens.tolist(), example.weights.tolist(), strict=True):
        if not runs or runs[-1][1] != (weight > 0):
            runs.append(([], weight > 0))
        runs[-1][0].append(token)
    return runs


def _show_counts(job: JobConfig, data: JobData, console: Console) -> None:
    for remark in data.remarks:
        console.say(f"{job.name}: {remark}")
    lengths = sorted(len(e.tokens) for e in data.train)
    steps = total_steps(len(data.train), job.batch_size, job.epochs, job.steps)
    console.say(f"{job.name}: lengths {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}; "
                f"{steps} optimizer steps of {job.batch_size} examples")  # fmt: skip
    for low, high, count in histogram(lengths, BUCKETS):
        console.say(f"  {low:>6} - {high:<6} {'█' * max(1, round(40 * count / len(lengths))) if count else ''} {count}")
