"""Three jobs on one real base end where each of them ends alone, bit for bit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from real.common import NoWatch, examples, job_config, lora, plan
from snugtune.model.base import Base, load_base
from snugtune.model.source import ModelSource
from snugtune.training.examples import JobData
from snugtune.training.job import Job, start_job
from snugtune.training.trainer import Trainer
from snugtune.types import Plan, Width

pytestmark = pytest.mark.real

Rows = Sequence[tuple[Tensor, Tensor]]
Ended = tuple[list[tuple[float | None, float | None]], dict[str, Tensor]]
"""(loss, gradient norm) of every step, and the adapter."""

STEPS = 2
FUSED = 128
JOBS = {
    "wide": {"method": {"type": "lora", "r": 8}, "batch_size": 2, "optimizer": {"lr": 1e-3}, "seed": 1, "max_seq_len": 64},
    "narrow": {
        "method": {"type": "lora", "r": 3, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "batch_size": 2,
        "optimizer": {"lr": 3e-3},
        "seed": 2,
        "max_seq_len": 48,
    },
    "short": {
        "method": {"type": "lora", "r": 16, "target_modules": ["o_proj", "up_proj"]},
        "batch_size": 1,
        "optimizer": {"type": "lion", "lr": 3e-4},
        "seed": 3,
        "max_seq_len": 40,
        "neftune_noise_alpha": 5.0,
    },
}


def data_of(name: str, rows: Rows) -> JobData:
    """Its own conversations; those of "short" are the last 11 tokens, fewer than a matrix product should have."""
    parts = {"wide": rows[:6], "narrow": rows[6:11], "short": [(ids[-11:], labels[-11:]) for ids, labels in rows[11:]]}
    return JobData(examples(parts[name]))


@contextmanager
def started(base: Base, use: Plan, rows: Rows, names: Sequence[str]) -> Iterator[tuple[Trainer, list[Job]]]:
    trainer, jobs = Trainer(base, use, NoWatch()), list[Job]()
    try:
        for name in names:
            jobs.append(start_job(base, job_config(name=name, steps=STEPS, **JOBS[name]), data_of(name, rows), use))
            trainer.add(jobs[-1])
        yield trainer, jobs
    finally:
        for name in list(trainer.jobs):
            trainer.remove(name)


def ended(base: Base, use: Plan, rows: Rows, names: Sequence[str]) -> dict[str, Ended]:
    """Train the named jobs together for all their steps."""
    history: dict[str, list[tuple[float | None, float | None]]] = {name: [] for name in names}
    with started(base, use, rows, names) as (trainer, jobs):
        while steps := trainer.step():
            for metrics in steps:
                history[metrics.job].append((metrics.loss, metrics.grad_norm))
        return {j.name: (history[j.name], {k: v.clone() for k, v in lora(j).tensors().items()}) for j in jobs}


@pytest.fixture(scope="module")
def loaded(demo: ModelSource, base: Base) -> Callable[[Width], Base]:
    """The base in a format; the fp32 one is that of the session."""
    return lambda weights: base if weights == "fp32" else load_base(demo, plan(weights))


@pytest.mark.parametrize(
    ("weights", "names"),
    [("fp32", ("wide", "narrow", "short")), ("bf16", ("wide", "narrow", "short")), ("nf4", ("narrow", "short"))],
)
def test_joint_equals_alone(weights: Width, names: Sequence[str], loaded: Callable[[Width], Base], rows: Rows) -> None:
    """Interleaved, and sharing each forward where this machine's products let rows be (else a run would take turns, too)."""
    base, use = loaded(weights), plan(weights)
    alone = {name: end for name in names for name, end in ended(base, use, rows, [name]).items()}
    fused = [FUSED] if base.rows_are_independent(FUSED) else []
    for capacity in [0, *fused]:
        order = names if capacity else tuple(reversed(names))
        together = ended(base, replace(use, fused_tokens=capacity), rows, order)
        for name in names:
            history, adapter = together[name]
            assert len(history) == STEPS and history == alone[name][0]
            assert adapter.keys() == alone[name][1].keys()
            assert [k for k in adapter if not torch.equal(adapter[k], alone[name][1][k])] == []
            assert all(bool(v.any()) for v in adapter.values()), "a factor that is still zero was not trained"
