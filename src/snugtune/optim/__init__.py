"""Optimizers and learning-rate schedules."""

from typing import Annotated

from pydantic import Field

from snugtune.optim.adamw import AdamWConfig
from snugtune.optim.clip import clip_grad_norm
from snugtune.optim.schedules import ConstantConfig, CosineConfig, LinearConfig, WsdConfig, learning_rate

OptimizerConfig = AdamWConfig
ScheduleConfig = Annotated[ConstantConfig | LinearConfig | CosineConfig | WsdConfig, Field(discriminator="type")]

__all__ = [
    "AdamWConfig",
    "ConstantConfig",
    "CosineConfig",
    "LinearConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "WsdConfig",
    "clip_grad_norm",
    "learning_rate",
]
