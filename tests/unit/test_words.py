import pytest

from snugtune.words import counted


@pytest.mark.parametrize(
    ("count", "things", "said"),
    [
        (0, "records without text", "0 records without text"),
        (1, "records without text", "1 record without text"),
        (1, "training examples, 3 tokens", "1 training example, 3 tokens"),
        (1, "lists of tools left out", "1 list of tools left out"),
        (1, "documents, which", "1 document, which"),
        (1234, "tokens", "1,234 tokens"),
    ],
)
def test_one_thing_is_no_plural(count: int, things: str, said: str) -> None:
    assert counted(count, things) == said
