"""Loss scaling, which fp16 needs on CUDA: torch's scaler works on CPU too, so the trainer's use of it is tested here."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from conftest import NoWatch, sequences, tiny_base
from snugtune.config import JobConfig
from snugtune.errors import UnreadableError
from snugtune.model.base import Base
from snugtune.training.examples import JobData
from snugtune.training.job import Job, start_job
from snugtune.training.metrics import StepMetrics
from snugtune.training.trainer import Trainer
from snugtune.types import Example, OptimizerState, Plan


def _job(base: Base, plan: Plan, name: str = "default", **fields: Any) -> Job:
    data = JobData(tuple(Example(ids, torch.ones(len(ids)).index_fill(0, torch.tensor(0), 0.0), "x") for ids in sequences(9, 14)))
    plain = {"name": name, "data": "invented.jsonl", "batch_size": 2, "steps": 6, "max_seq_len": 16, "optimizer": {"lr": 1e-2}}
    return start_job(base, JobConfig.model_validate(plain | fields), data, plan)


def _trainer(base: Base, scaler: torch.amp.GradScaler | None, **fields: Any) -> tuple[Trainer, Job]:
    plan = Plan("cpu", "fp32", 1, "none", 512, 1, "fp32")
    trainer, job = Trainer(base, plan, NoWatch()), _job(base, plan, **fields)
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


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", init_scale=1.0)], ids=["plain", "scaled"])
@pytest.mark.parametrize("limit", [1.0, None])
def test_a_norm_that_overflows_is_a_step_that_is_skipped(scaler: torch.amp.GradScaler | None, limit: float | None) -> None:
    """Although each gradient is finite: divided by that norm they would be zeros, or no numbers."""
    trainer, job = _trainer(tiny_base(), scaler, max_grad_norm=limit)
    trainer.step()
    before = {k: v.clone() for k, v in job.state()[0].items()}
    (weight,) = job.attached.parameters()
    job.attached.zero_grad()
    assert weight.grad is not None
    weight.grad.fill_(1e30)
    assert not math.isfinite(trainer.optim_step(["default"])["default"])
    assert all(torch.equal(v, before[k]) for k, v in job.state()[0].items()) and job.skipped_in_a_row == 1


def _two(settings: dict[str, dict[str, Any]], fused: int, state: OptimizerState) -> Trainer:
    """Jobs on one base, each with a scaler of its own; `fused`: tokens of the batches they share."""
    base = tiny_base()
    plan = Plan("cpu", "fp32", 1, "none", 512, 1, "fp32", optimizer_state=state, fused_tokens=fused)
    trainer = Trainer(base, plan, NoWatch())
    for name, how in settings.items():
        job = _job(base, plan, name=name, optimizer={"lr": 1e-2})
        job.scaler = torch.amp.GradScaler("cpu", **how)
        trainer.add(job)
    return trainer


_CALM = {"init_scale": 2.0**8, "growth_interval": 3}
_WILD = {"init_scale": 2.0**127}


@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize("fused", [0, 1000])
def test_another_jobs_overflow_is_its_own(fused: int, state: OptimizerState) -> None:
    """Its steps are skipped and its scale comes down; this one's steps, scale and growth are those of the job alone."""
    alone, both = _two({"calm": _CALM}, fused, state), _two({"wild": _WILD, "calm": _CALM}, fused, state)
    _enlarge(both.jobs["wild"])
    for _ in range(5):
        (truth,) = alone.step()
        wild, ours = both.step() if fused else [*both.step(), *both.step()]
        assert wild.skipped and not ours.skipped
        assert (ours.loss, ours.grad_norm, ours.lr) == (truth.loss, truth.grad_norm, truth.lr)
    (ours, our_numbers), (truth, true_numbers) = both.jobs["calm"].state(), alone.jobs["calm"].state()
    assert ours.keys() == truth.keys() and all(torch.equal(ours[k], truth[k]) for k in truth)
    assert our_numbers["scaler"] == true_numbers["scaler"]
    assert our_numbers["scaler"]["scale"] == 2.0**9 and our_numbers["scaler"]["_growth_tracker"] == 2
    assert both.jobs["wild"].state()[1]["scaler"]["scale"] == 2.0**122
    assert both.jobs["wild"].skipped_in_a_row == 5 and both.jobs["calm"].skipped_in_a_row == 0


@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_a_restored_job_scales_on_as_it_would_have(state: OptimizerState) -> None:
    """Through the text of a checkpoint, in the middle of the steps after which the scale grows."""
    whole = _two({"a": _CALM}, 0, state)
    for _ in range(2):
        whole.step()
    tensors, numbers = whole.jobs["a"].state()
    saved, told = {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(numbers))
    again = _two({"a": {"growth_interval": 3}}, 0, state)  # another scale to begin with
    again.jobs["a"].load_state(saved, told)
    for _ in range(3):
        assert [(m.loss, m.grad_norm) for m in whole.step()] == [(m.loss, m.grad_norm) for m in again.step()]
    (ours, our_numbers), (truth, true_numbers) = again.jobs["a"].state(), whole.jobs["a"].state()
    assert all(torch.equal(ours[k], truth[k]) for k in truth)
    assert our_numbers["scaler"] == true_numbers["scaler"] and true_numbers["scaler"]["scale"] == 2.0**9


