"""What to say when a job that has ended was no success: training that diverges often ends without any error."""

from collections.abc import Mapping, Sequence
from typing import Any

from snugtune.training.job import Ended
from snugtune.training.metrics import held_out_course, mean_ends, steps_of_mean

BLOWN_UP = 1e4
"""A weight above this is no result of learning: those of models stay below some hundreds."""
ROSE = 1.25
"""Batches differ: the loss has risen where each of the last steps lies this much above the first, before any update."""


def warning(job: Ended, lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Why the result of `job` is likely of no use, and what to do; None where nothing speaks against it.

    `lines`: its metrics. That no evaluation was better than the untuned model's is said when the job is finished.
    """
    untuned, best = job.untuned, job.best
    if job.failure is not None or (untuned is not None and best is not None and best.eval_loss >= untuned):
        return None
    lower = f"lower optimizer.lr (it is {job.config.optimizer.lr:g})"
    if not job.largest_weight <= BLOWN_UP:  # not a number, too
        return (
            f"{job.name}: training blew up: weights have grown to {job.largest_weight:.0e} and the result is of no use; {lower}"
        )
    held = held_out_course(lines, job.config.keep_best)
    if len(held) > 1 and held[-1] > held[0]:
        return f"{job.name}: the held-out loss rose, {_course(held)}; {lower}, or train shorter (keep_best keeps the best state)"
    losses = [line["loss"] for line in lines if "loss" in line]
    count = steps_of_mean(len(losses))
    if len(losses) > 3 and min(losses[-count:]) > ROSE * losses[0]:
        rise = _course([losses[0], mean_ends(losses, count)[-1]])
        return f"{job.name}: the loss rose, {rise} (mean of the last {count} steps); {lower}"
    return None


def _course(values: Sequence[float]) -> str:
    return f"{values[0]:.4f} -> {values[-1]:.4f}"
