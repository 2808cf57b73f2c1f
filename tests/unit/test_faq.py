"""Every message that docs/faq.md quotes is one that the code still has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import snugtune

SOURCES = sorted(Path(snugtune.__file__).parent.rglob("*.py"))
PAGE = (Path(__file__).parents[2] / "docs" / "faq.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.+)`$(?:\n+<!-- fragments: (.+) -->)?", PAGE, re.MULTILINE)
HOLE = "\0"


def texts(source: str) -> Iterator[str]:
    """All texts of a module, f-strings with a `HOLE` for each value."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\{\w+\}", HOLE, node.value)


TEXTS = [text for path in SOURCES for text in texts(path.read_text(encoding="utf-8"))]


def said(quoted: str) -> bool:
    """Whether some text of the code holds the parts of `quoted` between its dots, in order."""
    pattern = re.compile(".*".join(map(re.escape, filter(None, (part.strip() for part in quoted.split("..."))))), re.DOTALL)
    return any(pattern.search(text) for text in TEXTS)


@pytest.mark.parametrize("quoted", [fragments or message for message, fragments in QUOTED])
def test_a_quoted_message_is_still_in_the_code(quoted: str) -> None:
    assert any(len(part.strip()) > 7 for part in quoted.split("...")), "too little of it to be found by"
    assert said(quoted), f"no message like this in src any more: {quoted}"


def test_the_page_quotes_enough() -> None:
    assert len(QUOTED) >= 50
    assert not said("a message that nobody has ever ... written")
