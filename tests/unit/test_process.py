"""What a process is said to have besides tensors."""

from dataclasses import replace

import pytest

from snugtune.memory.process import SELF_TEST, runtime
from snugtune.types import HEAD_ROWS, Plan

PLAN = Plan("cpu", "fp32", 1, "none", HEAD_ROWS, 1, "fp32")


@pytest.mark.parametrize("how", [{"weights": "int8"}, {"offload": "weights"}, {"offload": "activations"}], ids=str)
def test_what_the_self_test_leaves_is_counted_where_it_runs(how: dict[str, str]) -> None:
    grown = [runtime(plan, 0, "mimalloc", 0).grows for plan in (PLAN, replace(PLAN, **how))]
    assert grown[1] - grown[0] == SELF_TEST
