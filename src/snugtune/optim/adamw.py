"""AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101): torch's fused implementation."""

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from snugtune.schema import Config

Decay = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(Config):
    """AdamW."""

    type: Literal["adamw"] = "adamw"
    lr: float = Field(default=2e-4, gt=0, description="peak learning rate")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), description="decay rates of the two moments, each in [0, 1)")
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )
