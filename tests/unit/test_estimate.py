"""Estimates: a few blocks and rows tell of all, and what is at rest is what a real run keeps, to the byte."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from conftest import NoWatch, tiny_config
from quantised import loaded, plan_of, saved
from snugtune.config import JobConfig
from snugtune.memory.estimate import Estimate, Estimator, Runtime, UntraceableError, Work, _depths
from snugtune.memory.trace import Trace, trace_step
from snugtune.model.hollow import hollow_base, hollow_model
from snugtune.model.load import load_config
from snugtune.model.source import ModelSource
from snugtune.optim import AdafactorConfig, AdamWConfig, ApolloConfig, GaloreConfig, LionConfig, SgdConfig
from snugtune.training.examples import JobData
from snugtune.training.job import new_job
from snugtune.training.trainer import Trainer
from snugtune.types import Chunk, Plan

LORA: dict[str, Any] = {"type": "lora"}
FULL: dict[str, Any] = {"type": "full"}
NOTHING = Runtime(0)
OPTIMIZERS: list[dict[str, Any]] = [
    {"type": "adamw"},
    {"type": "sgd"},
    {"type": "sgd", "momentum": 0.0},
    {"type": "lion"},
    {"type": "adafactor"},
    {"type": "galore", "rank": 8},
    {"type": "apollo", "rank": 8},
    {"type": "apollo", "rank": 1, "scaling": "tensor"},
]


def job_of(method: dict[str, Any], name: str = "a", **more: Any) -> JobConfig:
    return JobConfig.model_validate({"name": name, "data": "x.jsonl", "method": method, **more})


STATES = [(fields, "fp32") for fields in OPTIMIZERS]
STATES += [(fields, "8bit") for fields in OPTIMIZERS if job_of(LORA, optimizer=fields).optimizer.obstacle() is None]


def chunk_of(lengths: Sequence[int], scored: int, job: str = "a") -> Chunk:
    rows = torch.arange(scored)
    tokens = torch.arange(sum(lengths)) % 300
    return Chunk(job, 0, 0, 0, tokens, tuple(lengths), rows, torch.zeros_like(rows), torch.ones(scored))


def of_all_blocks(config: Any, plan: Plan, work: Work) -> Trace:
    """Of the model as it is, all rows scored."""
    base = hollow_base(hollow_model(config, plan), plan, "whole")
    return trace_step(base, [(work.config, chunk_of(work.lengths, work.scored))], plan)


LAYERS = {
    "llama": {"num_hidden_layers": 6},
    "gemma3": {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "gemma2": {"num_hidden_layers": 9},
}


@pytest.mark.parametrize("method", [LORA, FULL], ids=lambda m: m["type"])
@pytest.mark.parametrize(("lengths", "scored"), [((150,), 149), ((60,) * 5, 290)], ids=["1", "5"])
@pytest.mark.parametrize("arch", LAYERS)
def test_few_blocks_tell_of_all(arch: str, lengths: tuple[int, ...], scored: int, method: dict[str, Any]) -> None:
    config, work = tiny_config(arch, **LAYERS[arch]), Work(job_of(method), lengths, scored)
    hows: tuple[dict[str, Any], ...] = ({"head_rows": 64}, {"head_rows": 256, "recompute": "blocks"}, {"recompute": 2})
    for how in hows:
        plan = plan_of("fp32", **how)
        estimate = Estimator(config).estimate(plan, [work], NOTHING)
        trace = of_all_blocks(config, plan, work)
        peak = max(sum(held.values()) for held in trace.peaks.values())
        whole = trace.weights + trace.trained + 3 * trace.gradients + peak  # AdamW's state is two gradients
        assert estimate.total == pytest.approx(whole, rel=2e-3, abs=16 << 10), how
        assert (estimate.weights, estimate.adapters) == (trace.weights, trace.trained)
        assert (estimate.gradients, estimate.optimizer) == (trace.gradients, 2 * trace.gradients)


@pytest.mark.parametrize(
    "method",
    [
        {"type": "freeze", "last_blocks": 4},
        {"type": "freeze", "names": ["model.layers.5.*"]},
        {"type": "rotate", "blocks": 3},
        {"type": "lora", "target_modules": r"model\.layers\.[35]\..*_proj"},
        {"type": "lora", "target_modules": ["layers.5.self_attn.q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_methods_that_tell_blocks_apart_are_traced_on_all(method: dict[str, Any]) -> None:
    config, work, plan = tiny_config("llama", num_hidden_layers=6), Work(job_of(method), (60,), 50), plan_of("fp32")
    estimate, trace = Estimator(config).estimate(plan, [work], NOTHING), of_all_blocks(config, plan, work)
    assert (estimate.adapters, estimate.gradients) == (trace.trained, trace.gradients) and trace.gradients > 0


def test_inputs_that_wait_elsewhere_do_not_add_up_with_depth() -> None:
    """A few may be on their way there; of those of three blocks as many are as of those of sixteen."""
    config, work = tiny_config("llama", num_hidden_layers=16), Work(job_of(LORA), (120,), 2)
    plan = plan_of("fp32", recompute="blocks", offload="activations")
    trace, estimate = of_all_blocks(config, plan, work), Estimator(config).estimate(plan, [work], NOTHING)
    peak = max(sum(held.values()) for held in trace.peaks.values())
    assert estimate.total == pytest.approx(trace.weights + trace.trained + 3 * trace.gradients + peak, abs=4 << 10)


@pytest.mark.parametrize("method", [{"last_blocks": 3}, {"first_blocks": 2, "last_blocks": 2, "head": True}], ids=str)
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_as_many_blocks_train_of_few_as_of_all(arch: str, method: dict[str, Any]) -> None:
    config, work = tiny_config(arch, num_hidden_layers=10), Work(job_of({"type": "freeze", **method}), (120,), 119)
    plan = plan_of("fp32", recompute="blocks")
    trace, estimate = of_all_blocks(config, plan, work), Estimator(config).estimate(plan, [work], NOTHING)
    peak = max(sum(held.values()) for held in trace.peaks.values())
    assert estimate.gradients == trace.gradients
    assert estimate.total == pytest.approx(trace.weights + trace.trained + 3 * trace.gradients + peak, rel=2e-3)


def depths_of(arch: str, every: int = 1, **overrides: Any) -> tuple[int, int]:
    return _depths(hollow_model(tiny_config(arch, **overrides), plan_of("fp32")), every)


def sliding(count: int) -> dict[str, Any]:
    """Gemma 3's: every sixth block sees all."""
    kinds = ["full_attention" if at % 6 == 5 else "sliding_attention" for at in range(count)]
    return {"num_hidden_layers": count, "layer_types": kinds}


