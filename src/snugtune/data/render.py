"""From conversations to tokens and loss weights, through the model's own chat template.

Only what the assistant says is trained, up to and including the end-of-turn token that generation stops at. The borders
are found by rendering prefixes of the conversation: what a turn adds to the text before it is that turn. Templates that
rewrite earlier turns (Qwen3 drops old thinking) have no common text; there each assistant turn becomes its own example.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch
from jinja2 import TemplateError

from snugtune.data.forms import Conversation, Item, Message
from snugtune.data.sources import Drops
from snugtune.errors import InputError
from snugtune.types import Example

Messages = Sequence[Message]
Tools = Sequence[Mapping[str, Any]]
TRAINING_DATE = datetime(2025, 1, 1)
"""What templates that ask for today's date (`strftime_now`: Llama 3, Granite) get in training: examples must not change
overnight."""
_MARK = "snugtune-mark"  # stands for an answer where only the template's own text is wanted


@dataclass(frozen=True)
class Rendered:
    """Text of one training example, the character spans [start, end) that are trained, and the weight of each."""

    text: str
    spans: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]


class Renderer:
    """Renders conversations for one tokenizer. `stop_ids` are the tokens that end an answer in generation.

    `today` is what templates that ask for the date are told; None: the truth.
    """

    def __init__(self, tokenizer: Any, today: datetime | None = None):
        self.tokenizer = tokenizer
        own = tokenizer.get_chat_template()
        self.chat_template = _dated(own, today) if today is not None and "strftime_now" in own else own
        self.end_of_turn = self._find_end_of_turn()
        self.stop_ids = tuple(sorted({tokenizer.eos_token_id, self.end_of_turn}))

    def template(self, messages: Messages, for_answer: bool = False, tools: Tools = ()) -> str:
        """The conversation as the model's text; `for_answer` ends with the opening of an assistant turn.

        Raises `TemplateError`, whatever the template's own code trips over.
        """
        plain = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                plain,
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=for_answer,
            )
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from error

    def render(self, messages: Messages, tools: Tools = ()) -> tuple[Rendered, ...]:
        """One example, or one per assistant turn where the template rewrites earlier turns."""
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        weights = tuple(float(messages[i].get("weight", 1.0)) for i in answers)
        whole = self.template(messages[: answers[-1] + 1], tools=tools)
        spans = [self._span(messages, i, tools) for i in answers]
        if all(whole.startswith(text) for text, _ in spans):
            return (Rendered(whole, tuple(span for _, span in spans), weights),)
        return tuple(Rendered(text, (span,), (weight,)) for (text, span), weight in zip(spans, weights, strict=True))

    def _span(self, messages: Messages, answer: int, tools: Tools) -> tuple[str, tuple[int, int]]:
        """The text up to and with the answer, and where in it the answer stands."""
        text = self.template(messages[: answer + 1], tools=tools)
        opening = self.template(messages[:answer], for_answer=True, tools=tools)
        if not text.startswith(opening):  # some templates open an answer otherwise than they record it
            marked = self.template([*messages[:answer], {"role": "assistant", "content": _MARK}], tools=tools)
            opening, found, _ = marked.rpartition(_MARK)
            if not found or not text.startswith(opening):
                raise TemplateError("the chat template rewrites the question when it is answered")
        return text, (len(opening), len(text))

    def _find_end_of_turn(self) -> int:
        """The token the template closes an answer with; the tokenizer's eos where it closes with none."""
        try:
            text = self.template([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _MARK}])
        except TemplateError as error:
            raise InputError(f"model: its chat template cannot render a question and an answer: {error}") from error
        _, found, tail = text.rpartition(_MARK)
        if not found:
            raise InputError("model: its chat template leaves out what is answered; nothing could be learned through it")
        after = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        control = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        return next((token for token in after if token in control), self.tokenizer.eos_token_id)

    def tokenize(self, rendered: Rendered) -> tuple[list[int], list[float]]:
        """Token ids and their weights as targets: each answer's, up to its end token, which is added where there is none."""
        ids, owners = self._encode(rendered.text, 0, rendered.spans)
        ends = {n: self._end_of(n, ids, owners) for n in range(len(rendered.spans))}
        unclosed = [rendered.spans[n][1] for n, end in ends.items() if end is None]
        if unclosed:
            return self._tokenize_unclosed(rendered, unclosed)
        return ids, [rendered.weights[n] if n >= 0 and place <= (ends[n] or 0) else 0.0 for place, n in enumerate(owners)]

    def _encode(self, text: str, start: int, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Ids of `text`, which begins at character `start`, and for each the span that it belongs to (-1: none)."""
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        local = [(low - start, high - start) for low, high in spans]
        owners = []
        for token in coded["offset_mapping"]:
            owners.append(next((n for n, span in enumerate(local) if _belongs(text, token, span)), -1))
        return coded["input_ids"], owners

    def _end_of(self, span: int, ids: list[int], owners: list[int]) -> int | None:
        """Where the span's closing end token stands: the first, where several close it."""
        places = [place for place, owner in enumerate(owners) if owner == span]
        while places and ids[places[-1]] not in self.stop_ids:
            places.pop()
        while len(places) > 1 and ids[places[-2]] in self.stop_ids:
            places.pop()
        return places[-1] if places else None

    def _tokenize_unclosed(self, rendered: Rendered, unclosed: Sequence[int]) -> tuple[list[int], list[float]]:
        """For templates that close an answer with nothing: the text is cut there, and an end token put in."""
        ids: list[int] = []
        weights: list[float] = []
        start = 0
        for cut in (*unclosed, len(rendered.text)):
            piece, owners = self._encode(rendered.text[start:cut], start, rendered.spans)
            ids += piece
            weights += [rendered.weights[n] if n >= 0 else 0.0 for n in owners]
            if cut in unclosed and (start < cut or not ids):
                ids.append(self.end_of_turn)
                weights.append(next(w for (_, end), w in zip(rendered.spans, rendered.weights, strict=True) if end == cut))
            start = cut
        return ids, weights


def _dated(template: str, today: datetime) -> str:
    """The template with a `strftime_now` of its own, which hides the library's and knows one moment only."""
    fills = "".join(f"|replace('%{code}', '{today.strftime('%' + code)}')" for code in "aAwdbBmyYHIpMSjx")
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{fills} }}}}{{%- endmacro -%}}{template}"


