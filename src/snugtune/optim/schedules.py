"""Learning-rate schedules as pure functions of the step. Formulas as in transformers' `optimization.py`."""

import math
from typing import Literal

from pydantic import Field

from snugtune.schema import Config


class _Schedule(Config):
    warmup: float = Field(
        default=0.0, ge=0, description="linear warm-up: below 1 a fraction of all steps, else a number of steps"
    )


class ConstantConfig(_Schedule):
    """The peak rate throughout, after warm-up."""

    type: Literal["constant"] = "constant"


class LinearConfig(_Schedule):
    """From the peak down to zero in a straight line."""

    type: Literal["linear"] = "linear"


class CosineConfig(_Schedule):
    """From the peak down to zero along half a cosine."""

    type: Literal["cosine"] = "cosine"


class WsdConfig(_Schedule):
    """Warm-up, a stable peak, and a cool-down to zero (MiniCPM, arXiv 2404.06395); also called constant with cooldown."""

    type: Literal["wsd"] = "wsd"
    cooldown: float = Field(default=0.1, ge=0, description="the last part: below 1 a fraction of all steps, else steps")
    shape: Literal["linear", "cosine", "1-sqrt"] = Field(default="linear", description="of the cool-down")


def learning_rate(config: _Schedule, peak: float, step: int, total: int) -> float:
    """The rate of optimizer step `step` (from 0) of `total`."""
    warmup = _steps(config.warmup, total)
    if step < warmup:
        return peak * step / max(1, warmup)
    done = (step - warmup) / max(1, total - warmup)
    if isinstance(config, LinearConfig):
        return peak * max(0.0, 1.0 - done)
    if isinstance(config, CosineConfig):
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    if isinstance(config, WsdConfig):
        length = min(_steps(config.cooldown, total), max(0, total - warmup))  # a run too short for both cools down from its peak
        return peak * _cooled(config, step - (total - length), length)
    return peak


def _steps(amount: float, total: int) -> int:
    return math.ceil(amount * total) if amount < 1 else int(amount)


def _cooled(config: WsdConfig, step: int, length: int) -> float:
    """The part of the peak that is left at step `step` of a cool-down of `length`; 1 before it."""
    if step <= 0:
        return 1.0
    done = min(1.0, step / length)
    if config.shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - (math.sqrt(done) if config.shape == "1-sqrt" else done)
