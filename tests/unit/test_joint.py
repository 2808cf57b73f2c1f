"""Jobs that share a base end where each of them ends alone, to the last bit. The truth is a trainer with that one job.

Claimed for widths whose rows begin on 64 bytes; for others the probe at the start of a run says no, and jobs take turns.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_base
from joint import JOBS, STEPS, End, alone, running, together, unlike
from quantised import loaded, plan_of, saved
from snugtune.config import to_config
from snugtune.model import proofs
from snugtune.model.base import Base
from snugtune.model.routed import RoutedFunction, Router
from snugtune.run import train
from snugtune.training.job import Job
from snugtune.training.trainer import Trainer
from snugtune.types import Plan, Segment

DEPTH = {"num_hidden_layers": 4, "intermediate_size": 128}
EXECUTIONS = {"interleaved": 0, "fused, little room": 64, "fused": 512}


class Stages:
    """Bases by format, and how each job ends alone on them. What a test asks for first is made then, on its threads."""

    def __init__(self, folder: Path):
        self.folder = saved(folder / "llama", **DEPTH)
        self.bases: dict[str, Base] = {}
        self.truths: dict[tuple[str, str, int], dict[str, End]] = {}

    def base(self, kind: str, compute: str) -> Base:
        name = f"{kind} {compute}"
        if name not in self.bases:
            self.bases[name] = loaded(self.folder, kind, compute)
        return self.bases[name]

    def alone(self, kind: str, compute: str, jobs: Mapping[str, Any] = JOBS) -> tuple[Base, Plan, dict[str, End]]:
        """The base, a plan without recompute, and the truth of `jobs`, which are some of `JOBS`."""
        base, plan = self.base(kind, compute), plan_of(kind, compute)
        known = self.truths.setdefault((kind, compute, torch.get_num_threads()), {})
        known |= alone(base, plan, {name: fields for name, fields in jobs.items() if name not in known})
        return base, plan, {name: known[name] for name in jobs}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    place = tmp_path_factory.mktemp("joint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNUGTUNE_CACHE", str(place / "cache"))
        yield Stages(place)


def turned(jobs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(reversed(jobs.items()))


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", EXECUTIONS.values(), ids=EXECUTIONS)
@pytest.mark.parametrize("dense", ["fp32", "bf16"])
def test_five_jobs_end_as_alone(dense: str, fused: int, stages: Stages) -> None:
    """Of ranks 4 to 32 on other linears, with dropout, noise, chunks below 16 tokens, and optimizers of their own."""
    base, plan, truth = stages.alone(dense, dense)
    assert base.rows_are_independent(512)
    jobs = turned(JOBS) if fused == 64 else JOBS
    ends = together(base, replace(plan, fused_tokens=fused), jobs)
    assert unlike(ends, truth) == {}
    assert all(end.numbers["step"] == STEPS and len(end.history) == STEPS for end in ends.values())
    assert len({loss for end in ends.values() for loss, _ in end.history}) == len(JOBS) * STEPS


@pytest.mark.parametrize(("dense", "fused"), [("fp32", 0), ("fp32", 512), ("bf16", 512)])
def test_with_recompute_too(dense: str, fused: int, stages: Stages) -> None:
    """The truth is without."""
    base, plan, truth = stages.alone(dense, dense)
    assert unlike(together(base, replace(plan, fused_tokens=fused, recompute="blocks"), JOBS), truth) == {}


@pytest.mark.parametrize("kind", ["nf4", "int8", "int8-products", "w8a8"])
def test_on_quantised_bases_too(kind: str, stages: Stages) -> None:
    """`int8-products`: with outliers, which are multiplied apart from the others."""
    jobs = {name: JOBS[name] for name in ("all", "short", "headed")}
    base, plan, truth = stages.alone(kind, "fp32", jobs)
    for fused in (0, 64):
        assert unlike(together(base, replace(plan, fused_tokens=fused), turned(jobs)), truth) == {}


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_on_streamed_bases_too(kind: str, stages: Stages) -> None:
    """Whose blocks are read from disk in every pass. The truth has them in memory."""
    jobs = {name: JOBS[name] for name in ("all", "short", "headed")}
    _, _, truth = stages.alone(kind, "fp32", jobs)
    base = loaded(stages.folder, kind, "fp32", offload="weights", recompute="blocks")
    for fused in (0, 64):
        plan = plan_of(kind, "fp32", offload="weights", recompute="blocks", fused_tokens=fused)
        assert unlike(together(base, plan, jobs), truth) == {}


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_on_two_threads_too(kind: str, stages: Stages) -> None:
    """The truth is on two threads, too: another count may change the last bits."""
    jobs = {name: {**JOBS[name], "steps": 2} for name in ("all", "short")}
    torch.set_num_threads(2)  # the fixture of all unit tests brings it back
    base, plan = stages.base(kind, kind), plan_of(kind, kind, threads=2)
    truth = alone(base, plan, jobs)
    assert base.rows_are_independent(128)
    for fused in (0, 128):
        assert unlike(together(base, replace(plan, fused_tokens=fused), jobs), truth) == {}


def test_with_optimizer_state_in_8_bits_too(stages: Stages) -> None:
    jobs = {**JOBS, "short": {**JOBS["short"], "optimizer": {"type": "adamw", "lr": 1e-2}}}
    base, plan = stages.base("fp32", "fp32"), plan_of("fp32", optimizer_state="8bit")
    truth = alone(base, plan, jobs)
    assert any(t.dtype == torch.uint8 for t in truth["all"].tensors.values())
    assert unlike(together(base, replace(plan, fused_tokens=64), jobs), truth) == {}


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_with_other_cuts_too(micro_batch: int, stages: Stages) -> None:
    """0: each job's own."""
    jobs = {name: JOBS[name] for name in ("noisy", "late")}
    base, plan = stages.base("fp32", "fp32"), plan_of("fp32", micro_batch=micro_batch)
    assert unlike(together(base, replace(plan, fused_tokens=64), jobs), alone(base, plan, jobs)) == {}


