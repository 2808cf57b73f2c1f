"""Jobs over random tokens, for programs that measure steps: nothing is read, tokenised or written."""

from collections.abc import Sequence
from typing import Any

import torch

from snugtune.allocator import give_back_freed
from snugtune.config import JobConfig
from snugtune.console import quiet_libraries
from snugtune.model.base import Base, load_base
from snugtune.model.source import find_model
from snugtune.training.examples import JobData
from snugtune.training.job import Job, start_job
from snugtune.types import HEAD_ROWS, NARROW, Dense, Example, Plan, Width


def loaded(model: str, weights: Width, **knobs: Any) -> tuple[Base, Plan]:
    """(base, plan), and no memory left over from loading. `knobs`: of the plan, where they are not the usual ones."""
    quiet_libraries()
    compute: Dense = "bf16" if weights in NARROW else weights  # pyright: ignore[reportAssignmentType]
    usual = {
        "micro_batch": 1,
        "recompute": "none",
        "head_rows": HEAD_ROWS,
        "threads": torch.get_num_threads(),
        "compute": compute,
    }
    plan = Plan(device="cpu", weights=weights, **usual | knobs)
    base = load_base(find_model(model), plan)
    give_back_freed()
    return base, plan


def examples(real: Sequence[int], laid: Sequence[int], seed: int, labelled: float = 1.0) -> tuple[Example, ...]:
    """Rows of random tokens. What is laid out beyond the real ones carries no weight, nor does what comes before the
    last `labelled` share of these."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for count, length in zip(real, laid, strict=True):
        places = torch.arange(length)
        weights = ((places < count) & (places >= max(1, round(count * (1 - labelled))))).float()
        made.append(Example(torch.randint(3, 250, (length,), generator=generator), weights, "random"))
    return tuple(made)


def started(
    base: Base, plan: Plan, name: str, rows: tuple[Example, ...], batch: int, method: dict[str, Any], chunk: int = 0
) -> Job:
    """A job of `batch` sequences a step, in chunks of so many tokens (0: a sequence a chunk).

    All have one seed, so that rows of the same place meet in a forward.
    """
    longest = max(len(row.tokens) for row in rows)
    plain = {"name": name, "data": "random", "batch_size": batch, "steps": 10**6, "max_seq_len": longest, "method": method}
    job = start_job(base, JobConfig.model_validate(plain), JobData(rows), plan)
    job.capacity = chunk
    return job
