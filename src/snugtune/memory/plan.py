"""The plan of a run: which knobs, and why. Fixed rules for now; pins of the config are respected."""

from dataclasses import dataclass

import torch

from snugtune.config import PlanConfig, RunConfig
from snugtune.errors import InputError
from snugtune.types import Plan, Width

HEAD_ROWS = 512
FULL_FORWARD = 512
"""Tokens a forward should at least have room for: with half of that, steps were a quarter slower on 2 CPU cores."""


@dataclass(frozen=True)
class Planned:
    """A plan and the reason of each choice, in the words shown to the user."""

    plan: Plan
    reasons: tuple[str, ...]


def make_plan(config: RunConfig) -> Planned:
    """Choose the knobs. Raises `InputError` for a pin that this device cannot serve."""
    device = _device(config.device)
    weights, why_weights = _weights(config.plan, device)
    longest = max(job.max_seq_len for job in config.resolved_jobs())
    micro_batch = max(1, FULL_FORWARD // longest) if config.plan.micro_batch == "auto" else config.plan.micro_batch
    recompute = "none" if config.plan.recompute == "auto" else config.plan.recompute
    plan = Plan(device, weights, micro_batch, recompute, HEAD_ROWS, torch.get_num_threads())
    name = torch.cuda.get_device_name() if device == "cuda" else f"{plan.threads} threads"
    reasons = (
        f"device {device} ({name})",
        f"weights {weights} ({why_weights})",
        f"at most {micro_batch} x max_seq_len tokens a forward",
        "each block's activations recomputed in backward" if recompute == "blocks" else "activations kept",
    )
    return Planned(plan, reasons)


def plan_for_answers() -> Plan:
    """The plan for loading a base to generate with: the best device, the number format native to it."""
    device = _device("auto")
    return Plan(
        device,
        _weights(PlanConfig(weights="auto", micro_batch="auto", recompute="auto"), device)[0],
        1,
        "none",
        HEAD_ROWS,
        torch.get_num_threads(),
    )


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda was asked for, but torch finds no CUDA device here; use device: auto or cpu")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def _weights(pins: PlanConfig, device: str) -> tuple[Width, str]:
    if pins.weights == "fp16" and device == "cpu":
        raise InputError(
            "plan.weights: fp16 is refused on CPU: matrix products run 10 to 70 times slower there than in bf16; use bf16 or fp32"
        )
    if pins.weights != "auto":
        return pins.weights, "as asked"
    if device == "cuda":
        return (
            ("bf16", "native on this GPU")
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else ("fp16", "this GPU has no bf16")
        )
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bf16", "native on this CPU"
    return "fp32", "this CPU has no fast bf16"
