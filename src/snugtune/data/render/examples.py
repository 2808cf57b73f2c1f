"""From conversations to training examples, with what is cut or cannot be used counted."""

from collections.abc import Iterable
from typing import Any

import torch
from jinja2 import TemplateError

from snugtune.data.forms import Conversation, Document, Item
from snugtune.data.render.template import TRAINING_DATE, Renderer, TrainOn
from snugtune.data.sources import Drops
from snugtune.types import Example


def render_all(
    items: Iterable[Item], tokenizer: Any, max_seq_len: int, drops: Drops, train_on: TrainOn = "answers"
) -> list[Example]:
    """Tokenise all conversations, cut to `max_seq_len`; what is cut or dropped is counted."""
    renderer = Renderer(tokenizer, TRAINING_DATE, train_on)
    examples: list[Example] = []
    for conversation in items:
        if not isinstance(conversation, Conversation):
            advice = "set objective: clm" if isinstance(conversation, Document) else "it takes conversations"
            drops.add(
                f"{type(conversation).__name__.lower()}s, which objective sft does not learn ({advice})", conversation.source
            )
            continue
        try:
            pieces = renderer.render(conversation.messages, conversation.tools)
        except TemplateError as error:
            drops.add(f"examples the chat template refuses ({error})", conversation.source)
            continue
        if conversation.tools and not renderer.calls.shows_tools:
            drops.add("lists of tools left out by the chat template (the rest of the example is used)", conversation.source)
        if len(pieces) > 1:
            drops.add(
                "conversations split into one example per answer, since the template rewrites earlier turns", conversation.source
            )
        for piece in pieces:
            ids, weights = renderer.tokenize(piece)
            example = _to_example(ids, [conversation.weight * w for w in weights], conversation.source, max_seq_len, drops)
            if example is not None:
                examples.append(example)
    return examples


def _to_example(ids: list[int], weights: list[float], source: str, max_seq_len: int, drops: Drops) -> Example | None:
    if weights:
        weights[0] = 0.0  # nothing predicts the first token
    if len(ids) > max_seq_len:
        if not any(weights[:max_seq_len]):
            drops.add(f"examples dropped: no answer begins within max_seq_len={max_seq_len} tokens", source)
            return None
        drops.add(f"examples cut to max_seq_len={max_seq_len} tokens", source)
    if not any(weights):
        drops.add("examples dropped: nothing to learn in them", source)
        return None
    return Example(torch.tensor(ids[:max_seq_len]), torch.tensor(weights[:max_seq_len]), source)
