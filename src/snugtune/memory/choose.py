"""The plan of a run within its budget: what `train` and `snugtune plan` have in common."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PretrainedConfig

from snugtune.config import PlanConfig, RunConfig
from snugtune.memory.budget import free_memory, resident
from snugtune.memory.demand import largest_chunk
from snugtune.memory.estimate import Estimate, Estimator, Work
from snugtune.memory.fit import Fitted, Question, fit
from snugtune.memory.plan import Planned, make_plan
from snugtune.memory.process import runtime
from snugtune.model.load import DTYPES
from snugtune.model.source import ModelSource, Say
from snugtune.training.examples import JobData
from snugtune.types import Plan, Width
from snugtune.words import bytes_of


@dataclass(frozen=True)
class Model:
    """What is known of a base before it is loaded. `apart`: why its jobs cannot share a forward."""

    source: ModelSource
    config: PretrainedConfig
    stored: Width | None
    apart: str | None

    def files(self) -> list[Path]:
        """Those of its weights that lie in a local folder."""
        folder = Path(self.source.location)
        return sorted(folder.glob("*.safetensors")) if folder.is_dir() else []

    def is_computed_with_as_it_lies(self, plan: Plan) -> bool:
        """Whether its files' pages are the weights: these are mapped, where their format is that of the plan."""
        return plan.device == "cpu" and self.config.dtype == DTYPES.get(plan.weights)


def planned_within(config: RunConfig, model: Model, data: Mapping[str, JobData], say: Say) -> Fitted:
    """The quickest plan within the config's budget, or else within what the device has free. Raises `DoesNotFitError`."""
    question = question_of(config, model, data)
    device = question.make(config.plan).plan.device
    here = resident() if device == "cpu" else 0
    budget = free_memory(device) + here if config.memory is None else bytes_of(config.memory)
    return fit(question, budget)


def question_of(config: RunConfig, model: Model, data: Mapping[str, JobData]) -> Question:
    """What is to be planned, with the chunks of its data."""
    here, jobs, estimator = resident(), config.resolved_jobs(), Estimator(model.config, config.trust_remote_code)

    def make(pins: PlanConfig) -> Planned:
        return make_plan(config.model_copy(update={"plan": pins}), model.stored, model.apart)

    @functools.cache
    def chunks(micro_batch: int, fused_tokens: int) -> Sequence[Work]:
        plan = replace(usual, micro_batch=micro_batch, fused_tokens=fused_tokens)
        return _together([largest_chunk(job, data[job.name], plan) for job in jobs], plan)

    def demand(plan: Plan) -> Sequence[Work]:
        return chunks(plan.micro_batch, plan.fused_tokens)

    def predict(plan: Plan, works: Sequence[Work]) -> Estimate:
        return estimator.estimate(plan, works, runtime(plan, here, model.files(), model.is_computed_with_as_it_lies(plan)))

    usual = make(config.plan).plan
    return Question(config.plan, jobs, make, predict, demand, model.stored)


def _together(works: Sequence[Work], plan: Plan) -> Sequence[Work]:
    """The jobs' largest chunks; the first with those of others beside it, where they share forwards."""
    if not plan.fused_tokens:
        return works
    lengths: tuple[int, ...] = ()
    scored = 0
    for work in sorted(works, key=lambda w: sum(w.lengths)):
        if sum(lengths) + sum(work.lengths) <= plan.fused_tokens:
            lengths, scored = lengths + work.lengths, scored + work.scored
    first, *others = works
    wide = replace(first, lengths=lengths, scored=scored)
    return [wide if sum(lengths) > sum(first.lengths) else first, *others]
