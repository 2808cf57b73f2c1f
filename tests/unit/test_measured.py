"""What a run has in memory is counted to the byte, and what it takes beyond its prediction makes what is to come smaller."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_base
from joint import Run, running
from quantised import loaded, plan_of, saved
from snugtune.config import to_config
from snugtune.memory.budget import Watch
from snugtune.memory.estimate import Estimate, Estimator, Work
from snugtune.memory.measured import Counted, Forecast, Meter, counted
from snugtune.model.base import Base
from snugtune.model.stream import StreamedLinear
from snugtune.observer import Silent
from snugtune.optim.narrow import BLOCK
from snugtune.run import train
from snugtune.types import Plan

MIB = 2**20
ADAMW = {"optimizer": {"type": "adamw", "lr": 1e-3}}
LORA = {"method": {"type": "lora", "r": 4}} | ADAMW
FULL = {"method": {"type": "full"}} | ADAMW


def numbers_of(base: Base) -> int:
    """Of the model, buffers too: each counted once where they share memory."""
    tensors = {t.data_ptr(): t.numel() for t in (*base.model.parameters(), *base.model.buffers())}
    return sum(tensors.values())


def after_a_step(run: Run) -> Counted:
    run.trainer.step()
    return counted(run.trainer.base, run.trainer.jobs.values())


def counts(size: int) -> int:
    """With AdamW's counts of steps, one a tensor, 4 bytes each: less than 1 KiB here."""
    return size // 1024


def test_of_lora_each_part_is_what_its_numbers_take() -> None:
    base = tiny_base(tie_word_embeddings=True)
    with running(base, plan_of("fp32"), {"a": LORA}) as run:
        trains = sum(p.numel() for p in run.trainer.jobs["a"].attached.parameters())
        before = counted(base, run.trainer.jobs.values())
        found = after_a_step(run)
    assert (before.adapters, before.optimizer) == (4 * trains, 0)
    assert found.weights == before.weights == 4 * numbers_of(base)
    assert (found.adapters, found.gradients, counts(found.optimizer)) == (4 * trains, 4 * trains, counts(8 * trains))
    assert found.total == found.weights + found.adapters + found.gradients + found.optimizer


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_of_full_training_masters_are_what_is_not_the_weights_themselves(kind: str) -> None:
    base = tiny_base(dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
    trains = sum(p.numel() for p in base.model.parameters())
    with running(base, plan_of(kind, kind), {"a": FULL}) as run:
        found = after_a_step(run)
    assert found.adapters == (0 if kind == "fp32" else 4 * trains)
    assert found.gradients == 4 * trains and counts(found.optimizer) == counts(8 * trains)


def test_gradients_that_are_released_are_not_there() -> None:
    fields = FULL | {"max_grad_norm": None, "batch_size": 1}
    with running(tiny_base(), plan_of("fp32", gradients="released"), {"a": fields}) as run:
        assert after_a_step(run).gradients == 0


def test_jobs_add_up_and_those_at_rest_take_nothing() -> None:
    base = tiny_base()
    with running(base, plan_of("fp32"), {"a": LORA, "b": LORA | {"seed": 1}, "c": LORA | {"steps": 9}}) as run:
        one = 4 * sum(p.numel() for p in run.trainer.jobs["a"].attached.parameters())
        run.train(until=lambda: all(job.step for job in run.trainer.jobs.values()))
        there = counted(base, run.trainer.jobs.values())
        assert (there.adapters, counts(there.optimizer)) == (3 * one, counts(6 * one))
        assert there.gradients == one  # one buffer goes from job to job
        run.trainer.rest("b")
        left = counted(base, run.trainer.jobs.values())
        assert (left.adapters, counts(left.optimizer)) == (2 * one, counts(4 * one))


def test_state_in_8_bits_is_counted_as_it_is_kept() -> None:
    with running(tiny_base(), plan_of("fp32", optimizer_state="8bit"), {"a": LORA}) as run:
        trains = sum(p.numel() for p in run.trainer.jobs["a"].attached.parameters())
        assert counts(after_a_step(run).optimizer) == counts(2 * (trains + 4 * math.ceil(trains / BLOCK)))


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_of_streamed_weights_the_buffers_are_there(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path / "cache"))
    folder = saved(tmp_path / "tiny", num_hidden_layers=5)
    streamed, whole = (loaded(folder, kind, offload=offload) for offload in ("weights", "none"))
    with running(streamed, plan_of(kind, offload="weights", recompute="blocks"), {"a": LORA}) as run:
        found = after_a_step(run)
        stream = next(m.stream for m in streamed.model.modules() if isinstance(m, StreamedLinear))
    blocks = sum(stream.sizes)
    assert len(stream.sizes) == 5 and found.weights < counted(whole, []).weights - blocks // 2
    resident = {t.data_ptr(): t.nbytes for t in (*streamed.model.parameters(), *streamed.model.buffers())}
    assert found.weights == sum(resident.values()) + 2 * max(stream.sizes)


# --- what it says of what is to come ------------------------------------------------------------------------------------

ESTIMATE = {
    "when": "head",
    "weights": 50,
    "activations": 20,
    "logits": 5,
    "transients": 12,
    "holes": 3,
    "total_bytes": 100,
    "tokens": 400,
}


def test_a_forecast_is_on_a_line_and_keeps_the_error() -> None:
    forecast = Forecast.of(ESTIMATE)
    assert forecast == Forecast(100, 40, 400)
    assert [forecast.at(n) for n in (0, 100, 200, 400, 800)] == [60, 70, 80, 100, 100]
    assert forecast.to_come(100, 70, 400) == 100
    assert forecast.to_come(100, 75, 400) == 105 and forecast.to_come(100, 75, 200) == 85
    assert forecast.to_come(100, 50, 400) == 100  # that it was less promises nothing


