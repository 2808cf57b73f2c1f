"""Optimizers and learning-rate schedules."""

from typing import Annotated

from pydantic import Field

from snugtune.optim.clip import clip_grad_norm, norms_in_pieces
from snugtune.optim.optimizers import AdafactorConfig, AdamWConfig, ApolloConfig, GaloreConfig, LionConfig, SgdConfig
from snugtune.optim.schedules import ConstantConfig, CosineConfig, LinearConfig, WsdConfig, learning_rate

OptimizerConfig = Annotated[
    AdamWConfig | SgdConfig | LionConfig | AdafactorConfig | GaloreConfig | ApolloConfig, Field(discriminator="type")
]
ScheduleConfig = Annotated[ConstantConfig | LinearConfig | CosineConfig | WsdConfig, Field(discriminator="type")]

__all__ = [
    "AdafactorConfig",
    "AdamWConfig",
    "ApolloConfig",
    "ConstantConfig",
    "CosineConfig",
    "GaloreConfig",
    "LinearConfig",
    "LionConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "SgdConfig",
    "WsdConfig",
    "clip_grad_norm",
    "learning_rate",
    "norms_in_pieces",
]
