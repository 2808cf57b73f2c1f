"""The plan that a config's pins give by themselves: which knobs, and why. `fit` looks for the pins that a budget wants."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

import torch

from snugtune.config import JobConfig, PlanConfig, RunConfig
from snugtune.errors import InputError
from snugtune.methods import METHODS
from snugtune.types import (
    FULL_FORWARD,
    HEAD_ROWS,
    NARROW,
    SHARED_FORWARD,
    Dense,
    Offload,
    OptimizerState,
    Plan,
    Recompute,
    Width,
)

_NO_FP16 = "plan.weights: fp16 is refused on CPU: matrix products run 10 to 70 times slower there than in bf16; use bf16 or fp32"


@dataclass(frozen=True)
class Planned:
    """A plan and the reason of each choice, in the words shown to the user."""

    plan: Plan
    reasons: tuple[str, ...]


def make_plan(config: RunConfig, stored: Width | None = None, apart: str | None = None, elsewhere: bool = False) -> Planned:
    """Choose the knobs of a run; see `plan_for`."""
    return plan_for(config.model, config.device, config.plan, config.resolved_jobs(), stored, apart, elsewhere)


def plan_for(
    model: str,
    wanted: str,
    pins: PlanConfig,
    jobs: Sequence[JobConfig],
    stored: Width | None = None,
    apart: str | None = None,
    elsewhere: bool = False,
) -> Planned:
    """Choose the knobs; `wanted` is the device, `jobs` are those that are known, of which there may be none yet.

    `stored`: the format that the checkpoint keeps its weights in, where it is a narrow one; `apart`: why this base's jobs
    cannot share a forward, where its config tells; `elsewhere`: it is for a machine that may have devices that this one lacks.

    Raises `InputError` for a pin that this device, the methods or the checkpoint cannot serve.
    """
    device = _device(wanted, elsewhere)
    weights, why_weights = _weights(pins.weights, device, stored)
    offload, recompute = _offload(pins)
    _check_frozen(jobs, weights, offload, stored)
    fused_tokens, why_execution = _execution(model, pins, jobs, apart)
    plan = Plan(
        device=device,
        weights=weights,
        micro_batch=_micro_batch(pins, jobs),
        recompute=recompute,
        head_rows=HEAD_ROWS if pins.head_rows == "auto" else pins.head_rows,
        threads=torch.get_num_threads(),
        compute=_compute(weights, device),
        double_quant=pins.double_quant,
        outlier_threshold=pins.outlier_threshold,
        optimizer_state=_optimizer_state(pins.optimizer_state, jobs, device),
        offload=offload,
        fused_tokens=fused_tokens,
        gradients="released" if pins.gradients == "released" else "kept",
        resident_jobs=_resident_jobs(pins, jobs),
    )
    _check_released(plan, jobs)
    together = (why_execution,) if why_execution else ()
    return Planned(plan, (*_reasons(plan, why_weights), *_spared(plan), *together, *_resting(pins, jobs)))


def taking_turns(planned: Planned, why: str) -> Planned:
    """The plan with jobs that take turns instead of sharing forwards; the last of its reasons says why."""
    return Planned(replace(planned.plan, fused_tokens=0), (*planned.reasons, f"jobs take turns after all ({why})"))


def unless_idle(planned: Planned, chunks: Sequence[float]) -> Planned:
    """The plan, with jobs that take turns where sharing forwards gains nothing; else the same one.

    `chunks`: how many tokens a chunk of each job usually has. Two that fill a forward by themselves gain nothing from sharing
    one: measured, 1.6 times the throughput at 16 tokens a chunk and 16 jobs, nothing from 256 on.
    """
    room = planned.plan.fused_tokens
    if not room or sum(tokens <= room / 2 for tokens in chunks) >= 2:
        return planned
    return taking_turns(planned, f"their chunks have {min(chunks):.0f} tokens and more: nothing to gain")


def check_job(job: JobConfig, plan: Plan, stored: Width | None = None) -> None:
    """See whether a job can come to a base that was loaded by `plan`. Raises `InputError`."""
    _check_frozen([job], plan.weights, plan.offload, stored)
    _optimizer_state(plan.optimizer_state, [job], plan.device)
    _check_released(plan, [job])


def _micro_batch(pins: PlanConfig, jobs: Sequence[JobConfig]) -> int:
    """Sequences of a chunk. Where lengths differ it is each job's own: what it learns must not depend on its neighbours'."""
    if pins.micro_batch != "auto":
        return pins.micro_batch
    lengths = {job.max_seq_len for job in jobs}
    whole = max((job.batch_size for job in jobs), default=1) if pins.gradients == "released" else 1  # a step is one forward
    return max(whole, FULL_FORWARD // lengths.pop()) if len(lengths) == 1 else 0


def _check_released(plan: Plan, jobs: Sequence[JobConfig]) -> None:
    """Gradients that nobody keeps are those of whole steps, and nothing is asked of all of them. Raises `InputError`."""
    if plan.gradients == "kept":
        return
    for job in jobs:
        fits = plan.micro_batch or max(1, FULL_FORWARD // job.max_seq_len)
        why = None
        if METHODS[type(job.method)].routable:
            why = f"is for methods that train the base itself (full, freeze, rotate); {job.method.type} has few: use kept"
        elif job.max_grad_norm is not None:
            why = "cannot be clipped, the norm is known after the last one; set max_grad_norm: null"
        elif plan.compute == "fp16":
            why = "cannot be with fp16, whose loss scale asks for all gradients before a step; use plan.weights: bf16"
        elif not job.data:
            why = "cannot be driven by hand, gradients do not add up; use kept"
        elif job.batch_size > fits:
            why = f"needs a step to be one forward; set plan.micro_batch: {job.batch_size}, or batch_size: {fits}"
        if why is not None:
            raise InputError(f"plan.gradients: released (job '{job.name}') {why}")


def _execution(model: str, pins: PlanConfig, jobs: Sequence[JobConfig], apart: str | None) -> tuple[int, str]:
    """Tokens of a forward that several jobs share (0: they take turns), and why, in words. Nothing is said of a single job."""
    wanted, said = pins.execution, f"{len(jobs)} jobs" if jobs else "jobs"
    if wanted == "fused" and apart is not None:
        raise InputError(f"plan.execution: fused cannot be on '{model}' ({apart}); use interleaved")
    if len(jobs) == 1:
        return 0, ""
    if wanted == "interleaved" or apart is not None:
        return 0, f"{said} take turns ({'as asked' if apart is None else apart})"
    longest = max((job.max_seq_len for job in jobs), default=0)
    pinned = 1 if pins.micro_batch == "auto" else pins.micro_batch
    room = max(SHARED_FORWARD, pinned * longest) if wanted == "fused" else SHARED_FORWARD
    return (
        room,
        f"{said} share forwards of up to {room} tokens ({'as asked' if wanted == 'fused' else 'while their chunks are short'})",
    )


def _resident_jobs(pins: PlanConfig, jobs: Sequence[JobConfig]) -> int:
    """Jobs whose state may be in memory; 0: all. Raises `InputError` where what trains is the base itself."""
    wanted = pins.resident_jobs
    if wanted == "auto":
        return 0
    for job in jobs:
        if not METHODS[type(job.method)].routable:
            raise InputError(
                f"plan.resident_jobs: method: {job.method.type} trains the base itself, which cannot rest on disk; use auto"
            )
    return wanted


def _resting(pins: PlanConfig, jobs: Sequence[JobConfig]) -> tuple[str, ...]:
    wanted = pins.resident_jobs
    if wanted == "auto" or (jobs and wanted >= len(jobs)):
        return ()
    return (f"{wanted} of {len(jobs) or 'all'} jobs in memory at a time, the others rest on disk",)


def _reasons(plan: Plan, why_weights: str) -> tuple[str, ...]:
    name = f"{plan.threads} threads"
    if plan.device == "cuda":
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "another machine's"
    products = "int8" if plan.weights == "w8a8" else plan.compute
    narrow = f", products in {products}" if plan.weights in NARROW else ""
    return (
        f"device {plan.device} ({name})",
        f"weights {plan.weights} ({why_weights}{narrow})",
        f"at most {plan.micro_batch} x max_seq_len tokens a forward"
        if plan.micro_batch
        else f"at most {FULL_FORWARD} tokens a forward, or one sequence",
        {"none": "activations kept", "blocks": "each block's activations recomputed in backward"}.get(
            str(plan.recompute), f"the activations of one block in {plan.recompute} recomputed in backward"
        ),
    )


def _spared(plan: Plan) -> tuple[str, ...]:
    """What is kept elsewhere or in fewer bits, where anything is."""
    where = "on disk" if plan.device == "cpu" else "in host memory"
    said = {"weights": f"the blocks' weights stay {where}", "activations": f"the blocks' inputs wait {where}", "none": ""}
    state = {"8bit": "optimizer state in 8 bits", "paged": "optimizer state in 8 bits, paged to the host", "fp32": ""}
    released = "each weight steps in backward, no gradients are kept" if plan.gradients == "released" else ""
    rows = f"logits of at most {plan.head_rows} tokens at a time" if plan.head_rows != HEAD_ROWS else ""
    return tuple(text for text in (said[plan.offload], state[plan.optimizer_state], released, rows) if text)


@dataclass(frozen=True)
class Kept:
    """How a run kept the weights that it did not train: the part of its plan that answers depend on."""

    weights: Width | None = None
    compute: Dense | None = None
    double_quant: bool = False
    outlier_threshold: float = 0.0
    offload: Offload = "none"

    @classmethod
    def of(cls, plan: Mapping[str, Any]) -> "Kept":
        """From the fields of a plan. Raises `ValueError` for a value that no plan has."""
        known = {f.name: plan[f.name] for f in fields(cls) if f.name in plan}
        for name, value in known.items():
            allowed = get_args(get_type_hints(Plan)[name])
            if value not in allowed if allowed else type(value) is not get_type_hints(Plan)[name]:
                raise ValueError(f"plan: {name} is {value!r}")
        return cls(**known)

    @property
    def narrow(self) -> bool:
        return self.weights in NARROW


def plan_for_answers(stored: Width | None = None, weights: str = "auto", kept: Kept | None = None) -> tuple[Plan, str]:
    """The plan for loading a base to generate with, on the best device, and why its weights are as they are.

    As asked for; else as a run `kept` them, where they were narrow or streamed; else as the checkpoint keeps them (`stored`);
    else in the device's native format. Raises `InputError` for what cannot be.
    """
    device, kept = _device("auto"), kept or Kept()
    elsewhere = device == "cpu" and kept.weights == "fp16"  # trained on a GPU
    if weights == "auto" and kept.weights is not None and (kept.narrow or kept.offload == "weights") and not elsewhere:
        width, why = kept.weights, "as the run was trained"
    else:
        width, why = _weights(weights, device, stored, "--weights")
        kept = Kept()
    plan = Plan(device, width, 1, "none", HEAD_ROWS, torch.get_num_threads(), _compute(width, device))
    offload: Offload = "weights" if kept.offload == "weights" else "none"  # activations are not kept when there is no backward
    how = {"double_quant": kept.double_quant, "outlier_threshold": kept.outlier_threshold, "offload": offload}
    return replace(plan, **how), why


def _device(wanted: str, elsewhere: bool = False) -> Literal["cpu", "cuda"]:
    if wanted == "cuda" and not torch.cuda.is_available() and not elsewhere:
        raise InputError("device: cuda was asked for, but torch finds no CUDA device here; use device: auto or cpu")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if wanted == "cuda" else "cpu"


def _check_frozen(jobs: Sequence[JobConfig], weights: Width, offload: Offload, stored: Width | None) -> None:
    """Only frozen weights can be kept in fewer bits or elsewhere."""
    job = next((job for job in jobs if not METHODS[type(job.method)].routable), None)
    if job is None:
        return
    if stored is not None:
        raise InputError(f"method: {job.method.type} trains the base's weights, but the checkpoint keeps them in {stored}")
    if weights in NARROW or offload == "weights":
        field = f"plan.weights: {weights}" if weights in NARROW else "plan.offload: weights"
        raise InputError(f"{field} needs frozen weights, but method: {job.method.type} trains them; use method: lora")


def _offload(pins: PlanConfig) -> tuple[Offload, Recompute]:
    """What is kept elsewhere, and whether blocks are recomputed, which inputs that wait elsewhere need."""
    offload: Offload = "none" if pins.offload == "auto" else pins.offload
    if offload == "activations" and pins.recompute == "none":
        raise InputError("plan.offload: activations needs plan.recompute: blocks; only the blocks' inputs are kept then")
    if pins.recompute == "auto":
        return offload, "blocks" if offload == "activations" else "none"
    return offload, "blocks" if pins.recompute == 1 else pins.recompute


def _optimizer_state(wanted: OptimizerState | Literal["auto"], jobs: Sequence[JobConfig], device: str) -> OptimizerState:
    if wanted == "auto" or wanted == "fp32":
        return "fp32"
    if wanted == "paged" and device != "cuda":
        raise InputError("plan.optimizer_state: paged keeps it in the host's memory, where on CPU it is anyway; use 8bit")
    for job in jobs:
        why = job.optimizer.obstacle()
        if why is not None:
            raise InputError(
                f"plan.optimizer_state: {wanted} is nothing for optimizer: {job.optimizer.type} of job '{job.name}' ({why}); "
                "use fp32, or adamw, lion, or sgd with momentum"
            )
    return wanted


def _weights(wanted: str, device: str, stored: Width | None, field: str = "plan.weights") -> tuple[Width, str]:
    """The format of the weights, and why. `field` names what asked for it."""
    if wanted == "fp16" and device == "cpu":
        raise InputError(_NO_FP16.replace("plan.weights", field))
    if wanted in NARROW and stored not in (None, "int8" if wanted == "w8a8" else wanted):
        raise InputError(f"{field}: {wanted} asked for, but the checkpoint keeps its weights in {stored}; use auto")
    for width in get_args(Width):
        if width == wanted:
            return width, "as asked"
    if wanted != "auto":
        raise InputError(f"{field}: {wanted} is no number format; valid: auto, {', '.join(get_args(Width))}")
    return (stored, "as the checkpoint keeps them") if stored is not None else _native(device)


def _compute(weights: Width, device: str) -> Dense:
    """The format to compute with: that of the weights, where they are not in fewer bits."""
    return _native(device)[0] if weights == "int8" or weights == "w8a8" or weights == "nf4" else weights


def _native(device: str) -> tuple[Dense, str]:
    """The number format that this device computes fastest in, and why."""
    if device == "cuda" and not torch.cuda.is_available():
        return "bf16", "native on GPUs since Ampere"
    if device == "cuda":
        return (
            ("bf16", "native on this GPU")
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else ("fp16", "this GPU has no bf16")
        )
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bf16", "native on this CPU"
    return "fp32", "this CPU has no fast bf16"
