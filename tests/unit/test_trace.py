"""What a step holds, counted without memory: to the byte what is counted on a real model that does the same step.

One difference is left, and allowed for: a chunk's own tensors (targets, weights, where its sequences begin) lie on the CPU
already where the base does, and are counted there when a step first looks at them. They have 12 bytes a scored row.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen2ForCausalLM

from conftest import NoWatch, tiny_config, tiny_model, tiny_tokenizer
from quantised import loaded, plan_of, saved
from snugtune.config import JobConfig
from snugtune.memory.budget import resident
from snugtune.memory.estimate import Estimator, Runtime, Work
from snugtune.memory.operators import WITHIN
from snugtune.memory.trace import MOST, EndlessError, Held, Ledger, Trace, trace_step
from snugtune.model import formats
from snugtune.model.attention import forget_masks
from snugtune.model.hollow import hollow_base, hollow_model
from snugtune.model.load import load_config
from snugtune.model.offload import blocks_of
from snugtune.model.source import ModelSource
from snugtune.model.spill import WRITES_AHEAD
from snugtune.training.examples import JobData
from snugtune.training.job import new_job
from snugtune.training.trainer import Trainer
from snugtune.types import Chunk

LENGTHS, SCORED = (24, 9), 20
LORA: dict[str, Any] = {"type": "lora"}
FULL: dict[str, Any] = {"type": "full"}
QWEN2: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def job_of(method: dict[str, Any], name: str = "a", **more: Any) -> JobConfig:
    return JobConfig.model_validate({"name": name, "data": "x.jsonl", "method": method, **more})


def chunk_of(lengths: Sequence[int] = LENGTHS, scored: int = SCORED, job: str = "a") -> Chunk:
    tokens, rows = torch.arange(sum(lengths)) % 300, torch.arange(scored)
    return Chunk(job, 0, 0, 0, tokens, tuple(lengths), rows, torch.zeros_like(rows), torch.ones(scored))


def own_bytes(chunk: Chunk) -> int:
    """Of what a chunk brings: targets, weights, borders."""
    return 12 * len(chunk.rows) + 4 * (len(chunk.lengths) + 1)


def folder_of(place: Path, arch: str, **overrides: Any) -> Path:
    if arch != "qwen2":
        return saved(place / arch, arch, **overrides)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=320, **QWEN2)).save_pretrained(place / arch)
    tiny_tokenizer().save_pretrained(place / arch)
    return place / arch


def both(
    place: Path,
    arch: str,
    method: dict[str, Any],
    kind: str = "fp32",
    compute: str = "fp32",
    chunk: Chunk | None = None,
    **how: Any,
) -> tuple[Trace, Trace]:
    """The trace of a real step, and that of a hollow one, of the model in one folder."""
    overrides = how.pop("overrides", {})
    folder, plan = folder_of(place, arch, **overrides), plan_of(kind, compute, **how)
    jobs = [(job_of(method), chunk or chunk_of())]
    real = trace_step(loaded(folder, kind, compute, **how), jobs, plan)
    config = load_config(ModelSource(arch, str(folder)), False)
    return real, trace_step(hollow_base(hollow_model(config, plan), plan, arch), jobs, plan)


def assert_equal(real: Trace, hollow: Trace, chunk: Chunk, spare: int = 0) -> None:
    """`spare`: bytes that the hollow step may count too many."""
    for field in fields(Trace):
        if field.name != "peaks":
            assert getattr(hollow, field.name) == getattr(real, field.name), field.name
    assert hollow.peaks.keys() == real.peaks.keys() == {"body", "head", "backward"}
    for phase, held in real.peaks.items():
        assert -spare <= total(held) - total(hollow.peaks[phase]) <= own_bytes(chunk), phase
        for made, size in held.items():
            assert -spare <= size - hollow.peaks[phase][made] <= own_bytes(chunk), (phase, made)


def total(held: Held) -> float:
    return sum(held.values())


@pytest.mark.parametrize(
    "method", [LORA, FULL, {"type": "freeze", "last_blocks": 1, "embeddings": True}], ids=lambda m: m["type"]
)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "gemma2", "gemma3"])
def test_a_hollow_step_holds_what_a_real_one_holds(tmp_path: Path, arch: str, method: dict[str, Any]) -> None:
    """Grouped heads; biases; transposed linears and learned positions; sliding windows with soft caps and without."""
    assert_equal(*both(tmp_path, arch, method), chunk_of())


@pytest.mark.parametrize(
    ("kind", "compute"),
    [("bf16", "bf16"), ("nf4", "fp32"), ("nf4", "bf16"), ("int8", "fp32"), ("int8", "bf16")],
)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_in_every_width(tmp_path: Path, arch: str, kind: str, compute: str) -> None:
    """Means and deviations of torch's layer norms (GPT-2's, two a block and one) are in bf16 on CPU, in fp32 elsewhere."""
    statistics = 2 * (2 * 2 + 1) * sum(LENGTHS) * 2 if (arch, compute) == ("gpt2", "bf16") else 0
    assert_equal(*both(tmp_path, arch, LORA, kind, compute), chunk_of(), spare=statistics)


@pytest.mark.parametrize("how", [{}, {"recompute": "blocks"}], ids=str)
@pytest.mark.parametrize("method", [LORA, FULL], ids=lambda m: m["type"])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["mixtral", "qwen3moe", "gptoss"])
def test_experts_are_counted_whatever_they_get(
    tmp_path: Path, arch: str, kind: str, method: dict[str, Any], how: dict[str, Any]
) -> None:
    """Grouped products have as many rows as tokens choose experts, wherever these send them; so no values are needed."""
    chunk = chunk_of((40, 30, 20), 80)
    assert_equal(*both(tmp_path, arch, method, kind, kind, chunk=chunk, **how), chunk)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["mixtral", "qwen3moe"])
def test_experts_are_counted_for_cuda(arch: str, compute: Literal["fp32", "bf16"]) -> None:
    """For each expert that a token chooses backward keeps both halves of the gated layer, the function of one, and the result."""
    config = tiny_config(arch, **{"mixtral": {"intermediate_size": 512}, "qwen3moe": {"moe_intermediate_size": 512}}[arch])
    plan = plan_of(compute, compute, device="cuda")
    trace = trace_step(hollow_base(hollow_model(config, plan), plan, arch), [(job_of(LORA), chunk_of((90,), 2))], plan)
    blocks, chosen, size = 2, 2 * 90, {"fp32": 4, "bf16": 2}[compute]
    experts = blocks * chosen * size * (2 * 512 + 512 + 64)
    assert experts < trace.peaks["head"]["body"] < 1.6 * experts


def test_with_scales_in_8_bits(tmp_path: Path) -> None:
    """Real linears share the table of 256 numbers that their scales are looked up in; hollow ones count one each."""
    real, hollow = both(tmp_path, "llama", LORA, "nf4-double")
    assert hollow.weights - real.weights == (2 * 7 - 1) * 256 * 4
    assert_equal(real, replace(hollow, weights=real.weights), chunk_of())


def test_masters_are_counted_beside_weights_in_bf16(tmp_path: Path) -> None:
    real, hollow = both(tmp_path, "llama", FULL, "bf16", "bf16")
    assert_equal(real, hollow, chunk_of())
    assert hollow.trained == sum(4 * p.numel() for p in tiny_model("llama").parameters())


@pytest.mark.parametrize("method", [LORA, FULL], ids=lambda m: m["type"])
@pytest.mark.parametrize(
    "how", [{"recompute": "blocks"}, {"recompute": 2}, {"head_rows": 32}, {"recompute": "blocks", "head_rows": 32}], ids=str
)
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_with_every_knob(tmp_path: Path, arch: str, how: dict[str, Any], method: dict[str, Any]) -> None:
    chunk, overrides = chunk_of((40, 30, 20), 80), {"num_hidden_layers": 4}
    assert_equal(*both(tmp_path, arch, method, chunk=chunk, overrides=overrides, **how), chunk)


@pytest.mark.parametrize(("kind", "method"), [("fp32", LORA), ("fp32", FULL), ("int8", LORA)])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_what_is_done_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, kind: str, method: dict[str, Any]
) -> None:
    """Where nothing has values three pieces of queries, rows of logits and rows of weights stand for all of them."""
    monkeypatch.setattr(formats, "PIECE", 1000)
    chunk = chunk_of((700, 260), 500)
    how: dict[str, Any] = {"chunk": chunk, "overrides": {"max_position_embeddings": 1024}, "head_rows": 64}
    assert_equal(*both(tmp_path, arch, method, kind, **how), chunk)


def traced_for_cuda(compute: Literal["bf16", "fp32"], lengths: Sequence[int] = (2048, 2048)) -> tuple[Trace, Counter[str]]:
    """A step of a base whose attention is nearly all there is, and how often each operator ran in it."""
    sizes: dict[str, Any] = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    config = tiny_config("llama", **sizes, intermediate_size=8, max_position_embeddings=4096)
    plan = plan_of(compute, compute, device="cuda")
    with Counting() as ran:
        trace = trace_step(hollow_base(hollow_model(config, plan), plan, "tiny"), [(job_of(LORA), chunk_of(lengths, 2))], plan)
    return trace, ran.counts


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_for_cuda_attention_is_flash_attention() -> None:
    """In 16 bits. Its backward takes what no tensor shows: see flash_api.cpp."""
    trace, ran = traced_for_cuda("bf16")
    assert ran["torch_attn._varlen_attn.default"] == ran["torch_attn._varlen_attn_backward.default"] == 2
    assert ran["aten._softmax.default"] == 0
    tokens, heads, width = 4096, 8, 64
    accumulated = 4 * (tokens + 2 * 128) * heads * width  # the queries' gradient in fp32
    expanded = 2 * 2 * tokens * heads * width  # keys' and values', for each head
    assert trace.peaks["backward"]["backward"] > accumulated + expanded
    _, ran = traced_for_cuda("fp32", (64, 64))
    assert ran["torch_attn._varlen_attn.default"] == 0 and ran["aten._softmax.default"] > 0


def test_what_flash_attention_takes_for_llama_8b() -> None:
    """By hand: 16,384 bytes a token accumulated, 128 of sums, 16,384 expanded."""
    q, k = (torch.empty(4096, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    within = WITHIN[torch.ops.torch_attn._varlen_attn_backward.default]
    taken = within(q, q, k, k, q, q, torch.tensor([0, 4096]))
    assert taken == 4096 * (16_384 + 128 + 16_384) + 128 * (16_384 + 128)
    assert within(q, q, q, q, q, q, torch.tensor([0, 4096])) == taken - 4096 * 16_384


def test_a_loop_over_tokens_is_given_up() -> None:
    x = torch.empty(4, device="meta")
    with pytest.raises(EndlessError), Ledger([x]):
        for _ in range(MOST + 1):
            x.view(2, 2)


def test_a_logsumexp_has_a_copy_while_it_runs() -> None:
    z = torch.randn(50, 1000)
    with Ledger([z]) as ledger:
        z.logsumexp(dim=-1)
    assert ledger.peaks["body"]["body"] == z.nbytes + 50 * 4


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_inputs_that_wait_on_disk(tmp_path: Path, arch: str) -> None:
    """When the disk is done with writing is its own affair: as many states as may wait for it are there, or are not."""
    chunk, overrides, state = chunk_of((40, 30, 20), 60), {"num_hidden_layers": 8}, 90 * 64 * 4
    how: dict[str, Any] = {"chunk": chunk, "overrides": overrides, "recompute": "blocks"}
    real, hollow = both(tmp_path, arch, LORA, offload="activations", **how)
    for phase, held in real.peaks.items():
        assert abs(total(hollow.peaks[phase]) - total(held)) <= WRITES_AHEAD * state + own_bytes(chunk), phase
    kept = both(tmp_path, arch, LORA, **how)[1]
    assert total(kept.peaks["head"]) - total(hollow.peaks["head"]) == pytest.approx((8 - WRITES_AHEAD) * state, rel=0.03)


def test_two_jobs_side_by_side(tmp_path: Path) -> None:
    folder, plan = folder_of(tmp_path, "llama"), plan_of("fp32", fused_tokens=100)
    jobs = [(job_of(LORA, name), chunk_of(job=name)) for name in ("a", "b")]
    real = trace_step(loaded(folder, "fp32", fused_tokens=100), jobs, plan)
    config = load_config(ModelSource("tiny", str(folder)), False)
    hollow = trace_step(hollow_base(hollow_model(config, plan), plan, "tiny"), jobs, plan)
    alone = trace_step(hollow_base(hollow_model(config, plan), plan, "tiny"), jobs[:1], plan)
    for phase, held in real.peaks.items():
        assert 0 <= total(held) - total(hollow.peaks[phase]) <= 2 * own_bytes(chunk_of()), phase
        assert total(hollow.peaks[phase]) > 1.5 * total(alone.peaks[phase])
    assert hollow.trained == real.trained == 2 * alone.trained


def test_the_ledger_follows_a_step_of_a_real_base(tmp_path: Path) -> None:
    """Nothing but what is made is counted, by its phase; what is freed is no longer there."""
    base, config, plan = loaded(folder_of(tmp_path, "llama"), "fp32"), job_of(LORA), plan_of("fp32")
    job = new_job(base, config, JobData(()), plan)
    trainer = Trainer(base, plan, NoWatch())
    trainer.add(job)
    job.begin_step()
    known = [*base.model.parameters(), *base.model.buffers(), *job.attached.parameters()]
    forget_masks()
    masks = sum(n * n for n in LENGTHS)
    ledger = Ledger([*known, *(p.grad for p in job.attached.parameters() if p.grad is not None)])
    with ledger.following(base), ledger:
        trainer.forward_backward({"a": [chunk_of()]}, {"a": 1.0})
    logits = SCORED * 320 * 4
    assert ledger.peaks["head"]["head"] > logits
    assert ledger.peaks["backward"]["head"] < logits, "the logits are gone before backward"
    assert masks <= ledger.live.total() <= masks + own_bytes(chunk_of()), "all else is gone: the step is over"


def test_a_trace_is_the_same_again() -> None:
    """Masks of attention are kept between forwards, which a second trace must not take for nothing."""
    plan, jobs = plan_of("fp32"), [(job_of(LORA), chunk_of((300,), 20))]
    config = tiny_config("llama")
    first, second = (trace_step(hollow_base(hollow_model(config, plan), plan, "tiny"), jobs, plan) for _ in range(2))
    assert first == second


def test_a_ledger_counts_a_storage_once_and_until_it_is_freed() -> None:
    known = torch.ones(1000)
    with Ledger([known]) as ledger:
        known.view(10, 100).t()
        assert ledger.live.total() == 0
        made = torch.ones(500)
        views = [made[3:], made.view(5, 100)]
        assert ledger.live.total() == 2000
        del made
        assert ledger.live.total() == 2000, "its views live"
        del views
        assert ledger.live.total() == 0
        ledger.phase = "head"
        del known
        torch.ones(10)
    assert ledger.peaks["body"] == {"body": 2000}
    assert total(ledger.peaks["head"]) == 40


def test_blocks_are_left_out_from_the_end(tmp_path: Path) -> None:
    config = load_config(ModelSource("tiny", str(folder_of(tmp_path, "gemma3", num_hidden_layers=2))), False)
    first, last = blocks_of(hollow_model(config, plan_of("fp32")))
    assert blocks_of(hollow_model(config, plan_of("fp32"), blocks=1)) == [first] != [last]


def large() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_a_model_of_405_billion_weights_is_estimated_in_no_memory(kind: str) -> None:
    config, work = large(), Work(job_of(LORA), (1024,), 1023)
    Estimator(LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=2)).estimate(
        plan_of("fp32"), [work], Runtime(0)
    )  # what is imported is imported
    before = resident()
    estimate = Estimator(config).estimate(plan_of(kind, "bf16", head_rows=256), [work], Runtime(0))
    assert resident() - before < 300 << 20
    linears = 126 * (2 * 16384**2 + 2 * 16384 * 1024 + 3 * 16384 * 53248)
    others = 2 * 128256 * 16384 + (2 * 126 + 1) * 16384
    bits = {"bf16": 16, "nf4": 4.5}[kind]
    assert estimate.weights == pytest.approx(linears * bits / 8 + 2 * others, rel=1e-3)
