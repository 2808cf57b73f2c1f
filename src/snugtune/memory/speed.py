"""How long a plan's steps take beside another's: from what the machine is known to do, and what the plan lets it do.

Only the order of plans is decided by it, so it has what differs between them: products, decoding of narrow weights, weights
and inputs of blocks that come and go. Per token, as all plans train on the same tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from snugtune.types import Plan, Width

BITS: Mapping[Width, float] = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "w8a8": 8, "nf4": 4.5}
"""Of a weight as it is kept."""


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second."""

    flops: float  # additions and multiplications of a product in the dtype that is computed in
    decoded: Mapping[Width, float]  # weights of a format that are brought into that dtype
    read: float  # bytes of streamed weights
    read_cached: float  # the same, where the system has the file in memory
    written: float  # bytes of blocks' inputs that are kept elsewhere
    cache: float  # bytes of files that the system may have in memory


FORWARD = 128
"""Tokens that take as long as a forward by itself does: of 512 tokens instead of 1024, a step was a tenth to a seventh slower
(2 CPU cores)."""
ASSUMED = {
    "cuda": Speed(1.0e14, {"int8": 3e11, "nf4": 3e11}, 2.0e10, 2.0e10, 2.0e10, float("inf")),
    "cpu": Speed(1.0e11, {"int8": 1e9, "nf4": 7e8}, 1.0e9, 5.0e9, 5.0e8, 8.0e9),
}
"""Of a machine that is not here: from data sheets, to the power of ten (bf16 products of a consumer GPU, PCIe 4 x16, its memory
read once and written once for each weight decoded; a desktop processor and its NVMe disk)."""


@dataclass(frozen=True)
class Size:
    """What a step's time follows from besides the plan."""

    weights: float  # numbers in the base
    tokens: float  # of a forward
    inputs: float  # bytes of all blocks' inputs a token
    full: bool  # gradients of the weights are made, too
    state: float = 0.0  # bytes of what a job trains, and of its optimizer's state


def seconds_a_token(plan: Plan, speed: Speed, size: Size) -> float:
    """A product with each weight forward and one back, two where weights train, and one more where backward computes again.

    Streamed weights come while others are computed with: the slower of both counts. Where jobs rest, one's state is written and
    another's read for each step, which may be no more than a forward.
    """
    again = {"none": 0.0, "blocks": 1.0}[plan.recompute] if isinstance(plan.recompute, str) else 1 / plan.recompute
    uses = 2 + again
    products = 2 * size.weights * (uses + size.full) / speed.flops * (1 + FORWARD / size.tokens)
    decoding = uses * size.weights / size.tokens / speed.decoded[plan.weights] if plan.weights in speed.decoded else 0.0
    resting = 2 * size.state / size.tokens / speed.written if plan.resident_jobs else 0.0
    if plan.offload == "weights":
        kept = size.weights * BITS[plan.weights] / 8
        bandwidth = speed.read_cached if kept <= speed.cache else speed.read
        return max(products + decoding, uses * kept / size.tokens / bandwidth) + resting
    spilled = 2 * size.inputs * again / speed.written if plan.offload == "activations" else 0.0
    return products + decoding + spilled + resting