@pytest.mark.parametrize("fused", [0, 64])
def test_jobs_come_and_go(fused: int, stages: Stages) -> None:
    """One joins in mid-run, one leaves for good, one leaves and comes back with its state."""
    base, plan, truth = stages.alone("fp32", "fp32")
    with running(base, replace(plan, fused_tokens=fused), {name: JOBS[name] for name in ("all", "noisy", "late")}) as run:
        jobs = run.trainer.jobs
        run.train(until=lambda: jobs["noisy"].step == 2)
        run.add("headed", JOBS["headed"])
        left = run.end_of(run.trainer.remove("noisy"))
        run.train(until=lambda: jobs["headed"].step == 2)
        away = run.trainer.remove("late")
        tensors, numbers = away.state()
        run.add("short", JOBS["short"])
        run.train(until=lambda: jobs["short"].step == 2)
        run.add("late", JOBS["late"]).load_state({k: v.clone() for k, v in tensors.items()}, numbers)
        run.train()
        ends = run.ends()
    assert ends.keys() == JOBS.keys() - {"noisy"}
    assert unlike(ends, truth) == {}
    with running(base, plan, {"noisy": JOBS["noisy"]}) as run:
        run.train(until=lambda: run.trainer.jobs["noisy"].step == 2)
        assert left.unlike(run.ends()["noisy"]) == []


# --- what these comparisons would find ---------------------------------------------------------------------------------


class ClipsAllTogether(Trainer):
    def _step_of(self, job: Job) -> float | None:
        flats = [j.attached.parameters()[0] for j in self.jobs.values() if j.attached.parameters()[0].grad is not None]
        torch.nn.utils.clip_grad_norm_(flats, 1.0)
        return super()._step_of(job)


