"""Control tokens: what a conversation is built of, and how a text that holds the words of one is kept from becoming it.

Such a text is cut inside those words, and encoded in pieces. Where a normaliser could make the words of others (a wide bar a
plain one), the tokens themselves are looked at.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

Token = tuple[int, int, int]
"""An id, and the place [start, end) of its characters."""

# ASCII's bar, DeepSeek's wide one; thinking and calls of tools are never mere words, whatever the template knows of them.
_CONTROL = re.compile("<[|\uff5c]|</?(think|tool)")


class Barred:
    """Tokens that a text must not turn into."""

    def __init__(self, tokenizer: Any, tokens: Iterable[str]):
        self._tokens = sorted(set(tokens), key=lambda t: (-len(t), t))
        self._tokenizer = tokenizer
        self._ids = frozenset(tokenizer.convert_tokens_to_ids(self._tokens))
        self._normalizer = tokenizer.backend_tokenizer.normalizer
        normal = {self._normalizer.normalize_str(t).strip(" \u2581") for t in self._tokens} if self._normalizer else set()
        self._words = _anyone(self._tokens)
        self._normal_words = _anyone({*self._tokens, *normal} - {""})

    @property
    def ids(self) -> frozenset[int]:
        """The ids of these tokens."""
        return self._ids

    def words(self, text: str) -> list[tuple[int, int]]:
        """The places [start, end) in a text that read like such a token."""
        places: list[tuple[int, int]] = []
        for found in self._words.finditer(text):
            if not places or found.start() >= places[-1][1]:
                places.append(found.span(1))
        return places

    def cuts(self, text: str) -> list[int]:
        """Where the text is to be cut. Two cuts around one character: it alone could become such a token."""
        places: set[int] = set()
        for found in self._words.finditer(text):
            places |= {found.start() + 1} | ({found.start()} if len(found[1]) == 1 else set())
        if self._normalizer is not None:
            normal = self._normalizer.normalize_str(text)
            if normal != text and self._normal_words.search(normal):
                hits = [token for token in encoded(self._tokenizer, text) if token[0] in self._ids]
                places |= {place for _, low, high in hits for place in range(low if high - low == 1 else low + 1, high + 1)}
        return sorted(places)


class Controls:
    """The control tokens of a tokenizer: `all` of them, and those that are marked `special`, which an answer holds no more
    than a question does."""

    def __init__(self, tokenizer: Any, template: str):
        added = tokenizer.added_tokens_decoder.values()
        special = {t.content for t in added if t.special} | set(tokenizer.all_special_tokens)
        self.special = Barred(tokenizer, special)
        self.all = Barred(tokenizer, special | {t.content for t in added if _controls(t.content, template)})


def _controls(token: str, template: str) -> bool:
    """Whether an added token that is not marked special is one of those that a conversation is built of."""
    return len(token) > 1 and not token.isspace() and (token in template or _CONTROL.match(token) is not None)


def _anyone(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds the places where the text of a token begins, overlapping ones too; group 1 is the longest that does."""
    longest_first = sorted(tokens, key=lambda t: (-len(t), t))
    return re.compile(f"(?=({'|'.join(map(re.escape, longest_first))}))" if longest_first else "(?!)()", re.DOTALL)


def encoded(tokenizer: Any, text: str, plain: bool = False, inside: bool = False) -> list[Token]:
    """The tokens of a piece of text. `plain`: no special ones. `inside`: the piece is not where a text begins.

    SentencePiece puts a blank before what begins a text: it is put before a line break, which is cut off again.
    """
    lead = "\n" if inside else ""
    how = {"add_special_tokens": False, "split_special_tokens": plain}
    coded = tokenizer(lead + text, return_offsets_mapping=True, **how)
    places = [(low - len(lead), high - len(lead)) for low, high in coded["offset_mapping"]]
    tokens = [(token, *place) for token, place in zip(coded["input_ids"], places, strict=True)]
    if not lead:
        return tokens
    line_break = tokenizer(lead, **how)["input_ids"]
    fits = coded["input_ids"][: len(line_break)] == line_break
    return tokens[len(line_break) :] if fits else encoded(tokenizer, text, plain)


def encoded_plainly(tokenizer: Any, text: str, cuts: Sequence[int]) -> list[Token]:
    """The tokens of a text, cut there: none is special, none reaches over a cut."""
    tokens = []
    for low, high in pairwise([0, *(cut for cut in cuts if 0 < cut < len(text)), len(text)]):
        piece = encoded(tokenizer, text[low:high], plain=True, inside=low > 0)
        tokens += [(token, start + low, end + low) for token, start, end in piece]
    return tokens
