"""Optimizer state in 8 bits: what it is worth, what it weighs, and that nothing of it is lost or shared."""

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from conftest import NoWatch, relative, sequences, tiny_base
from snugtune.config import JobConfig, to_config
from snugtune.errors import InputError
from snugtune.memory.plan import make_plan
from snugtune.model.base import Base
from snugtune.optim import AdafactorConfig, AdamWConfig, ApolloConfig, GaloreConfig, LionConfig, SgdConfig
from snugtune.optim.narrow import PIECE, dequantize, dynamic_map, quantize
from snugtune.training.examples import JobData
from snugtune.training.job import Job, start_job
from snugtune.training.trainer import Trainer
from snugtune.types import Example, Plan

CPU = torch.device("cpu")
KINDS = {
    "adamw": AdamWConfig(lr=1e-3, weight_decay=0.1),
    "lion": LionConfig(lr=1e-3, weight_decay=0.1),
    "sgd": SgdConfig(lr=0.1, weight_decay=0.01),
    "nesterov": SgdConfig(lr=0.1, nesterov=True),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(values: Tensor, signed: bool) -> Tensor:
    """The truth about rounding: among all 256 numbers of the map, scaled by the block's largest, the nearest."""
    blocks = values.split(256)
    numbers = dynamic_map(signed, CPU).double()
    if not signed:
        numbers = numbers[1:]  # zero is not among them
    rounded = [numbers[(b.double()[:, None] / b.abs().max() - numbers).abs().argmin(1)] * b.abs().max() for b in blocks]
    return torch.cat(rounded).float()


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_go_to_the_nearest_of_the_map(signed: bool) -> None:
    """Over many magnitudes: a thousandth of a block's largest is kept as well as the largest."""
    values = noise(3000) * torch.logspace(-6, 0, 3000)[torch.randperm(3000, generator=torch.Generator().manual_seed(1))]
    values = values if signed else values**2
    codes, scales = quantize(values, signed)
    assert codes.dtype == torch.uint8 and codes.shape == (3000,) and scales.shape == (12,)
    ours, truth = dequantize(codes, scales, signed), nearest(values, signed)
    largest = scales.repeat_interleave(256)[:3000]
    further = (ours - values).abs() - (truth - values).abs()
    assert (further <= 2**-10 * values.abs() + 1e-7 * largest).all()
    assert torch.equal(
        ours, torch.ops.bitsandbytes.dequantize_blockwise(codes, scales, dynamic_map(signed, CPU), 256, ours.dtype)
    )


def test_zero_stays_zero_where_it_has_a_sign_and_is_never_a_denominator() -> None:
    values = torch.zeros(600)
    values[3], values[300] = 1.0, 1e-30
    signed, squared = (dequantize(*quantize(values, s), s) for s in (True, False))
    assert torch.equal(signed, values)
    assert (squared[:512] > 0).all() and torch.equal(squared[512:], values[512:])


def steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter, count: int, sparse: bool = False, begin: int = 0) -> None:
    """Noisy gradients of many magnitudes. `sparse`: half of them are zero in every other step."""
    for index in range(begin, begin + count):
        gradient = noise(*weight.shape, seed=10 + index) * noise(*weight.shape, seed=1).abs()
        if sparse and index % 2:
            gradient[noise(*weight.shape, seed=100 + index) > 0] = 0.0
        weight.grad = gradient
        optimizer.step()


def adam_by_hand(weight: Tensor, gradients: list[Tensor], c: AdamWConfig) -> Tensor:
    """AdamW as its paper has it, its moments brought to the nearest number of the map after each step."""
    weight, m, v, (b1, b2) = weight.clone(), torch.zeros(()), torch.zeros(()), c.betas
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        weight *= 1 - c.lr * c.weight_decay
        weight -= c.lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + c.eps)
        m, v = nearest(m, True), nearest(v, False)
    return weight


def test_adamw_is_adamw_with_rounded_moments() -> None:
    config, start = AdamWConfig(lr=1e-2, weight_decay=0.1), noise(5000)
    weight = nn.Parameter(start.clone())
    optimizer, gradients = config.build([weight], "8bit"), [noise(5000, seed=s) for s in range(1, 6)]
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    truth = adam_by_hand(start, gradients, config)
    assert relative(weight - start, truth - start) < 5e-3  # numbers between two of the map may go to either
    assert ((weight - truth).abs() > 1e-5).float().mean() < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", [False, True])
