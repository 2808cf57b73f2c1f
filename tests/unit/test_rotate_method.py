"""Blocks that train in turns: who trains when, what is there of the others, the bits of plain steps, and going on anywhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import NoWatch, sequences, tiny_base
from snugtune.config import JobConfig
from snugtune.errors import InputError
from snugtune.methods.freeze import Freeze, FreezeConfig
from snugtune.methods.full import FullAttached
from snugtune.methods.rotate import Rotate, RotateConfig, turn_at
from snugtune.model.base import Base
from snugtune.training.examples import JobData
from snugtune.training.job import Job, start_job
from snugtune.training.trainer import Trainer
from snugtune.types import Example, Gradients, Plan

DEPTH = 4
ENDS = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def base_of(dtype: torch.dtype = torch.float32, arch: str = "llama") -> Base:
    return tiny_base(arch, dtype, num_hidden_layers=DEPTH)


def started(base: Base, gradients: Gradients = "kept", **fields: Any) -> tuple[Trainer, Job]:
    plan = Plan("cpu", "fp32", 2, "none", 16, 1, "fp32", gradients=gradients)
    parts = sequences(9, 14, 5, 16, seed=1)
    data = tuple(Example(ids, torch.ones(len(ids)).index_fill(0, torch.tensor(0), 0.0), "x:1") for ids in parts)
    plain = {"data": "x", "batch_size": 2, "steps": 9, "max_seq_len": 16, "optimizer": {"lr": 1e-2}, "max_grad_norm": None}
    config = JobConfig.model_validate(plain | {"method": {"type": "rotate", "every": 2}} | fields)
    job = start_job(base, config, JobData(data), plan)
    trainer = Trainer(base, plan, NoWatch())
    trainer.add(job)
    return trainer, job


def weights(base: Base) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in base.model.named_parameters()}


def moved(before: dict[str, Tensor], base: Base) -> set[str]:
    return {name for name, weight in base.model.named_parameters() if not torch.equal(weight, before[name])}


def in_blocks(base: Base, *blocks: int) -> set[str]:
    return {name for name, _ in base.model.named_parameters() if any(f".layers.{block}." in name for block in blocks)}


# --- whose turn it is -------------------------------------------------------------------------------------------------


def test_turns_in_order() -> None:
    up, down = RotateConfig(order="ascending", every=3, blocks=2), RotateConfig(order="descending", every=1)
    assert [turn_at(up, 5, 0, step) for step in range(12)] == [(0, 1)] * 3 + [(2, 3)] * 3 + [(4,)] * 3 + [(0, 1)] * 3
    assert [turn_at(down, 3, 0, step) for step in range(4)] == [(2,), (1,), (0,), (2,)]


def test_random_turns_are_a_function_of_the_seed() -> None:
    """Each pass takes every block once; the global generator is neither read nor moved."""
    config, before = RotateConfig(every=2), torch.get_rng_state()
    turns = [turn_at(config, 6, 7, step) for step in range(24)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert turns == [turn_at(config, 6, 7, step) for step in range(24)] != [turn_at(config, 6, 8, step) for step in range(24)]
    assert turns[::2] == turns[1::2]
    assert sorted(turns[:12:2]) == sorted(turns[12::2]) == [(block,) for block in range(6)]
    assert turns[:12] != turns[12:]


@pytest.mark.parametrize("ends", [False, True], ids=["blocks alone", "with the ends"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_whose_turn_it_is_moves_and_nothing_else(dtype: torch.dtype, ends: bool) -> None:
    """And has masters, gradients and optimizer state; no gradient is made for the others."""
    base = base_of(dtype)
    trainer, job = started(base, method={"type": "rotate", "every": 2, "blocks": 2, "order": "descending", "ends": ends})
    for blocks in ((2, 3), (2, 3), (0, 1), (0, 1), (2, 3)):
        before = weights(base)
        trainer.step()
        names = in_blocks(base, *blocks) | (ENDS if ends else set())
        assert moved(before, base) == names
        assert isinstance(job.attached, FullAttached)
        assert job.attached.masters.keys() == names
        assert {n for n, p in base.model.named_parameters() if p.requires_grad} == names
        assert len(job.optimizer.state) == len(job.optimizer.param_groups[0]["params"]) == len(names)
        assert all(p.grad is None for n, p in base.model.named_parameters() if n not in names)


def test_a_turn_is_partial_training_of_its_blocks() -> None:
    """Bit for bit, with an optimizer that begins anew: two turns against two runs of `freeze` after one another."""
    rotated, frozen = base_of(), base_of()
    trainer, job = started(rotated, method={"type": "rotate", "every": 2, "order": "ascending"}, schedule="constant")
    for _ in range(4):
        trainer.step()
    truth = None
    for name in ("*layers.0.*", "*layers.1.*"):
        part, own = started(frozen, method={"type": "freeze", "names": [name]}, schedule="constant")
        own.step = 0 if truth is None else 2
        for _ in range(2):
            part.step()
        truth = part.remove("default")
    assert weights(rotated).keys() == weights(frozen).keys()
    assert not moved(weights(rotated), frozen) and job.step == 4


def test_the_ends_keep_what_the_optimizer_remembers() -> None:
    trainer, job = started(base_of(), method={"type": "rotate", "every": 1, "ends": True})
    for _ in range(3):
        trainer.step()
    counts = {name: int(job.optimizer.state[w]["step"]) for name, w in zip(_names(job), job.attached.parameters(), strict=True)}
    assert {count for name, count in counts.items() if name in ENDS} == {3}
    assert {count for name, count in counts.items() if name not in ENDS} == {1}


def _names(job: Job) -> list[str]:
    assert isinstance(job.attached, FullAttached)
    return list(job.attached.masters)


# --- going on, results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", ["kept", "released"])
@pytest.mark.parametrize("optimizer", ["adamw", "apollo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_it_goes_on_bit_for_bit(at: int, dtype: torch.dtype, optimizer: str, gradients: Gradients) -> None:
    """From before the first step, the middle of a turn, its end, and the next one's middle."""
    fields: dict[str, Any] = {"optimizer": {"type": optimizer, "lr": 1e-2}, "seed": 5}
    fields["optimizer"] |= {} if optimizer == "adamw" else {"rank": 4}
    fields["method"] = {"type": "rotate", "every": 2, "blocks": 1, "ends": optimizer == "apollo"}
    whole, kept = base_of(dtype), base_of(dtype)
    truth, _ = started(whole, **fields)
    first, job = started(kept, gradients, **fields)
    for step in range(7):
        truth.step()
        if step == at:
            tensors, numbers = job.state()
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            kept = base_of(dtype)
            first, job = started(kept, gradients, **fields)
            job.load_state(tensors, numbers)
        first.step()
    assert not moved(weights(whole), kept) and moved(weights(base_of(dtype)), kept)