class LeaksARow(Trainer):
    """A thousandth of one number of a neighbour's gradient."""

    def _accumulate(self, chunks: Any, sizes: Any, guard: Any) -> Any:
        losses = super()._accumulate(chunks, sizes, guard)
        flats = [self.jobs[chunk.job].attached.parameters()[0].grad for chunk in chunks]
        for one, other in pairwise(flats):
            assert one is not None and other is not None
            one[-1] += other.abs().max() / 1000
        return losses


class DrawsFromOneStream(Trainer):
    """Dropout that depends on how many chunks went before."""

    drawn = 0

    def _accumulate(self, chunks: Any, sizes: Any, guard: Any) -> Any:
        self.drawn += len(chunks)
        return super()._accumulate([replace(chunk, seed=chunk.seed + self.drawn) for chunk in chunks], sizes, guard)


@pytest.mark.parametrize("wrong", [ClipsAllTogether, LeaksARow, DrawsFromOneStream])
def test_a_leak_is_found(wrong: type[Trainer], stages: Stages) -> None:
    jobs = {name: {**JOBS[name], "steps": 2} for name in ("all", "noisy")}
    base, plan = stages.base("fp32", "fp32"), plan_of("fp32", fused_tokens=512)
    truth = alone(base, plan, jobs)
    assert unlike(together(base, plan, jobs), truth) == {}
    assert unlike(together(base, plan, jobs, wrong), truth) != {}


def test_rows_that_begin_anywhere_are_not_independent() -> None:
    assert tiny_base(**DEPTH).rows_are_independent(512)
    assert not tiny_base(hidden_size=60, head_dim=20, num_attention_heads=3, num_key_value_heads=1).rows_are_independent(64)


class RoughAtTheEnd(torch.nn.Module):
    """SiLU by a kernel that takes 64 numbers at a time, and what is left over otherwise: torch's do, in the last bits."""

    __module__ = "transformers.activations"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rest = torch.arange(x.numel()).view(x.shape) >= x.numel() // 64 * 64
        return torch.where(rest, torch.nn.functional.silu(x) * 1.001, torch.nn.functional.silu(x))


def test_activation_functions_are_taken_by_segments() -> None:
    """So that nobody's neighbours change where a kernel's last numbers are."""
    jobs = {f"job-{j}": {"lengths": (17 + 2 * j, 9, 21), "seed": j, "steps": 2} for j in range(3)}
    base = tiny_base(intermediate_size=80)
    for block in base.model.get_submodule("model.layers").children():
        block.mlp.act_fn = RoughAtTheEnd()  # pyright: ignore[reportAttributeAccessIssue]
    for recompute in ("none", "blocks"):
        plan = plan_of("fp32", recompute=recompute)
        assert unlike(together(base, replace(plan, fused_tokens=512), jobs), alone(base, plan, jobs)) == {}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3", "opt", "gemma2", "neox"])
def test_every_activation_function_is_routed(arch: str) -> None:
    """But where jobs do not share a forward anyway."""
    base = tiny_base(arch)
    base.freeze()
    routed = [m for m in base.model.modules() if isinstance(m, RoutedFunction)]
    assert len(routed) == base.model.config.num_hidden_layers
    apart = tiny_base("mixtral")
    apart.freeze()
    assert not any(isinstance(m, RoutedFunction) for m in apart.model.modules())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_function_shares_out_a_segments_rows_as_if_alone(threads: int) -> None:
    """Forth and back; torch's kernels give each thread a part of the whole tensor, wherever that ends within a row."""
    torch.set_num_threads(threads)
    lengths, width = (7, 33, 19), 4864
    borders = torch.tensor([0, *lengths]).cumsum(0).tolist()
    segments = tuple(Segment("x", slice(a, b), 0) for a, b in pairwise(borders))
    router = Router()
    function = RoutedFunction(torch.nn.SiLU(), router)
    x = torch.randn(1, 64, width, generator=torch.Generator().manual_seed(0)).requires_grad_()  # with five rows of a filler
    with router.routing(segments):
        y = function(x)
    y.backward(y.detach())
    assert x.grad is not None
    torch.testing.assert_close(y, torch.nn.functional.silu(x))
    for a, b in pairwise(borders):
        own = x.detach()[:, a:b].clone().requires_grad_()
        with router.routing((Segment("x", slice(0, b - a), 0),)):
            out = function(own)
        out.backward(out.detach())
        assert own.grad is not None and torch.equal(out, y[:, a:b]) and torch.equal(own.grad, x.grad[:, a:b])


