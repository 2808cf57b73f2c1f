"""SmolLM2 in budgets down to the smallest that is claimed: each is kept, what is learned stays, and less is refused at once."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.real, pytest.mark.slow]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MIB = 2**20


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return importlib.import_module("budget")


def test_budgets_are_kept_and_change_nothing_that_is_learned(tmp_path: Path, budget: Any) -> None:
    budget.write_data(tmp_path / "data.jsonl")
    least = budget.smallest(tmp_path)
    wide, narrow = (budget.trained(tmp_path, name, size) for name, size in (("2 GiB", 2048 * MIB), ("least", least)))
    assert budget.kept(wide) and budget.kept(narrow), (wide, narrow)
    assert narrow["measured"] < 0.6 * wide["measured"] and narrow["knobs"] != wide["knobs"]
    assert narrow["losses"] == pytest.approx(wide["losses"], rel=1e-4)
    below = budget.trained(tmp_path, "below", least - 32 * MIB)
    assert below["code"] == 3 and "the smallest budget that works here is" in below["said"]
    assert not (tmp_path / "below" / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA holds on Linux alone")
def test_a_limit_of_the_system_is_a_budget(tmp_path: Path, budget: Any) -> None:
    budget.write_data(tmp_path / "data.jsonl")
    limited = budget.trained(tmp_path, "limited", None, 1280 * MIB)
    assert limited["code"] == 0, limited
    assert limited["measured"] < 1280 * MIB
