"""Optimizers: thin configs over torch's and well-kept libraries' implementations.

`by_matrix` is true for those that look at the shapes of what they step: they are given each weight by itself, the others
one flat buffer where there is one. `kept_narrow` names what of its state can be kept in 8 bits, and whether that has a sign.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from snugtune.model.pieces import PIECE
from snugtune.optim.lowrank import Apollo, GaLore
from snugtune.optim.narrow import NarrowState, narrow_bytes, widened_bytes
from snugtune.schema import Config
from snugtune.types import OptimizerState

Decay = Annotated[float, Field(ge=0, lt=1)]


class _Optimizer(Config):
    by_matrix: ClassVar[bool] = False
    kept_narrow: ClassVar[Mapping[str, bool]] = MappingProxyType({})
    library: ClassVar[str | None] = None

    weight_decay: float = Field(default=0.0, ge=0, description="decay of the weights, decoupled from the gradient")

    def build(self, parameters: Iterable[Tensor], state: OptimizerState = "fp32", seed: int = 0) -> torch.optim.Optimizer:
        """The optimizer of these weights. One with an `obstacle` has no other state than its own.

        `seed`: the job's, of which those that draw make all that they draw.
        """
        if state == "fp32":
            return self._make(list(parameters))
        assert self.obstacle() is None
        return NarrowState(parameters, self._make, self.kept_narrow, paged=state == "paged")

    def bring(self) -> None:
        """Import what builds it, before the process's memory is looked at: transformers' optimizers take 47 MiB."""
        if self.library is not None:
            import_module(self.library)

    def obstacle(self) -> str | None:
        """Why the state cannot be kept in 8 bits, or None."""
        return None

    def state_bytes(self, shape: Sequence[int], state: OptimizerState = "fp32") -> int:
        """What is remembered of a weight, but for counts of steps. On the device: what is paged lies in the host's memory."""
        return (
            0 if state == "paged" else self._numbers(shape) * 4 if state == "fp32" else narrow_bytes(self._numbers(shape), shape)
        )

    def update_bytes(self, shape: Sequence[int], state: OptimizerState = "fp32") -> int:
        """What a step of a weight makes meanwhile: nothing where it is one kernel, that goes through it in place."""
        return 0 if state == "fp32" else widened_bytes(shape)

    def _numbers(self, shape: Sequence[int]) -> int:
        """How many are remembered of a weight."""
        return math.prod(shape) * len(self.kept_narrow)

    def _make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        raise NotImplementedError


class AdamWConfig(_Optimizer):
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101): torch's fused one. State: 8 bytes a weight, 2 in 8 bits."""

    kept_narrow: ClassVar[Mapping[str, bool]] = MappingProxyType({"exp_avg": True, "exp_avg_sq": False})

    type: Literal["adamw"] = "adamw"
    lr: float = Field(default=2e-4, gt=0, description="peak learning rate")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), description="decay rates of the two moments, each in [0, 1)")
    eps: float = Field(default=1e-8, gt=0, description="added to the denominator")

    def _make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


class SgdConfig(_Optimizer):
    """Stochastic gradient descent, torch's. State: 4 bytes a weight with momentum (1 in 8 bits), else none."""

    kept_narrow: ClassVar[Mapping[str, bool]] = MappingProxyType({"momentum_buffer": True})

    type: Literal["sgd"] = "sgd"
    lr: float = Field(default=1e-2, gt=0, description="peak learning rate")
    momentum: Decay = Field(default=0.9, description="of the velocity; 0: plain descent, which needs no state")
    nesterov: bool = Field(default=False, description="look ahead along the velocity")
    weight_decay: float = Field(default=0.0, ge=0, description="an L2 penalty, as is usual for SGD")

    @model_validator(mode="after")
    def _ahead_of_what(self) -> "SgdConfig":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: needs momentum above 0")
        return self

    def obstacle(self) -> str | None:
        return None if self.momentum else "without momentum it has none"

    def _numbers(self, shape: Sequence[int]) -> int:
        return math.prod(shape) if self.momentum else 0

    def _make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=True,
        )


