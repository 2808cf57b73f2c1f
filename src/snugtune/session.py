"""A run in progress: what it holds between its steps, where it reports to, and what it leaves of a finished job."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from snugtune.config import RunConfig
from snugtune.files import whole_folder
from snugtune.folder import RunFolder
from snugtune.memory.plan import Planned
from snugtune.tracking import Tracking
from snugtune.training.checkpoint import load_best, save_best, save_checkpoint
from snugtune.training.job import Job
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
    step: int = 0  # of the run; every unfinished job takes one step in each
    ended: list[Job] = field(default_factory=list)  # finished, or given up
    pending: list[StepMetrics] = field(default_factory=list)  # steps done, not yet evaluated and reported
    saved: int = -1  # the step of the newest checkpoint

    @property
    def checkpoint_every(self) -> int:
        return self.config.checkpoint_every or max(1, -(-max(j.total for j in self.all_jobs) // AUTO_CHECKPOINTS))

    @property
    def all_jobs(self) -> list[Job]:
        return [*self.trainer.jobs.values(), *self.ended]

    def save(self) -> None:
        """Write a checkpoint of the state after the last whole step, unless there is one."""
        if self.step != self.saved:
            root, keep, base = self.folder.checkpoints, self.config.keep_checkpoints, self.trainer.base.fingerprint
            active = list(self.trainer.jobs.values())
            save_checkpoint(root, self.step, self.planned.plan, base, active, self.ended, self.pending, keep)
            self.saved = self.step

    def judge(self, metrics: StepMetrics) -> None:
        """Note a better held-out loss, and keep the weights that gave it where they are the result.

        A job that has ended has them back: what it is asked last is asked of its result.
        """
        job = self.trainer.jobs[metrics.job]
        if job.judge(metrics) and job.config.keep_best:
            save_best(self.folder.checkpoints, job)
        if job.ended and job.failure is None and self._best_is_earlier(job):
            load_best(self.folder.checkpoints, job)

    @staticmethod
    def _best_is_earlier(job: Job) -> bool:
        return job.config.keep_best and job.best is not None and job.best.step != job.step

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
        return {job.name: job.step for job in self.all_jobs} | {m.job: m.step - 1 for m in self.pending}


@dataclass(frozen=True)
class Logs:
    """Where a run reports to."""

    metrics: MetricsFile
    samples: MetricsFile | None  # where no job is asked anything
    tracking: Tracking

    @classmethod
    def open(cls, session: Session, tracking: Tracking) -> "Logs":
        """Open them, cut back to where each job stands. Raises `StorageError`."""
        resume_at = session.reported() if session.saved >= 0 else None
        asked = any(job.data.prompts for job in session.all_jobs)
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
