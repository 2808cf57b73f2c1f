"""What jobs are asked as they stand, without training them: their held-out loss, log probabilities, answers to prompts.

Shapes: n scored tokens of a chunk, D model width.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from snugtune.data.pack import collate, scored
from snugtune.errors import StopRequestedError
from snugtune.model.base import Base
from snugtune.model.generate import Sampling, generate
from snugtune.model.head import Head
from snugtune.training.job import Job
from snugtune.training.metrics import Sample, StepMetrics
from snugtune.training.recut import Short, unless_short
from snugtune.training.trainer import Trainer
from snugtune.types import Chunk, Prompt


def evaluated(trainer: Trainer, metrics: StepMetrics) -> StepMetrics:
    """`metrics` with the held-out loss, where one is due. Raises `StopRequestedError` when asked to stop meanwhile."""
    job = trainer.jobs[metrics.job]
    every = job.config.eval_every
    due = metrics.step in (0, job.total) or (every is not None and metrics.step % every == 0)
    if not (due and job.data.held_out):
        return metrics
    loss, tokens = evaluate(trainer, job)
    known = loss if math.isfinite(loss) else None
    return replace(metrics, eval_loss=known, eval_tokens=tokens, peak_memory=trainer.watch.peak())


def evaluate(trainer: Trainer, job: Job) -> tuple[float, int]:
    """(mean loss, label tokens) over the job's held-out examples, of which there is at least one. Raises `OutOfMemoryError`."""
    return trainer.attempt(job, job.evaluation_chunks, partial(_evaluate, trainer, job))


def _evaluate(trainer: Trainer, job: Job) -> tuple[float, int]:
    trainer.bring_in(job)
    chunks = job.evaluation_chunks()
    total, size = 0.0, sum(job.objective.size(c) for c in chunks)
    with _asking(trainer.base):
        for chunk in chunks:
            if trainer.stop_requested():
                raise StopRequestedError
            with _forward(trainer.base, chunk, job.head_rows) as (head, states):
                total += float(job.objective.loss(head, states, chunk, False))
    return total / size, sum(len(c.rows) for c in chunks)


def sampled(trainer: Trainer, metrics: StepMetrics) -> list[Sample]:
    """What the job answers at this step to its prompts, straight from the training weights, where that is due."""
    job = trainer.jobs[metrics.job]
    if not job.samples_due(metrics.step):
        return []
    trainer.bring_in(job)
    pairs = enumerate(zip(job.data.prompts, _answers(trainer, job, job.data.prompts), strict=True))
    found = [Sample(job.name, metrics.step, at, prompt.text, answer) for at, (prompt, answer) in pairs if answer is not None]
    if len(found) < len(job.data.prompts):
        missing = f"{len(job.data.prompts) - len(found)} of {len(job.data.prompts)} answers"
        trainer.say(f"samples ({job.name}): memory ran out over {missing} after step {metrics.step}; they are left out")
    return found


def _answers(trainer: Trainer, job: Job, prompts: Sequence[Prompt]) -> list[str | None]:
    """All together; where memory is too short for that, half of them at a time; None where it is too short for one alone."""
    how = Sampling(max_new_tokens=job.config.samples.max_new_tokens)
    tokens = [prompt.tokens for prompt in prompts]
    found = unless_short(lambda: generate(trainer.base, job.name, tokens, prompts[0].stops, how))
    if not isinstance(found, Short):
        return list(found)
    trainer.watch.give_back()
    half = len(prompts) // 2
    return [*_answers(trainer, job, prompts[:half]), *_answers(trainer, job, prompts[half:])] if half else [None]


def logprobs(base: Base, chunks: Sequence[Chunk], training: bool = False) -> list[Tensor]:
    """Log probabilities of each chunk's targets, [n] each, without gradients. Their jobs' states must be in memory.

    `training`: those that a forward for training has, with its dropout and noise.
    """
    found = list[Tensor]()
    with _asking(base, training):
        for chunk in chunks:
            with _forward(base, chunk) as (head, states):
                found.append(head.logprobs(states, chunk.targets.to(states.device)))
    return found


@contextmanager
def _asking(base: Base, training: bool = False) -> Iterator[None]:
    """No gradients inside the block, and the model in that mode."""
    before = base.model.training
    base.model.train(training)
    try:
        with torch.no_grad():
            yield
    finally:
        base.model.train(before)


@contextmanager
def _forward(base: Base, chunk: Chunk, head_rows: int | None = None) -> Iterator[tuple[Head, Tensor]]:
    """A chunk by itself: its job's head, and the states of its scored rows, [n, D]. The block is under its routing."""
    batch = collate([chunk], base.min_rows, base.device)
    with base.routed(batch):
        (segment,) = batch.segments
        yield base.head.for_segment(segment, head_rows), scored(base.hidden(batch), chunk, segment)
