"""What the largest forward of a job will be, from the lengths of its data and how its steps are cut."""

import itertools

from snugtune.config import JobConfig
from snugtune.data.mix import step_indices, total_steps
from snugtune.data.pack import even_fit
from snugtune.memory.estimate import Work
from snugtune.training.examples import JobData
from snugtune.training.job import capacity_of
from snugtune.types import Example, Plan

LOOKED_AT = 2000
"""Steps that are cut to see their chunks; what comes after them may be as large as the plan allows."""


def largest_chunk(config: JobConfig, data: JobData, plan: Plan) -> Work:
    """The chunk with the most tokens that the job will train on, the longest sequences first among equals.

    Of a base whose sequences cannot share a row, which shows when it is there, that is more than it will be.
    """
    examples, capacity = data.train, capacity_of(config, plan)
    lengths = [len(e.tokens) for e in examples]
    total = total_steps(len(examples), config.batch_size, config.epochs, config.steps)
    largest: tuple[int, ...] = ()
    for step in range(min(total, LOOKED_AT)):
        chosen = step_indices(step, len(examples), config.batch_size, config.epochs, config.steps, config.seed)
        for group in even_fit([lengths[i] for i in chosen], capacity):
            chunk = tuple(chosen[i] for i in group)
            largest = max(largest, chunk, key=lambda indices: _size(indices, lengths))
    chunk = [examples[i] for i in largest]
    if total > LOOKED_AT:
        chunk = _filled(examples, capacity, config.batch_size)
    return Work(config, tuple(len(e.tokens) for e in chunk), sum(int((e.weights[1:] > 0).sum()) for e in chunk))


def full_chunk(config: JobConfig, plan: Plan) -> Work:
    """The largest that may be, where there is no data to look at: every sequence as long as it may be, all of it scored."""
    length = config.max_seq_len
    count = min(config.batch_size, max(1, capacity_of(config, plan) // length))
    return Work(config, (length,) * count, count * (length - 1))


def _size(indices: tuple[int, ...], lengths: list[int]) -> tuple[int, int]:
    return sum(lengths[i] for i in indices), max((lengths[i] for i in indices), default=0)


def _filled(examples: tuple[Example, ...], capacity: int, most: int) -> list[Example]:
    """The longest examples, as many as fit into a chunk."""
    order = sorted(examples, key=lambda e: len(e.tokens), reverse=True)[:most]
    ends = list(itertools.accumulate(len(e.tokens) for e in order))
    return order[: max(1, sum(end <= capacity for end in ends))]
