"""What a process has besides tensors: named constants, each with where it comes from.

Those of CPU were measured with SmolLM2-135M and models of its size, torch 2.13, on Linux; `benchmarks/estimate.py` holds
predictions against runs. Those of CUDA are others' measurements and torch's source: no GPU was here.
"""

import sys

from snugtune.memory.budget import CONTEXT
from snugtune.memory.estimate import Runtime
from snugtune.types import NARROW, Plan

MIB = 2**20
GROWS = 45 * MIB
"""From the reading of weights to a step: pages of libraries that are touched, threads, compiled products, Python's objects (0 to
50 MiB seen under LoRA, 25 to 80 where the whole model trains)."""
WRITTEN = 60 * MIB
"""PEFT's import, with that of bitsandbytes: when adapters are written."""
BITSANDBYTES = 45 * MIB
"""Its import, where weights are kept in 4 bits, or optimizer state in 8."""
SELF_TEST = 15 * MIB
"""What the gradient self-test leaves, of narrow weights, and where weights or activations are kept elsewhere: compiled kernels,
pages that hold a little (14 to 18 MiB seen)."""
HOLES = {"mimalloc": 0.09, "glibc": 0.6}
"""Of what comes and goes in a step, so much lies unused between it at the peak."""
_HOLES_ELSEWHERE = 0.15

WORKSPACES = 2 * 32 * MIB
"""cuBLAS': 32 MiB for each of two threads' handles from compute capability 9.0 on, 8.1 before (CublasHandlePool.cpp)."""
ROUNDED = 0.04
"""Of CUDA's blocks: those from 1 MiB on may have up to 1 MiB more than was asked for (kSmallSize, kMinBlockSize of torch's
caching allocator), and what is between them cannot always be used."""


def runtime(plan: Plan, process: int, malloc: str, stored: int) -> Runtime:
    """Of a process that has so many bytes in memory before the base is loaded.

    `malloc`: the allocator that it has; `stored`: bytes of a number in the model's files, 0 where it is computed with as it lies
    there, mapped.
    """
    if plan.device == "cuda":
        return Runtime(CONTEXT + WORKSPACES, holes=ROUNDED)
    late = BITSANDBYTES if _needs_bitsandbytes(plan) and "bitsandbytes" not in sys.modules else 0
    grows = GROWS + (SELF_TEST if plan.weights in NARROW or plan.offload != "none" else 0)
    return Runtime(process + late, grows, HOLES.get(malloc, _HOLES_ELSEWHERE), stored, WRITTEN)


def _needs_bitsandbytes(plan: Plan) -> bool:
    return plan.weights == "nf4" or plan.optimizer_state != "fp32"
