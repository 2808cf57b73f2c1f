"""From a config to a session that can train: data read, plan made, base loaded, jobs started or restored."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from snugtune.allocator import give_back_large_blocks
from snugtune.config import RunConfig
from snugtune.data.cache import tokenizer_identity
from snugtune.errors import InputError
from snugtune.files import user_path
from snugtune.folder import RunFolder
from snugtune.interrupt import Stop
from snugtune.machine import keep_few_kernels
from snugtune.memory.budget import Watch
from snugtune.memory.choose import Model, beyond_the_machine, budget_of, planned_by_rule, planned_within
from snugtune.memory.estimate import UntraceableError
from snugtune.memory.fit import Fitted
from snugtune.memory.measured import Forecast, Meter
from snugtune.memory.plan import Planned, make_plan, taking_turns
from snugtune.model.base import Base, Found, load_base
from snugtune.model.load import load_config, load_tokenizer, stored_width
from snugtune.model.proofs import obstacle_to_sharing
from snugtune.model.selftest import check_gradients
from snugtune.model.source import ModelSource, Say, find_model
from snugtune.observer import Observer
from snugtune.session import Session
from snugtune.training.checkpoint import Checkpoint, latest_checkpoint
from snugtune.training.examples import JobData, JobText, read_job, tokenize_job
from snugtune.training.job import length_remark, start_job
from snugtune.training.metrics import StepMetrics
from snugtune.training.trainer import Trainer
from snugtune.types import NARROW
from snugtune.words import bytes_of


def prepare(config: RunConfig, observer: Observer, stop: Stop) -> Session:
    """Read data, plan, load the base and start or restore every job; from then on there is a state to save.

    Writes nothing but jobs at rest.
    """
    folder = RunFolder(user_path(config.output, "output"))
    texts = {job.name: read_job(job) for job in config.resolved_jobs()}
    checkpoint = latest_checkpoint(folder.checkpoints)
    source = find_model(config.model, observer.note)
    model_config = load_config(source, config.trust_remote_code)
    stored, apart = stored_width(source, model_config), obstacle_to_sharing(model_config)
    if checkpoint is None:
        make_plan(config, stored, apart)  # a pin that cannot be had is told of before the data is tokenised
    found = load_tokenizer(source, config.trust_remote_code)
    data = _tokenised(config, texts, found[0], observer)
    fitted = None
    if checkpoint is None:
        planned, fitted = _planned(config, Model(source, model_config, stored, apart), data, observer.note)
    else:
        planned = _planned_before(checkpoint)
    torch.set_num_threads(planned.plan.threads)
    keep_few_kernels(len(texts) if planned.plan.fused_tokens else 1)  # before the first product
    if planned.plan.offload == "weights" and give_back_large_blocks():
        observer.note("memory: the allocator gives blocks from 128 KiB on back at once (M_MMAP_THRESHOLD)")
    watch = Watch(planned.plan.device, None if config.memory is None else bytes_of(config.memory))
    base = _load(source, planned, checkpoint, config, observer, found)
    watch.give_back()  # what loading left, before the largest weights are decoded beside it
    planned = proved(planned, base, config.plan.execution == "fused", observer.note)
    trainer = Trainer(base, planned.plan, watch, stop.is_set, folder.path, observer.note)
    session = Session(config, folder, planned, trainer, told=folder.read_jobs())
    session.fitted, session.meter = fitted, _meter(config, watch, fitted, {} if checkpoint is None else folder.read_plan())
    session.data = {name: known.summary() for name, known in data.items()}
    try:
        _start_jobs(session, data, checkpoint, observer)
        if (planned.plan.weights in NARROW or planned.plan.offload != "none") and (checked := check_gradients(base)).linears:
            observer.note(f"checked: {checked}")
        watch.give_back()
    except BaseException:
        trainer.close()
        raise
    if checkpoint is None:
        session.pending = trainer.start_metrics()
    else:
        session.pending, session.looked = [StepMetrics(**fields) for fields in checkpoint.pending], session.step
        session.saved = session.stands
        observer.note(f"resuming after {session.place}")
    stop.saves = True
    return session


def _meter(config: RunConfig, watch: Watch, fitted: Fitted | None, before: Mapping[str, Any]) -> Meter:
    """What measures a run, and knows what was predicted of it; `before`: `plan.json`, where the run began earlier."""
    known = before if fitted is None else fitted.facts()
    budget = budget_of(config, watch.device) if fitted is None else fitted.budget
    return Meter(watch, budget, Forecast.of(known.get("estimate")), before.get("measured"))


def _tokenised(
    config: RunConfig, texts: Mapping[str, JobText], tokenizer: PreTrainedTokenizerBase, observer: Observer
) -> dict[str, JobData]:
    """Each job's data, with what there is to say of it."""
    identity, found = tokenizer_identity(tokenizer), dict[str, JobData]()
    for job in config.resolved_jobs():
        found[job.name] = tokenize_job(job, texts[job.name], tokenizer, observer.track, observer.note, identity)
        for remark in found[job.name].remarks:
            observer.note(f"data ({job.name}): {remark}")
    return found


