"""Optimizers and learning-rate schedules."""

from typing import Annotated

from pydantic import Field

from snugtune.optim.clip import clip_grad_norm
from snugtune.optim.optimizers import AdafactorConfig, AdamWConfig, LionConfig, SgdConfig
from snugtune.optim.schedules import ConstantConfig, CosineConfig, LinearConfig, WsdConfig, learning_rate

OptimizerConfig = Annotated[AdamWConfig | SgdConfig | LionConfig | AdafactorConfig, Field(discriminator="type")]
ScheduleConfig = Annotated[ConstantConfig | LinearConfig | CosineConfig | WsdConfig, Field(discriminator="type")]

__all__ = [
    "AdafactorConfig",
    "AdamWConfig",
    "ConstantConfig",
    "CosineConfig",
    "LinearConfig",
    "LionConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "SgdConfig",
    "WsdConfig",
    "clip_grad_norm",
    "learning_rate",
]
