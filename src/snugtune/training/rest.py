"""Jobs at rest: between two steps a job's adapter and optimizer state may lie on disk, and take no memory.

What lies there is a checkpoint's file of that job, so a checkpoint of a run links it, and wakes nobody.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from snugtune.errors import StorageError
from snugtune.files import cache_dir, link_or_copy, remove_abandoned, scratch_folder, whole_file
from snugtune.training.job import Guard, Job
from snugtune.training.stored import Stored

_NAME = "resting"
_TO_WRITE = 2 << 20
"""Bytes that a file is written with. safetensors ends the process where it cannot have its buffer of half of that."""


class Residence:
    """Who is in memory, and the files of those that rest: in a folder that goes with this object, or with the process.

    `limit`: jobs that may be in memory, 0 for all; `parent` holds the folder (None: the user's cache); `between_steps`: whether
    a job could rest.
    """

    def __init__(self, limit: int, parent: Path | None, between_steps: Callable[[Job], bool]):
        self.limit, self.parent, self.between_steps = limit, parent, between_steps
        self.folder: Path | None = None

    def places(self, jobs: Iterable[Job], least: int) -> float:
        """How many more jobs could be in the middle of a step, but never fewer than `least`."""
        if not self.limit:
            return math.inf
        busy = sum(not self.between_steps(job) for job in _in_memory(jobs))
        return max(self.limit - busy, least)

    def make_room(self, jobs: Iterable[Job], coming: Job, guard: Guard = lambda _: nullcontext()) -> None:
        """Let others rest so that `coming` can be in memory: whose turn comes last, as far as anyone knows.

        Never one in the middle of a step: where all are, they are one too many for a while. What the disk refuses is a
        `StorageError` of the job that was to rest, in `guard`.
        """
        if not self.limit:
            return
        others = [job for job in _in_memory(jobs) if job is not coming]
        idle = sorted(filter(self.between_steps, others), key=lambda job: (job.ended, job.served))  # stable
        for job in idle[max(0, len(idle) - max(0, len(others) + 1 - self.limit)) :]:
            with guard(job):
                self.put(job)

    def put(self, job: Job) -> None:
        """Write a job's state and let go of it. Raises `StorageError`: the job stands as it stood then."""
        if self.folder is None:
            self.folder, remove = scratch_folder(self.parent or cache_dir(), _NAME)
            self._remove = weakref.finalize(self, remove)
        file = self.folder / f"{job.name}.safetensors"
        with whole_file(file) as made:
            write_tensors(job, made)
        job.rest(file)

    def take(self, job: Job) -> None:
        """Bring a job back as it was. Raises `StorageError`: the job is at rest still."""
        file = job.at_rest
        assert file is not None
        try:
            job.wake(Stored(file))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            why = f"cannot read {file}, where job '{job.name}' rests: {error}"
            raise StorageError(f"{why}; run again, it goes on from the last checkpoint") from error
        file.unlink(missing_ok=True)

    def forget(self, job: Job) -> None:
        """The job will not come back."""
        if job.at_rest is not None:
            job.at_rest.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder; no job is to wake any more."""
        if self.folder is not None:
            self._remove()


def sweep() -> None:
    """Remove what rests in the user's cache of processes that were killed. In a run's folder the run itself does so."""
    remove_abandoned(cache_dir(), _NAME)


def write_tensors(job: Job, file: Path) -> None:
    """The large part of a job's state as a file; of a job at rest the one that there is. Raises what the disk says.

    And `MemoryError` where there is none to write with.
    """
    if job.at_rest is not None:
        link_or_copy(job.at_rest, file)
    else:
        bytearray(_TO_WRITE)
        save_file({k: v.contiguous() for k, v in job.tensors().items()}, file)


def _in_memory(jobs: Iterable[Job]) -> list[Job]:
    """Those that count; ones that a disk refused are let stand as they are."""
    return [job for job in jobs if job.at_rest is None and not job.paused]
