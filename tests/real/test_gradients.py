"""Fused gradients against plain autograd of PEFT over the same weights, one tensor at a time."""

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from conftest import lora_gradients, peft_twin, relative, shake
from real.common import IGNORE, accumulate, lora, mean_nll, mean_nll_one_by_one, one_job, peft_gradients, plan, whole
from snugtune.model.base import Base, load_base
from snugtune.model.source import ModelSource
from snugtune.observer import RunResult

pytestmark = pytest.mark.real

Plain = Callable[[torch.dtype], PreTrainedModel]
Rows = Sequence[tuple[Tensor, Tensor]]


def test_fp32_gradients_equal_autograd_of_a_padded_batch(base: Base, plain: Plain, rows: Rows) -> None:
    with one_job(base, plan(), rows) as (trainer, job):
        shake(lora(job), size=0.005)
        loss = accumulate(trainer, job)
        ours = lora_gradients(lora(job))
        twin = peft_twin(plain(torch.float32), lora(job)).train()
    truth_loss = mean_nll(twin, rows)
    truth_loss.backward()
    truth = peft_gradients(twin)

    assert loss == pytest.approx(truth_loss.item(), rel=2e-6)
    assert ours.keys() == truth.keys() and len(truth) == 2 * 7 * 30
    errors = {name: relative(ours[name], truth[name]) for name in truth}
    assert max(errors.values()) <= 2e-5, max(errors.items(), key=lambda e: e[1])


def snippets(tokenizer: Any, count: int, length: int) -> Rows:
    """The beginnings of the shipped messages, everything after the first tokens labelled."""
    text = files("snugtune").joinpath("demo_data", "train.jsonl").read_text(encoding="utf-8")
    asked = [json.loads(line)["messages"][0]["content"] for line in text.splitlines()[:count]]
    found = [torch.tensor(tokenizer(message)["input_ids"][:length]) for message in asked]
    assert len(found) == count and {len(ids) for ids in found} == {length}
    return [(ids, torch.where(torch.arange(length) < 4, IGNORE, ids)) for ids in found]


def typical(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Mean relative error of a step, without the worst fifth: now and then a step in bf16 is off by ten times as much,
    in PEFT as in ours, and one of those would decide alone."""
    errors = sorted(relative(g, t) for g, t in zip(ours, truth, strict=True))
    kept = errors[: len(errors) * 4 // 5]
    return sum(kept) / len(kept)


def test_bf16_gradients_are_no_worse_than_plain_bf16(demo: ModelSource, plain: Plain, trained: RunResult) -> None:
    """Many steps of one sequence, at an adapter as training makes it. The demo's weights are bf16 numbers, so in fp32
    they are the same: those gradients are the truth."""
    factors = load_file(trained.artefacts["default"] / "adapter_model.safetensors")
    narrow = load_base(demo, plan("bf16"))
    rows = snippets(narrow.tokenizer, 48, 20)
    ours = []
    for row in rows:
        with one_job(narrow, plan("bf16"), [row]) as (trainer, job):
            for name, factor in lora(job).tensors().items():
                factor.copy_(factors[name])
            accumulate(trainer, job)
            ours.append(whole(lora_gradients(lora(job))))

    def peft(dtype: torch.dtype) -> list[Tensor]:
        twin = PeftModel.from_pretrained(plain(dtype), str(trained.artefacts["default"]), is_trainable=True).train()
        found = []
        for row in rows:
            twin.zero_grad()
            for part in mean_nll_one_by_one(twin, [row]):
                part.backward()
            found.append(whole(peft_gradients(twin)))
        return found

    truth, rival = peft(torch.float32), peft(torch.bfloat16)
    assert all(g.dtype == torch.float32 for g in (*ours, *rival)), "adapters are fp32 in both"
    assert 1e-2 < typical(rival, truth) < 0.2, "plain bf16 must be visibly and moderately off, or it is no yardstick"
    assert typical(ours, truth) <= 1.1 * typical(rival, truth)
