"""Full fine-tuning: every weight of the base trains.

In bf16 or fp16 the optimizer works on fp32 master weights; gradients leave the base as soon as they are made and
accumulate in fp32 (mixed-precision training, Micikevicius et al. 2017, arXiv 1710.03740).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from snugtune.model.base import Base
from snugtune.schema import Config


class FullConfig(Config):
    """Train every weight of the base."""

    type: Literal["full"] = "full"


class FullAttached:
    """The masters of the weights that train (the weights themselves where they are fp32) and the way back into the base.

    `names`: which weights; None: all. The others are frozen.
    """

    def __init__(self, base: Base, job: str, names: Collection[str] | None = None):
        self.base, self.job = base, job
        base.model.requires_grad_(False)
        weights = base.model.named_parameters()  # tied weights appear once
        self.weights: dict[str, nn.Parameter] = {n: w for n, w in weights if names is None or n in names}
        self.masters: dict[str, nn.Parameter] = {}
        self.hooks: list[Any] = []
        for name, weight in self.weights.items():
            weight.requires_grad_()
            master = weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            master.grad = torch.zeros_like(master)
            if master is not weight:
                self.hooks.append(weight.register_post_accumulate_grad_hook(_collect_into(master)))
            self.masters[name] = master

    def parameters(self) -> list[nn.Parameter]:
        return list(self.masters.values())

    def matrices(self) -> list[Tensor]:
        return list(self.masters.values())

    def zero_grad(self) -> None:
        for name, master in self.masters.items():
            assert master.grad is not None
            if master is not self.weights[name]:
                self.weights[name].grad = None  # of a step that broke off before it was collected
            master.grad.zero_()

    def drop_grad(self) -> None:
        """They stay: as large as the model, they take long to make."""

    def publish(self) -> None:
        with torch.no_grad():
            for name, master in self.masters.items():
                if master is not self.weights[name]:
                    self.weights[name].copy_(master)

    def state(self) -> dict[str, Tensor]:
        return {name: master.detach() for name, master in self.masters.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[name])
        self.publish()

    def release(self) -> None:
        raise NotImplementedError("the base itself is what trains")

    def save(self, folder: Path) -> None:
        """A transformers model folder (safetensors) in the base's dtype, with its tokenizer."""
        self.base.model.save_pretrained(folder)
        self.base.tokenizer.save_pretrained(folder)

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for weight in self.weights.values():
            weight.requires_grad_(False)
            weight.grad = None


def _collect_into(master: nn.Parameter) -> Any:
    def collect(weight: Tensor) -> None:
        assert master.grad is not None and weight.grad is not None
        master.grad.add_(weight.grad)
        weight.grad = None

    return collect


class Full:
    """The method. One job per run: the whole base is that job's."""

    routable: ClassVar[bool] = False
    artefacts: ClassVar[str] = "models"

    def numbers(self, base: Base, config: FullConfig) -> int:
        return base.model.num_parameters()

    def attach(self, base: Base, job: str, config: FullConfig, seed: int) -> FullAttached:
        return FullAttached(base, job)