def test_a_state_of_another_turn_is_the_whole_models() -> None:
    """As the best one is, when a run ends: weights of all blocks come back."""
    base = base_of(torch.bfloat16)
    trainer, job = started(base, method={"type": "rotate", "every": 1})
    trainer.step()
    best, then = {k: v.clone() for k, v in job.attached.state().items()}, weights(base)
    for _ in range(3):
        trainer.step()
    assert moved(then, base)
    job.attached.load_state(best)
    assert not moved(then, base)


def test_the_result_is_the_whole_model(tmp_path: Path) -> None:
    base = base_of()
    trainer, job = started(base, method={"type": "rotate", "every": 1})
    for _ in range(4):
        trainer.step()
    job.attached.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    mine = weights(base)
    assert all(torch.equal(p, mine[n]) for n, p in model.named_parameters())
    assert moved(weights(base_of()), base) == in_blocks(base, *range(DEPTH))


def test_numbers_are_those_of_one_turn() -> None:
    base = base_of()
    block = Freeze().numbers(base, FreezeConfig(first_blocks=1))
    assert Rotate().numbers(base, RotateConfig(blocks=3)) == 3 * block
    ends = sum(base.model.get_parameter(name).numel() for name in ENDS)
    assert Rotate().numbers(base, RotateConfig(ends=True)) == block + ends


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(InputError, match=f"method.blocks: 5 asked for, but 'tiny-llama' has {DEPTH} blocks"):
        started(base_of(), method={"type": "rotate", "blocks": 5})


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "qwen3moe", "neox"])
def test_blocks_of_any_family(arch: str) -> None:
    """Tied ends, experts, other names."""
    base = tiny_base(arch)
    trainer, _ = started(base, method={"type": "rotate", "every": 1, "order": "ascending", "ends": True})
    before = weights(base)
    trainer.step()
    names = moved(before, base)
    assert any(".0." in name for name in names) and not any(".1." in name and ".0." not in name for name in names)