@pytest.mark.parametrize(
    "told",
    [None, [], {}, {"total_bytes": 5}, ESTIMATE | {"tokens": 0}, ESTIMATE | {"total_bytes": "x"}, ESTIMATE | {"when": "load"}],
)
def test_without_an_estimate_there_is_no_forecast(told: Any) -> None:
    assert Forecast.of(told) is None


class Made(Watch):
    """Of a process that takes 100 MiB, and 1 MiB a token of its largest forward."""

    def __init__(self, *told: Any):
        super().__init__(*told)
        self.before = 30 * MIB

    def peak(self) -> int:
        return (100 + self.largest) * MIB

    def exceeded(self) -> bool:
        return self.budget is not None and self.peak() > self.budget


def test_what_would_not_fit_is_foreseen() -> None:
    watch = Made("cpu")
    watch.make_room(50)  # 150 MiB, and 100 were predicted
    short = Meter(watch, 250 * MIB, Forecast(140 * MIB, 80 * MIB, 100)).short
    assert short(100) is None  # 190
    short = Meter(watch, 180 * MIB, Forecast(140 * MIB, 80 * MIB, 100)).short
    assert short(100) == "memory would run short (50 tokens took 0.15 GiB, predicted 0.10 GiB; 100 may come)"
    assert short(60) is None and short(50) is None  # 158, and nothing larger
    assert Meter(watch, 180 * MIB).short(100) is None


def test_facts_add_up_to_the_peak() -> None:
    watch, base = Made("cpu"), tiny_base()
    meter = Meter(watch, 0, earlier={"step": 7})
    assert meter.facts() == {"step": 7} and meter.is_due()
    with running(base, plan_of("fp32"), {"a": LORA}) as run:
        run.trainer.watch = watch
        run.trainer.step()
        meter.count(base, run.trainer.jobs.values(), 1)
        assert not meter.is_due()
        watch.make_room(60)
        assert meter.is_due()
    meter.count(base, [], 2)  # less is there: the fuller count stands
    facts = meter.facts()
    parts = [facts[k] for k in ("weights", "adapters", "gradients", "optimizer", "process", "rest")]
    assert sum(parts) == facts["total_bytes"] == 160 * MIB and min(parts) > 0
    assert (facts["step"], facts["tokens"], facts["process"]) == (1, 60, 30 * MIB)


# --- in a run -------------------------------------------------------------------------------------------------------------


def run_of(place: Path, model: Path, monkeypatch: pytest.MonkeyPatch, memory: str, still: int = 80) -> tuple[Any, list[str]]:
    """plan.json and the notes of a run whose first step is short and whose other steps are long; 1 MiB a token is taken.

    `still`: MiB that are predicted besides, of 100.
    """
    heard: list[str] = []

    class Watching(Silent):
        def note(self, text: str) -> None:
            heard.append(text)

    def estimate(self: Estimator, plan: Plan, works: Sequence[Work], _: Any) -> Estimate:
        comes = max(sum(work.lengths) for work in works)
        return Estimate(still * MIB, 0, 0, 0, comes * MIB, 0, 0, 0, "backward")

    place.mkdir()
    (place / "data.jsonl").write_text("".join(f'{{"text": "{"a word or another " * n}"}}\n' for n in (1, 1, 3, 3, 3, 3)))
    monkeypatch.setattr("snugtune.prepare.Watch", Made)
    monkeypatch.setattr("snugtune.training.job.step_indices", lambda step, *_: ((0, 1), (2, 3), (4, 5))[step])
    monkeypatch.setattr(Estimator, "estimate", estimate)
    fields = {"model": str(model), "data": str(place / "data.jsonl"), "objective": "clm", "max_seq_len": 64, "memory": memory}
    fields |= {"batch_size": 2, "steps": 3, "plan": {"weights": "fp32", "micro_batch": 2}, "output": str(place / "run")}
    train(to_config(fields), Watching())
    return json.loads((place / "run/plan.json").read_text()), heard


def test_a_first_step_that_took_more_makes_what_comes_smaller(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the budget is exceeded, told and recorded; what is learned is the same to rounding."""
    free, _ = run_of(tmp_path / "free", model_folder, monkeypatch, "1GiB")
    assert free["changes"] == []
    largest = free["measured"]["tokens"]
    assert free["estimate"]["tokens"] == largest
    tight, heard = run_of(tmp_path / "tight", model_folder, monkeypatch, f"{100 + largest - 1}MiB")
    (change,) = tight["changes"]
    assert (change["knob"], change["step"]) == ("capacity", 2) and change["value"] < largest
    assert change["cause"].startswith("memory would run short (") and f"{largest} may come" in change["cause"]
    assert any("memory would run short" in note and "from here on" in note for note in heard)
    assert tight["measured_peak_bytes"] <= tight["budget_bytes"] < free["measured_peak_bytes"]
    truth, found = (load_file(tmp_path / name / "run/adapters/default/adapter_model.safetensors") for name in ("free", "tight"))
    for name, tensor in truth.items():
        assert float((found[name] - tensor).norm()) <= 1e-5 * float(tensor.norm())


def test_a_prediction_that_holds_changes_nothing(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = run_of(tmp_path / "run", model_folder, monkeypatch, "200MiB", still=100)
    assert plan["changes"] == []


def test_what_was_measured_stands_beside_what_was_predicted(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = run_of(tmp_path / "run", model_folder, monkeypatch, "1GiB")
    measured = plan["measured"]
    assert measured["total_bytes"] == plan["measured_peak_bytes"]
    assert {"weights", "adapters", "gradients", "optimizer"} < measured.keys() & plan["estimate"].keys()
    assert measured["gradients"] == measured["adapters"] > 0
