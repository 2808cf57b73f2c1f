"""Conversations through a model's own chat template: the text, which parts of it are trained, and their tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from jinja2 import TemplateError

from snugtune.data.forms import Message
from snugtune.data.render.calls import Calls
from snugtune.data.render.controls import Controls
from snugtune.data.render.marks import encoded_by_marks, with_marks
from snugtune.errors import InputError

Messages = Sequence[Message]
Tools = Sequence[Mapping[str, Any]]
TrainOn = Literal["answers", "last_answer", "everything"]
TRAINING_DATE = datetime(2025, 1, 1)
"""What templates that ask for today's date (`strftime_now`: Llama 3, Granite) get in training: examples must not change
overnight."""
_SHORT = {"F": "%Y-%m-%d", "D": "%m/%d/%y", "T": "%H:%M:%S", "R": "%H:%M", "h": "%b"}
_MARK = "snugtune-mark"  # stands for an answer where only the template's own text is wanted


@dataclass(frozen=True)
class Rendered:
    """Text of one training example, the character spans [start, end) that are trained, and the weight of each.

    `text` holds `BREAK`s and `PLAIN`s; `outside` is the weight of what lies in no span.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    outside: float = 0.0


class Renderer:
    """Renders conversations for one tokenizer. `stop_ids` are the tokens that end an answer in generation.

    `today` is what templates that ask for the date are told; None: the truth. `train_on` says what is trained.
    """

    def __init__(self, tokenizer: Any, today: datetime | None = None, train_on: TrainOn = "answers"):
        self.tokenizer = tokenizer
        self.train_on = train_on
        try:
            own = tokenizer.get_chat_template()
        except ValueError as error:
            names = ", ".join(tokenizer.chat_template or ()) or "none at all"
            raise InputError(f"model: it has no chat template named 'default' (it has {names}); name one so") from error
        self.chat_template = _dated(own, today) if today is not None and "strftime_now" in own else own
        self._controls = Controls(tokenizer, self.chat_template)
        self.calls = Calls(self._apply)
        self.end_of_turn, self._epilogue = self._find_end_of_turn()
        self.stop_ids = tuple(sorted({tokenizer.eos_token_id, self.end_of_turn}))

    def template(self, messages: Messages, for_answer: bool = False, tools: Tools = ()) -> str:
        """The conversation as the model's text, with those marks; `for_answer` ends with the opening of an assistant turn.

        An answer may hold control tokens that are not special (Qwen's `<think>`); whatever else is said holds none.
        """
        plain = []
        for message in self.calls.told(messages):
            barred = self._controls.special if message["role"] == "assistant" else self._controls.all
            plain.append({key: with_marks(value, barred) for key, value in message.items() if key != "weight"})
        return self._apply(plain, [with_marks(tool, self._controls.all) for tool in tools], for_answer)

    def _apply(self, messages: Messages, tools: Tools = (), for_answer: bool = False) -> str:
        """The template's text. Whatever it stumbles over is a `TemplateError`, as what it refuses."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=for_answer,
            )
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from error

    def prompt(self, messages: Messages, tools: Tools = ()) -> list[int]:
        """Token ids after which the model answers."""
        return [token for token, _, _ in encoded_by_marks(self.tokenizer, self.template(messages, for_answer=True, tools=tools))]

    def render(self, messages: Messages, tools: Tools = ()) -> tuple[Rendered, ...]:
        """One example, or one per assistant turn where the template rewrites earlier turns."""
        if self.train_on == "everything":
            return (self._everything(messages, tools),)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if self.train_on == "last_answer":
            answers = answers[-1:]
        weights = tuple(float(messages[i].get("weight", 1.0)) for i in answers)
        spans = [self._span(messages, i, tools) for i in answers]
        whole = spans[-1][0]
        kept = [n for n, (text, _) in enumerate(spans) if whole.startswith(text)]
        if len(kept) == len(spans):
            return (Rendered(whole, tuple(span for _, span in spans), weights),)
        return tuple(Rendered(text, (span,), (weight,)) for (text, span), weight in zip(spans, weights, strict=True))

    def _everything(self, messages: Messages, tools: Tools) -> Rendered:
        """The conversation up to its last answer. Raises where a message's own weight would be lost."""
        answers = {i: self._span(messages, i, tools) for i, m in enumerate(messages) if m["role"] == "assistant"}
        last = max(answers)
        whole = answers[last][0]
        kept = {i: span for i, (text, span) in answers.items() if whole.startswith(text)}
        weights = {i: float(message.get("weight", 1.0)) for i, message in enumerate(messages[: last + 1])}
        if any(weight != 1.0 and i not in kept for i, weight in weights.items()):
            raise TemplateError("a question, or an answer that it rewrites, has a weight of its own, which would be lost")
        return Rendered(whole, tuple(kept.values()), tuple(weights[i] for i in kept), outside=1.0)

    def _span(self, messages: Messages, answer: int, tools: Tools) -> tuple[str, tuple[int, int]]:
        """The text up to and with the answer, and where in it the answer stands."""
        text = self.template(messages[: answer + 1], tools=tools)
        opening = self.template(messages[:answer], for_answer=True, tools=tools)
        if not text.startswith(opening):
            opening, text = self._otherwise(messages[:answer], tools, opening, text)
        if self._epilogue and text.endswith(self._epilogue):  # Phi-3's end of a conversation, which is no part of the answer
            text = text[: -len(self._epilogue)]
        return text, (len(opening), len(text))

    def _otherwise(self, asked: Messages, tools: Tools, opening: str, text: str) -> tuple[str, str]:
        """Opening and text, where templates open an answer otherwise than they record it, or its question.

        A record that opens otherwise stands (DeepSeek R1). A question that is recorded otherwise stands as it was asked, for
        the answer followed that (Mistral leaves the system turn out of it once it is answered).
        """
        marked, found, _ = self.template([*asked, {"role": "assistant", "content": _MARK}], tools=tools).rpartition(_MARK)
        if not text.startswith(self.template(asked, tools=tools)):
            end = _end_of_shared(opening, marked)
            if opening[-1:] == marked[end - 1 : end] and text.startswith(marked[:end]):
                return opening, opening + text[end:]
        if not found or not text.startswith(marked):
            raise TemplateError("the chat template rewrites the question when it is answered")
        return marked, text

    def _find_end_of_turn(self) -> tuple[int, str]:
        """The token the template closes an answer with, and what it writes after it where a conversation ends.

        The tokenizer's eos where it closes with none.
        """
        try:
            text = self.template([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _MARK}])
        except TemplateError as error:
            raise InputError(f"model: its chat template cannot render a question and an answer: {error}") from error
        _, found, tail = text.rpartition(_MARK)
        if not found:
            raise InputError("model: its chat template leaves out what is answered; nothing could be learned through it")
        after = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        control = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        end = next((token for token in after if token in control), None)
        if end is None:
            return self.tokenizer.eos_token_id, ""
        return end, tail.partition(str(self.tokenizer.convert_ids_to_tokens(end)))[2].lstrip()

    def tokenize(self, rendered: Rendered) -> tuple[list[int], list[float]]:
        """Token ids and their weights as targets: each answer's, up to its end token, which is added where there is none."""
        ids, owners = self._owned(rendered, 0, len(rendered.text))
        ends = {n: self._end_of(n, ids, owners) for n in range(len(rendered.spans))}
        unclosed = [rendered.spans[n][1] for n, end in ends.items() if end is None]
        if unclosed:
            return self._tokenize_unclosed(rendered, unclosed)
        trained = [n >= 0 and place <= (ends[n] or 0) for place, n in enumerate(owners)]
        return ids, [rendered.weights[n] if t else rendered.outside for n, t in zip(owners, trained, strict=True)]

    def _owned(self, rendered: Rendered, start: int, end: int) -> tuple[list[int], list[int]]:
        """Ids of a part of the text, and for each the span that it belongs to (-1: none)."""
        ids, owners = [], []
        for token, low, high in encoded_by_marks(self.tokenizer, rendered.text[start:end]):
            place = (low + start, high + start)
            ids.append(token)
            owners.append(next((n for n, span in enumerate(rendered.spans) if _belongs(rendered.text, place, span)), -1))
        return ids, owners

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
            piece, owners = self._owned(rendered, start, cut)
            ids += piece
            weights += [rendered.weights[n] if n >= 0 else rendered.outside for n in owners]
            if cut in unclosed and (start < cut or not ids):
                ids.append(self.end_of_turn)
                weights.append(next(w for (_, end), w in zip(rendered.spans, rendered.weights, strict=True) if end == cut))
            start = cut
        return ids, weights


