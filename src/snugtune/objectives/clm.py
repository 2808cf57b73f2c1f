"""Causal language modelling: continued pre-training on plain text, of which every token is learned."""

from collections.abc import Iterable
from typing import Any, Literal

from snugtune.data.documents import Reader, tokenise_documents
from snugtune.data.forms import Document, Item
from snugtune.data.sources import Drops
from snugtune.objectives.likelihood import Likelihood, LikelihoodConfig
from snugtune.types import Example, Prompt

BEGINNING = 32
"""Tokens of a document that the model is shown, to go on with."""


class ClmConfig(LikelihoodConfig):
    """Maximise the likelihood of whole documents."""

    type: Literal["clm"] = "clm"


class Clm(Likelihood):
    """Documents."""

    @property
    def tokenises_by(self) -> str:
        """The settings that its tokens and weights follow from."""
        return "documents"

    def tokenise(self, items: Iterable[Item], tokenizer: Any, max_seq_len: int, drops: Drops) -> list[Example]:
        """Tokens and loss weights; what cannot be used is counted in `drops`."""
        return tokenise_documents(items, tokenizer, max_seq_len, drops)

    def ask(self, text: str, tokenizer: Any) -> Prompt:
        """A text to go on with."""
        return Prompt(text, tuple(Reader(tokenizer).tokens(text)), (tokenizer.eos_token_id,))

    def ask_as(self, item: Item, tokenizer: Any) -> Prompt | None:
        """The beginning of a document; None for what is none."""
        if not isinstance(item, Document):
            return None
        beginning = Reader(tokenizer).encode(item.text)[:BEGINNING]
        return self.ask(item.text[: beginning[-1][2]], tokenizer) if beginning else None
