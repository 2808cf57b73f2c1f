"""Jobs driven from Python: a base that jobs come to and leave, its fair scheduler, and each job's verbs.

The verbs are Tinker's: forward_backward, forward_backward_custom, optim_step, save_state, load_state, sample.
"""

from collections.abc import Mapping
from typing import Any

from snugtune.allocator import give_back_large_blocks
from snugtune.config import JobConfig
from snugtune.errors import InputError
from snugtune.live.config import Opening, job_config, validated
from snugtune.live.job import Bench, LiveJob, PassMetrics, failure_of
from snugtune.machine import keep_few_kernels
from snugtune.memory.budget import Watch
from snugtune.memory.plan import check_job, plan_for
from snugtune.methods import METHODS
from snugtune.model.base import Base, load_base
from snugtune.model.load import load_config, stored_width
from snugtune.model.proofs import obstacle_to_sharing
from snugtune.model.selftest import check_gradients
from snugtune.model.source import find_model
from snugtune.prepare import proved
from snugtune.training.evaluation import evaluated
from snugtune.training.examples import JobData, read_job, tokenize_job
from snugtune.training.job import length_remark, quarantine, start_job
from snugtune.training.metrics import StepMetrics
from snugtune.training.rest import sweep
from snugtune.training.trainer import Trainer
from snugtune.types import NARROW, Plan, Width

_JOBS_EXPECTED = 8
"""That share a forward: nobody knows before they come."""


class LiveTrainer:
    """A base in memory, and the jobs on it. A context manager: the end of the block lets all of them go.

    `notes` is what a run would have told meanwhile. Everything raises `InputError` for what cannot be. Not for several
    threads at once.
    """

    def __init__(self, base: Base, plan: Plan, stored: Width | None = None, notes: list[str] | None = None):
        self.notes = [] if notes is None else notes
        self._bench = Bench(plan, Trainer(base, plan, Watch(plan.device), say=self.notes.append))
        self._stored: Width | None = stored
        self._changed_by: str | None = None  # the job that trained the base's own weights
        self._checked = plan.weights not in NARROW and plan.offload == "none"

    def add(self, job: JobConfig | Mapping[str, Any]) -> "LiveJob":
        """Let a job take part from now on: one with `data` in `step`, one without by its verbs alone."""
        config, trainer, plan = job_config(job), self._bench.trainer, self._bench.plan
        self._check_room(config)
        check_job(config, plan, self._stored)
        data = JobData(())
        if config.data:
            text = read_job(config)
            data = tokenize_job(config, text, trainer.base.tokenizer, lambda items, _: items, self.notes.append)
            self.notes += [f"data ({config.name}): {remark}" for remark in data.remarks]
        started = start_job(trainer.base, config, data, plan)
        kernels = (f"kernels: {note}" for note in trainer.base.kernel_notes)
        self.notes += [note for note in kernels if note not in self.notes]
        if data.train and (remark := length_remark(trainer.base, config, data)):
            self.notes.append(f"data ({config.name}): {remark}")
        try:
            trainer.add(started)
        except BaseException:  # the disk does not take whoever was to make room
            started.attached.detach()
            raise
        if not METHODS[type(config.method)].routable:
            self._changed_by = config.name
        try:
            self._check_gradients()
        except BaseException:
            trainer.remove(config.name)
            raise
        return LiveJob(self._bench, started)

    def remove(self, name: str) -> None:
        """Let a job go, and what it trained since it was last saved. Its verbs are refused from now on."""
        self._known(name).remove(name)

    def rest(self, name: str) -> None:
        """Let a job stand as it is, its adapter and optimizer state on disk: it takes no part in `step`, and no memory.

        `wake`, and each of its own verbs, bring it back. Raises `InputError` in the middle of a step of its.
        """
        self._known(name).rest(name)

    def wake(self, name: str) -> None:
        """Bring a job back from `rest`."""
        self._known(name).wake(name)

    def step(self) -> list[StepMetrics]:
        """Work until at least one of the jobs with data has completed an optimizer step; [] when none has any left to do.

        Where memory runs out, a step begins anew in smaller pieces, as `notes` say; raises `OutOfMemoryError` where there are
        none smaller. A job whose own part breaks is given up alone, its `failure` says why. When no step is left, such jobs are
        told of: raises `JobFailedError` (`DivergedError` where gradients did not stay finite) as long as one of them is here.
        """
        trainer = self._bench.trainer
        steps = [self._evaluated(trainer, metrics) for metrics in trainer.step()]
        failed = [job for job in trainer.jobs.values() if job.failure is not None and not job.by_hand]
        if failed and not steps:
            raise failure_of(*failed)
        return steps

    def close(self) -> None:
        """Let all jobs and the base go."""
        trainer, self._bench.held = self._bench.held, None
        if trainer is not None:
            for name in list(trainer.jobs):
                trainer.remove(name)
            trainer.close()

    def __enter__(self) -> "LiveTrainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _known(self, name: str) -> Trainer:
        """The trainer, which must have such a job."""
        trainer = self._bench.trainer
        if name not in trainer.jobs:
            raise InputError(f"there is no job '{name}'; there are {', '.join(trainer.jobs) or 'none'}")
        return trainer

    def _check_room(self, config: JobConfig) -> None:
        trainer = self._bench.trainer
        if config.name in trainer.jobs:
            raise InputError(f"name: there is a job '{config.name}' already; give another name, or remove it first")
        if self._changed_by is not None:
            raise InputError(f"job '{config.name}': '{self._changed_by}' trained the base's own weights; open the model anew")
        if not METHODS[type(config.method)].routable and (trainer.jobs or trainer.base.frozen):
            raise InputError(f"method: '{config.method.type}' of job '{config.name}' cannot share a base; open the model anew")

    def _check_gradients(self) -> None:
        """Once, with the first job's adapter in place."""
        if not self._checked and (checked := check_gradients(self._bench.trainer.base)).linears:
            self.notes.append(f"checked: {checked}")
        self._checked = True

    def _evaluated(self, trainer: Trainer, metrics: StepMetrics) -> StepMetrics:
        job = trainer.jobs[metrics.job]
        with quarantine(job):
            metrics = evaluated(trainer, metrics)
            job.judge(metrics)
        return metrics


def open_trainer(**fields: Any) -> LiveTrainer:
    """Load a base for jobs to come; `fields` are those of `Opening`. Raises `SnugtuneError`."""
    opening = validated(Opening, fields, "open")
    notes: list[str] = []
    sweep()
    source = find_model(opening.model, notes.append)
    config = load_config(source, opening.trust_remote_code)
    stored = stored_width(source, config)
    planned = plan_for(opening.model, opening.device, opening.plan, (), stored, obstacle_to_sharing(config))
    notes += [f"plan: {reason}" for reason in planned.reasons]
    keep_few_kernels(_JOBS_EXPECTED if planned.plan.fused_tokens else 1)  # before the first product
    if planned.plan.offload == "weights" and give_back_large_blocks():
        notes.append("memory: the allocator gives blocks from 128 KiB on back at once (M_MMAP_THRESHOLD)")
    base = load_base(source, planned.plan, opening.trust_remote_code, notes.append)
    notes += [f"model: {note}" for note in base.notes]
    planned = proved(planned, base, opening.plan.execution == "fused", notes.append)
    return LiveTrainer(base, planned.plan, stored, notes)


__all__ = ["LiveJob", "LiveTrainer", "PassMetrics", "open_trainer"]
