"""Fused gradients against plain autograd of PEFT over the same weights, one tensor at a time."""

from collections.abc import Callable, Sequence

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from conftest import lora_gradients, peft_twin, relative, shake
from real.common import accumulate, lora, mean_nll, mean_nll_one_by_one, one_job, peft_gradients, plan, whole
from snugtune.methods.lora import LoraAttached
from snugtune.model.base import Base, load_base
from snugtune.model.source import ModelSource

pytestmark = pytest.mark.real

Plain = Callable[[torch.dtype], PreTrainedModel]
Rows = Sequence[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def batch(rows: Rows) -> Rows:
    """Five sequences of different lengths, the one with two answers among them."""
    return [*rows[:2], *rows[-3:]]


def one_by_one(twin: PeftModel, batch: Rows) -> dict[str, Tensor]:
    """Gradients of the plain model, each sequence unpadded in a forward of its own."""
    twin.train()
    for part in mean_nll_one_by_one(twin, batch):
        part.backward()
    return peft_gradients(twin)


def test_fp32_gradients_equal_autograd_of_a_padded_batch(base: Base, plain: Plain, batch: Rows) -> None:
    with one_job(base, plan(), batch) as (trainer, job):
        shake(lora(job), size=0.02)
        loss = accumulate(trainer, job)
        ours = lora_gradients(lora(job))
        twin = peft_twin(plain(torch.float32), lora(job)).train()
    truth_loss = mean_nll(twin, batch)
    truth_loss.backward()
    truth = peft_gradients(twin)

    assert loss == pytest.approx(float(truth_loss), rel=1e-6)
    assert ours.keys() == truth.keys() and len(truth) == 2 * 7 * 30
    errors = {name: relative(ours[name], truth[name]) for name in truth}
    assert max(errors.values()) <= 2e-5, max(errors.items(), key=lambda e: e[1])


def test_bf16_gradients_are_no_worse_than_plain_bf16(demo: ModelSource, base: Base, plain: Plain, batch: Rows) -> None:
    """The demo's weights are bf16 numbers, so the fp32 base holds the very same ones: its gradients are the truth."""
    narrow = load_base(demo, plan("bf16"))
    with one_job(narrow, plan("bf16"), batch) as (trainer, job):
        attached: LoraAttached = lora(job)
        shake(attached, size=0.02)
        accumulate(trainer, job)
        ours = lora_gradients(attached)
        truth = one_by_one(peft_twin(plain(torch.float32), attached), batch)
        rival = one_by_one(peft_twin(plain(torch.bfloat16), attached), batch)
    assert all(g.dtype == torch.float32 for g in ours.values())
    error, plain_error = relative(whole(ours), whole(truth)), relative(whole(rival), whole(truth))
    assert 1e-3 < plain_error < 0.5, "plain bf16 must be visibly and moderately off, or it is no yardstick"
    assert error <= 1.1 * plain_error