def _belongs(text: str, token: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether a token lies in the span, save for blanks before it that the tokenizer joined with the span's first word."""
    (first, last), (low, high) = token, span
    blanks, inside = text[first : max(first, low)], text[max(first, low) : last]
    return last <= high and (not blanks or (blanks.isspace() and bool(inside.strip())))


def render_all(items: Iterable[Item], tokenizer: Any, max_seq_len: int, drops: Drops) -> list[Example]:
    """Tokenise all conversations, cut to `max_seq_len`; what is cut or dropped is counted. Raises if nothing is left."""
    renderer = Renderer(tokenizer, TRAINING_DATE)
    examples: list[Example] = []
    for conversation in items:
        if not isinstance(conversation, Conversation):
            drops.add(f"{type(conversation).__name__.lower()}s, which objective sft does not learn", conversation.source)
            continue
        try:
            pieces = renderer.render(conversation.messages, conversation.tools)
        except TemplateError as error:
            drops.add(f"examples the chat template refuses ({error})", conversation.source)
            continue
        if len(pieces) > 1:
            drops.add(
                "conversations split into one example per answer, since the template rewrites earlier turns", conversation.source
            )
        for piece in pieces:
            ids, weights = renderer.tokenize(piece)
            example = _to_example(ids, [conversation.weight * w for w in weights], conversation.source, max_seq_len, drops)
            if example is not None:
                examples.append(example)
    if not examples:
        raise InputError(f"data: no example is left to train on: {'; '.join(drops.lines())}")
    return examples


def _to_example(ids: list[int], weights: list[float], source: str, max_seq_len: int, drops: Drops) -> Example | None:
    if weights:
        weights[0] = 0.0  # nothing predicts the first token
    if len(ids) > max_seq_len:
        if not any(weights[:max_seq_len]):
            drops.add(f"examples dropped: their answers begin after max_seq_len={max_seq_len} tokens", source)
            return None
        drops.add(f"examples cut to max_seq_len={max_seq_len} tokens", source)
    if not any(weights):
        drops.add("examples dropped: nothing to learn in them", source)
        return None
    return Example(torch.tensor(ids[:max_seq_len]), torch.tensor(weights[:max_seq_len]), source)
