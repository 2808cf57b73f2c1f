"""What flows between the layers: frozen dataclasses, nothing that computes.

Shapes: T tokens of a row, n scored positions ("rows"), L tokens of one sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from torch import Tensor

Dense = Literal["fp32", "bf16", "fp16"]
Width = Literal["fp32", "bf16", "fp16", "int8", "w8a8", "nf4"]
"""Number formats of the base: those that are computed with, and those that weights are only kept in."""
NARROW: frozenset[str] = frozenset({"int8", "w8a8", "nf4"})
Recompute = Literal["none", "blocks"] | int
"""Of which blocks backward computes the activations again: of none, of all, of every k-th (k of at least 2)."""
OptimizerState = Literal["fp32", "8bit", "paged"]
Offload = Literal["none", "activations", "weights"]
Gradients = Literal["kept", "released"]

MIN_ROWS = 16
"""Rows below which CPU GEMMs take other kernels: they sum in another order, and over a vocabulary up to 30 times less exactly."""

HEAD_ROWS = 256
"""Rows of logits alive at a time: with fewer, products with the head take longer on CPU; more take memory alone."""

FULL_FORWARD = 1024
"""Tokens a forward should at least have room for: with half of that, steps were a tenth to a seventh slower on 2 CPU cores."""

SHARED_FORWARD = 512
"""The same where several jobs share it: between them more may be in the middle of a step, with gradients."""


@dataclass(frozen=True)
class Example:
    """One tokenised training sequence."""

    tokens: Tensor  # int64 [L]
    weights: Tensor  # float32 [L]; weight of token i as a target, 0 for context; weights[0] is always 0
    source: str  # "file:line", for messages


@dataclass(frozen=True)
class Chunk:
    """One job's atom of work: whole sequences of one optimizer step. Never split, merged or reordered."""

    job: str
    step: int
    index: int
    seed: int  # a pure function of (job seed, step, index); every random draw of the chunk derives from it
    tokens: Tensor  # int64 [T]
    lengths: tuple[int, ...]  # per sequence, host values; sums to T
    rows: Tensor  # int64 [n], positions in `tokens` whose next token is scored
    targets: Tensor  # int64 [n], those next tokens
    weights: Tensor  # float32 [n], loss weights
    extra: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Segment:
    """The contiguous part of a batch that belongs to one chunk. `slice(None)` covers whatever passes."""

    job: str
    tokens: slice  # of the batch's T tokens
    seed: int
    lengths: tuple[int, ...] = ()  # per sequence; sums to its tokens


@dataclass(frozen=True)
class Prompt:
    """Something for the model to answer while it is being trained."""

    text: str  # as a person would show it
    tokens: tuple[int, ...]
    stops: tuple[int, ...]  # tokens that end an answer


@dataclass(frozen=True)
class Batch:
    """Chunks laid side by side in one padding-free row."""

    input_ids: Tensor  # int64 [1, T]
    position_ids: Tensor  # int64 [1, T], restarting at each sequence
    lengths: tuple[int, ...]  # per sequence
    segments: tuple[Segment, ...]  # the routing; a filler sequence at the end belongs to nobody


@dataclass(frozen=True)
class Plan:
    """The knobs a run was given. They change what it costs; what it learns only by rounding (narrow weights, 8-bit state)."""

    device: Literal["cpu", "cuda"]
    weights: Width
    micro_batch: int  # a chunk holds at most micro_batch * max_seq_len tokens; 0: each job's own, what fills a forward
    recompute: Recompute
    head_rows: int  # rows of logits alive at once
    threads: int  # intra-op threads; another count changes the last bits
    compute: Dense  # number format of activations and products; that of the weights, where these are not narrower
    double_quant: bool = False  # nf4: the scales in 8 bits too
    optimizer_state: OptimizerState = "fp32"  # paged: in 8 bits, in the memory of the host
    offload: Offload = "none"  # weights: those of the blocks stay on disk; activations: the blocks' inputs do
    outlier_threshold: float = 0.0  # int8: from which magnitude on activations stay in `compute`; 0: all do
    fused_tokens: int = 0  # a forward that jobs share holds at most so many tokens; 0: they take turns (interleaved)
    gradients: Gradients = "kept"  # released: a weight that trains makes its step in backward, its gradient is gone then
    resident_jobs: int = 0  # of so many jobs the state is in memory, that of the others rests on disk; 0: all are in memory
