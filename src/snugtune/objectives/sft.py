"""Supervised fine-tuning: the negative log likelihood of the labelled tokens."""

from typing import Literal, Protocol

from torch import Tensor

from snugtune.data.render import render_all
from snugtune.schema import Config
from snugtune.types import Chunk


class SftConfig(Config):
    """Maximise the likelihood of the assistant's turns."""

    type: Literal["sft"] = "sft"


class Scorer(Protocol):
    """What an objective needs of the head."""

    def nll(self, h: Tensor, targets: Tensor, weights: Tensor) -> Tensor: ...


class Sft:
    """Conversations, of which the assistant's turns are learned.

    Sum over scored positions of weight x negative log likelihood; its size is the sum of the weights.
    """

    tokenise = staticmethod(render_all)

    def size(self, chunk: Chunk) -> float:
        """What the chunk counts for in its step, known before any forward."""
        return float(chunk.weights.double().sum())

    def loss(self, head: Scorer, hidden: Tensor, chunk: Chunk) -> Tensor:
        """A sum over the chunk, undivided. `hidden` [n, D]: the states of the chunk's scored rows."""
        device = hidden.device
        return head.nll(hidden, chunk.targets.to(device), chunk.weights.to(device))
