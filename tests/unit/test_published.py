"""Predictions beside published peaks: what the docs print is what is predicted, and what was published stays as it was."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("published")


def test_each_row_is_predicted_or_says_why_not(published: Any) -> None:
    rows = published.read_rows()
    assert len(rows) == 41
    for row in rows:
        assert row["why"] and row["published"]["source"]
        assert (row["run"] is None) == (row["config"] is None)
        assert row["run"] is not None or "not predicted" in row["why"] or "vram_gb" in row["published"]


@pytest.mark.parametrize("at", [5, 19, 26])
def test_the_docs_print_what_is_predicted(published: Any, at: int) -> None:
    """QLoRA with scales in 8 bits, some blocks of a model with a head of 256,000 words, LoRA with 8-bit state."""
    page = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8")
    line = published.line(at, published.read_rows()[at - 1])
    assert re.findall(rf"^\| {at} \|.*$", page, re.MULTILINE) == ["| " + " | ".join(line) + " |"]


def test_another_recipe_is_counted_by_its_bytes(published: Any) -> None:
    """Llama 3.1 8B in bf16, by hand: weights 14.96, block inputs 1.00, logits 0.98, two gradients of the head."""
    row = published.read_rows()[0]
    numbers, head = 8_030_261_248, 128_256 * 4096
    hand = 2 * numbers + 2 * 32 * 4096 * 4096 + 2 * 4096 * 128_256 + 2 * 2 * head
    assert published.counted(published.task_of(row["config"], row["run"]), row["theirs"]) == pytest.approx(hand, rel=1e-4)
