"""The trainer: one step of all due jobs on one base, as a story.

Due jobs give their chunks; each job's loss size is known before any forward; chunks go in batches through the base under
their routing; each job's loss is a sum over its chunks divided once by its own size; then every job clips its own norm,
is skipped alone if that is not finite, and steps its own optimizer.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from snugtune.data.pack import collate
from snugtune.model.base import Base
from snugtune.model.generate import Sampling, generate
from snugtune.optim import clip_grad_norm
from snugtune.training.job import Job
from snugtune.training.metrics import Sample, StepMetrics
from snugtune.training.schedule import schedule
from snugtune.types import MIN_ROWS, Batch, Chunk, Plan

MAX_SKIPS = 10
"""Non-finite gradients in a row after which a job is given up (fp16's loss scale needs a few to settle)."""


class Watch(Protocol):
    """What the trainer is told about memory."""

    def peak(self) -> int:
        """Highest use so far, in bytes."""
        ...


class StopRequestedError(Exception):
    """The user asked to stop in the middle of a step; that step did not happen."""


class Trainer:
    """Trains 1..N jobs on one base. Jobs may come and go between steps."""

    def __init__(self, base: Base, plan: Plan, watch: Watch, stop_requested: Callable[[], bool] = lambda: False):
        self.base = base
        self.plan = plan
        self.watch = watch
        self.stop_requested = stop_requested
        self.jobs: dict[str, Job] = {}
        self.fused_tokens = 0  # capacity of a batch that several jobs share; 0: one chunk at a time
        base.configure(plan.recompute == "blocks", plan.head_rows, spill=plan.offload == "activations")

    def add(self, job: Job) -> None:
        """Let `job` take part from the next step on. Its name must be new."""
        assert job.name not in self.jobs
        self.jobs[job.name] = job
        if job.config.neftune_noise_alpha is not None:
            self.base.embedding_noise[job.name] = job.config.neftune_noise_alpha

    def remove(self, name: str) -> Job:
        """Take a job out; the base forgets it."""
        job = self.jobs.pop(name)
        self.base.embedding_noise.pop(name, None)
        job.attached.detach()
        return job

    def step(self) -> list[StepMetrics]:
        """One optimizer step of every job that has not ended. Raises `StopRequestedError` before anything was updated."""
        due = [job for job in self.jobs.values() if not job.ended]
        queues = {job.name: job.chunks() for job in due}
        started = time.perf_counter()
        for job in due:
            job.attached.zero_grad()
        losses = self.forward_backward(queues)
        norms = self.optim_step([job.name for job in due])
        elapsed = time.perf_counter() - started
        total_tokens = sum(len(c.tokens) for q in queues.values() for c in q)
        return [self._report(job, queues[job.name], losses[job.name], norms[job.name], total_tokens / elapsed) for job in due]

    def forward_backward(self, queues: Mapping[str, Sequence[Chunk]]) -> dict[str, Tensor]:
        """Accumulate the gradients of one step's chunks, given per job. Returns each job's loss (no host sync).

        The chunks of a job must be all of its step: its loss is divided by their common size.
        """
        sizes = {name: sum(self.jobs[name].objective.size(c) for c in chunks) for name, chunks in queues.items()}
        losses = {name: torch.zeros((), device=self.base.device) for name in queues}
        self.base.model.train()
        for chunks in schedule((list(q) for q in queues.values()), self.fused_tokens):
            if self.stop_requested():
                raise StopRequestedError
            batch = collate(chunks, MIN_ROWS if self.base.packable else 0, self.base.device)
            with self.base.routed(batch):  # spans backward: recompute runs there
                total = torch.zeros((), device=self.base.device)
                for chunk, loss in self._losses(chunks, batch, training=True):
                    mean = loss / sizes[chunk.job]
                    losses[chunk.job] += mean.detach()
                    scaler = self.jobs[chunk.job].scaler
                    total = total + (mean if scaler is None else scaler.scale(mean))
                total.backward()
        return losses

    def optim_step(self, names: Iterable[str]) -> dict[str, float]:
        """Clip and step each named job on its own gradients. Returns gradient norms; a non-finite one means skipped."""
        return {name: self._optim_step(self.jobs[name]) for name in names}

    def start_metrics(self) -> list[StepMetrics]:
        """A step 0 for every job: what is evaluated and sampled before training."""
        return [StepMetrics(job.name, 0, job.total, 0.0) for job in self.jobs.values()]

    def evaluated(self, metrics: StepMetrics) -> StepMetrics:
        """`metrics` with the held-out loss, where one is due. Raises `StopRequestedError` when asked to stop meanwhile."""
        job = self.jobs[metrics.job]
        every = job.config.eval_every
        due = metrics.step in (0, job.total) or (every is not None and metrics.step % every == 0)
        if not (due and job.data.held_out):
            return metrics
        loss, tokens = self.evaluate(job)
        known = loss if math.isfinite(loss) else None
        return replace(metrics, eval_loss=known, eval_tokens=tokens, peak_memory=self.watch.peak())

    def evaluate(self, job: Job) -> tuple[float, int]:
        """(mean loss, label tokens) over the job's held-out examples, of which there is at least one."""
        chunks = job.evaluation_chunks()
        total, size = 0.0, sum(job.objective.size(c) for c in chunks)
        training = self.base.model.training
        self.base.model.eval()
        try:
            with torch.no_grad():
                for chunk in chunks:
                    if self.stop_requested():
                        raise StopRequestedError
                    batch = collate([chunk], MIN_ROWS if self.base.packable else 0, self.base.device)
                    with self.base.routed(batch):
                        total += sum(float(loss) for _, loss in self._losses([chunk], batch, training=False))
        finally:
            self.base.model.train(training)
        return total / size, sum(len(c.rows) for c in chunks)

    def samples(self, metrics: StepMetrics) -> list[Sample]:
        """What the job answers at this step to its prompts, straight from the training weights, where that is due."""
        job = self.jobs[metrics.job]
        if not job.samples_due(metrics.step):
            return []
        stops, how = job.data.prompts[0].stops, Sampling(max_new_tokens=job.config.samples.max_new_tokens)
        answers = generate(self.base, job.name, [p.tokens for p in job.data.prompts], stops, how)
        pairs = enumerate(zip(job.data.prompts, answers, strict=True))
        return [Sample(job.name, metrics.step, index, prompt.text, answer) for index, (prompt, answer) in pairs]

    def _losses(self, chunks: Sequence[Chunk], batch: Batch, training: bool) -> Iterable[tuple[Chunk, Tensor]]:
        """Each chunk's undivided loss, from one forward of their batch."""
        hidden = self.base.hidden(batch)
        for chunk, segment in zip(chunks, batch.segments, strict=True):
            states = hidden[segment.tokens].index_select(0, chunk.rows.to(hidden.device))
            yield chunk, self.jobs[chunk.job].objective.loss(self.base.head.for_segment(segment), states, chunk, training)

    def _optim_step(self, job: Job) -> float:
        for group in job.optimizer.param_groups:
            group["lr"] = job.lr()
        if job.scaler is not None:
            job.scaler.unscale_(job.optimizer)
        limit = math.inf if job.config.max_grad_norm is None else job.config.max_grad_norm
        norm = float(clip_grad_norm(job.attached.parameters(), limit))
        finite = math.isfinite(norm)
        if finite:
            job.optimizer.step()
        if job.scaler is not None:
            job.scaler.update()  # down after an overflow, up after many steps without
        job.attached.publish()
        job.step += 1
        job.skipped_in_a_row = 0 if finite else job.skipped_in_a_row + 1
        if job.skipped_in_a_row >= MAX_SKIPS:
            job.failure = (
                f"job '{job.name}': {MAX_SKIPS} steps in a row had no finite gradient (step {job.step}); "
                "lower optimizer.lr, lengthen schedule.warmup, or look for broken examples"
            )
        return norm

    def _report(self, job: Job, chunks: Sequence[Chunk], loss: Tensor, norm: float, speed: float) -> StepMetrics:
        value, finite = float(loss), math.isfinite(norm)
        tokens, label_tokens = sum(len(c.tokens) for c in chunks), sum(len(c.rows) for c in chunks)
        job.seen_tokens += tokens
        job.seen_label_tokens += label_tokens
        return StepMetrics(
            job=job.name,
            step=job.step,
            total_steps=job.total,
            epoch=round(job.epoch, 4),
            loss=value if math.isfinite(value) else None,
            examples=sum(len(c.lengths) for c in chunks),
            tokens=tokens,
            label_tokens=label_tokens,
            total_tokens=job.seen_tokens,
            total_label_tokens=job.seen_label_tokens,
            lr=float(job.optimizer.param_groups[0]["lr"]),
            grad_norm=norm if finite else None,
            skipped=not finite,
            tokens_per_second=round(speed, 2),
            peak_memory=self.watch.peak(),
        )
