"""Supervised fine-tuning: the likelihood of what the assistant says."""

from collections.abc import Iterable
from typing import Any, Literal

from jinja2 import TemplateError
from pydantic import Field

from snugtune.data.forms import Conversation, Item
from snugtune.data.render import TRAINING_DATE, Messages, Renderer, Tools, TrainOn, render_all
from snugtune.data.sources import Drops
from snugtune.objectives.likelihood import Likelihood, LikelihoodConfig
from snugtune.types import Example, Prompt


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

    def ask(self, text: str, tokenizer: Any) -> Prompt:
        """A question of the user's."""
        return _asked(Renderer(tokenizer, TRAINING_DATE), [{"role": "user", "content": text}])

    def ask_as(self, item: Item, tokenizer: Any) -> Prompt | None:
        """A conversation up to its last answer; None for what is none, or what the template refuses."""
        if not isinstance(item, Conversation):
            return None
        last = max(i for i, message in enumerate(item.messages) if message["role"] == "assistant")
        try:
            return _asked(Renderer(tokenizer, TRAINING_DATE), item.messages[:last], item.tools)
        except TemplateError:
            return None


def _asked(renderer: Renderer, messages: Messages, tools: Tools = ()) -> Prompt:
    return Prompt(messages[-1]["content"], tuple(renderer.prompt(messages, tools)), renderer.stop_ids)
