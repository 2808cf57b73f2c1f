"""A run in progress: what it holds between its steps, where it reports to, and what it leaves of a finished job."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from snugtune.config import RunConfig
from snugtune.errors import StorageError
from snugtune.files import whole_folder
from snugtune.folder import RunFolder
from snugtune.memory.plan import Planned
from snugtune.tracking import Tracking
from snugtune.training.checkpoint import load_best, save_best, save_checkpoint
from snugtune.training.job import Ended, Job, quarantine
from snugtune.training.metrics import MetricsFile, Sample, StepMetrics
from snugtune.training.trainer import Trainer
from snugtune.types import NARROW
from snugtune.words import counted

AUTO_CHECKPOINTS = 10
"""Checkpoints in a run that does not say how often."""


@dataclass
class Session:
    """A run in progress: what `train` holds between its steps."""

    config: RunConfig
    folder: RunFolder
    planned: Planned
    trainer: Trainer
    ended: list[Ended] = field(default_factory=list)  # finished, or given up
    errors: dict[str, Exception] = field(default_factory=dict)  # what broke jobs in this session
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # job -> what its data is
    parked: dict[str, StorageError] = field(default_factory=dict)  # jobs that could not be written; they keep their state
    pending: list[StepMetrics] = field(default_factory=list)  # steps done, not yet evaluated and reported
    saved: tuple[int, frozenset[str]] | None = None  # the newest checkpoint: its step, and the jobs that go on
    held_back: list[StepMetrics] = field(default_factory=list)  # of parked jobs: evaluated once their disk takes it
    looked: int = 0  # the step at which one was last thought of

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

    def save_is_due(self) -> bool:
        """Whether each job that trains has done, on average, as many steps as lie between two checkpoints."""
        every = self.config.checkpoint_every or max(1, -(-max(j.total for j in self.all_jobs) // AUTO_CHECKPOINTS))
        every *= max(1, len(self.trainer.jobs))
        before, self.looked = self.looked, self.step
        return self.step // every > before // every

    def save(self) -> None:
        """Write a checkpoint of the state after the last whole step, unless there is one."""
        state = self.step, frozenset(self.trainer.jobs)
        if state != self.saved:
            root, keep, base = self.folder.checkpoints, self.config.keep_checkpoints, self.trainer.base.fingerprint
            active = list(self.trainer.jobs.values())
            save_checkpoint(root, self.step, self.planned.plan, base, active, self.ended, [*self.pending, *self.held_back], keep)
            self.saved = state

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
        if job.ended and self._best_is_earlier(job):
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
            self.ended.append(Ended.of(job))
            self.trainer.remove(job.name)

    def park(self, job: Job, note: Callable[[str], None]) -> bool:
        """Where the disk refused a job, let it stand as it is until the others are done; says whether that is so."""
        if not isinstance(job.error, StorageError):
            return False
        self.parked[job.name], job.paused = job.error, True
        job.failure = job.error = None
        note(f"{job.name}: waits as it is, the others go on: {self.parked[job.name]}")
        return True

    def try_parked(self, note: Callable[[str], None]) -> None:
        """Save the results of parked jobs after all, where the disk takes them by now."""
        for name in [name for name in self.parked if self.trainer.jobs[name].ended]:
            del self.parked[name]
            self.trainer.jobs[name].paused = False
        self.retire(note)

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
        _save_artefact(self, job)

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


def _save_artefact(session: Session, job: Job) -> None:
    """Write a finished job's adapter or model folder, whole, with its model card and the tokenizer."""
    with whole_folder(session.folder.artefact(job.config)) as made:
        job.attached.save(made)
        session.trainer.base.tokenizer.save_pretrained(made)
        (made / "README.md").write_text(_card(session, job), encoding="utf-8")


def _card(session: Session, job: Job) -> str:
    """A model card: where this comes from and how to load it."""
    c, base = job.config, session.trainer.base
    library = "peft" if c.method.type == "lora" else "transformers"
    steps = f"{counted(job.step, 'steps')} of {counted(c.batch_size, 'examples')}"
    about = (
        f"Fine-tuned from `{base.name}` with snugtune: method `{c.method.type}`, {steps}, "
        f"{counted(len(job.data.train), 'training examples')}, seed {c.seed}."
    )
    plan = session.planned.plan
    if plan.weights in NARROW:
        about += f" The base's weights were kept in {plan.weights} meanwhile, and computed with in {plan.compute}."
    if c.keep_best and job.best is not None:
        about += f" The weights are those of step {job.best.step}, held-out loss {job.best.eval_loss:.4f}."
    head = ["---", f"base_model: {base.name}", f"library_name: {library}", "tags: [snugtune]", "---"]
    return "\n".join([*head, "", f"# {c.name}", "", about, "", f"Base fingerprint: `{base.fingerprint}`", ""])
