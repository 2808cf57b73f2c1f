"""Clipping against the textbook in fp64, where one flat buffer holds millions of numbers."""

import math

import pytest
import torch
from torch import nn

from snugtune.optim import clip_grad_norm


def _parameter(gradient: torch.Tensor | None) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(() if gradient is None else gradient.shape))
    parameter.grad = gradient
    return parameter


def test_the_norm_of_a_large_buffer_is_exact():
    """Torch's own fp32 norm of one such tensor is off by more than 1e-4 on CPU."""
    gradient = torch.randn(5_000_000, generator=torch.Generator().manual_seed(0))
    norm = clip_grad_norm([_parameter(gradient)], math.inf)
    assert float(norm) == pytest.approx(float(gradient.double().norm()), rel=2e-6)


@pytest.mark.parametrize("limit", [0.5, 1e6, math.inf])
def test_gradients_are_scaled_to_the_limit(limit: float):
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(shape, generator=generator) for shape in ((3, 5), (70_000,), ())]
    parameters = [_parameter(g.clone()) for g in gradients]
    truth = float(torch.cat([g.double().flatten() for g in gradients]).norm())
    assert float(clip_grad_norm([*parameters, _parameter(None)], limit)) == pytest.approx(truth, rel=1e-6)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * min(1.0, limit / truth), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad: float):
    gradient = torch.ones(100_000)
    gradient[77_777] = bad
    assert not math.isfinite(float(clip_grad_norm([_parameter(gradient)], 1.0)))
