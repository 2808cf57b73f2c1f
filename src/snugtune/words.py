"""Plain words for numbers of things."""

import re

_PLURAL = re.compile(r"^([a-z]+?(?: [a-z]+?)?)s\b")


def counted(count: int, things: str) -> str:
    """`3 training examples left`, `1 training example left`: the first or second word of `things` is a plain plural."""
    return f"{count:,} " + (_PLURAL.sub(r"\1", things) if count == 1 else things)


def gib(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 2**30:.2f} GiB"


_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)


def bytes_of(text: str) -> int:
    """`8GiB`, `512 MB`, `8G` (which is 8 GiB, as torch and the system mean it). Raises `ValueError`."""
    found = _SIZE.match(text)
    if found is None:
        raise ValueError(f"'{text}' is no size; write 8GiB or 500MiB")
    number, letter, binary = found.groups()
    decimal = not binary and text.strip().lower().endswith("b") and letter
    return round(float(number) * (1000 if decimal else 1024) ** " kmgt".index(letter.lower() or " "))


def one_line(text: str) -> str:
    """A text on one line: line ends and repeated blanks become one blank."""
    return " ".join(text.split())