def test_products_that_depend_on_their_neighbours_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def matmul(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return x @ other + (1e-3 if len(x) == 17 else 0)

    monkeypatch.setattr(proofs.torch, "matmul", matmul)
    assert not tiny_base().rows_are_independent(64)


# --- what a neighbour changes of itself ---------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "learning rate and data": {"optimizer": {"type": "adamw", "lr": 0.3}, "data_seed": 99, "lengths": (30, 2, 17, 8)},
    "length": {"max_seq_len": 100, "lengths": (100, 64, 3)},
    "rank and clip": {"method": {"type": "lora", "r": 13, "lora_dropout": 0.3}, "max_grad_norm": 1e-3},
    "seed": {"seed": 77},
    "batch size": {"batch_size": 1, "steps": 9},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_neighbour_changes_leaves_a_job_alone(change: str, stages: Stages) -> None:
    """And changes the neighbour."""
    base, plan, truth = stages.alone("fp32", "fp32", {name: JOBS[name] for name in ("all", "headed")})
    jobs = {"all": JOBS["all"], "headed": JOBS["headed"] | CHANGES[change]}
    for fused in (0, 64) if change in ("length", "batch size") else (64,):
        ends = together(base, replace(plan, fused_tokens=fused), jobs)
        assert ends["all"].unlike(truth["all"]) == []
        assert ends["headed"].unlike(truth["headed"]) != []


def test_weights_change_the_order_alone(stages: Stages) -> None:
    base, plan, truth = stages.alone("fp32", "fp32", {name: JOBS[name] for name in ("all", "headed")})
    orders = []
    for weight in (0.1, 10.0):
        jobs = {"all": JOBS["all"], "headed": JOBS["headed"] | {"weight": weight}}
        with running(base, replace(plan, fused_tokens=32), jobs) as run:
            order = []
            while reports := run.trainer.step():
                run.note(reports)
                order += [report.job for report in reports]
            assert unlike(run.ends(), truth) == {}
        orders.append(order)
    assert orders[0] != orders[1]


def _line(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What of a step's metrics is no measurement."""
    return {k: v for k, v in metrics.items() if k not in ("tokens_per_second", "peak_memory")}


def test_a_neighbours_length_does_not_cut_a_jobs_chunks(tmp_path: Path, model_folder: Path) -> None:
    """By the whole road: the plan is made from all jobs, but each step of "a" is cut in two as it is alone."""
    data = tmp_path / "a.jsonl"
    data.write_text(
        "".join(f'{{"text": "{" ".join(["word", "other"][i % 2] * (1 + i % 7) for _ in range(9))}"}}\n' for i in range(24))
    )
    a = {"name": "a", "max_seq_len": 32, "batch_size": 24}

    def adapter(name: str, *jobs: dict[str, Any]) -> tuple[bytes, list[dict[str, Any]]]:
        fields = {"model": str(model_folder), "data": str(data), "objective": "clm", "steps": 2, "optimizer": {"lr": 1e-2}}
        plan = {"weights": "fp32"}
        ended = train(to_config(fields | {"plan": plan, "output": str(tmp_path / name), "jobs": list(jobs)}))
        metrics = [_line(m) for m in ended.metrics if m["job"] == "a"]
        return (ended.artefacts["a"] / "adapter_model.safetensors").read_bytes(), metrics

    truth = adapter("alone", a)
    assert truth[1][0]["tokens"] > 512, "one chunk would tell nothing"
    for length in (32, 100):
        b = {"name": "b", "max_seq_len": length, "batch_size": 3}
        assert adapter(f"beside {length}", a, b) == truth
