"""What docs/precision.md and `doctor --precision` say of number formats, against the formats themselves."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import NoWatch, tiny_base
from snugtune.config import RunConfig, to_config
from snugtune.memory.plan import make_plan
from snugtune.memory.precision import precision, weight_bits
from snugtune.model.formats import Bits4, Format, Int8
from snugtune.model.load import DTYPES
from snugtune.training.examples import JobData
from snugtune.training.job import start_job
from snugtune.training.trainer import Trainer
from snugtune.types import Example

DOC = (Path(__file__).parents[2] / "docs" / "precision.md").read_text(encoding="utf-8")


def _table(first: str) -> dict[str, list[str]]:
    """The rows of the table whose first row begins with `first`, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in DOC.splitlines() if line.startswith("|")]
    start = next(i for i, row in enumerate(rows) if row[0] == first)
    end = next((i for i, row in enumerate(rows[start:], start) if row[0] in ("format", "base")), len(rows))
    return {row[0]: row[1:] for row in rows[start:end]}


def _number(text: str) -> float:
    power = re.fullmatch(r"2\^(-?\d+)(?: relative)?", text)
    return 2.0 ** int(power[1]) if power else float(text)


@pytest.mark.parametrize("name", DTYPES)
def test_ranges_of_floats(name: str) -> None:
    largest, normal, subnormal, step, rounding = map(_number, _table("fp32")[name])
    dtype = DTYPES[name]  # pyright: ignore[reportArgumentType]
    facts = torch.finfo(dtype)
    assert largest == pytest.approx(facts.max, rel=1e-4)
    assert (normal, step) == (facts.smallest_normal, facts.eps)
    tiny = torch.tensor([subnormal, subnormal * 0.49], dtype=torch.float64).to(dtype)
    assert tiny[0] == subnormal and tiny[1] == 0
    x = 1 + torch.rand(1 << 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    worst = ((x.to(dtype).double() - x).abs() / x).max()
    assert 0.9 * rounding < worst <= rounding
    assert torch.tensor(1.0, dtype=dtype) + rounding == 1.0  # ties go to even


NARROW: Mapping[str, Format] = {"int8": Int8(), "nf4": Bits4(), "nf4, `double_quant`": Bits4(double=True)}


@pytest.mark.parametrize("name", NARROW)
def test_errors_and_bits_of_narrow_formats(name: str) -> None:
    bits, worst, relative = _table("int8")[name][2:]
    format = NARROW[name]
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    parts = format.encode(weight)
    decoded = format.decode(parts, (256, 4096), torch.float32)
    kept = 8 * sum(part.nbytes for key, part in parts.items() if key != "nested_code") / weight.numel()  # a constant
    assert kept == pytest.approx(float(bits), abs=0.005)
    assert float((decoded - weight).norm() / weight.norm()) == pytest.approx(float(relative), rel=0.01)
    share = re.match(r"1/(\d+)|(0\.\d+)", worst)
    if share is not None:
        limit = 1 / int(share[1]) if share[1] else float(share[2])
        shape = (256, 1, 4096) if name == "int8" else (256, 64, 64)
        largest = weight.view(shape).abs().amax(-1, keepdim=True)
        error = ((decoded - weight).view(shape).abs() / largest).max()
        assert 0.98 * limit < error <= limit * 1.0005


@pytest.mark.parametrize("plan", [{"weights": "int8"}, {"weights": "nf4"}, {"weights": "nf4", "double_quant": True}])
def test_bits_of_a_plan(plan: dict[str, object]) -> None:
    made = make_plan(_config(plan=plan)).plan
    name = "int8" if plan["weights"] == "int8" else "nf4, `double_quant`" if "double_quant" in plan else "nf4"
    assert weight_bits(made) == pytest.approx(float(_table("int8")[name][2]), abs=0.005)


def _config(**fields: object) -> RunConfig:
    return to_config({"model": "m", "data": "d", "output": "o", "device": "cpu", **fields})


def test_released_gradients_are_no_tensors_that_are_kept() -> None:
    config = _config(method="full", max_grad_norm=None, plan={"gradients": "released"})
    (row,) = (row for row in precision(config, make_plan(config).plan) if row.what == "gradients of what trains")
    assert row.bits is None and "one weight's at a time" in row.note


@pytest.mark.parametrize("optimizer", ["adamw", "galore", "apollo"])
@pytest.mark.parametrize("method", ["lora", "full", "rotate"])
@pytest.mark.parametrize("width", ["fp32", "bf16"])
def test_rows_are_those_of_real_tensors(width: str, method: str, optimizer: str) -> None:
    """Formats of weights, gradients, optimizer state, activations and losses, looked at while a step is taken."""
    rank = {} if optimizer == "adamw" else {"rank": 4}
    config = _config(method=method, plan={"weights": width}, optimizer={"type": optimizer, **rank})
    plan = make_plan(config).plan
    rows = {row.what: row for row in precision(config, plan)}
    base = tiny_base("llama", DTYPES[width])  # pyright: ignore[reportArgumentType]
    example = Example(torch.arange(5, 25), torch.tensor([0.0] + [1.0] * 19), "x:1")
    job = start_job(base, config.resolved_jobs()[0], JobData((example,) * 16), plan)
    trainer = Trainer(base, plan, NoWatch())
    trainer.add(job)
    seen: dict[str, set[torch.dtype]] = {"activations": set(), "gradients": set()}

    def look(module: object, inputs: object, output: Tensor) -> None:
        seen["activations"].add(output.dtype)
        output.register_hook(lambda grad: seen["gradients"].add(grad.dtype))

    block = base.model.get_submodule("model.layers.1.mlp.down_proj")
    block.register_forward_hook(look)
    losses = trainer.forward_backward({job.name: job.chunks()})
    trainer.optim_step([job.name])
    compute = DTYPES[rows["activations and their gradients"].computed]  # pyright: ignore[reportArgumentType]
    assert seen == {"activations": {compute}, "gradients": {compute}}
    assert base.model.get_input_embeddings().weight.dtype == DTYPES[rows["embeddings, output head"].kept]  # pyright: ignore
    assert losses[job.name].dtype == DTYPES[rows["logits, losses"].kept]  # pyright: ignore[reportArgumentType]
    trained = rows["lora weights" if method == "lora" else "master weights" if width == "bf16" else "weights that train"]
    for parameter in job.attached.parameters():
        assert parameter.dtype == DTYPES[trained.kept]  # pyright: ignore[reportArgumentType]
        assert parameter.grad is not None and parameter.grad.dtype == DTYPES[rows["gradients of what trains"].kept]  # pyright: ignore
    assert optimizer == "adamw" or "rank 4" in rows[f"{optimizer} state"].note
    assert ("weights of blocks in turns" in rows) == (method == "rotate")
    moments = [t for state in job.optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
    assert moments and {t.dtype for t in moments} == {DTYPES[rows[f"{optimizer} state"].kept]}  # pyright: ignore[reportArgumentType]
