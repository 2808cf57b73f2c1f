"""Two jobs on one base end where each of them ends alone, bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from real.common import NoWatch, examples, job_config, lora, plan
from snugtune.model.base import Base
from snugtune.training.examples import JobData
from snugtune.training.job import Job, start_job
from snugtune.training.trainer import Trainer

pytestmark = pytest.mark.real

Rows = Sequence[tuple[Tensor, Tensor]]
Ended = tuple[list[tuple[float | None, float | None]], dict[str, Tensor]]
"""(loss, gradient norm) of every step, and the adapter."""

STEPS = 3
JOBS = {
    "wide": {"method": {"type": "lora", "r": 8}, "batch_size": 3, "optimizer": {"lr": 1e-3}, "seed": 1, "max_seq_len": 64},
    "narrow": {
        "method": {"type": "lora", "r": 3, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "batch_size": 2,
        "optimizer": {"lr": 3e-3},
        "seed": 2,
        "max_seq_len": 48,
    },
}


@contextmanager
def started(base: Base, rows: Rows, names: Sequence[str], fused_tokens: int) -> Iterator[tuple[Trainer, list[Job]]]:
    trainer, jobs = Trainer(base, replace(plan(), fused_tokens=fused_tokens), NoWatch()), []
    parts = {"wide": rows[:7], "narrow": rows[7:]}
    try:
        for name in names:
            jobs.append(start_job(base, job_config(name=name, steps=STEPS, **JOBS[name]), JobData(examples(parts[name])), plan()))
            trainer.add(jobs[-1])
        yield trainer, jobs
    finally:
        for job in jobs:
            job.attached.detach()


def ended(base: Base, rows: Rows, names: Sequence[str], fused_tokens: int = 0) -> dict[str, Ended]:
    """Train the named jobs together for all their steps."""
    history: dict[str, list[tuple[float | None, float | None]]] = {name: [] for name in names}
    with started(base, rows, names, fused_tokens) as (trainer, jobs):
        while steps := trainer.step():
            for metrics in steps:
                history[metrics.job].append((metrics.loss, metrics.grad_norm))
        return {j.name: (history[j.name], {k: v.clone() for k, v in lora(j).tensors().items()}) for j in jobs}


@pytest.fixture(scope="module")
def alone(base: Base, rows: Rows) -> dict[str, Ended]:
    return ended(base, rows, ["wide"]) | ended(base, rows, ["narrow"])


@pytest.mark.parametrize(("order", "fused_tokens"), [(("wide", "narrow"), 0), (("narrow", "wide"), 4096)])
def test_joint_equals_alone(order: tuple[str, ...], fused_tokens: int, base: Base, rows: Rows, alone: dict[str, Ended]) -> None:
    """Interleaved (0), and sharing each forward (4096)."""
    together = ended(base, rows, order, fused_tokens)
    for name in JOBS:
        history, adapter = together[name]
        assert history == alone[name][0]
        assert adapter.keys() == alone[name][1].keys()
        assert [k for k in adapter if not torch.equal(adapter[k], alone[name][1][k])] == []
        assert all(bool(v.any()) for v in adapter.values()), "a factor that is still zero was not trained"
