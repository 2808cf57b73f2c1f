"""The plan of a run within its budget: what `train` and `snugtune plan` have in common."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from snugtune import allocator
from snugtune.config import JobConfig, PlanConfig, RunConfig, to_config
from snugtune.errors import InputError
from snugtune.files import cache_dir
from snugtune.memory.budget import free_memory, resident
from snugtune.memory.demand import full_chunk, largest_chunk
from snugtune.memory.estimate import Estimate, Estimator, Work
from snugtune.memory.fit import Fitted, Question, fit
from snugtune.memory.kept import TraceCache
from snugtune.memory.plan import Planned, make_plan, unless_idle
from snugtune.memory.probe import speed_of
from snugtune.memory.process import runtime
from snugtune.memory.speed import Size, seconds_a_token
from snugtune.methods import METHODS
from snugtune.methods.lora import LoraConfig
from snugtune.model.load import DTYPES
from snugtune.model.source import ModelSource
from snugtune.training.examples import JobData
from snugtune.training.job import chunk_tokens
from snugtune.types import Plan, Width
from snugtune.words import bytes_of, gib


@dataclass(frozen=True)
class Model:
    """What is known of a base before it is loaded. `apart`: why its jobs cannot share a forward."""

    source: ModelSource
    config: PretrainedConfig
    stored: Width | None
    apart: str | None

    def read(self, plan: Plan) -> int:
        """Bytes of a number in its files; 0 where their pages are the weights: mapped, if their format is that of the plan."""
        stored = self.config.dtype if isinstance(self.config.dtype, torch.dtype) else torch.float32
        plain = plan.offload != "weights" and stored == DTYPES.get(plan.weights)
        return 0 if plain else stored.itemsize


def estimator_of(model: Model, trust_remote_code: bool) -> Estimator:
    """One that finds what was traced on this machine before; but a checkpoint's own code may change unseen."""
    kept = None if trust_remote_code else TraceCache(cache_dir() / "traces", model.config)
    return Estimator(model.config, trust_remote_code, kept)


def planned_within(config: RunConfig, model: Model, data: Mapping[str, JobData]) -> Fitted:
    """The quickest plan within the config's budget, or else within what the device has free. Raises `DoesNotFitError`."""
    question = question_of(config, model, data)
    return fit(question, budget_of(config, question.make(config.plan).plan.device))


def planned_by_rule(config: RunConfig, model: Model, data: Mapping[str, JobData] | None, elsewhere: bool = False) -> Planned:
    """The plan that the config's pins give by themselves. `elsewhere`: for a machine that may have other devices."""
    planned = make_plan(config, model.stored, model.apart, elsewhere)
    if data is None or config.plan.execution != "auto":
        return planned
    return unless_idle(planned, [chunk_tokens(job, data[job.name], planned.plan) for job in config.resolved_jobs()])


def budget_of(config: RunConfig, device: str) -> int:
    """Bytes that this process may have. Raises `InputError` where nothing says how much that is."""
    if config.memory is not None:
        return bytes_of(config.memory)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("memory: how much has the GPU? There is none here to ask; give --memory, as 24GiB")
    return free_memory(device) + (resident() if device == "cpu" else 0)


def process_of(jobs: Sequence[JobConfig]) -> int:
    """Bytes that this process has before it loads a base for these jobs."""
    for job in jobs:
        job.optimizer.bring()
    return resident()


def beyond_the_machine(config: RunConfig, fitted: Fitted) -> str | None:
    """What to say of a budget whose plan needs more than this machine has free."""
    there = budget_of(config.model_copy(update={"memory": None}), fitted.chosen.planned.plan.device)
    if config.memory is None or fitted.chosen.needs <= there:
        return None
    needs = f"{gib(fitted.chosen.needs)} are needed and {gib(there)} free here"
    return f"{config.memory} are allowed, but {needs}: the system may end the run"


