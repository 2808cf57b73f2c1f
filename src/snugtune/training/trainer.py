"""The trainer: the steps of all jobs on one base, as a story.

Whoever is furthest behind gives its next chunk, and others' chunks share its forward where there is room; each job's loss
size is known before any forward; a job's loss is a sum over its chunks divided once by its own size. When the last chunk of
a job's step is through, that job clips its own norm, is skipped alone if that is not finite, and steps its own optimizer.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from snugtune.data.pack import collate, scored
from snugtune.errors import InputError, OutOfMemoryError, StopRequestedError
from snugtune.methods import METHODS
from snugtune.model.base import Base
from snugtune.objectives import Objective
from snugtune.training.job import Guard, Job, quarantine
from snugtune.training.metrics import StepMetrics
from snugtune.training.recut import OF_A_JOB, Change, Short, Watch, nothing_left, tighter, unless_short
from snugtune.training.rest import Residence
from snugtune.training.schedule import Waiting, next_batch, schedule
from snugtune.training.step import Turn, Work, completed, give_up_half_way, optim_step
from snugtune.types import Chunk, Plan

LOOKAHEAD = 2
"""Forwards' worth of chunks to choose from: a step that is begun long before its chunks can run costs a gradient's memory."""

_OWN: Mapping[str, Objective] = MappingProxyType({})
T = TypeVar("T")


class Trainer:
    """Trains 1..N jobs on one base. Jobs may come and go between steps.

    Those that rest lie in a folder in `resting`, by default in the user's cache; it is gone when the trainer is. `plan` is
    as it is now, with all `changes` that were made for want of memory; `say` is told of each.
    """

    def __init__(
        self,
        base: Base,
        plan: Plan,
        watch: Watch,
        stop_requested: Callable[[], bool] = lambda: False,
        resting: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
    ):
        self.base = base
        self.plan = plan
        self.watch = watch
        self.stop_requested = stop_requested
        self.say = say
        self.changes: list[Change] = []
        self._wanted: dict[str, str] = {}  # job -> why its next step is to take less memory
        self.residence = Residence(plan.resident_jobs, resting, self._between_steps)
        self.jobs: dict[str, Job] = {}
        self.turns: dict[str, Turn] = {}  # of the jobs in the middle of a step
        self.tokens, self.seconds = 0, 0.0  # of all jobs' training so far
        self._reports: list[StepMetrics] = []  # of steps that are done, where an exception came between
        self._configure()

    def _configure(self) -> None:
        self.base.configure(self.plan.recompute, self.plan.head_rows, spill=self.plan.offload == "activations")

    def add(self, job: Job) -> None:
        """Let `job` take part from now on. Its name must be new. One that comes late has no arrears to catch up with.

        Late is after others have trained here: jobs of a checkpoint, which are added before that, keep what they had.

        Where it is one too many for the memory, another rests; raises `StorageError` when the disk does not take that.
        """
        assert job.name not in self.jobs
        self.residence.make_room(self.jobs.values(), job)
        if self.tokens:
            job.served = max(job.served, self._hindmost())
        self.jobs[job.name] = job
        if job.config.neftune_noise_alpha is not None:
            self.base.embedding_noise[job.name] = job.config.neftune_noise_alpha

    def remove(self, name: str) -> Job:
        """Take a job out; the base forgets it, and a step that it was in the middle of did not happen.

        Of one at rest only its numbers are left: wake it first to have its state.
        """
        job = self.jobs.pop(name)
        self.residence.forget(job)
        self._forget_turn(job)
        self._wanted.pop(name, None)
        self.base.embedding_noise.pop(name, None)
        job.attached.detach()
        return job

    def rest(self, name: str) -> None:
        """Let a job stand as it is, its state on disk: until `wake` it takes no part, and no memory.

        Raises `InputError` in the middle of a step of its, `StorageError` when the disk does not take it.
        """
        job = self.jobs[name]
        if not METHODS[type(job.config.method)].routable:
            raise InputError(f"job '{name}': method {job.config.method.type} trains the base itself, which cannot rest")
        if not self._between_steps(job):
            raise InputError(f"job '{name}' is in the middle of a step; let it rest after that")
        if job.at_rest is None:
            self.residence.put(job)
        job.paused = True

    def wake(self, name: str) -> None:
        """Bring a job back from `rest`; it takes part again, with no arrears to catch up with. Raises `StorageError`."""
        job = self.jobs[name]
        self.bring_in(job)
        if job.paused:
            job.served, job.paused = max(job.served, self._hindmost()), False

    def bring_in(self, job: Job) -> None:
        """Have a job's state in memory. Raises `StorageError` where it cannot be read."""
        if job.at_rest is not None:
            self.residence.make_room(self.jobs.values(), job, quarantine)
            self.watch.give_back()  # what those had who rest now
            self.residence.take(job)
            self.watch.give_back()  # what its state was read into

    def start_metrics(self) -> list[StepMetrics]:
        """A step 0 for every job: what is evaluated and sampled before training."""
        return [StepMetrics(job.name, 0, job.total, 0.0) for job in self.jobs.values()]

    def close(self) -> None:
        """Remove what lies on disk of jobs at rest: nothing is trained any more."""
        self.residence.close()

    def _between_steps(self, job: Job) -> bool:
        return job.name not in self.turns and all(weight.grad is None for weight in job.attached.parameters())

    def _hindmost(self) -> float:
        """Virtual tokens of the job that is furthest behind, 0 where there is none."""
        return min((self._served(job) for job in self.jobs.values() if job.active), default=0.0)

    def step(self) -> list[StepMetrics]:
        """Work until at least one job has completed an optimizer step; [] when none has any left to do.

        A job whose own data, objective or optimizer raises is given up: its `failure` says why, its `error` is what it
        raised. Where memory runs out, steps that it broke into begin anew, on the same data in smaller pieces; raises
        `OutOfMemoryError` where there are none smaller. Raises `StopRequestedError` between two batches; the steps under way
        are taken up where they were. After whatever else it raises (a base's disk that fails), steps that it broke into
        begin anew; but a job whose optimizer has written is given up, as its weights are neither those before the step nor
        those after it.
        """
        while True:
            for job in [self.jobs[name] for name, turn in self.turns.items() if turn.through]:
                turn = self.turns[job.name]
                with self._clock():
                    norm = self._attempt([job.name], partial(self._step_of, job))
                if isinstance(norm, float):
                    self._reports.append(self._report(job, turn, norm))
            if self._reports:
                reports, self._reports = self._reports, []
                return reports
            waiting = self._waiting()
            if not waiting:
                return []
            with self._clock():
                names = next_batch(waiting, self.plan.fused_tokens)
                self._attempt(names, partial(self._run, names))
                if self.watch.exceeded():
                    self.tighten("more memory was used than there is to use", names)

    def _waiting(self) -> list[Waiting]:
        """The jobs whose next chunk could go next. Taking turns, the one that has begun its step ends it first:

        there are never more gradients than those of one job. Sharing, no more begin than there is enough to choose from.
        """
        due = sorted((job for job in self.jobs.values() if job.active), key=self._served)  # stable
        if not self.plan.fused_tokens:
            due = [job for job in due if job.name in self.turns] or due
        places = self.residence.places(self.jobs.values(), least=0 if self.turns else 1)
        tokens, waiting = 0, list[Waiting]()
        for job in due:
            if job.name not in self.turns:
                enough = bool(waiting) and tokens >= LOOKAHEAD * self.plan.fused_tokens
                if enough or not places or not job.active or not self._begin(job):
                    continue
                places -= 1
            turn = self.turns[job.name]
            waiting.append(Waiting(job.name, len(turn.chunks[turn.done].tokens), self._served(job)))
            tokens += waiting[-1].tokens
        begun = all(job.job in self.turns for job in waiting)  # until memory runs out as another begins
        return waiting if begun else self._waiting()

    def _begin(self, job: Job) -> bool:
        """Open the job's next step; whether that went well."""
        if (cause := self._wanted.pop(job.name, None)) is not None:
            self._turn_a_knob(job, job.chunks(), cause)
        opened: object = Short()
        while isinstance(opened, Short):
            opened = self._attempt([job.name], partial(self._open, job))
        return job.name in self.turns

    def _open(self, job: Job) -> None:
        with quarantine(job):
            self.bring_in(job)
            chunks = job.chunks()
            size = sum(job.objective.size(c) for c in chunks)
            if job.in_backward is not None and len(chunks) > 1:
                raise InputError(f"plan.gradients: released needs a step to be one forward, not {len(chunks)}; use kept")
            job.begin_step()
            self.turns[job.name] = Turn(chunks, size, torch.zeros((), device=self.base.device), (self.tokens, self.seconds))

    def _run(self, names: Sequence[str]) -> None:
        """One batch of the named jobs' next chunks. A job that fails in it loses its turn; where all do, each does."""
        if self.stop_requested():
            raise StopRequestedError
        turns = {name: self.turns[name] for name in names}
        chunks = [turn.chunks[turn.done] for turn in turns.values()]
        try:
            losses = self._accumulate(chunks, {name: turn.size for name, turn in turns.items()}, quarantine)
        except BaseException as error:
            for name in names:  # half a gradient is none: these steps begin anew
                job = self.jobs[name]
                if job.in_backward is not None and job.in_backward.half_done:
                    give_up_half_way(job, error)
                self._forget_turn(job)
            raise
        for chunk in chunks:
            self.tokens += len(chunk.tokens)
            if chunk.job in losses:
                turns[chunk.job].loss += losses[chunk.job]
                turns[chunk.job].done += 1
            else:
                self._forget_turn(self.jobs[chunk.job])

    def _accumulate(
        self, chunks: Sequence[Chunk], sizes: Mapping[str, float], guard: Guard, objectives: Mapping[str, Objective] = _OWN
    ) -> dict[str, Tensor]:
        """Forward and backward of one batch, at most one chunk a job. Returns the jobs' losses, but of those that failed.

        Each job's head and objective go forward and backward by themselves; what the base goes back through together is
        the gradient of its states.
        """
        losses: dict[str, Tensor] = {}
        self.base.model.train()
        self.watch.make_room(sum(len(chunk.tokens) for chunk in chunks))
        batch = collate(chunks, self.base.min_rows, self.base.device)
        with self.base.routed(batch):  # spans backward: recompute runs there
            hidden = self.base.hidden(batch)
            gradient = torch.zeros_like(hidden)
            for chunk, segment in zip(chunks, batch.segments, strict=True):
                job = self.jobs[chunk.job]
                objective = objectives.get(job.name, job.objective)
                with guard(job):
                    states = scored(hidden.detach(), chunk, segment).requires_grad_()
                    head = self.base.head.for_segment(segment, job.head_rows)
                    loss = objective.loss(head, states, chunk, True) / sizes[chunk.job]
                    job.scaled(loss).backward()
                    assert states.grad is not None
                    gradient[segment.tokens].index_add_(0, chunk.rows.to(gradient.device), states.grad)
                    losses[chunk.job] = loss.detach()
            if hidden.requires_grad and losses:
                hidden.backward(gradient)
        return losses

    def tighten(self, cause: str, names: Iterable[str] | None = None) -> None:
        """Let the steps to come of these jobs (None: of all) take less memory, by one notch; steps under way end as they began.

        `cause`: why, in words. Nothing happens where nothing is left to be done.
        """
        jobs = [self.jobs[name] for name in (self.jobs if names is None else names)]
        if jobs and self._sharing():
            self._turn_a_knob(jobs[0], [], cause)
        else:
            self._wanted |= {job.name: cause for job in jobs if job.active}

    def attempt(self, job: Job, chunks: Callable[[], Sequence[Chunk]], work: Callable[[], T]) -> T:
        """What `work` on a job's chunks gives, which trains nothing; where memory runs out in it, again with less of it.

        Raises `OutOfMemoryError`.
        """
        while isinstance(found := unless_short(work), Short):
            self._make_do([job], chunks())
        return found

    def _attempt(self, names: Sequence[str], work: Callable[[], T]) -> T | Short:
        """What a part of these jobs' steps gives; where memory runs out in it, what is begun begins anew, on less of it."""
        found = unless_short(work)
        if isinstance(found, Short):
            jobs = [self.jobs[name] for name in names]
            torn = next((job.failure for job in jobs if job.failure is not None), None)
            if torn is not None:
                raise OutOfMemoryError(f"memory ran out; {torn}")
            self._make_do(jobs, jobs[0].chunks())
        return found

    def _make_do(self, jobs: Sequence[Job], chunks: Sequence[Chunk]) -> None:
        """After memory ran out over these jobs, the first one's `chunks`: let all that is begun begin anew, on less of it."""
        for name in [name for name, turn in self.turns.items() if not turn.through]:
            self._forget_turn(self.jobs[name])
        for job in jobs:
            self._forget_turn(job)
            if job.at_rest is None and not job.by_hand:
                job.attached.drop_grad()  # it may have half of one, and no turn yet
        self.watch.give_back()
        job = jobs[0]
        if not self._turn_a_knob(job, chunks, "memory ran out"):
            where = f"memory ran out at step {job.step + 1} of job '{job.name}'"
            routable = METHODS[type(job.config.method)].routable
            raise OutOfMemoryError(f"{where}, and {nothing_left(self.plan, job.head_rows, chunks, routable)}")

    def _turn_a_knob(self, job: Job, chunks: Sequence[Chunk], cause: str) -> bool:
        """The next thing to be done for less memory; whether there was one."""
        plan = self.plan if self.base.model.supports_gradient_checkpointing else replace(self.plan, recompute="blocks")
        capacity = 0 if job.in_backward is not None else job.capacity  # such a step is one forward
        found = tighter(plan, capacity, job.head_rows, chunks, self._sharing())
        if found is not None:
            self.change(Change(job.name, job.step + 1, *found, cause))
            self.say(f"plan ({job.name}): {self.changes[-1].told}")
        return found is not None

    def change(self, change: Change) -> None:
        """Go on with a change of the plan: one that is needed now, or one that was made before a resume."""
        self.changes.append(change)
        if change.knob not in OF_A_JOB:
            self.plan = replace(self.plan, **{change.knob: change.value})
            self._configure()
        elif change.job in self.jobs:
            setattr(self.jobs[change.job], change.knob, change.value)

    def _sharing(self) -> bool:
        return self.plan.fused_tokens > 0 and sum(job.active for job in self.jobs.values()) > 1

    def _step_of(self, job: Job) -> float | None:
        """The optimizer step of a job whose chunks are through, and its gradient's norm; None where it failed.

        However it ends, its turn is over: nobody steps twice on one gradient.
        """
        norm = None
        try:
            with quarantine(job):
                if job.config.optimizer.by_matrix:  # what steps of matrices make is large, and fits into no hole of the forward's
                    self.watch.give_back()
                norm = optim_step(job)
        finally:
            self._forget_turn(job)
        if job.step == 1 or job.config.optimizer.by_matrix:
            self.watch.give_back()  # its state lies where the forward's tensors were: the next one's would come beside holes
        return norm

    def _report(self, job: Job, turn: Turn, norm: float) -> StepMetrics:
        """What there is to say of the step that a job has just completed."""
        work, loss = Work.of(turn.chunks), float(turn.loss)
        job.served += work.tokens / job.config.weight
        before, since = turn.began
        return replace(
            completed(job, work, norm, self.watch.peak()),
            loss=loss if math.isfinite(loss) else None,
            tokens_per_second=round((self.tokens - before) / (self.seconds - since), 2),
        )

    def _forget_turn(self, job: Job) -> None:
        if self.turns.pop(job.name, None) is not None:
            job.attached.drop_grad()

    def _served(self, job: Job) -> float:
        turn = self.turns.get(job.name)
        return job.served + (0 if turn is None else turn.tokens / job.config.weight)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def forward_backward(
        self,
        queues: Mapping[str, Sequence[Chunk]],
        sizes: Mapping[str, float] | None = None,
        objectives: Mapping[str, Objective] | None = None,
    ) -> dict[str, Tensor]:
        """Accumulate the gradients of chunks, given per job. Returns each job's loss (no host sync).

        A job's loss is divided by its entry in `sizes`; without, its chunks must be all of its step, and it is divided by
        their common size. `objectives`: what some jobs minimise instead of their own.
        """
        if sizes is None:
            sizes = {name: sum(self.jobs[name].objective.size(c) for c in chunks) for name, chunks in queues.items()}
        for job in (self.jobs[name] for name in queues):
            self.bring_in(job)
            if any(weight.grad is None for weight in job.attached.parameters()):
                job.begin_step()
        losses = {name: torch.zeros((), device=self.base.device) for name in queues}
        for chunks in schedule(queues, self.plan.fused_tokens):
            for name, loss in self._accumulate(chunks, sizes, lambda _: nullcontext(), objectives or {}).items():
                losses[name] += loss
        return losses

    def optim_step(self, names: Iterable[str], lr: float | None = None) -> dict[str, float]:
        """Clip and step each named job on its own gradients. Returns gradient norms; a non-finite one means skipped.

        `lr`: instead of what the job's schedule says.
        """
        return {name: optim_step(self.jobs[name], lr) for name in names}

    def abandon(self, name: str) -> None:
        """Let the step that a job is in the middle of, if it is, not have happened."""
        self._forget_turn(self.jobs[name])
