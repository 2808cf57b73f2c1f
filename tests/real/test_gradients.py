"""Fused gradients against plain autograd of PEFT over the same weights, one tensor at a time."""

from collections.abc import Callable, Sequence

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from conftest import lora_gradients, peft_twin, relative, shake
from real.common import accumulate, lora, mean_nll, mean_nll_one_by_one, one_job, peft_gradients, plan, whole
from snugtune.model.base import Base, load_base
from snugtune.model.source import ModelSource
from snugtune.run import RunResult

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


def test_bf16_gradients_are_no_worse_than_plain_bf16(
    demo: ModelSource, base: Base, plain: Plain, rows: Rows, trained: RunResult
) -> None:
    """Each sequence is a step of its own, at an adapter as training makes it (random factors upset the model, and with it
    the comparison). The demo's weights are bf16 numbers, so in fp32 they are the same: those gradients are the truth."""
    factors = load_file(trained.artefacts["default"] / "adapter_model.safetensors")
    narrow = load_base(demo, plan("bf16"))
    ours = []
    for row in rows:
        with one_job(narrow, plan("bf16"), [row]) as (trainer, job):
            for name, factor in lora(job).tensors().items():
                factor.copy_(factors[name])
            accumulate(trainer, job)
            ours.append(whole(lora_gradients(lora(job))))
            twins = {} if row is not rows[-1] else {d: peft_twin(plain(d), lora(job)) for d in (torch.float32, torch.bfloat16)}

    def steps(twin: PeftModel) -> list[Tensor]:
        found = []
        for row in rows:
            twin.train().zero_grad()
            for part in mean_nll_one_by_one(twin, [row]):
                part.backward()
            found.append(whole(peft_gradients(twin)))
        return found

    truth, rival = steps(twins[torch.float32]), steps(twins[torch.bfloat16])
    assert all(g.dtype == torch.float32 for g in (*ours, *rival)), "adapters are fp32 in both"
    error, plain_error = (
        torch.tensor([relative(g, t) for g, t in zip(side, truth, strict=True)]).square().mean().sqrt().item()
        for side in (ours, rival)
    )
    assert 1e-2 < plain_error < 0.3, "plain bf16 must be visibly and moderately off, or it is no yardstick"
    assert error <= 1.1 * plain_error