def _once(error: BaseException, right: Callable[..., Any], after: bool) -> Callable[..., Any]:
    """Raises the first time; `after`: when that has done its work."""
    left = [error]

    def either(*given: Any) -> Any:
        done = right(*given) if after or not left else None
        if left:
            raise left.pop()
        return done

    return either


def _end(trainer: Trainer, until: type[BaseException] | None = None) -> list[tuple[str, int, float | None, float | None]]:
    """What is reported of all steps to the end, or `until` one breaks off; the others' too that were done by then."""
    found = list[StepMetrics]()
    with nullcontext() if until is None else pytest.raises(until):
        while steps := trainer.step():
            found += steps
    return sorted((m.job, m.step, m.loss, m.grad_norm) for m in found)


def _saved(trainer: Trainer) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    return {n: ({k: v.clone() for k, v in job.tensors().items()}, job.numbers()) for n, job in trainer.jobs.items()}


def _assert_same(trainer: Trainer, truth: Trainer) -> None:
    for name, (true, true_numbers) in _saved(truth).items():
        job = trainer.jobs[name]
        assert job.failure is None and job.tensors().keys() == true.keys()
        assert all(torch.equal(v, true[k]) for k, v in job.tensors().items())
        assert {k: v for k, v in job.numbers().items() if k != "served"} == {
            k: v for k, v in true_numbers.items() if k != "served"
        }


@pytest.mark.parametrize("fused", [0, 1000], ids=["interleaved", "fused"])
@pytest.mark.parametrize("after", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), UnreadableError("the disk is gone")], ids=["Ctrl-C", "disk"])
def test_a_step_that_is_broken_off_at_its_unscaling_did_not_happen(error: BaseException, after: bool, fused: int) -> None:
    """It is done again, to the bit; and from what is saved then, it is too."""
    settings = {"a": _CALM, "b": _CALM}
    truth, trainer, again = (_two(settings, fused, "fp32") for _ in range(3))
    for _ in range(2):
        truth.step()
        trainer.step()
    job = trainer.jobs["a"]
    assert job.scaler is not None
    job.scaler.unscale_ = _once(error, job.scaler.unscale_, after)
    broken = _end(trainer, until=type(error))
    for name, state in _saved(trainer).items():
        again.jobs[name].load_state(*state)
    assert sorted(broken + _end(trainer)) == _end(truth)
    _end(again)
    _assert_same(trainer, truth)
    _assert_same(again, truth)


def test_a_job_that_was_broken_off_in_its_optimizer_scales_on_from_its_saved_state() -> None:
    truth, trainer = _two({"a": _CALM}, 0, "fp32"), _two({"a": _CALM}, 0, "fp32")
    trainer.step()
    job, saved = trainer.jobs["a"], _saved(trainer)
    job.optimizer.step = _once(KeyboardInterrupt(), job.optimizer.step, after=True)
    with pytest.raises(KeyboardInterrupt):
        trainer.step()
    del job.optimizer.step
    assert job.failure is not None
    job.load_state(*saved["a"])
    _end(trainer)
    _end(truth)
    _assert_same(trainer, truth)


def test_nobody_steps_on_a_gradient_that_was_unscaled_before() -> None:
    """By hand: it is refused until there is a new one."""
    trainer, job = _trainer(tiny_base(), torch.amp.GradScaler("cpu", init_scale=2.0**8))
    truth, _ = _trainer(tiny_base(), torch.amp.GradScaler("cpu", init_scale=2.0**8))
    assert job.scaler is not None
    job.scaler.unscale_ = _once(KeyboardInterrupt(), job.scaler.unscale_, after=True)
    trainer.forward_backward({"default": job.chunks()})
    with pytest.raises(KeyboardInterrupt):
        trainer.optim_step(["default"])
    with pytest.raises(RuntimeError, match="already been called"):
        trainer.optim_step(["default"])
    job.attached.zero_grad()
    for each in (trainer, truth):
        each.forward_backward({"default": job.chunks()})
    assert trainer.optim_step(["default"]) == truth.optim_step(["default"])
    _assert_same(trainer, truth)


def test_jobs_in_fp16_each_have_their_own_scaler() -> None:
    """As `start_job` makes them on a GPU; fp16 is refused on CPU before that."""
    base = tiny_base()
    plans = [Plan("cpu", "fp32", 1, "none", 512, 1, compute) for compute in ("fp16", "fp32")]
    scaled, other, plain = (_job(base, plan, name) for plan, name in zip((plans[0], *plans), "abc", strict=True))
    assert scaled.scaler is not None and other.scaler is not None and scaled.scaler is not other.scaler
    assert plain.scaler is None


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