def _start_jobs(session: Session, data: Mapping[str, JobData], checkpoint: Checkpoint | None, observer: Observer) -> None:
    """Start each job, or restore it."""
    trainer, base, plan = session.trainer, session.trainer.base, session.planned.plan
    for job_config in session.config.resolved_jobs():
        if checkpoint is not None and (ended := checkpoint.ended(job_config)) is not None:
            session.ended.append(ended)
            continue
        job = start_job(base, job_config, data[job_config.name], plan)
        if remark := length_remark(base, job_config, job.data):
            observer.note(f"data ({job.name}): {remark}")
        if checkpoint is not None:
            checkpoint.restore(job)
        trainer.add(job)
    for change in [] if checkpoint is None else checkpoint.changes:
        trainer.change(change)
        observer.note(f"plan ({change.job}): {change.told}")
    for note in base.kernel_notes:
        observer.note(f"kernels: {note}")


def _load(
    source: ModelSource, planned: Planned, checkpoint: Checkpoint | None, config: RunConfig, observer: Observer, found: Found
) -> Base:
    """The base, with what there is to say of it. Raises `InputError` where it is not that of the checkpoint."""
    for reason in planned.reasons:
        observer.note(f"plan: {reason}")
    base = load_base(source, planned.plan, config.trust_remote_code, observer.note, found)
    for note in base.notes:
        observer.note(f"model: {note}")
    if checkpoint is not None and checkpoint.base != base.fingerprint:
        raise InputError(
            f"model: '{base.name}' has other weights now than {checkpoint.folder} was trained on; bring them back, "
            "or give a new output folder"
        )
    return base


def proved(planned: Planned, base: Base, pinned: bool, note: Say) -> Planned:
    """The plan, with jobs in turns where this base or this machine cannot lay them side by side. `pinned`: they were to be."""
    capacity = planned.plan.fused_tokens
    if not capacity:
        return planned
    if base.apart is not None and pinned:
        raise InputError(f"plan.execution: fused cannot be on '{base.name}' ({base.apart}); use interleaved")
    if base.apart is None and base.rows_are_independent(capacity):
        return planned
    if pinned:
        note("plan: matrix products here give a row other last bits among others: fused, as asked, no job is as if alone")
        return planned
    planned = taking_turns(planned, base.apart or "matrix products here give a row other last bits among others")
    note(f"plan: {planned.reasons[-1]}")
    return planned


def _planned(config: RunConfig, model: Model, data: Mapping[str, JobData], note: Say) -> tuple[Planned, Fitted | None]:
    """The quickest plan that fits, with what was looked at; of a model that cannot be traced that of rules. Says what is odd."""
    try:
        fitted = planned_within(config, model, data)
    except UntraceableError as error:
        note(f"plan: {error}; the knobs are set by rule")
        return planned_by_rule(config, model, data), None
    if (remark := beyond_the_machine(config, fitted)) is not None:
        note(f"memory: {remark}")
    return fitted.chosen.planned, fitted


def _planned_before(checkpoint: Checkpoint) -> Planned:
    if checkpoint.plan.device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{checkpoint.folder}: this run was started on cuda, which is not here; resume it where it began")
    return Planned(checkpoint.plan, ("as planned when the run began",))
