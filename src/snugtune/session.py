"""A run in progress: what it holds between its steps, and where it reports to."""

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from snugtune.allocator import give_back_freed
from snugtune.config import RunConfig
from snugtune.errors import SnugtuneError, StorageError
from snugtune.folder import RunFolder
from snugtune.memory.fit import Fitted
from snugtune.memory.measured import Meter
from snugtune.memory.plan import Planned
from snugtune.tracking import Tracking
from snugtune.training.artefact import save_artefact
from snugtune.training.checkpoint import load_best, save_best, save_checkpoint
from snugtune.training.job import Ended, Job, quarantine
from snugtune.training.metrics import MetricsFile, Sample, StepMetrics
from snugtune.training.recut import forget_locals
from snugtune.training.trainer import Trainer
from snugtune.words import one_line

AUTO_CHECKPOINTS = 10
"""Checkpoints in a run that does not say how often."""
STATUS_SECONDS = 1.0
"""Between two writes of `jobs.json`, while no job ends."""
STATUS_SHARE = 0.05
"""Of the time that may be spent on it, while many jobs end one after the other."""


@dataclass
class Session:
    """A run in progress: what `train` holds between its steps."""

    config: RunConfig
    folder: RunFolder
    planned: Planned
    trainer: Trainer
    fitted: Fitted | None = None  # how the plan was chosen, in a run's first session
    meter: Meter | None = None  # what the run takes
    ended: list[Ended] = field(default_factory=list)  # finished, or given up
    errors: dict[str, Exception] = field(default_factory=dict)  # what broke jobs in this session
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # job -> what its data is
    parked: dict[str, StorageError] = field(default_factory=dict)  # jobs that could not be written; they keep their state
    pending: list[StepMetrics] = field(default_factory=list)  # steps done, not yet evaluated and reported
    saved: tuple[int, frozenset[str], int] | None = None  # the newest checkpoint: its step, jobs that go on, changes of the plan
    held_back: list[StepMetrics] = field(default_factory=list)  # of parked jobs: evaluated once their disk takes it
    looked: int = 0  # the step at which one was last thought of
    told: dict[str, dict[str, Any]] = field(default_factory=dict)  # what jobs.json says
    told_at: float = 0.0  # when
    told_of: tuple[int, int] = (0, 0)  # how many jobs had ended or were parked then
    telling: float = 0.0  # seconds that it took
    planned_of: tuple[int, int] = (0, 0)  # what plan.json knows: how many changes of the plan, and what peak

    @property
    def step(self) -> int:
        """Optimizer steps of all jobs together."""
        return sum(job.step for job in self.all_jobs)

    @property
    def all_jobs(self) -> list[Job | Ended]:
        return [*self.trainer.jobs.values(), *self.ended]

    @property
    def place(self) -> str:
        """Where the run stands, in words."""
        jobs = self.all_jobs
        if len(jobs) == 1:
            return f"step {self.step}"
        return f"step {min(job.step for job in jobs)} to {max(job.step for job in jobs)} of {len(jobs)} jobs"

    def work(self) -> None:
        """Train until a step is done. Where one took more than there was before, see to what that means."""
        before = self.trainer.watch.peak()
        self.pending = self.trainer.step()
        if self.meter is None or not self.pending:
            return
        rose = self.trainer.watch.peak() > before
        ends = not self.ended and any(m.step == m.total_steps for m in self.pending)  # the first: all have what they will have
        if ends or self.meter.is_due():
            self.meter.count(self.trainer.base, self.trainer.jobs.values(), self.step)
        if rose:
            self._look_ahead(self.meter)

    def _look_ahead(self, meter: Meter) -> None:
        """Where larger forwards may come than any so far, and would take more than there is: let them be smaller."""
        active = [job for job in self.trainer.jobs.values() if job.active]
        most = {job.name: job.capacity or job.config.max_seq_len for job in active}
        largest = max(self.trainer.plan.fused_tokens, *most.values(), 0)
        predicted = largest if meter.forecast is None else min(largest, meter.forecast.tokens)
        if (cause := meter.short(predicted)) is not None:
            self.trainer.tighten(cause, [name for name, tokens in most.items() if tokens > meter.watch.largest] or list(most))

    def save_is_due(self) -> bool:
        """Whether each job that trains has done, on average, as many steps as lie between two checkpoints.

        Or the plan was changed: what goes on from a checkpoint shall go on with that.
        """
        every = self.config.checkpoint_every or max(1, -(-self._longest // AUTO_CHECKPOINTS))
        every *= max(1, len(self.trainer.jobs))
        before, self.looked = self.looked, self.step
        changed = len(self.trainer.changes) > (0 if self.saved is None else self.saved[2])
        return changed or self.looked // every > before // every

    @cached_property
    def _longest(self) -> int:
        """Steps of the longest job."""
        return max(job.total for job in self.all_jobs)

    def save(self) -> None:
        """Write a checkpoint of the state after the last whole step, unless there is one. Raises `StorageError`.

        None is written while a job rests in a file that cannot be read: the last one has what it was.
        """
        lost = any(self.trainer.jobs[name].at_rest is not None for name in self.parked)
        if self.stands != self.saved and not lost:
            root, keep, base = self.folder.checkpoints, self.config.keep_checkpoints, self.trainer.base.fingerprint
            active, pending = list(self.trainer.jobs.values()), [*self.pending, *self.held_back]
            plan, changes = self.planned.plan, self.trainer.changes
            save_checkpoint(root, self.step, plan, changes, base, active, self.ended, pending, keep)
            self.saved = self.stands

    @property
    def stands(self) -> tuple[int, frozenset[str], int]:
        """What tells one checkpoint from another; see `saved`."""
        return self.step, frozenset(self.trainer.jobs), len(self.trainer.changes)

    def judge(self, metrics: StepMetrics) -> None:
        """Note a better held-out loss, and keep the weights that gave it where they are the result.

        A job that has ended has them back: what it is asked last is asked of its result.
        """
        job = self.trainer.jobs[metrics.job]
        before = job.best, job.to_beat, job.stale
        if job.judge(metrics) and job.config.keep_best:
            try:
                save_best(self.folder.checkpoints, job)
            except StorageError:
                job.best, job.to_beat, job.stale = before  # as if it were not judged yet
                raise
        if (job.finished or job.stopped_early) and self._best_is_earlier(job):
            load_best(self.folder.checkpoints, job)

    @staticmethod
    def _best_is_earlier(job: Job) -> bool:
        return job.config.keep_best and job.best is not None and job.best.step != job.step

    def retire(self, note: Callable[[str], None]) -> None:
        """Let the jobs that have ended leave: their results are saved, their memory is free.

        One that the disk does not take is parked.
        """
        for job in [job for job in self.trainer.jobs.values() if job.ended and not job.paused]:
            if job.failure is None:
                with quarantine(job):
                    self.trainer.wake(job.name)
                    self.finish(job, note)
            if self.park(job, note):
                continue
            if job.failure is not None:
                note(f"given up: {job.failure}")
            if job.error is not None:
                self.errors[job.name] = job.error
                forget_locals(job.error)
            self.ended.append(Ended.of(job))
            self.trainer.remove(job.name)

    def park(self, job: Job, note: Callable[[str], None]) -> bool:
        """Where the disk refused a job, let it stand as it is until the others are done; says whether that is so."""
        if not isinstance(job.error, StorageError):
            return False
        self.parked[job.name], job.paused = job.error, True
        forget_locals(job.error)
        job.failure = job.error = None
        note(f"{job.name}: waits as it is, the others go on: {self.parked[job.name]}")
        return True

    def unpark(self) -> None:
        """Let parked jobs go on where they stood: the disk may take them by now."""
        for name in self.parked:
            self.trainer.jobs[name].paused = False
        self.parked.clear()
        self.pending, self.held_back = [*self.pending, *self.held_back], []

    def finish(self, job: Job, note: Callable[[str], None]) -> None:
        """Save the result of a job that has ended well: its last state, or its best."""
        if job.stopped_early and not job.finished:
            best = "none was finite" if job.best is None else f"the best was {job.best.eval_loss:.4f} at step {job.best.step}"
            note(f"{job.name}: stopped at step {job.step}: the held-out loss no longer falls ({best})")
        if self._best_is_earlier(job):
            assert job.best is not None
            load_best(self.folder.checkpoints, job)  # again, where a run is resumed here
            note(f"{job.name}: the result is the state of step {job.best.step}, held-out loss {job.best.eval_loss:.4f}")
        if job.best is not None and job.untuned is not None and job.best.eval_loss >= job.untuned:
            note(f"{job.name}: no evaluation was better than the untuned model's, {job.untuned:.4f}; try a lower optimizer.lr")
        give_back_freed()  # what is imported to write an adapter need not come on top of what the steps left
        save_artefact(self.folder.artefact(job.config), self.trainer.base, self.planned.plan, job)

    def statuses(self) -> dict[str, dict[str, Any]]:
        """Job -> how it stands: `status` (waiting, training, finished, stopped early, failed, parked), `step`, `total_steps`;

        `reason` where it failed or is parked, and `traceback` where that was a bug.
        """
        jobs = {job.name: job for job in self.all_jobs}
        return {name: self._status(jobs[name]) for name in (config.name for config in self.config.resolved_jobs())}

    def _status(self, job: Job | Ended) -> dict[str, Any]:
        told: dict[str, Any] = {"status": "training" if job.step else "waiting", "step": job.step, "total_steps": job.total}
        if job.name in self.parked:
            return told | {"status": "parked", "reason": one_line(str(self.parked[job.name]))}
        if isinstance(job, Ended) and job.failure is None:
            return told | {"status": "finished" if job.step == job.total else "stopped early"}
        if job.failure is not None:
            told |= {"status": "failed", "reason": one_line(job.failure.removeprefix(f"job '{job.name}': "))}
            error = job.error if isinstance(job, Job) else self.errors.get(job.name)  # a stop may come before it is retired
            before = self.told.get(job.name, {})
            if error is not None and not isinstance(error, SnugtuneError):
                told["traceback"] = "".join(traceback.format_exception(error))
            elif isinstance(before.get("traceback"), str) and before.get("reason") == told["reason"]:
                told["traceback"] = before["traceback"]  # of the process that this one goes on for
        return told

    def tell(self, at_once: bool = False) -> dict[str, str]:
        """Keep `jobs.json` up to date. Returns job -> status of those that have another one now.

        It is written when a job has ended or is parked, else every so many seconds; of many jobs more seldom.
        """
        self._tell_plan()
        began, of = time.monotonic(), (len(self.ended), len(self.parked))
        pause = STATUS_SECONDS if of == self.told_of else 0.0
        if not at_once and began - self.told_at < max(pause, self.telling / STATUS_SHARE):
            return {}
        before, self.told, self.told_of = self.told, self.statuses(), of
        with suppress(StorageError):  # a full disk is told of where it costs something
            self.folder.write_jobs(self.told)
        self.told_at = time.monotonic()
        self.telling = self.told_at - began
        return {name: job["status"] for name, job in self.told.items() if job["status"] != before.get(name, {}).get("status")}

    def write_plan(self, finished: bool = False) -> None:
        """Write `plan.json`: the plan, how it was chosen, what was changed and what was measured. Raises `StorageError`."""
        peak = self.trainer.watch.peak() if finished else None
        measured = None if self.meter is None else self.meter.facts()
        self.folder.write_plan(self.planned, self.trainer.changes, peak, measured, self.fitted)

    def _tell_plan(self) -> None:
        """Keep `plan.json` up to date."""
        known = len(self.trainer.changes), 0 if self.meter is None else self.meter.peak
        if known != self.planned_of:
            with suppress(StorageError):  # checkpoints have the changes, too
                self.write_plan()
                self.planned_of = known

    def reported(self) -> dict[str, int]:
        """Job -> the last step whose metrics are final."""
        return {job.name: job.step for job in self.all_jobs} | {m.job: m.step - 1 for m in (*self.pending, *self.held_back)}


@dataclass(frozen=True)
class Logs:
    """Where a run reports to."""

    metrics: MetricsFile
    samples: MetricsFile | None  # where no job is asked anything
    tracking: Tracking

    @classmethod
    def open(cls, session: Session, tracking: Tracking) -> "Logs":
        """Open them, cut back to where each job stands. Raises `StorageError`."""
        resume_at = None if session.saved is None else session.reported()
        asked = any(job.data.prompts for job in session.trainer.jobs.values()) or session.folder.samples.exists()
        samples = MetricsFile(session.folder.samples, resume_at) if asked else None
        return cls(MetricsFile(session.folder.metrics, resume_at), samples, tracking)

    def write(self, metrics: StepMetrics, samples: Sequence[Sample]) -> None:
        if metrics.loss is not None or metrics.eval_tokens is not None or metrics.skipped:
            self.metrics.write(metrics)
            self.tracking.step(metrics)
        for sample in samples:
            assert self.samples is not None
            self.samples.write(sample)

    def sync(self) -> None:
        """Make sure that what was written survives a crash of the machine."""
        for log in (self.metrics, self.samples):
            if log is not None:
                log.sync()

    def close(self) -> None:
        self.metrics.close()
        if self.samples is not None:
            self.samples.close()
