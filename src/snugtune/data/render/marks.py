"""Marks in rendered text, which keep what somebody says from becoming a control token.

Where a message holds the text of one, a `BREAK` is put inside it before the template is rendered, and the rendered text is
encoded in pieces between the breaks. A character that is one by itself stands behind a `PLAIN`.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from snugtune.data.render.controls import Barred, Token, encoded

BREAK = "\U000f0002"  # private use: stands in rendered text where two pieces must not become one token
PLAIN = "\U000f0003"  # before a character that must not become a special token, and that a BREAK follows
_MARKS = re.compile(f"[{BREAK}{PLAIN}]")
_PIECE = re.compile(f"{PLAIN}?([^{BREAK}{PLAIN}]+)")


def with_marks(value: Any, barred: Barred) -> Any:
    """`value` with marks where a barred token would come of it, at any depth."""
    if isinstance(value, str):
        return _marked(_MARKS.sub("", value), barred)
    if isinstance(value, Mapping):
        return {with_marks(k, barred): with_marks(v, barred) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_marks(v, barred) for v in value]
    return value


def _marked(text: str, barred: Barred) -> str:
    cuts = barred.cuts(text)
    alone = {low for low, high in pairwise(cuts) if high == low + 1}
    pieces = pairwise([0, *cuts, len(text)])
    return BREAK.join((PLAIN if low in alone and high > low else "") + text[low:high] for low, high in pieces) if cuts else text


def encoded_by_marks(tokenizer: Any, text: str) -> Iterator[Token]:
    """The tokens of rendered text; none reaches over a mark."""
    for found in _PIECE.finditer(text):
        at, piece = found.start(1), found[1]
        for token, low, high in encoded(tokenizer, piece, plain=len(found[0]) > len(piece), inside=at > 0):
            yield token, low + at, high + at
