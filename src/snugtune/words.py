"""Plain words for numbers of things."""

import re

_PLURAL = re.compile(r"^([a-z]+?(?: [a-z]+?)?)s\b")


def counted(count: int, things: str) -> str:
    """`3 training examples left`, `1 training example left`: the first or second word of `things` is a plain plural."""
    return f"{count:,} " + (_PLURAL.sub(r"\1", things) if count == 1 else things)


def gib(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 2**30:.2f} GiB"


def one_line(text: str) -> str:
    """A text on one line: line ends and repeated blanks become one blank."""
    return " ".join(text.split())
