"""Supervised fine-tuning: the likelihood of what the assistant says."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from snugtune.data.forms import Item
from snugtune.data.render import TrainOn, render_all
from snugtune.data.sources import Drops
from snugtune.objectives.likelihood import Likelihood, LikelihoodConfig
from snugtune.types import Example


class SftConfig(LikelihoodConfig):
    """Maximise the likelihood of the assistant's turns."""

    type: Literal["sft"] = "sft"
    train_on: TrainOn = Field(
        default="answers", description="the assistant's turns, only the last of them, or everything: prompts too"
    )


class Sft(Likelihood):
    """Conversations."""

    def __init__(self, config: SftConfig):
        super().__init__(config)
        self.train_on: TrainOn = config.train_on

    @property
    def tokenises_by(self) -> str:
        """The settings that its tokens and weights follow from."""
        return f"{self.train_on} of conversations"

    def tokenise(self, items: Iterable[Item], tokenizer: Any, max_seq_len: int, drops: Drops) -> list[Example]:
        """Tokens and loss weights; what cannot be used is counted in `drops`."""
        return render_all(items, tokenizer, max_seq_len, drops, self.train_on)
