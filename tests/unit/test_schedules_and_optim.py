"""Learning rates against transformers' schedulers; AdamW against its formula written out in fp64."""

import math

import pytest
import torch
from torch import nn
from transformers import get_scheduler
from transformers.optimization import get_wsd_schedule

from snugtune.optim import AdamWConfig, ConstantConfig, CosineConfig, LinearConfig, WsdConfig, learning_rate

KINDS = {"constant_with_warmup": ConstantConfig, "linear": LinearConfig, "cosine": CosineConfig}


def rates_of_transformers(name: str, peak: float, warmup: int, total: int) -> list[float]:
    """The rate in force at each optimizer step of a plain torch loop."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates: list[float] = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("total", [1, 2, 3, 10, 97])
@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 97, 200])
@pytest.mark.parametrize("name", KINDS)
def test_rates_are_those_of_transformers(name: str, warmup: int, total: int):
    """Also with a warm-up as long as the run, or longer."""
    config = KINDS[name](warmup=float(warmup))
    ours = [learning_rate(config, 3e-4, step, total) for step in range(total)]
    assert ours == pytest.approx(rates_of_transformers(name, 3e-4, warmup, total), rel=1e-12, abs=1e-20)


@pytest.mark.parametrize(
    ("fraction", "total", "steps"), [(0.0, 50, 0), (0.25, 40, 10), (0.03, 100, 3), (0.03, 20, 1), (0.5, 5, 3), (0.001, 1, 1)]
)
@pytest.mark.parametrize("name", KINDS)
def test_a_warmup_below_one_is_a_part_of_the_run(name: str, fraction: float, total: int, steps: int):
    """Rounded up to whole steps, as transformers does; from 1 on it is a number of steps."""
    ours = [learning_rate(KINDS[name](warmup=fraction), 1.0, step, total) for step in range(total)]
    assert ours == pytest.approx(rates_of_transformers(name, 1.0, steps, total), rel=1e-12, abs=1e-20)


@pytest.mark.parametrize("total", [1, 3, 10, 97])
@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0.0), (0, 0.2), (2, 3.0), (1, 40.0), (3, 0.5)])
@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_wsd_is_that_of_transformers(shape, warmup: int, cooldown: float, total: int):
    """Where the parts fit into the run; and the last step is never at the full rate when it is to cool down."""
    config = WsdConfig(warmup=float(warmup), cooldown=cooldown, shape=shape)
    decay = math.ceil(cooldown * total) if cooldown < 1 else int(cooldown)
    ours = [learning_rate(config, 3e-4, step, total) for step in range(total)]
    assert all(0 <= rate <= 3e-4 for rate in ours)
    if warmup + decay > total:
        return
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_wsd_schedule(optimizer, warmup, decay, total, decay_type=shape)
    truth = []
    for _ in range(total):
        truth.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert ours == pytest.approx(truth, rel=1e-9, abs=1e-20)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize(("warmup", "cooldown", "total"), [(5, 10.0, 10), (7, 0.5, 10), (3, 97.0, 20)])
def test_wsd_of_a_run_too_short_for_both_parts_cools_down_from_its_peak(shape, warmup: int, cooldown: float, total: int):
    """Without a jump: the rate rises to the peak, and falls from there as in a run whose cool-down is what is left."""
    short, fitting = (WsdConfig(warmup=float(warmup), cooldown=c, shape=shape) for c in (cooldown, float(total - warmup)))
    rates = [learning_rate(short, 1.0, step, total) for step in range(total)]
    assert rates == [learning_rate(fitting, 1.0, step, total) for step in range(total)]
    assert rates[warmup] == 1.0 and rates[:warmup] == [step / warmup for step in range(warmup)]


def test_one_step_of_warmup_is_a_number_and_not_the_whole_run():
    assert learning_rate(LinearConfig(warmup=1), 1.0, 1, 101) == 1.0


def reference_adamw(values: torch.Tensor, gradients: list[torch.Tensor], rates: list[float], config: AdamWConfig) -> torch.Tensor:
    """Algorithm 2 of Loshchilov and Hutter (arXiv 1711.05101), the decay scaled by the rate as torch does, element by element."""
    beta1, beta2 = config.betas
    result = []
    for i, value in enumerate(values.tolist()):
        m = v = 0.0
        for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
            g = float(gradient[i])
            value *= 1 - rate * config.weight_decay
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            value -= rate * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + config.eps)
        result.append(value)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(
    "config",
    [
        AdamWConfig(),
        AdamWConfig(lr=0.02, weight_decay=0.1),
        AdamWConfig(lr=0.02, betas=(0.8, 0.95), eps=1e-3),
        AdamWConfig(lr=0.02, betas=(0.0, 0.5), weight_decay=0.5),
    ],
    ids=["defaults", "decay", "betas and eps", "no momentum"],
)
def test_adamw_is_the_formula(config: AdamWConfig, dtype: torch.dtype, tolerance: float):
    """Twelve steps with a rate that changes, from zero gradients to large ones. The start is subtracted: steps are small."""
    torch.manual_seed(0)
    start = torch.randn(17, dtype=torch.float64)
    gradients = [torch.randn(17, dtype=torch.float64) * 10.0 ** (t % 5 - 3) for t in range(12)]
    gradients[3] = torch.zeros(17, dtype=torch.float64)
    rates = [config.lr * (t + 1) / 12 for t in range(12)]
    weight = nn.Parameter(start.to(dtype, copy=True))
    optimizer = config.build([weight])
    for gradient, rate in zip(gradients, rates, strict=True):
        weight.grad = gradient.to(dtype)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    wanted = reference_adamw(start.to(dtype).double(), [g.to(dtype).double() for g in gradients], rates, config)
    assert torch.allclose(weight.detach().double(), wanted, rtol=tolerance, atol=tolerance)
    assert (wanted - start).abs().max() > 1e-3 or config.lr < 1e-3, "the reference moved"


def test_an_optimizer_holds_no_decay_unless_asked():
    """A parameter with a gradient of zero stays where it is."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdamWConfig(lr=0.1).build([weight])
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3))
