"""From plain text to tokens: documents, each closed with the end-of-text token, cut into pieces that fit.

A piece begins with the last token of the one before it, as context: every token of a document but its first is learned
exactly once.
"""

from collections.abc import Iterable
from typing import Any

import torch

from snugtune.data.forms import Document, Item
from snugtune.data.sources import Drops
from snugtune.types import Example


def tokenise_documents(items: Iterable[Item], tokenizer: Any, max_seq_len: int, drops: Drops) -> list[Example]:
    """Tokenise all documents into pieces of at most `max_seq_len`. What cannot be used is counted.

    What a text says about control tokens stays text. A tokenizer that begins its texts with a token does so here.
    """
    examples: list[Example] = []
    for item in items:
        if not isinstance(item, Document):
            drops.add(f"{type(item).__name__.lower()}s, which objective clm does not learn (it takes plain text)", item.source)
            continue
        pieces = list(_pieces([*document_tokens(item.text, tokenizer), tokenizer.eos_token_id], max_seq_len))
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


def document_tokens(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text, and before them the one that the tokenizer begins its texts with, if any."""
    begin = tokenizer("")["input_ids"][:1]
    opening = begin if begin == [tokenizer.bos_token_id] else []
    return [*opening, *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]]


def _pieces(ids: list[int], length: int) -> Iterable[list[int]]:
    for start in range(0, len(ids) - 1, length - 1):
        yield ids[start : start + length]