def _dated(template: str, today: datetime) -> str:
    """The template with a `strftime_now` of its own, which hides the library's and knows one moment only."""
    words = {code: today.strftime(f"%{code}") for code in "aAwdbBmyYHIpMSfjUWxXcGuV"}
    words |= {f"-{code}": words[code].lstrip("0") or "0" for code in "dmyHIMSj"}  # as the C libraries of Linux and macOS do
    words |= {"e": f"{today.day:2}"} | {code: today.strftime(how) for code, how in _SHORT.items()}
    fills = "".join(f"|replace('%{code}', '{word}')" for code, word in words.items())
    parts = f"{{%- for part in format.split('%%') -%}}{{{{ '%' if not loop.first }}}}{{{{ part{fills} }}}}{{%- endfor -%}}"
    return f"{{%- macro strftime_now(format) -%}}{parts}{{%- endmacro -%}}{template}"


def _end_of_shared(opening: str, marked: str) -> int:
    """Where `marked` but for blanks at its end ends most like `opening`."""
    ends = range(len(marked.rstrip()), len(marked) + 1)
    return max(ends, key=lambda end: _shared_ending(opening, marked[:end]))


def _shared_ending(one: str, other: str) -> int:
    """How many characters both end with."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _belongs(text: str, token: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether a token lies in the span, save for blanks before it that the tokenizer joined with the span's first word."""
    (first, last), (low, high) = token, span
    blanks, inside = text[first : max(first, low)], text[max(first, low) : last]
    return last <= high and (not blanks or (blanks.isspace() and bool(inside.strip())))
