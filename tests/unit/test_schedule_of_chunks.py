"""Which chunks share a forward: nothing lost, nothing reordered, nobody starved, nobody's work changed by a neighbour."""

from collections import Counter
from itertools import islice, pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snugtune.training.schedule import schedule
from snugtune.types import Chunk

MANY = settings(deadline=None, derandomize=True, max_examples=200)


def chunk(job: str, index: int, length: int) -> Chunk:
    none = torch.zeros(0, dtype=torch.long)
    return Chunk(job, 0, index, 0, torch.zeros(length, dtype=torch.long), (length,), none, none, torch.zeros(0))


def queues_of(lengths: list[list[int]]) -> list[list[Chunk]]:
    return [[chunk(f"job-{j}", i, n) for i, n in enumerate(own)] for j, own in enumerate(lengths)]


def batches_of(queues: list[list[Chunk]], capacity: int) -> list[list[Chunk]]:
    """What `schedule` gives; more batches than chunks would mean that it never ends."""
    return list(islice(schedule(queues, capacity), sum(map(len, queues)) + 1))


def plain(batches: list[list[Chunk]]) -> list[list[tuple[str, int]]]:
    return [[(c.job, c.index) for c in batch] for batch in batches]


queue_lengths = st.lists(st.lists(st.integers(1, 20), max_size=6), max_size=5)
capacities = st.integers(0, 60)


@MANY
@given(queue_lengths, capacities)
def test_every_chunk_runs_once_in_its_jobs_order(lengths: list[list[int]], capacity: int):
    queues = queues_of(lengths)
    batches = batches_of(queues, capacity)
    assert all(batches)
    for queue in queues:
        ran = [c for batch in batches for c in batch if queue and c.job == queue[0].job]
        assert len(ran) == len(queue) and all(a is b for a, b in zip(ran, queue, strict=True)), "the very chunks, in order"
    assert sum(map(len, batches)) == sum(map(len, lengths))


@MANY
@given(queue_lengths, capacities)
def test_a_batch_holds_one_chunk_a_job_and_keeps_the_capacity(lengths: list[list[int]], capacity: int):
    """Only a chunk that is itself too large may exceed it, and that one is alone."""
    for batch in batches_of(queues_of(lengths), capacity):
        assert max(Counter(c.job for c in batch).values()) == 1
        assert len(batch) == 1 or sum(len(c.tokens) for c in batch) <= capacity


@MANY
@given(queue_lengths, capacities)
def test_no_job_waits_longer_than_there_are_jobs(lengths: list[list[int]], capacity: int):
    """Whoever is left out moves up, so a job's turn comes within as many batches as there are jobs."""
    batches = [[c.job for c in batch] for batch in batches_of(queues_of(lengths), capacity)]
    jobs = {job for batch in batches for job in batch}
    for job in jobs:
        turns = [i for i, batch in enumerate(batches) if job in batch]
        assert turns[0] < len(jobs)
        assert all(after - before <= len(jobs) for before, after in pairwise(turns))


@MANY
@given(queue_lengths, capacities)
def test_nobody_is_left_out_who_would_fit(lengths: list[list[int]], capacity: int):
    """A batch with room for another waiting job's next chunk would be wasted."""
    queues = {q[0].job: list(q) for q in queues_of(lengths) if q}
    for batch in batches_of(queues_of(lengths), capacity):
        for c in batch:
            assert queues[c.job].pop(0).index == c.index
        used = sum(len(c.tokens) for c in batch)
        for job, queue in queues.items():
            if queue and job not in {c.job for c in batch}:
                assert used + len(queue[0].tokens) > capacity


@MANY
@given(st.lists(st.integers(1, 20), max_size=8), capacities)
def test_a_job_alone_runs_chunk_by_chunk(lengths: list[int], capacity: int):
    """Whatever the capacity, so that a job computes the same alone as among others."""
    [queue] = queues_of([lengths])
    assert batches_of([queue], capacity) == [[c] for c in queue]


def test_jobs_take_turns():
    """Room for two of three: the one left out comes first in the next batch."""
    batches = plain(batches_of(queues_of([[5, 5], [5, 5], [5, 5]]), 10))
    assert batches == [
        [("job-0", 0), ("job-1", 0)],
        [("job-2", 0), ("job-0", 1)],
        [("job-1", 1), ("job-2", 1)],
    ]


def test_capacity_zero_is_one_chunk_at_a_time_in_turns():
    batches = plain(batches_of(queues_of([[1, 1], [1, 1]]), 0))
    assert batches == [[("job-0", 0)], [("job-1", 0)], [("job-0", 1)], [("job-1", 1)]]


def test_a_large_chunk_goes_alone_in_its_turn():
    batches = plain(batches_of(queues_of([[3, 3], [50, 3]]), 10))
    assert batches == [[("job-0", 0)], [("job-1", 0)], [("job-0", 1), ("job-1", 1)]]


@MANY
@given(queue_lengths, capacities)
def test_scheduling_leaves_its_input_alone(lengths: list[list[int]], capacity: int):
    """Pure: the queues are the caller's, and asking twice gives the same answer."""
    queues = queues_of(lengths)
    first, second = plain(batches_of(queues, capacity)), plain(batches_of(queues, capacity))
    assert first == second
    assert [[len(c.tokens) for c in q] for q in queues] == lengths
