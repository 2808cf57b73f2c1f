"""From plain text to tokens: documents, each closed with the end-of-text token, cut into pieces that fit.

A piece begins with the last token of the one before it, as context: every token of a document but its first is learned
exactly once.
"""

from collections.abc import Iterable
from typing import Any

import torch

from snugtune.data.forms import Conversation, Document, Item
from snugtune.data.render.controls import Controls, Token, encoded_plainly
from snugtune.data.sources import Drops
from snugtune.types import Example


def tokenise_documents(items: Iterable[Item], tokenizer: Any, max_seq_len: int, drops: Drops) -> list[Example]:
    """Tokenise all documents into pieces of at most `max_seq_len`. What cannot be used is counted.

    What a text says about control tokens stays text. A tokenizer that begins its texts with a token does so here.
    """
    reader = Reader(tokenizer)
    examples: list[Example] = []
    for item in items:
        if not isinstance(item, Document):
            advice = "set objective: sft" if isinstance(item, Conversation) else "it takes plain text"
            drops.add(f"{type(item).__name__.lower()}s, which objective clm does not learn ({advice})", item.source)
            continue
        pieces = list(_pieces([*reader.tokens(item.text), tokenizer.eos_token_id], max_seq_len))
        if not pieces or item.weight == 0.0:
            drops.add("documents dropped: nothing to learn in them", item.source)
            continue
        if len(pieces) > 1:
            drops.add(f"documents cut into pieces of max_seq_len={max_seq_len} tokens (nothing is lost)", item.source)
        for piece in pieces:
            weights = torch.full((len(piece),), item.weight)
            weights[0] = 0.0  # nothing predicts it, or the piece before has learned it
            examples.append(Example(torch.tensor(piece), weights, item.source))
    return examples


class Reader:
    """Reads texts for one tokenizer: what they say about control tokens stays text."""

    def __init__(self, tokenizer: Any):
        templates = tokenizer.chat_template or ""
        self._tokenizer = tokenizer
        self._barred = Controls(tokenizer, templates if isinstance(templates, str) else " ".join(templates.values())).all
        begin = tokenizer("")["input_ids"][:1]
        self._opening = begin if begin == [tokenizer.bos_token_id] else []

    def encode(self, text: str) -> list[Token]:
        """The tokens of a text and their places in it."""
        return encoded_plainly(self._tokenizer, text, self._barred.cuts(text))

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, and before them the one that the tokenizer begins its texts with, if any."""
        return [*self._opening, *(token for token, _, _ in self.encode(text))]


def _pieces(ids: list[int], length: int) -> Iterable[list[int]]:
    for start in range(0, len(ids) - 1, length - 1):
        yield ids[start : start + length]
