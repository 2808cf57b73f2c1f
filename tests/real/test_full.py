"""Full fine-tuning: textbook steps in fp32, fp32 masters under bf16, resume bit for bit."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import relative, tiny_base, tiny_model, tiny_tokenizer
from real.common import CONVERSATIONS, labelled, mean_nll, one_job, plan, train, write_data
from snugtune.data.mix import step_indices
from snugtune.errors import Interrupted
from snugtune.methods.full import FullAttached
from snugtune.observer import Silent
from snugtune.training.metrics import StepMetrics

pytestmark = pytest.mark.real


@pytest.fixture(params=["llama", "gpt2"], ids=["untied head", "tied head, Conv1D"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model and data beside it."""
    tiny_model(request.param).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    return tmp_path


def fields(folder: Path, run: str = "run", **more: Any) -> dict[str, Any]:
    common = {"model": str(folder / "model"), "data": str(folder / "data.jsonl"), "output": str(folder / run)}
    return common | {"method": "full", "max_seq_len": 128, "batch_size": 4, "plan": {"weights": "fp32"}} | more


def adamw(model: nn.Module, batches: list[list[tuple[Tensor, Tensor]]], limit: float, **settings: Any) -> list[float]:
    """Plain torch over the whole model. Returns the gradient norms; `model` is changed."""
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    norms = []
    for batch in batches:
        optimizer.zero_grad()
        mean_nll(model, batch).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        optimizer.step()
    return norms


def test_an_fp32_step_equals_plain_adamw(folder: Path) -> None:
    """With a large eps, so that the size of the gradient shows in AdamW's first step and not only its sign."""
    settings = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
    result = train(**fields(folder, steps=1, optimizer=settings, max_grad_norm=0.5))

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [labelled(c, tiny_tokenizer()) for c in CONVERSATIONS]
    order = step_indices(0, len(rows), 4, None, 1, 0)
    (norm,) = adamw(model, [[rows[i] for i in order]], 0.5, **settings)

    assert norm > 0.5, "clipping must bite"
    assert result.metrics[-1]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    trained = AutoModelForCausalLM.from_pretrained(result.artefacts["default"], dtype=torch.float32)
    for name, ours in trained.named_parameters():
        truth = dict(model.named_parameters())[name]
        assert relative(ours - before[name], truth - before[name]) <= 1e-4, name


def test_bf16_keeps_fp32_masters() -> None:
    """At this rate a bf16 weight never moves: each step is far below half its last place. The masters add the steps up."""
    rows = [labelled(c, tiny_tokenizer()) for c in CONVERSATIONS[:4]]
    steps, lr = 20, 1e-5
    truth = tiny_model("llama", torch.bfloat16).float()  # the same numbers
    start = {name: p.detach().clone() for name, p in truth.named_parameters()}
    adamw(truth, [rows] * steps, 1.0, lr=lr, weight_decay=0.0)
    narrow = tiny_model("llama", torch.bfloat16)
    adamw(narrow, [rows] * steps, 1.0, lr=lr, weight_decay=0.0)

    config = {"method": "full", "steps": steps, "max_seq_len": 128, "optimizer": {"lr": lr}}
    with one_job(tiny_base("llama", torch.bfloat16), plan("bf16"), rows, **config) as (trainer, job):
        for _ in range(steps):
            trainer.step()
        assert isinstance(job.attached, FullAttached)
        masters = {name: m.detach() for name, m in job.attached.masters.items()}
        weights = {name: w.detach().clone() for name, w in trainer.base.model.named_parameters()}

    def moved(after: dict[str, Tensor]) -> Tensor:
        return torch.cat([(after[n].float() - start[n]).flatten() for n in sorted(start) if start[n].dim() > 1])

    wanted = moved(dict(truth.named_parameters()))
    assert all(m.dtype == torch.float32 for m in masters.values())
    assert all(torch.equal(weights[n], masters[n].bfloat16()) for n in masters)
    assert relative(moved(dict(narrow.named_parameters())), wanted) > 0.8, "plain bf16 kept up, so masters are not needed here"
    assert relative(moved(masters), wanted) < 0.3


class Stopper(Silent):
    """Asks the run to stop after a step, as a scheduler on a shared machine would."""

    def __init__(self, after: int):
        self.after = after

    def step(self, metrics: StepMetrics) -> None:
        if metrics.step == self.after:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_resumed_run_ends_bit_equal(folder: Path, weights: str) -> None:
    config = {"steps": 5, "optimizer": {"lr": 1e-3}, "schedule": "cosine", "plan": {"weights": weights}, "validation": 0.2}
    straight = train(**fields(folder, "straight", **config))
    with pytest.raises(Interrupted, match="step 3"):
        train(Stopper(3), **fields(folder, "stopped", **config))
    assert not (folder / "stopped" / "models").exists()
    resumed = train(**fields(folder, "stopped", **config))

    kept = ("step", "loss", "grad_norm", "lr", "eval_loss")
    assert [{k: m.get(k) for k in kept} for m in resumed.metrics] == [{k: m.get(k) for k in kept} for m in straight.metrics]
    ours, truth = (load_file(r.artefacts["default"] / "model.safetensors") for r in (resumed, straight))
    assert ours.keys() == truth.keys()
    assert [k for k in truth if not torch.equal(ours[k], truth[k])] == []
