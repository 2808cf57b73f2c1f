"""A result that is of no use is said to be so, by what the losses and the weights show; a good one is not doubted."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from snugtune.training.job import Best, largest_weight
from snugtune.training.verdict import warning


def judged(
    losses: list[float] = [],  # noqa: B006
    held: list[float] = [],  # noqa: B006
    weight: float = 0.1,
    keep_best: bool = False,
    failure: str | None = None,
) -> str | None:
    """What is said of a job with these training losses, these held-out losses (one before, the rest after) and this weight."""
    lines: list[dict[str, Any]] = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    lines += [{"step": step, "eval_loss": loss} for step, loss in enumerate(held)]
    attached: Any = SimpleNamespace(parameters=lambda: [torch.zeros(3), torch.tensor([0.0, -weight]), torch.zeros(0)])
    job: Any = SimpleNamespace(
        name="b",
        failure=failure,
        untuned=held[0] if held else None,
        best=Best(1, min(held[1:])) if held[1:] else None,
        config=SimpleNamespace(keep_best=keep_best, optimizer=SimpleNamespace(lr=1e9)),
        largest_weight=largest_weight(attached),
    )
    return warning(job, lines)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"losses": [3.0, 11.0, 10.0, 12.0]}, "b: the loss rose, 3.0000 -> 11.0000 (mean of the last 2 steps); lower"),
        ({"losses": [3.0] + [10.0] * 30}, "mean of the last 10 steps"),
        ({"losses": [3.0, 2.0], "held": [3.0, 2.0, 4.0]}, "b: the held-out loss rose, 3.0000 -> 4.0000; lower"),
        ({"losses": [3.0, 2.0], "weight": 5e9}, "b: training blew up: weights have grown to 5e+09"),
        ({"weight": float("nan")}, "weights have grown to nan"),
    ],
)
def test_what_went_wrong_is_said_with_the_next_step(found: dict[str, Any], said: str) -> None:
    text = judged(**found)
    assert text is not None and said in text
    assert "lower optimizer.lr (it is 1e+09)" in text


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"losses": [3.0, 2.9, 2.5, 2.0], "held": [3.0, 2.0]},
        {"losses": [2.0, 3.0, 2.1, 3.0, 2.2, 3.0]},  # noise of batches
        {"losses": [1.0, 9.0, 9.0]},  # too few to tell
        {"losses": [1.0, 9.0, 9.0, 9.0], "failure": "given up"},  # said already
        {"held": [2.0, 3.0, 3.0]},  # said when it finished: no evaluation was better
        {"held": [3.0, 2.0, 4.0], "keep_best": True},  # the result is the best state
    ],
)
def test_nothing_else_is_doubted(found: dict[str, Any]) -> None:
    assert judged(**found) is None
