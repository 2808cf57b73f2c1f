"""Which chunks share a forward: nothing lost, nothing reordered, nobody starved, nobody's work changed by a neighbour.

Schedules are held against `faults`, which is held against schedules that are wrong.
"""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snugtune.training.schedule import Served, Waiting, faults, next_batch, schedule
from snugtune.types import Chunk

MANY = settings(deadline=None, derandomize=True, max_examples=200)
Queues = Mapping[str, Sequence[int]]


def served(queues: Queues, weights: Mapping[str, float], capacity: int) -> list[list[Served]]:
    """The whole schedule of queues (tokens of each chunk); a scheduler that never ends is cut off."""
    at, counters, batches = dict.fromkeys(queues, 0), dict.fromkeys(queues, 0.0), []
    while len(batches) <= sum(map(len, queues.values())):
        waiting = [Waiting(job, own[at[job]], counters[job]) for job, own in queues.items() if at[job] < len(own)]
        if not waiting:
            break
        batch = [Served(job, at[job], queues[job][at[job]]) for job in next_batch(waiting, capacity)]
        for chunk in batch:
            at[chunk.job] += 1
            counters[chunk.job] += chunk.tokens / weights[chunk.job]
        batches.append(batch)
    return batches


def plain(batches: Sequence[Sequence[Served]]) -> list[list[tuple[str, int]]]:
    return [[(c.job, c.index) for c in batch] for batch in batches]


def even(queues: Queues) -> dict[str, float]:
    return dict.fromkeys(queues, 1.0)


jobs_queues = st.lists(st.lists(st.integers(1, 20), max_size=6), max_size=5).map(
    lambda lengths: {f"job-{j}": own for j, own in enumerate(lengths)}
)
capacities = st.integers(0, 60)
weights_of = st.lists(st.sampled_from([0.1, 0.5, 1.0, 2.0, 30.0]), min_size=5, max_size=5)


@MANY
@given(jobs_queues, capacities, weights_of)
def test_every_schedule_is_faultless(queues: Queues, capacity: int, shares: list[float]) -> None:
    weights = dict(zip(queues, shares, strict=False))
    assert faults(served(queues, weights, capacity), queues, weights, capacity) == []


TWO = {"a": [4, 4], "b": [4, 4]}
A, B = (lambda i: Served("a", i, 4)), (lambda i: Served("b", i, 4))


@pytest.mark.parametrize(
    ("batches", "fault"),
    [
        ([[A(0), B(0)], [A(1)]], "'b' was given 1 of 2 chunks"),
        ([[A(0), B(0)], [B(1), A(1)], [A(2)]], "chunk 2 of 'a' is not its next one"),
        ([[A(1), B(0)], [A(0), B(1)]], "chunk 1 of 'a' is not its next one"),
        ([[A(0), A(1)], [B(0), B(1)]], "holds a job twice"),
        ([[Served("a", 0, 5), B(0)], [A(1), B(1)]], "chunk 0 of 'a' is not its next one"),
        ([[], [A(0), B(0)], [A(1), B(1)]], "batch 0 holds 0 tokens in 0 chunks"),
    ],
)
def test_a_wrong_schedule_is_found(batches: list[list[Served]], fault: str) -> None:
    assert any(fault in found for found in faults(batches, TWO, even(TWO), 8))


def test_a_batch_too_large_is_found() -> None:
    batches = [[A(0), B(0)], [A(1), B(1)]]
    assert faults(batches, TWO, even(TWO), 8) == []
    assert any("8 tokens in 2 chunks" in found for found in faults(batches, TWO, even(TWO), 7))


def test_a_job_that_is_starved_is_found() -> None:
    queues = {"a": [4] * 9, "b": [4] * 9}
    batches = [[A(i)] for i in range(9)] + [[B(i)] for i in range(9)]
    assert any("virtual tokens ahead" in found for found in faults(batches, queues, even(queues), 8))


@MANY
@given(st.lists(st.integers(1, 20), max_size=8), capacities)
def test_a_job_alone_runs_chunk_by_chunk(lengths: list[int], capacity: int) -> None:
    """Whatever the capacity, so that a job computes the same alone as among others."""
    assert plain(served({"a": lengths}, {"a": 1.0}, capacity)) == [[("a", i)] for i in range(len(lengths))]


