"""Training here is training as the textbook has it: the loss of every step, and where the weights end up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from conftest import relative
from real.common import RUN, mean_nll
from snugtune.data.mix import step_indices
from snugtune.observer import RunResult

pytestmark = pytest.mark.real


def plain_loop(model: PreTrainedModel, rows: list[tuple[Tensor, Tensor]]) -> tuple[PeftModel, list[dict[str, Any]]]:
    """`RUN` as PEFT and torch alone do it: padded batches, full logits, one optimizer over separate tensors."""
    torch.manual_seed(RUN["seed"])
    twin = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    weights = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, **RUN["optimizer"])
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=RUN["steps"])
    twin.train()
    history = []
    for step in range(RUN["steps"]):
        order = step_indices(step, len(rows), RUN["batch_size"], None, RUN["steps"], RUN["seed"])
        loss = mean_nll(twin, [rows[i] for i in order])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        history.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": schedule.get_last_lr()[0]})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return twin, history


def test_twenty_steps_equal_a_plain_peft_loop(
    plain: Callable[[torch.dtype], PreTrainedModel], rows: list[tuple[Tensor, Tensor]], trained: RunResult
) -> None:
    """Both are seeded alike and nothing is copied over: initial adapter, targets, labels and clipping must all agree."""
    twin, truth = plain_loop(plain(torch.float32), rows)
    ours = [m for m in trained.metrics if m["step"]]

    assert len(ours) == RUN["steps"]
    assert truth[-1]["loss"] < 0.8 * truth[0]["loss"], "nothing was learned, so agreeing says little"
    assert max(t["grad_norm"] for t in truth) > 1.0, "clipping must bite in some steps"
    for key, tolerance in (("lr", 1e-12), ("loss", 1e-5), ("grad_norm", 2e-5)):
        assert [m[key] for m in ours] == [pytest.approx(t[key], rel=tolerance) for t in truth], key

    saved = load_file(trained.artefacts["default"] / "adapter_model.safetensors")
    final = {k.replace(".default", ""): v for k, v in twin.state_dict().items() if ".lora_" in k}
    assert saved.keys() == final.keys()
    assert max(relative(saved[k], final[k]) for k in final) <= 1e-3