@pytest.mark.parametrize(
    ("arch", "overrides", "expected"),
    [
        ("llama", {"num_hidden_layers": 6}, (2, 3)),  # the first alone needs less: nothing goes back beyond it
        ("llama", {"num_hidden_layers": 2}, (2, 2)),  # as few as would be traced
        ("llama", {"num_hidden_layers": 30, "every": 2}, (2, 4)),
        ("llama", {"num_hidden_layers": 31, "every": 3}, (4, 7)),
        ("gemma2", {"num_hidden_layers": 18, "every": 3}, (6, 12)),
        ("gemma2", {"num_hidden_layers": 8}, (2, 4)),
        ("gemma3", sliding(18), (6, 12)),
        ("gemma3", sliding(26), (8, 14)),  # two left over at the end: they come first
        ("gemma3", sliding(12), (12, 12)),
        ("deepseek_v3", {"num_hidden_layers": 6}, (2, 3)),  # the first is dense
        ("deepseek_v3", {"num_hidden_layers": 7, "first_k_dense_replace": 3}, (4, 5)),
        ("gemma3", {"num_hidden_layers": 5, "layer_types": ["sliding_attention"] * 4 + ["full_attention"]}, (5, 5)),
    ],
)
def test_depths_between_which_each_kind_comes_as_often(arch: str, overrides: dict[str, Any], expected: tuple[int, int]) -> None:
    assert depths_of(arch, **overrides) == expected