class LionConfig(_Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675): the sign of a momentum. State: 4 bytes a weight, 1 in 8 bits."""

    kept_narrow: ClassVar[Mapping[str, bool]] = MappingProxyType({"exp_avg": True})

    type: Literal["lion"] = "lion"
    lr: float = Field(default=5e-5, gt=0, description="peak learning rate: 3 to 10 times less than AdamW's")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.99), description="for the update and for the momentum, each in [0, 1)")

    def update_bytes(self, shape: Sequence[int], state: OptimizerState = "fp32") -> int:
        return 8 * min(math.prod(shape), PIECE) if state == "fp32" else widened_bytes(shape)  # the update, and what it is made of

    def _make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        from snugtune.optim.lion import LionInPieces

        return LionInPieces(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)


class AdafactorConfig(_Optimizer):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235), transformers', at the given rate.

    State: 4 bytes for each row and each column of a weight.
    """

    by_matrix: ClassVar[bool] = True

    library: ClassVar[str | None] = "transformers.optimization"

    type: Literal["adafactor"] = "adafactor"
    lr: float = Field(default=2e-4, gt=0, description="peak learning rate")
    clip_threshold: float = Field(default=1.0, gt=0, description="largest root mean square of one weight's update, before lr")
    decay_rate: float = Field(default=-0.8, lt=0, gt=-1, description="how the memory of squared gradients grows with the steps")

    def obstacle(self) -> str | None:
        return "its state is small already, a row and a column of each weight"

    def update_bytes(self, shape: Sequence[int], state: OptimizerState = "fp32") -> int:
        return 8 * math.prod(shape)  # the squared gradient, and the update

    def _numbers(self, shape: Sequence[int]) -> int:
        return math.prod(shape) if len(shape) < 2 else math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))

    def _make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=self.lr,
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            weight_decay=self.weight_decay,
            scale_parameter=False,  # with it LoRA's B, which starts at zero, would hardly move
            relative_step=False,
        )


class _LowRank(_Optimizer):
    by_matrix: ClassVar[bool] = True

    lr: float = Field(default=2e-4, gt=0, description="peak learning rate")
    rank: int = Field(default=128, ge=1, description="dimensions of the moments; smaller matrices are stepped by AdamW")
    update_every: int = Field(default=200, ge=1, description="steps until other dimensions are taken")
    scale: float | None = Field(
        default=None, gt=0, description="factor of a matrix' update (default: sqrt(shorter side / rank), as long as AdamW's)"
    )
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), description="decay rates of the two moments, each in [0, 1)")
    eps: float = Field(default=1e-8, gt=0, description="added to the denominator")

    def obstacle(self) -> str | None:
        return "its state is small already, of low rank"

    def update_bytes(self, shape: Sequence[int], state: OptimizerState = "fp32") -> int:
        if not self._is_projected(shape):
            return 4 * math.prod(shape)  # the direction
        return 4 * (3 * self.rank * max(shape) + self._projection(min(shape)))

    def _numbers(self, shape: Sequence[int]) -> int:
        return 2 * self.rank * max(shape) if self._is_projected(shape) else 2 * math.prod(shape)

    def _is_projected(self, shape: Sequence[int]) -> bool:
        return len(shape) == 2 and min(shape) > self.rank

    def _projection(self, side: int) -> int:
        """Numbers of what finds or draws it."""
        return self.rank * side

    def _settings(self) -> dict[str, Any]:
        return self.model_dump(include={"lr", "betas", "eps", "weight_decay", "rank", "update_every", "scale"})


class GaloreConfig(_LowRank):
    """GaLore (Zhao et al. 2024, arXiv 2403.03507): AdamW in the r largest singular directions of each matrix' gradient.

    State of a matrix of sides L >= S: 4 r (2 L + S) bytes, where AdamW has 8 L S.
    """

    type: Literal["galore"] = "galore"

    def _make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return GaLore(parameters, **self._settings())

    def _numbers(self, shape: Sequence[int]) -> int:
        return super()._numbers(shape) + (self.rank * min(shape) if self._is_projected(shape) else 0)

    def _projection(self, side: int) -> int:
        return 2 * (3 * side * side + 1024 * side)  # in fp64: the product with itself, its eigenvectors and what finds them, rows


class ApolloConfig(_LowRank):
    """APOLLO (Zhu et al. 2024, arXiv 2412.05270): the gradient, each row as long as AdamW would make it in r random dimensions.

    State of a matrix of sides L >= S: 8 r L bytes, where AdamW has 8 L S. APOLLO-Mini: rank 1, scaling tensor.
    """

    type: Literal["apollo"] = "apollo"
    scaling: Literal["channel", "tensor"] = Field(
        default="channel", description="what has a length of its own: each row of the longer side, or the matrix as a whole"
    )

    def build(self, parameters: Iterable[Tensor], state: OptimizerState = "fp32", seed: int = 0) -> torch.optim.Optimizer:
        assert state == "fp32"
        return Apollo(parameters, seed, self.scaling == "tensor", **self._settings())
