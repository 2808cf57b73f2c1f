"""Recompute of every k-th block: fewer of them are computed twice, and no bit of what is learned changes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from conftest import sequences, tiny_base
from joint import JOBS, together, unlike
from quantised import plan_of
from snugtune.config import to_config
from snugtune.data.pack import collate, make_chunk
from snugtune.errors import InputError
from snugtune.memory.plan import make_plan
from snugtune.model import base as base_module
from snugtune.model.base import Base
from snugtune.model.spill import Disk
from snugtune.types import Example, Recompute

DEPTH = 5
TRAINED = {name: JOBS[name] for name in ("all", "noisy", "headed")}  # with dropout and noise


@pytest.fixture(scope="module", params=[("fp32", "fp32"), ("bf16", "bf16")], ids=["fp32", "bf16"])
def dense(request: pytest.FixtureRequest) -> Any:
    dtype = torch.float32 if request.param[0] == "fp32" else torch.bfloat16
    base, plan = tiny_base(dtype=dtype, num_hidden_layers=DEPTH), plan_of(*request.param)
    return base, plan, together(base, plan, TRAINED)


@pytest.mark.parametrize("recompute", ["blocks", 2, 3])
@pytest.mark.parametrize("offload", ["none", "activations"])
def test_no_bit_changes(recompute: Recompute, offload: Any, dense: Any) -> None:
    base, plan, truth = dense
    found = together(base, replace(plan, recompute=recompute, offload=offload), TRAINED)
    assert unlike(found, truth) == {}


@contextmanager
def counted(base: Base) -> Iterator[Counter[int]]:
    """How often each block's forward runs."""
    calls = Counter[int]()
    blocks = [module for module in base.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [
        next(block.children()).register_forward_pre_hook(lambda *_, at=at: calls.update([at])) for at, block in enumerate(blocks)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("recompute", "again"),
    [("none", []), ("blocks", [0, 1, 2, 3, 4]), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])],
)
@pytest.mark.parametrize("spill", [False, True])
def test_every_kth_block_is_computed_again(
    recompute: Recompute, again: list[int], spill: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = tiny_base(num_hidden_layers=DEPTH)
    monkeypatch.setattr(base_module, "place_for", lambda _: Disk(tmp_path))
    base.configure(2, 64)
    base.configure(recompute, 64, spill=spill and bool(again))  # whatever it was before
    base.model.train()
    (tokens,) = sequences(20)
    batch = collate([make_chunk([Example(tokens, torch.ones(20), "here")], "a", 0, 0, 0)], base.min_rows)
    with counted(base) as calls, base.routed(batch):
        base.hidden(batch).sum().backward()
    assert [at for at in range(DEPTH) if calls[at] == 2] == again
    assert all(calls[at] == 1 for at in range(DEPTH) if at not in again)


def test_a_model_without_blocks_of_its_own_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    monkeypatch.setattr(base_module, "GradientCheckpointingLayer", type("Nothing", (), {}))
    base.configure("blocks", 64)
    with pytest.raises(
        InputError, match=r"^plan\.recompute: 'tiny-llama' recomputes all of its blocks or none; set it to blocks"
    ):
        base.configure(2, 64)


@pytest.mark.parametrize(
    ("pinned", "offload", "planned", "said"),
    [
        ("auto", "none", "none", "activations kept"),
        (1, "none", "blocks", "each block's activations recomputed in backward"),
        (3, "none", 3, "the activations of one block in 3 recomputed in backward"),
        (2, "activations", 2, "the activations of one block in 2 recomputed in backward"),
        ("auto", "activations", "blocks", "each block's activations recomputed in backward"),
    ],
)
def test_the_plan_says_which(pinned: Any, offload: str, planned: Recompute, said: str) -> None:
    plan = {"recompute": pinned, "offload": offload, "weights": "fp32"}
    made = make_plan(to_config({"model": "demo", "data": "x.jsonl", "output": "o", "steps": 1, "plan": plan}))
    assert made.plan.recompute == planned and said in made.reasons
