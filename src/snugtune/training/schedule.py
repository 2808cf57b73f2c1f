"""Which chunks share a forward. Pure."""

from collections.abc import Iterable, Iterator

from snugtune.types import Chunk


def schedule(queues: Iterable[list[Chunk]], capacity: int) -> Iterator[list[Chunk]]:
    """Lay one step's chunks, a queue per job, into batches of at most `capacity` tokens (a larger chunk goes alone).

    Jobs take turns, so none starves; within a job the order is kept. A batch holds at most one chunk of each job, so a
    single job's batches are its chunks: what it computes never depends on `capacity` or on neighbours.
    """
    waiting = [list(q) for q in queues if q]
    while waiting:
        batch: list[Chunk] = []
        for queue in waiting:
            if not batch or sum(len(c.tokens) for c in batch) + len(queue[0].tokens) <= capacity:
                batch.append(queue.pop(0))
        yield batch
        # Whoever was left out comes first in the next batch.
        served = {c.job for c in batch}
        waiting = [q for q in sorted(waiting, key=lambda q: bool(q) and q[0].job in served) if q]
