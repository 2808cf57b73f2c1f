"""A job that is driven from Python: its verbs.

Shapes: n_i scored tokens of example i, those whose weight is not 0.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snugtune.allocator import give_back_freed
from snugtune.data.pack import even_fit, make_chunk
from snugtune.data.render import Renderer
from snugtune.errors import DivergedError, InputError, JobFailedError
from snugtune.files import user_path
from snugtune.folder import MODEL_FILE
from snugtune.live.config import objective_from
from snugtune.live.examples import CustomLoss, by_example, check_examples, listed, slopes
from snugtune.methods import METHODS
from snugtune.methods.adapter_folder import CONFIG_FILE
from snugtune.model.generate import Sampling
from snugtune.objectives import Objective
from snugtune.objectives.sft import Sft, SftConfig
from snugtune.training.artefact import save_artefact
from snugtune.training.checkpoint import JOB_FILE, load_job, save_job
from snugtune.training.evaluation import logprobs
from snugtune.training.examples import examples_of
from snugtune.training.job import Job
from snugtune.training.metrics import StepMetrics
from snugtune.training.step import Work, completed
from snugtune.training.trainer import Trainer
from snugtune.tuned import Conversation, Tuned
from snugtune.types import Chunk, Example, Plan


@dataclass(frozen=True)
class PassMetrics:
    """One forward and backward pass of a job."""

    loss: float  # what was differentiated: the sum over the scored tokens / size, or what a loss of the user's own gave
    size: float  # what the sum was divided by; 1 for a loss of the user's own
    examples: int
    tokens: int
    label_tokens: int  # of these, those that are scored


@dataclass
class Bench:
    """What the jobs of one base have in common. `held`: None when it was closed."""

    plan: Plan
    held: Trainer | None

    @property
    def trainer(self) -> Trainer:
        """What does the work."""
        if self.held is None:
            raise InputError("this trainer is closed; open the model anew")
        return self.held

    @cached_property
    def renderer(self) -> Renderer:
        """What renders conversations to be answered."""
        return Renderer(self.trainer.base.tokenizer)


class LiveJob:
    """One job of a `LiveTrainer`, and its verbs. What one job does leaves all others as they are, bit for bit.

    `forward_backward`, `forward_backward_custom` and `optim_step` are for jobs without data, the others for all.
    """

    def __init__(self, bench: Bench, job: Job):
        self.config = job.config
        self._bench = bench
        self._job = weakref.ref(job)  # one that was removed leaves the memory, whoever still knows of it
        self._pending: Work | None = None  # what its gradient is made of since its last step; None: it has none

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far."""
        return self._at_work(well=False)[1].step

    @property
    def finished(self) -> bool:
        """Whether it has done its steps, or stopped early."""
        job = self._at_work(well=False)[1]
        return job.finished or job.stopped_early

    @property
    def failure(self) -> str | None:
        """Why it was given up, or None."""
        return self._at_work(well=False)[1].failure

    def examples(self, records: Sequence[Any], columns: Mapping[str, str] | None = None) -> list[Example]:
        """Records (messages, prompt and completion, text, ...) rendered and tokenised as training does it.

        `columns` maps our names to the records' own. A record may give several examples (a text longer than max_seq_len; a
        conversation whose template rewrites earlier turns). Raises `InputError` that names the first record of which
        something would be lost, as by a cut to max_seq_len.
        """
        trainer, job = self._at_work()
        return examples_of(listed(records, "records"), job.config, trainer.base.tokenizer, columns or {})

    def forward_backward(
        self, examples: Sequence[Example], objective: str | Mapping[str, Any] | None = None, size: float | None = None
    ) -> PassMetrics:
        """Add the gradient of the examples' loss to the job's. Returns that loss: a sum over scored tokens / `size`.

        `size` is by default the sum of these examples' weights, which makes the loss their mean. Several calls add up to one
        large batch when each is given the size of all. `objective`: instead of the job's own, as a config has it.
        """
        trainer, job = self._by_hand()
        how = job.objective if objective is None else objective_from(objective)
        _, chunks = self._cut(trainer, job, examples)
        total = sum(how.size(chunk) for chunk in chunks) if size is None else float(size)
        if not (math.isfinite(total) and total > 0):
            raise InputError(f"size: a loss cannot be divided by {total:g}; give a number above 0")
        loss = self._accumulate(trainer, job, chunks, how, total)
        return _passed(loss, total, chunks)

    def forward_backward_custom(self, examples: Sequence[Example], fn: CustomLoss) -> PassMetrics:
        """Add the gradient of a loss of your own to the job's: `fn(logprobs, examples)` gives it, a scalar.

        `logprobs` holds for each example those of its scored tokens, [n_i], in fp32. The gradient is exact: with
        g = d loss / d logprobs, a second pass differentiates the sum of g x logprobs, in as many chunks as memory asks for.
        What `fn` raises comes to the caller, and leaves the job and its gradient as they were.
        """
        trainer, job = self._by_hand()
        groups, chunks = self._cut(trainer, job, examples)
        found = by_example(groups, chunks, logprobs(trainer.base, chunks, training=True))
        loss, gradients = slopes(fn, found, examples)
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        scale = 2.0 ** math.frexp(largest)[1] if 0 < largest < math.inf else 1.0  # a power of 2; fp16 would lose small ones
        weighted = [
            replace(chunk, weights=torch.cat([gradients[i] for i in group]).cpu() / -scale)
            for group, chunk in zip(groups, chunks, strict=True)
        ]
        self._accumulate(trainer, job, weighted, Sft(SftConfig()), 1.0 / scale)
        return _passed(loss, 1.0, chunks)

    def optim_step(self, lr: float | None = None) -> StepMetrics:
        """Clip the job's gradient by its max_grad_norm, step its optimizer and begin anew with no gradient.

        `lr`: instead of what the job's schedule says. A gradient that is not finite is skipped, as the metrics say; after
        too many in a row raises `DivergedError`.
        """
        trainer, job = self._by_hand()
        if self._pending is None:
            raise InputError(f"job '{self.name}' has no gradient to step on; call forward_backward first")
        if lr is None and job.finished:
            raise InputError(f"job '{self.name}' has done its {job.total} steps; give it more, or optim_step(lr=...)")
        if lr is not None and not (math.isfinite(lr) and lr >= 0):
            raise InputError(f"lr: expected a number of at least 0, found {lr!r}")
        given = self._pending
        try:
            norm = trainer.optim_step([job.name], lr)[job.name]
        finally:
            self._drop(job)
        metrics = completed(job, given, norm, trainer.watch.peak())
        if job.failure is not None:
            raise failure_of(job)
        return metrics

    def logprobs(self, examples: Sequence[Example]) -> list[Tensor]:
        """The log probabilities of each example's scored tokens, [n_i] each, fp32; as in an evaluation, without gradients."""
        trainer, job = self._at_work()
        groups, chunks = self._cut(trainer, job, examples)
        return by_example(groups, chunks, logprobs(trainer.base, chunks))

    def sample(
        self,
        prompts: Sequence[Conversation],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """What the job answers to questions or conversations as it stands: as `snugtune.load` of what `save` writes would.

        On a base in int8, w8a8 or nf4 give `load` these `weights`: an adapter's folder does not say how its base was kept.
        """
        trainer, job = self._at_work()
        if max_new_tokens < 1 or not (0 <= temperature < math.inf) or not (0 < top_p <= 1):
            raise InputError("sample: needs max_new_tokens of at least 1, temperature of at least 0, and top_p in (0, 1]")
        asked, how = listed(prompts, "prompts"), Sampling(max_new_tokens, temperature, top_p, seed)
        return Tuned(trainer.base, job.name, self._bench.renderer).replies(asked, how) if asked else []

    def save(self, path: str | Path) -> Path:
        """Write the adapter (or model) folder, whole, as runs leave it; an older one there is replaced. Returns it."""
        trainer, job = self._at_work()
        folder = _place(path, CONFIG_FILE if METHODS[type(job.config.method)].routable else MODEL_FILE)
        give_back_freed()  # as at the end of a run
        save_artefact(folder, trainer.base, self._bench.plan, job)
        return folder

    def save_state(self, path: str | Path) -> Path:
        """Write what this job needs to go on bit for bit: weights, optimizer, counters. Returns the folder, made whole.

        That is the state after the last optimizer step: a gradient accumulated since is no part of it.
        """
        trainer, job = self._at_work()
        folder = _place(path, JOB_FILE)
        save_job(folder, job, trainer.base.fingerprint)
        return folder

    def load_state(self, path: str | Path) -> None:
        """Go on from a saved state, of this job or one like it; a gradient accumulated so far is dropped."""
        trainer, job = self._at_work(well=False)
        trainer.wake(job.name)
        served = job.served
        load_job(user_path(str(path), "path"), job, trainer.base.fingerprint)
        job.served = served  # its share of the tokens is counted from where it joined
        job.error = None
        trainer.abandon(job.name)
        self._drop(job)

    def _at_work(self, well: bool = True) -> tuple[Trainer, Job]:
        """The trainer and the job, which must still be there; `well`: and must not have been given up, and is awake then."""
        trainer = self._bench.trainer
        job = trainer.jobs.get(self.name)
        if job is None or job is not self._job():
            raise InputError(f"job '{self.name}' was removed; add it anew")
        if well and job.failure is not None:
            raise failure_of(job)
        if well and job.at_rest is not None:
            trainer.wake(job.name)
        return trainer, job

    def _by_hand(self) -> tuple[Trainer, Job]:
        trainer, job = self._at_work()
        if not job.by_hand:
            raise InputError(f"job '{self.name}' has data, and trainer.step() drives it; add one without data to drive by hand")
        return trainer, job

    def _cut(self, trainer: Trainer, job: Job, examples: Sequence[Example]) -> tuple[list[list[int]], list[Chunk]]:
        """The chunks of these examples, cut as those of a step, and which examples each holds."""
        check_examples(trainer.base, job.config, listed(examples, "examples"))
        groups = even_fit([len(e.tokens) for e in examples], job.capacity)
        first, seed = 0 if self._pending is None else self._pending.chunks, job.config.seed
        numbered = enumerate(groups, first)
        return groups, [make_chunk([examples[i] for i in group], job.name, job.step, at, seed) for at, group in numbered]

    def _accumulate(self, trainer: Trainer, job: Job, chunks: Sequence[Chunk], objective: Objective, size: float) -> float:
        """Forward and backward. Whatever breaks it half-way, half a gradient is none: what was accumulated is dropped."""
        if self._pending is None:
            job.begin_step()
        try:
            losses = trainer.forward_backward({job.name: chunks}, {job.name: size}, {job.name: objective})
        except BaseException:
            self._drop(job)
            raise
        self._pending = (self._pending or Work()) + Work.of(chunks)
        return float(losses[job.name])

    def _drop(self, job: Job) -> None:
        job.attached.drop_grad()
        self._pending = None


def _passed(loss: float, size: float, chunks: Sequence[Chunk]) -> PassMetrics:
    work = Work.of(chunks)
    return PassMetrics(loss, size, work.examples, work.tokens, work.label_tokens)


def failure_of(*jobs: Job) -> JobFailedError:
    """What there is to raise of jobs that were given up."""
    errors = [job.error for job in jobs if job.error is not None]
    kind = DivergedError if all(job.diverged for job in jobs) else JobFailedError
    error = kind("; ".join(str(job.failure) for job in jobs))
    error.__cause__ = errors[0] if errors else None
    return error


def _place(path: str | Path, mark: str) -> Path:
    """A folder to be written: new, empty, or one of the same kind, which has the file `mark`."""
    folder = user_path(str(path), "path")
    if not folder.name:
        raise InputError(f"path: '{path}' names no folder to be made; give one")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"path: {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise InputError(f"path: {folder} holds something else (no {mark}); give a new folder")
    return folder
