"""What objectives of maximum likelihood share: the sum over scored tokens of weight x negative log likelihood."""

from typing import Protocol

from pydantic import Field
from torch import Tensor

from snugtune.schema import Config
from snugtune.types import Chunk


class LikelihoodConfig(Config):
    """Settings of any objective that maximises the likelihood of tokens."""

    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of each target that is spread over the vocabulary, in training only"
    )


class Scorer(Protocol):
    """What an objective needs of the head."""

    def nll(self, h: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor: ...


class Likelihood:
    """Sum over scored positions of weight x negative log likelihood; its size is the sum of the weights.

    With label smoothing e (Szegedy et al. 2016, arXiv 1512.00567) a target counts 1 - e, and the mean over the
    vocabulary e. Evaluations are never smoothed.
    """

    def __init__(self, config: LikelihoodConfig):
        self.smoothing = config.label_smoothing

    def size(self, chunk: Chunk) -> float:
        """What the chunk counts for in its step, known before any forward."""
        return float(chunk.weights.double().sum())

    def loss(self, head: Scorer, hidden: Tensor, chunk: Chunk, training: bool = True) -> Tensor:
        """A sum over the chunk, undivided. `hidden` [n, D]: the states of the chunk's scored rows."""
        device = hidden.device
        smoothing = self.smoothing if training else 0.0
        return head.nll(hidden, chunk.targets.to(device), chunk.weights.to(device), smoothing)
