"""The largest number that fits, found by asking for few."""

import pytest

from snugtune.proposal import _largest


@pytest.mark.parametrize("flat", [0, 300, 900])
@pytest.mark.parametrize("most", [64, 1000, 100_000])
def test_the_largest_that_fits_is_found_to_a_64th(flat: int, most: int) -> None:
    """Needs that stay for a while and then grow on a line, or bend."""
    for bend in (0.0, 1e-4):
        asked: list[int] = []

        def needs(n: int, bend: float = bend, asked: list[int] = asked) -> int:
            asked.append(n)
            return max(flat, round(10 * n + bend * n * n))

        true = max((n for n in range(1, most + 1) if needs(n) <= 1000), default=None)
        asked.clear()
        found = _largest(needs, 1000, 1, most)
        assert found is not None and true is not None
        assert needs(found) <= 1000 and true - max(1, true // 32) <= found <= true
        assert len(asked) <= 20


def test_what_never_fits_and_what_always_does() -> None:
    assert _largest(lambda n: 5, 4, 1, 64) is None
    assert _largest(lambda n: 5, 5, 1, 64) == 64