@MANY
@given(jobs_queues, st.integers(20, 60))
def test_nobody_is_left_out_who_would_fit(queues: Queues, capacity: int) -> None:
    """A batch with room for another waiting job's next chunk would be wasted, unless that job is far ahead."""
    at, counters = dict.fromkeys(queues, 0), dict.fromkeys(queues, 0)
    for batch in served(queues, even(queues), capacity):
        room = capacity - sum(chunk.tokens for chunk in batch)
        least = min(counters[job] for job, own in queues.items() if at[job] < len(own))
        for job, own in queues.items():
            left_out = at[job] < len(own) and job not in {chunk.job for chunk in batch}
            assert not left_out or own[at[job]] > room or counters[job] - least > capacity
        for chunk in batch:
            at[chunk.job] += 1
            counters[chunk.job] += chunk.tokens


@pytest.mark.parametrize("capacity", [0, 10, 64])
def test_tokens_are_given_by_weight(capacity: int) -> None:
    """1 : 2 : 4, as long as all have work, to within the lead that one may have; chunks of any size."""
    generator = torch.Generator().manual_seed(0)
    queues = {job: torch.randint(1, 20, (400,), generator=generator).tolist() for job in "abc"}
    weights = {"a": 1.0, "b": 2.0, "c": 4.0}
    tokens = dict.fromkeys(queues, 0)
    for batch in served(queues, weights, capacity):
        for chunk in batch:
            tokens[chunk.job] += chunk.tokens
        if tokens["c"] > 2000:
            break
    assert all(abs(tokens[job] / weights[job] - tokens["a"]) <= capacity + 20 for job in tokens), tokens


def test_small_chunks_are_not_held_up_by_large_ones() -> None:
    """A job of small chunks has as many tokens as one whose chunks fill a batch."""
    queues = {"large": [60] * 20, "small": [3] * 400}
    tokens = dict.fromkeys(queues, 0)
    for batch in served(queues, even(queues), 64):
        for chunk in batch:
            tokens[chunk.job] += chunk.tokens
        if tokens["large"] == 600:
            break
    assert tokens["small"] >= 600 - 64 - 60


def test_jobs_take_turns() -> None:
    """Room for two of three: the one left out comes first in the next batch."""
    queues = {"a": [5, 5], "b": [5, 5], "c": [5, 5]}
    assert plain(served(queues, even(queues), 10)) == [
        [("a", 0), ("b", 0)],
        [("c", 0), ("a", 1)],
        [("b", 1), ("c", 1)],
    ]


def test_capacity_zero_is_one_chunk_at_a_time_in_turns() -> None:
    queues = {"a": [1, 1], "b": [1, 1]}
    assert plain(served(queues, even(queues), 0)) == [[("a", 0)], [("b", 0)], [("a", 1)], [("b", 1)]]


def test_a_large_chunk_goes_alone_in_its_turn() -> None:
    queues = {"a": [3, 3], "b": [50, 3]}
    assert plain(served(queues, even(queues), 10))[:2] == [[("a", 0)], [("b", 0)]]


def chunk(job: str, index: int, length: int) -> Chunk:
    none = torch.zeros(0, dtype=torch.long)
    return Chunk(job, 0, index, 0, torch.zeros(length, dtype=torch.long), (length,), none, none, torch.zeros(0))


@MANY
@given(jobs_queues, capacities)
def test_the_very_chunks_are_handed_out_and_the_queues_left_alone(queues: Queues, capacity: int) -> None:
    """Pure: asking twice gives the same answer."""
    chunks = {job: [chunk(job, i, n) for i, n in enumerate(own)] for job, own in queues.items()}
    first, second = list(schedule(chunks, capacity)), list(schedule(chunks, capacity))
    assert [[id(c) for c in batch] for batch in first] == [[id(c) for c in batch] for batch in second]
    assert [[(c.job, c.index) for c in batch] for batch in first] == plain(served(queues, even(queues), capacity))
    assert all(chunks[c.job][c.index] is c for batch in first for c in batch)