def test_dense_blocks_before_experts_are_counted_as_what_they_are() -> None:
    config = tiny_config("deepseek_v3", num_hidden_layers=7, first_k_dense_replace=3)
    work, plan = Work(job_of(LORA), (40,), 39), plan_of("bf16", "bf16")
    assert Estimator(config).estimate(plan, [work], NOTHING).weights == of_all_blocks(config, plan, work).weights


@pytest.mark.parametrize("shape", [(5000,), (50,), (64, 96), (12, 40), (96, 64), (5, 64), (3, 40, 48)], ids=str)
@pytest.mark.parametrize(("fields", "kept"), STATES, ids=str)
def test_what_an_optimizer_remembers_of_a_weight(fields: dict[str, Any], shape: tuple[int, ...], kept: Any) -> None:
    config = job_of(LORA, optimizer=fields).optimizer
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer = config.build([weight], kept)
    optimizer.step()
    found = sum(v.nbytes for v in optimizer.state[weight].values() if isinstance(v, Tensor) and v.dim())
    assert abs(config.state_bytes(shape, kept) - found) <= (4 if kept == "8bit" else 0)  # two scales where one block ends early


def test_every_optimizer_is_held_against_its_state() -> None:
    kinds = (AdamWConfig, SgdConfig, LionConfig, AdafactorConfig, GaloreConfig, ApolloConfig)
    assert {f["type"] for f in OPTIMIZERS} == {kind().type for kind in kinds}


@pytest.mark.parametrize("method", [LORA, FULL], ids=lambda m: m["type"])
@pytest.mark.parametrize(("fields", "kept"), STATES, ids=str)
def test_state_is_what_a_real_job_keeps_after_a_step(
    tmp_path: Path, fields: dict[str, Any], method: dict[str, Any], kept: Any
) -> None:
    job_config = job_of(method, optimizer=fields)
    folder, plan = saved(tmp_path / "tiny", num_hidden_layers=4), plan_of("fp32", optimizer_state=kept)
    base = loaded(folder, "fp32", optimizer_state=kept)
    job = new_job(base, job_config, JobData(()), plan)
    trainer = Trainer(base, plan, NoWatch())
    trainer.add(job)
    job.begin_step()
    trainer.forward_backward({"a": [chunk_of((24, 9), 20)]}, {"a": 1.0})
    job.optimizer.step()
    state = [v for k, v in job.tensors().items() if k.startswith("optimizer.") and v.dim()]
    estimate = estimate_of(folder, plan, [Work(job_config, (24, 9), 20)])
    assert abs(estimate.optimizer - sum(v.nbytes for v in state)) <= (4 * len(state) if kept == "8bit" else 0)
    assert estimate.gradients == sum(p.grad.nbytes for p in job.attached.parameters() if p.grad is not None)


def estimate_of(folder: Path, plan: Plan, works: Sequence[Work], runtime: Runtime = NOTHING) -> Estimate:
    config = load_config(ModelSource("tiny", str(folder)), False)
    return Estimator(config).estimate(plan, works, runtime)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "nf4", "nf4-double"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_weights_are_those_of_the_loaded_model(tmp_path: Path, arch: str, kind: str) -> None:
    depth = {"n_layer": 5} if arch == "gpt2" else {"num_hidden_layers": 5}
    folder, compute = saved(tmp_path / arch, arch, **depth), "bf16" if kind == "bf16" else "fp32"
    base = loaded(folder, kind, compute)
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*base.model.parameters(), *base.model.buffers())
    }
    tables = len(base.adaptable()) - 1 if kind == "nf4-double" else 0  # of 256 numbers, that real linears share
    estimate = estimate_of(folder, plan_of(kind, compute), [Work(job_of(LORA), (20,), 19)])
    assert estimate.weights == sum(storages.values()) + tables * 1024


