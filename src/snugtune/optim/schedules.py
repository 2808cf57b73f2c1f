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


def learning_rate(config: _Schedule, peak: float, step: int, total: int) -> float:
    """The rate of optimizer step `step` (from 0) of `total`."""
    warmup = math.ceil(config.warmup * total) if config.warmup < 1 else int(config.warmup)
    if step < warmup:
        return peak * step / max(1, warmup)
    done = (step - warmup) / max(1, total - warmup)
    if isinstance(config, LinearConfig):
        return peak * max(0.0, 1.0 - done)
    if isinstance(config, CosineConfig):
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    return peak
