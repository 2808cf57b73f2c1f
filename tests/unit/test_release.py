"""Gradients that are released: each weight steps in backward, to the bits of one step after it; and what cannot be taken back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import NoWatch, sequences, tiny_base
from snugtune.config import JobConfig, to_config
from snugtune.errors import InputError, OutOfMemoryError, UnreadableError
from snugtune.live.config import LiveJobConfig
from snugtune.memory.plan import check_job, make_plan
from snugtune.methods.full import FullAttached
from snugtune.model.base import Base
from snugtune.training.examples import JobData
from snugtune.training.job import Job, start_job
from snugtune.training.metrics import StepMetrics
from snugtune.training.trainer import Trainer
from snugtune.types import Example, Gradients, Plan

FULL: dict[str, Any] = {"method": "full"}
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "untied": ("llama", torch.float32, FULL),
    "untied, bf16, decay": ("llama", torch.bfloat16, FULL | {"optimizer": {"lr": 1e-2, "weight_decay": 0.1}}),
    "tied": ("gpt2", torch.float32, FULL),
    "tied, bf16": ("gemma2", torch.bfloat16, FULL),
    "experts that get nothing": ("qwen3moe", torch.float32, FULL | {"optimizer": {"lr": 1e-2, "weight_decay": 0.1}}),
    "the model's own head": ("modernbert", torch.float32, FULL),
    "head alone": ("llama", torch.float32, {"method": {"type": "freeze", "head": True}}),
    "last block": ("llama", torch.bfloat16, {"method": {"type": "freeze", "last_blocks": 1}}),
    "sgd": ("llama", torch.float32, FULL | {"optimizer": {"type": "sgd", "lr": 0.1}}),
    "lion": ("gpt2", torch.bfloat16, FULL | {"optimizer": {"type": "lion", "lr": 1e-3}}),
    "adafactor": ("llama", torch.float32, FULL | {"optimizer": {"type": "adafactor"}}),
    "galore": ("gpt2", torch.bfloat16, FULL | {"optimizer": {"type": "galore", "rank": 4, "update_every": 2}}),
    "apollo": ("llama", torch.float32, FULL | {"optimizer": {"type": "apollo", "rank": 4, "update_every": 2}}),
}


def started(gradients: Gradients, arch: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[Trainer, Job]:
    plan = Plan("cpu", "fp32" if dtype == torch.float32 else "bf16", 2, "none", 16, 1, "fp32", gradients=gradients)
    return started_by(plan, tiny_base(arch, dtype), **fields)


def started_by(plan: Plan, base: Base, **fields: Any) -> tuple[Trainer, Job]:
    parts = sequences(9, 14, 5, 16, seed=1)
    data = tuple(Example(ids, torch.ones(len(ids)).index_fill(0, torch.tensor(0), 0.0), "x:1") for ids in parts)
    plain = {"data": "x", "batch_size": 2, "steps": 4, "max_seq_len": 16, "optimizer": {"lr": 1e-2}, "max_grad_norm": None}
    config = JobConfig.model_validate(plain | FULL | {"schedule": "linear"} | fields)
    job = start_job(base, config, JobData(data), plan)
    trainer = Trainer(base, plan, NoWatch())
    trainer.add(job)
    return trainer, job


def steps(trainer: Trainer, count: int = 3) -> list[tuple[float | None, float | None, bool]]:
    return [(m.loss, m.grad_norm, m.skipped) for _ in range(count) for m in trainer.step()]


def equal(a: Job, b: Job) -> bool:
    """Weights and what the optimizers remember."""
    first, second = a.tensors(), b.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("recompute", ["none", "blocks"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_in_backward_has_the_bits_of_one_after_it(case: str, recompute: Any) -> None:
    """Weights, masters, optimizer state, losses and norms."""
    arch, dtype, fields = CASES[case]
    ends = []
    for gradients in ("kept", "released"):
        plan = Plan("cpu", "fp32", 2, recompute, 16, 1, "fp32", gradients=gradients)
        base = tiny_base(arch, dtype)
        trainer, job = started_by(plan, base, **fields)
        ends.append((steps(trainer), job, dict(base.model.named_parameters())))
    (kept, a, weights), (released, b, others) = ends
    assert kept == released and len(kept) == 3 and kept[0] != kept[2]
    assert equal(a, b)
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_8_bit_state_too() -> None:
    ends = []
    for gradients in ("kept", "released"):
        plan = Plan("cpu", "fp32", 2, "none", 16, 1, "fp32", optimizer_state="8bit", gradients=gradients)
        trainer, job = started_by(plan, tiny_base())
        ends.append((steps(trainer), job))
    assert ends[0][0] == ends[1][0] and equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize(("arch", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)])
def test_there_is_one_gradient_at_a_time(arch: str, dtype: torch.dtype) -> None:
    """Whenever a weight steps no other has a gradient, on the base or on its masters; of tied ends a part may wait."""
    trainer, job = started("released", arch, dtype)
    seen: list[int] = []

    def look(*_: object) -> None:
        weights = {id(p): p for p in (*job.attached.parameters(), *trainer.base.model.parameters())}
        seen.append(sum(p.grad is not None for p in weights.values()))

    job.optimizer.register_step_pre_hook(look)
    steps(trainer, 2)
    assert len(seen) == 2 * len(job.attached.parameters()) and set(seen) == {1}
    look()
    assert seen[-1] == 0
    assert isinstance(job.attached, FullAttached) and job.attached.released is not None and not job.attached.released.held


def poisoned(trainer: Trainer, name: str, wrong: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Do something to the gradient of what a module gives; returns what ends that."""

    def spoil(module: object, inputs: object, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(wrong)

    return trainer.base.model.get_submodule(name).register_forward_hook(spoil).remove


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_loss_that_is_not_finite_skips_the_whole_step(arch: str) -> None:
    """As it does with gradients kept: nothing has stepped when the first gradient shows it."""
    ends = []
    for gradients in ("kept", "released"):
        trainer, job = started(gradients, arch)
        first = steps(trainer, 1)
        own = job.objective
        job.objective = _NotANumber(own)
        before = {k: v.clone() for k, v in job.tensors().items()}
        skipped = steps(trainer, 1)
        after = job.tensors()
        assert skipped == [(None, None, True)] and all(torch.equal(v, before[k]) for k, v in after.items())
        assert job.failure is None and job.skipped_in_a_row == 1
        job.objective = own
        ends.append((first, steps(trainer, 1), job))
    assert ends[0][:2] == ends[1][:2] and equal(ends[0][2], ends[1][2])


class _NotANumber:
    def __init__(self, own: Any):
        self.size = own.size
        self.own = own

    def loss(self, *inputs: Any) -> Tensor:
        return self.own.loss(*inputs) * float("nan")


def test_a_gradient_that_stops_being_finite_on_its_way_ends_the_job() -> None:
    """Blocks above have stepped. With gradients kept the step is skipped; here the job says that it cannot be."""
    for gradients in ("kept", "released"):
        trainer, job = started(gradients)
        poisoned(trainer, "model.layers.0.mlp.down_proj", lambda g: g * float("inf"))
        (metrics,) = trainer.step()
        assert metrics.skipped and metrics.grad_norm is None
        if gradients == "kept":
            assert job.failure is None
        else:
            assert job.failure is not None and job.diverged and job.ended
            assert "plan.gradients: kept" in job.failure
            assert trainer.step() == []


def _no_memory(gradient: Tensor) -> Tensor:
    raise MemoryError


def _no_disk(gradient: Tensor) -> Tensor:
    raise UnreadableError("the disk is gone")


@pytest.mark.parametrize(("broken", "told"), [(_no_memory, OutOfMemoryError), (_no_disk, UnreadableError)])
def test_what_breaks_off_half_a_step_ends_the_job(broken: Callable[[Tensor], Tensor], told: type[Exception]) -> None:
    trainer, job = started("released")
    poisoned(trainer, "model.layers.0.mlp.down_proj", broken)
    with pytest.raises(told):
        trainer.step()
    assert job.failure is not None and "broken off in the middle of its optimizer step" in job.failure


def test_what_breaks_off_before_the_first_weight_steps_is_made_anew() -> None:
    """The tied head's gradient waits for the embedding's then."""
    truth, a = started("kept", "gpt2")
    trainer, b = started("released", "gpt2")
    undo = poisoned(trainer, "transformer.ln_f", _no_disk)
    with pytest.raises(UnreadableError):
        trainer.step()
    undo()
    assert b.failure is None
    assert steps(trainer) == steps(truth) and equal(a, b)


def test_a_step_of_several_forwards_is_given_up() -> None:
    """The plan never makes one; whoever cuts a step smaller must know."""
    plan = Plan("cpu", "fp32", 1, "none", 16, 1, "fp32", gradients="released")
    trainer, job = started_by(plan, tiny_base())
    assert trainer.step() == []
    assert job.failure is not None and "needs a step to be one forward" in job.failure


def test_a_second_gradient_of_a_step_is_refused() -> None:
    trainer, job = started("released")
    with pytest.raises(RuntimeError, match="came after its step"):
        trainer.forward_backward({job.name: [*job.chunks(), *job.chunks()]})


def fields(**more: Any) -> dict[str, Any]:
    plain = {"model": "m", "data": "d", "output": "o", "device": "cpu", "method": "full", "max_grad_norm": None, "batch_size": 12}
    return plain | {"max_seq_len": 256, "plan": {"gradients": "released", **more.pop("plan", {})}} | more


def test_the_plan_makes_a_step_one_forward() -> None:
    planned = make_plan(to_config(fields()))
    assert planned.plan.gradients == "released" and planned.plan.micro_batch == 12
    assert "each weight steps in backward, no gradients are kept" in planned.reasons
    assert make_plan(to_config(fields(batch_size=2))).plan.micro_batch == 4
    for wanted in ("auto", "kept"):
        plan = make_plan(to_config(fields(plan={"gradients": wanted}))).plan
        assert plan.gradients == "kept" and plan.micro_batch == 4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"method": "lora"}, "for methods that train the base itself"),
        ({"max_grad_norm": 1.0}, "set max_grad_norm: null"),
        ({"plan": {"micro_batch": 5}}, "set plan.micro_batch: 12, or batch_size: 5"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"plan.gradients: released .*{words}"):
        make_plan(to_config(fields(**wrong)))


def test_jobs_driven_by_hand_and_scaled_losses_are_refused() -> None:
    hand = LiveJobConfig.model_validate({"method": "full", "max_grad_norm": None})
    plan = Plan("cpu", "fp32", 16, "none", 16, 1, "fp32", gradients="released")
    with pytest.raises(InputError, match="cannot be driven by hand"):
        check_job(hand, plan)
    scaled = Plan("cuda", "fp16", 16, "none", 16, 1, "fp16", gradients="released")
    with pytest.raises(InputError, match="cannot be with fp16"):
        check_job(hand, scaled)


def test_sequences_that_cannot_share_a_forward_go_one_by_one() -> None:
    plan = Plan("cpu", "fp32", 2, "none", 16, 1, "fp32", gradients="released")
    with pytest.raises(InputError, match="sequences of 'tiny-bloom' cannot share one; set batch_size: 1"):
        started_by(plan, tiny_base("bloom"))
    trainer, _ = started_by(plan, tiny_base("bloom"), batch_size=1)
    assert all(isinstance(m, StepMetrics) for m in trainer.step())
