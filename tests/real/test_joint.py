"""Three jobs on one real base end where each of them ends alone, bit for bit."""

import functools
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
    return functools.cache(lambda weights: base if weights == "fp32" else load_base(demo, plan(weights)))


@pytest.fixture(scope="module")
def alone(loaded: Callable[[Width], Base], rows: Rows) -> Callable[[Width], dict[str, Ended]]:
    """How each job ends on a base that it has for itself."""
    return functools.cache(lambda weights: {n: ended(loaded(weights), plan(weights), rows, [n])[n] for n in JOBS})


@pytest.mark.parametrize("fused", [0, FUSED], ids=["interleaved", "fused"])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "nf4"])
def test_joint_equals_alone(
    weights: Width, fused: int, loaded: Callable[[Width], Base], alone: Callable[[Width], dict[str, Ended]], rows: Rows
) -> None:
    """In turns, and sharing each forward: in fp32 rows are independent wherever we claim to train, in bf16 it depends."""
    base, names = loaded(weights), list(JOBS)
    if fused and not base.rows_are_independent(fused):
        assert weights != "fp32", "rows of an fp32 product are not independent here"
        pytest.skip("this machine's bf16 products change a row's bits by its neighbours; a run takes turns here")
    truth = alone(weights)
    together = ended(base, replace(plan(weights), fused_tokens=fused), rows, names if fused else names[::-1])
    for name in names:
        history, adapter = together[name]
        assert len(history) == STEPS and history == truth[name][0]
        assert adapter.keys() == truth[name][1].keys()
        assert [k for k in adapter if not torch.equal(adapter[k], truth[name][1][k])] == []
        assert all(bool(v.any()) for v in adapter.values()), "a factor that is still zero was not trained"