def test_steps_are_close_to_those_with_state_in_fp32(kind: str, sparse: bool) -> None:
    """And no single number is ever thrown further than the optimizer would move one."""
    config, moved = KINDS[kind], []
    for state in ("fp32", "8bit"):
        weight = nn.Parameter(noise(70, 100))
        optimizer, largest = config.build([weight], state), 0.0
        for index in range(30):
            before = weight.detach().clone()
            steps(optimizer, weight, 1, sparse, begin=index)
            largest = max(largest, float((weight.detach() - before).abs().max()))
        moved.append((weight.detach() - noise(70, 100), largest))
    (truth, far), (ours, ours_far) = moved
    assert relative(ours, truth) < 0.15 and ours_far < 2 * far


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_what_has_no_gradient_does_not_move(kind: str) -> None:
    """Nor do its neighbours in a block: an embedding's rows stay where they are until their token comes."""
    config = KINDS[kind].model_copy(update={"weight_decay": 0.0})
    weight = nn.Parameter(noise(50, 100))
    optimizer = config.build([weight], "8bit")
    for seed in range(5):
        gradient = noise(50, 100, seed=seed)
        gradient[1::2] = 0.0
        weight.grad = gradient
        optimizer.step()
    assert torch.equal(weight[1::2], noise(50, 100)[1::2]) and not (weight[::2] == noise(50, 100)[::2]).any()


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_pieces_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight larger than a piece is stepped as if it were whole, whatever the order it lies in."""
    assert PIECE % 256 == 0
    results = []
    for piece, turned in ((1 << 18, False), (1024, False), (1024, True)):
        monkeypatch.setattr("snugtune.optim.narrow.PIECE", piece)
        start = noise(60, 90)
        weight = nn.Parameter(start.t().contiguous().t() if turned else start)
        assert weight.is_contiguous() is not turned
        steps(KINDS[kind].build([weight], "8bit"), weight, 4)
        results.append(weight.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize(("kind", "bytes_a_weight"), [("adamw", 2), ("lion", 1), ("sgd", 1)])
def test_what_it_weighs(kind: str, bytes_a_weight: int) -> None:
    """A byte a number, and four for the scale of 256; small weights keep their state in fp32."""
    large, small = nn.Parameter(noise(10_000)), nn.Parameter(noise(4095))
    optimizer = KINDS[kind].build([large, small], "8bit")
    for weight in (large, small):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    counted = {w: sum(t.nbytes for t in optimizer.state[w].values() if t.dim()) for w in (large, small)}
    assert counted[large] == bytes_a_weight * (10_000 + 4 * math.ceil(10_000 / 256))
    assert counted[small] == bytes_a_weight * 4 * 4095
    assert sum(t.nbytes for t in optimizer.state[large].values()) <= counted[large] + 4  # the count of steps


@pytest.mark.parametrize("kind", KINDS)
def test_small_weights_are_stepped_as_ever(kind: str) -> None:
    weights = [nn.Parameter(noise(40, 100)) for _ in range(2)]
    for weight, state in zip(weights, ("fp32", "8bit"), strict=True):
        steps(KINDS[kind].build([weight], state), weight, 5)
    assert torch.equal(*weights)


def spoiled(entry: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    codes = entry["exp_avg"]
    return [
        entry | {"exp_avg": codes[:-1]},
        entry | {"exp_avg": codes.float()},
        {k: v for k, v in entry.items() if k != "exp_avg_sq.scale"},
    ]


def test_state_of_other_weights_is_refused() -> None:
    weight = nn.Parameter(noise(5000))
    optimizer = AdamWConfig().build([weight], "8bit")
    steps(optimizer, weight, 1)
    saved = optimizer.state_dict()
    for entry in spoiled(saved["state"][0]):
        with pytest.raises(ValueError, match="8 bits"):
            optimizer.load_state_dict(saved | {"state": {0: entry}})
    with pytest.raises(ValueError, match="more weights"):
        optimizer.load_state_dict(saved | {"state": {0: saved["state"][0], 1: saved["state"][0]}})


# --- in jobs ----------------------------------------------------------------------------------------------------------


def job(base: Base, name: str = "default", seed: int = 0, **fields: Any) -> Job:
    data = JobData(tuple(Example(ids, torch.ones(len(ids)).index_fill(0, torch.tensor(0), 0.0), "x") for ids in sequences(9, 14)))
    plain = {"name": name, "data": "x.jsonl", "batch_size": 2, "steps": 6, "max_seq_len": 16, "seed": seed}
    plan = Plan("cpu", "fp32", 1, "none", 512, 1, "fp32", optimizer_state="8bit")
    return start_job(base, JobConfig.model_validate(plain | {"optimizer": {"lr": 1e-2}} | fields), data, plan)


def trainer(base: Base, *jobs: Job) -> Trainer:
    made = Trainer(base, Plan("cpu", "fp32", 1, "none", 512, 1, "fp32", optimizer_state="8bit"), NoWatch())
    for each in jobs:
        made.add(each)
    return made


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


METHODS = {"lora": {}, "full": {"method": "full"}, "lion": {"optimizer": {"type": "lion"}}, "sgd": {"optimizer": "sgd"}}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_job_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """Through the bytes of a file, as a checkpoint has it; in full fine-tuning with masters too."""
    whole = _fresh(dtype, METHODS[name])
    for _ in range(3):
        whole.step()
    tensors, numbers = whole.jobs["default"].state()
    stored = load(save({k: v.contiguous() for k, v in tensors.items()}))
    assert any(v.dtype == torch.uint8 for v in stored.values())
    again = _fresh(dtype, METHODS[name])
    again.jobs["default"].load_state(stored, numbers)
    for _ in range(3):
        assert [m.loss for m in whole.step()] == [m.loss for m in again.step()]
    assert equal(whole.jobs["default"].state()[0], again.jobs["default"].state()[0])


def _fresh(dtype: torch.dtype, fields: dict[str, Any]) -> Trainer:
    base = tiny_base(dtype=dtype)
    return trainer(base, job(base, **fields))


def test_jobs_do_not_see_each_others_state() -> None:
    """Another job's rate, its steps and its going leave this one's bits alone."""
    alone, shared = tiny_base(), tiny_base()
    one = trainer(alone, job(alone, "a"))
    two = trainer(shared, job(shared, "a"), job(shared, "b", seed=3, optimizer={"type": "lion", "lr": 1.0}))
    for index in range(5):
        one.step()
        while two.jobs["a"].step < one.jobs["a"].step:
            two.step()
        if index == 2:
            two.remove("b")
    assert equal(one.jobs["a"].state()[0], two.jobs["a"].state()[0])


def test_a_step_that_is_skipped_leaves_the_state_alone() -> None:
    base = tiny_base()
    runs = trainer(base, job(base))
    runs.step()
    running = runs.jobs["default"]
    before = {k: v.clone() for k, v in running.state()[0].items() if k.startswith("optimizer.")}
    weights = running.attached.parameters()[0]
    kept = weights.detach().clone()
    weights.data.fill_(float("nan"))
    (metrics,) = runs.step()
    weights.data.copy_(kept)
    assert metrics.skipped
    assert equal(before, {k: v for k, v in running.state()[0].items() if k.startswith("optimizer.")})


@pytest.mark.parametrize(
    ("optimizer", "word"),
    [
        (AdafactorConfig(), "small already"),
        (GaloreConfig(), "of low rank"),
        (ApolloConfig(), "of low rank"),
        (SgdConfig(momentum=0.0), "without momentum"),
    ],
)
def test_optimizers_without_such_a_state_are_refused(optimizer: Any, word: str) -> None:
    config = {"model": "demo", "data": "x.jsonl", "output": "o", "device": "cpu", "plan": {"optimizer_state": "8bit"}}
    with pytest.raises(InputError, match=word) as refused:
        make_plan(to_config(config | {"optimizer": optimizer.model_dump()}))
    assert "plan.optimizer_state: 8bit" in str(refused.value) and "use fp32, or adamw" in str(refused.value)
    assert make_plan(to_config(config)).plan.optimizer_state == "8bit"
    with pytest.raises(InputError, match="use 8bit"):
        make_plan(to_config(config | {"plan": {"optimizer_state": "paged"}}))


@pytest.mark.parametrize("kind", KINDS)
def test_state_in_host_memory_is_the_same_state(kind: str) -> None:
    """`paged` on a CPU, where the host is the device: what moves there and back stays what it is."""
    weights = [nn.Parameter(noise(50, 100)) for _ in range(2)]
    for weight, state in zip(weights, ("8bit", "paged"), strict=True):
        steps(KINDS[kind].build([weight], state), weight, 3)
    assert torch.equal(*weights)
