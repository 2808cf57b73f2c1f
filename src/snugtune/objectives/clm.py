"""Causal language modelling: continued pre-training on plain text, of which every token is learned."""

from collections.abc import Iterable
from typing import Any, Literal

from snugtune.data.documents import tokenise_documents
from snugtune.data.forms import Item
from snugtune.data.sources import Drops
from snugtune.objectives.likelihood import Likelihood, LikelihoodConfig
from snugtune.types import Example


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