def question_of(
    config: RunConfig,
    model: Model,
    data: Mapping[str, JobData] | None,
    estimator: Estimator | None = None,
    elsewhere: bool = False,
    process: int | None = None,
) -> Question:
    """What is to be planned, with the largest chunks of its data; without data, with the largest that may be.

    `estimator`: one that has traced this model before. `elsewhere`: for a process, or a machine, that is not this one.
    `process`: bytes that it has before it loads; None: what this one has now.
    """
    jobs = config.resolved_jobs()
    here = process_of(jobs) if process is None else process
    estimator = estimator or estimator_of(model, config.trust_remote_code)
    malloc = allocator.of_a_run() if elsewhere else allocator.name()

    def make(pins: PlanConfig) -> Planned:
        return planned_by_rule(config.model_copy(update={"plan": pins}), model, data, elsewhere)

    usual = make(config.plan).plan

    @functools.cache
    def chunks(micro_batch: int, fused_tokens: int) -> Sequence[Work]:
        plan = replace(usual, micro_batch=micro_batch, fused_tokens=fused_tokens)
        largest = [full_chunk(job, plan) if data is None else largest_chunk(job, data[job.name], plan) for job in jobs]
        return _together(largest, plan)

    def demand(plan: Plan) -> Sequence[Work]:
        return chunks(plan.micro_batch, plan.fused_tokens)

    def predict(plan: Plan, works: Sequence[Work]) -> Estimate:
        return estimator.estimate(plan, works, runtime(plan, here, malloc, model.read(plan)))

    @functools.cache
    def state() -> float:
        return estimator.state(usual, demand(usual))

    speed_here = functools.cache(speed_of)  # asked once for many plans, also where it cannot be kept

    def price(plan: Plan) -> float:
        speed = speed_here(plan.device, plan.compute, plan.threads, _is_here(plan.device))
        tokens = max(1, *(sum(work.lengths) for work in demand(plan)))
        full = any(not METHODS[type(job.method)].routable for job in jobs)
        return seconds_a_token(plan, speed, Size(estimator.numbers, tokens, _inputs(model.config, plan), full, state()))

    def other(**fields: Any) -> Question:
        changed = to_config(config.model_copy(update=fields).model_dump(), "plan")
        return question_of(changed, model, data, estimator, elsewhere, here)

    return Question(config.plan, jobs, make, predict, demand, price, model.stored, _otherwise(config, other))


def _otherwise(config: RunConfig, other: Callable[..., Question]) -> dict[str, Callable[[], Question]]:
    """What may be changed of a run that trains the base itself."""
    found: dict[str, Callable[[], Question]] = {}
    if config.jobs or METHODS[type(config.method)].routable:
        return found
    if config.max_grad_norm is not None and config.plan.gradients == "auto":
        found["max_grad_norm: null"] = functools.partial(other, max_grad_norm=None)
    return {**found, "method: lora": functools.partial(other, method=LoraConfig())}


def _is_here(device: str) -> bool:
    return device == "cpu" or torch.cuda.is_available()


def _inputs(config: PretrainedConfig, plan: Plan) -> float:
    """Bytes of a token's states at the beginning of all blocks, where the config has the usual words for that."""
    text = config.get_text_config()
    width, depth = (getattr(text, name, 0) for name in ("hidden_size", "num_hidden_layers"))
    return float(width * depth * DTYPES[plan.compute].itemsize)


def _together(works: Sequence[Work], plan: Plan) -> Sequence[Work]:
    """The jobs' largest chunks; the first of each kind with those of others beside it, where they share forwards."""
    if not plan.fused_tokens:
        return works
    lengths: tuple[int, ...] = ()
    scored = 0
    for work in sorted(works, key=lambda w: sum(w.lengths)):
        if sum(lengths) + sum(work.lengths) <= plan.fused_tokens:
            lengths, scored = lengths + work.lengths, scored + work.scored
    if sum(lengths) <= max(sum(work.lengths) for work in works):
        return works
    kinds = {(work.config.method, work.config.objective): at for at, work in reversed(list(enumerate(works)))}
    # one of each kind stands for all of the row: as if all had its adapters
    return [replace(work, lengths=lengths, scored=scored) if at in kinds.values() else work for at, work in enumerate(works)]