def test_of_jobs_in_turns_the_largest_step_counts_and_all_that_is_at_rest() -> None:
    config, plan = tiny_config("llama", num_hidden_layers=4), plan_of("fp32")
    small, wide = (
        Work(job_of({"type": "lora", "r": 2}, "small"), (60,), 59),
        Work(job_of({"type": "lora", "r": 32}, "wide"), (20,), 19),
    )
    estimator = Estimator(config)
    one, two = (estimator.estimate(plan, [work], NOTHING) for work in (small, wide))
    turns = estimator.estimate(plan, [small, wide], NOTHING)
    assert turns.weights == one.weights == two.weights
    assert turns.adapters == one.adapters + two.adapters == 17 * one.adapters
    assert turns.optimizer == one.optimizer + two.optimizer
    assert turns.gradients == two.gradients > one.gradients
    assert (turns.activations, turns.logits, turns.transients) == (one.activations, one.logits, one.transients)
    assert one.activations > two.activations
    fused = estimator.estimate(replace(plan, fused_tokens=512), [small, wide], NOTHING)
    assert fused.gradients == one.gradients + two.gradients
    resting = estimator.estimate(replace(plan, resident_jobs=1), [small, wide], NOTHING)
    assert (resting.adapters, resting.optimizer) == (two.adapters, two.optimizer)


def test_two_blocks_of_streamed_weights_are_in_memory() -> None:
    config, work = tiny_config("llama", num_hidden_layers=6), Work(job_of(LORA), (20,), 19)
    block = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    all_, streamed = (Estimator(config).estimate(plan_of("fp32", offload=o), [work], NOTHING) for o in ("none", "weights"))
    assert all_.weights - streamed.weights == 4 * block


def test_released_gradients_are_not_at_rest() -> None:
    config, work = tiny_config("llama", num_hidden_layers=6), Work(job_of(FULL, max_grad_norm=None), (20,), 19)
    kept, released = (Estimator(config).estimate(plan_of("fp32", gradients=g), [work], NOTHING) for g in ("kept", "released"))
    assert (kept.gradients, released.gradients) == (kept.weights - 64, 0)  # all but rotary frequencies, 8 numbers twice


def test_a_runtime_is_added_and_its_holes_are_a_share_of_what_comes_and_goes() -> None:
    config, work, plan = tiny_config("llama", num_hidden_layers=4), Work(job_of(LORA), (60,), 59), plan_of("fp32")
    plain = Estimator(config).estimate(plan, [work], NOTHING)
    holed = Estimator(config).estimate(plan, [work], Runtime(1000, holes=0.5))
    moving = plain.activations + plain.logits + plain.transients
    assert holed.runtime == 1000 + round(0.5 * moving)
    assert plain.total == sum(plain.parts().values())
    read = Estimator(config).estimate(plan, [work], Runtime(0, stored=1 << 20))
    largest = sorted((p.numel() for p in hollow_model(config, plan).parameters()), reverse=True)
    assert (read.when, read.total) == ("load", (sum(largest[:4]) << 20) + plain.weights)
    narrow = Estimator(config).estimate(replace(plan, weights="nf4"), [work], Runtime(0, stored=1 << 20))
    assert (narrow.when, narrow.transients) == ("load", largest[0] << 20)


class _Config(LlamaConfig):
    model_type = "looks_at_values"


class _Body(LlamaModel):
    def forward(self, input_ids: Any = None, **more: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(input_ids=input_ids + int(input_ids.min() > 0), **more)


class _Model(LlamaForCausalLM):
    config_class = _Config

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = _Body(config)


def test_a_model_that_looks_at_values_is_refused() -> None:
    AutoModelForCausalLM.register(_Config, _Model, exist_ok=True)
    config = _Config(**{k: v for k, v in tiny_config("llama").to_dict().items() if k != "model_type"})
    with pytest.raises(UntraceableError, match=r"the peak of a looks_at_values cannot be predicted: .*meta"):
        Estimator(config).estimate(plan_of("fp32"), [Work(job_of(LORA), (20,), 19)], NOTHING)
