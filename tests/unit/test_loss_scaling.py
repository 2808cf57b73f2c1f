"""Loss scaling, which fp16 needs on CUDA: torch's scaler works on CPU too, so the trainer's use of it is tested here."""

import pytest
import torch

from conftest import sequences, tiny_base
from snugtune.config import JobConfig
from snugtune.model.base import Base
from snugtune.training.examples import JobData
from snugtune.training.job import Job, start_job
from snugtune.training.trainer import Trainer
from snugtune.types import Example, Plan


class _NoWatch:
    def peak(self) -> int:
        return 0


def _trainer(base: Base, scaler: torch.amp.GradScaler | None) -> tuple[Trainer, Job]:
    plan = Plan("cpu", "fp32", 1, "none", 512, 1, "fp32")
    data = JobData(tuple(Example(ids, torch.ones(len(ids)).index_fill(0, torch.tensor(0), 0.0), "x") for ids in sequences(9, 14)))
    fields = {"data": "invented.jsonl", "batch_size": 2, "steps": 6, "max_seq_len": 16, "optimizer": {"lr": 1e-2}}
    trainer, job = Trainer(base, plan, _NoWatch()), start_job(base, JobConfig.model_validate(fields), data, plan)
    job.scaler = scaler
    trainer.add(job)
    return trainer, job


def _enlarge(job: Job) -> None:
    """Make the gradients a thousand times larger, so that they overflow under a large scale."""
    job.attached.parameters()[0].data.mul_(1000.0)


def _losses_and_norms(scaler: torch.amp.GradScaler | None) -> list[tuple[float | None, float | None]]:
    trainer, _ = _trainer(tiny_base(), scaler)
    return [(m.loss, m.grad_norm) for _ in range(6) for m in trainer.step()]


def test_scaling_changes_nothing_but_the_range() -> None:
    """By a power of two, so to the last bit: reported losses, clipped norms and updates are those without scaling."""
    assert _losses_and_norms(torch.amp.GradScaler("cpu", init_scale=2.0**10)) == _losses_and_norms(None)


def test_an_overflow_is_skipped_and_the_scale_comes_down() -> None:
    """fp32 overflows too when the scale is large enough; the weights stay, the step is reported as skipped."""
    trainer, job = _trainer(tiny_base(), torch.amp.GradScaler("cpu", init_scale=2.0**127))
    _enlarge(job)
    before = {k: v.clone() for k, v in job.attached.state().items()}
    (metrics,) = trainer.step()
    assert metrics.skipped and metrics.grad_norm is None
    assert all(torch.equal(v, before[k]) for k, v in job.attached.state().items())
    assert job.scaler is not None and job.scaler.get_scale() == 2.0**126
    assert job.failure is None


def test_the_scale_survives_a_checkpoint() -> None:
    base = tiny_base()
    trainer, job = _trainer(base, torch.amp.GradScaler("cpu", init_scale=2.0**127))
    _enlarge(job)
    trainer.step()
    tensors, numbers = job.state()
    saved = {k: v.clone() for k, v in tensors.items()}
    trainer.remove(job.name)
    _, again = _trainer(base, torch.amp.GradScaler("cpu"))
    again.load_state(saved, numbers)
    assert again.scaler is not None and again.scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")], ids=["plain", "scaled"])
def test_a_job_without_finite_gradients_is_given_up(scaler: torch.amp.GradScaler | None) -> None:
    """After ten skips in a row, and not before; it takes no more steps."""
    trainer, job = _trainer(tiny_base(), scaler)
    job.total = 100
    job.attached.parameters()[0].data.fill_(float("nan"))
    for done in range(10):
        assert job.failure is None and job.step == done
        trainer.step()
    assert job.failure is not None and "'default'" in job.failure and "optimizer.lr" in job.failure
    assert job.ended and trainer.step() == []
