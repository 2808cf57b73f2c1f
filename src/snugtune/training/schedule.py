"""Which chunks share a forward: a fair scheduler, and what judges it. Pure.

Each job has a counter of virtual tokens, those it was given divided by its weight: start-time fair queueing (Goyal et al.
1996, "Start-time fair queuing") with chunks for packets. The job that is furthest behind always goes first, so none starves.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from snugtune.types import Chunk


@dataclass(frozen=True)
class Waiting:
    """A job with work to do: the tokens of its next chunk, and its virtual tokens so far."""

    job: str
    tokens: int
    served: float


@dataclass(frozen=True)
class Served:
    """A chunk that was given a place in a batch."""

    job: str
    index: int  # among the job's chunks, from 0
    tokens: int


def next_batch(waiting: Sequence[Waiting], capacity: int) -> tuple[str, ...]:
    """The jobs whose next chunks share the next forward: at most `capacity` tokens, or one chunk.

    At most one chunk of each job: what a job computes never depends on `capacity` or on neighbours. Whoever is ahead of the
    hindmost by more than `capacity` virtual tokens waits, although there be room: else small chunks would wait for ever to
    have as many tokens as large ones. Ties go by the order of `waiting`.
    """
    queue = sorted(waiting, key=lambda job: job.served)  # stable
    chosen: list[str] = []
    room = max(capacity, queue[0].tokens) if queue else 0
    for job in queue:
        if job.tokens <= room and job.served - queue[0].served <= capacity:
            chosen.append(job.job)
            room -= job.tokens
    return tuple(chosen)


def schedule(queues: Mapping[str, Sequence[Chunk]], capacity: int) -> Iterator[list[Chunk]]:
    """The batches of some jobs' chunks, all of the same weight."""
    done, served = dict.fromkeys(queues, 0), dict.fromkeys(queues, 0.0)
    while waiting := [Waiting(j, len(q[done[j]].tokens), served[j]) for j, q in queues.items() if done[j] < len(q)]:
        batch = [queues[job][done[job]] for job in next_batch(waiting, capacity)]
        for chunk in batch:
            done[chunk.job] += 1
            served[chunk.job] += len(chunk.tokens)
        yield batch


def faults(
    batches: Sequence[Sequence[Served]], queues: Mapping[str, Sequence[int]], weights: Mapping[str, float], capacity: int
) -> list[str]:
    """What is wrong with a schedule of whole queues (tokens of each job's chunks), in words; empty where it is right.

    Every chunk once and in order; a batch within `capacity`, or one chunk; one chunk a job; no job with work left behind
    another by more virtual tokens than the lead that a job may have and one chunk.
    """
    found: list[str] = []
    at, served = dict.fromkeys(queues, 0), dict.fromkeys(queues, 0.0)
    for number, batch in enumerate(batches):
        if not batch or (len(batch) > 1 and sum(chunk.tokens for chunk in batch) > capacity):
            found.append(f"batch {number} holds {sum(chunk.tokens for chunk in batch)} tokens in {len(batch)} chunks")
        if len({chunk.job for chunk in batch}) < len(batch):
            found.append(f"batch {number} holds a job twice")
        for chunk in batch:
            own = queues[chunk.job]
            if chunk.index != at[chunk.job] or chunk.index >= len(own) or own[chunk.index] != chunk.tokens:
                found.append(f"batch {number}: chunk {chunk.index} of '{chunk.job}' is not its next one")
            at[chunk.job] += 1
            served[chunk.job] += chunk.tokens / weights[chunk.job]
        behind = min((served[job] for job, own in queues.items() if at[job] < len(own)), default=None)
        for chunk in batch:
            bound = capacity + chunk.tokens / weights[chunk.job]
            if behind is not None and served[chunk.job] - behind > bound * (1 + 1e-9):
                found.append(f"batch {number}: '{chunk.job}' is {served[chunk.job] - behind:.0f} virtual tokens ahead")
    found += [f"'{job}' was given {at[job]} of {len(own)} chunks" for job, own in queues.items() if at[job] != len(own)]
    return found
