"""The peak of a run, predicted from its config, its plan and the largest chunk it will see. No weight is loaded.

A step of the trainer is traced on a base without memory (see `trace`), with few of the model's blocks. What it holds grows
linearly with them, so two depths say what the whole one would hold. What no trace sees, the process itself and what its
allocator leaves unused, is counted by named constants that were measured.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from snugtune.config import JobConfig
from snugtune.errors import InputError
from snugtune.memory.kept import TraceCache
from snugtune.memory.trace import Held, Phase, Trace, trace_step
from snugtune.methods import METHODS
from snugtune.model.hollow import hollow_base, hollow_model
from snugtune.model.load import DTYPES
from snugtune.model.offload import blocks_of
from snugtune.model.spill import WRITES_AHEAD
from snugtune.types import HEAD_ROWS, NARROW, Chunk, Plan

BUFFERS = 2
"""Blocks of streamed weights that are in memory at a time: the one in use, and the next."""

Moment = Literal["load", "body", "head", "backward", "optimizer", "save"]
MOMENTS: Mapping[Moment, str] = {
    "load": "while the weights are read",
    "body": "in the forward",
    "head": "while the head scores",
    "backward": "in the backward",
    "optimizer": "in the optimizer's step",
    "save": "while the result is written",
}
_Numbers = dict[tuple[object, object], float]


@dataclass(frozen=True)
class Work:
    """What one job brings: `lengths` of the sequences of its largest chunk, and how many of their tokens are scored."""

    config: JobConfig
    lengths: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Runtime:
    """What a process has besides tensors. In bytes; `holes` is the share that its allocator adds to what comes and goes."""

    process: int
    grows: int = 0  # from the reading of weights to a step
    holes: float = 0.0
    stored: int = 0  # of a number in the model's files; 0: its pages are what is computed with
    written: int = 0  # what writing the result imports and makes


@dataclass(frozen=True)
class Estimate:
    """Bytes at the fullest moment of a run, by what they are for; `when` that is."""

    weights: int
    adapters: int  # or masters, where weights of the base train that are not fp32
    gradients: int
    optimizer: int
    activations: int  # what backward keeps
    logits: int  # what scores and their gradient take
    transients: int  # what comes and goes within the body
    runtime: int  # the process itself, and what the allocator leaves unused
    when: Moment
    holes: int = 0  # of runtime, what is left unused between what comes and goes

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """By name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("when", "holes")}


@dataclass(frozen=True)
class _Step:
    """What a run holds: at rest, and at the peaks of its largest forward. In bytes."""

    weights: float
    trained: float
    gradients: float
    state: float
    update: float
    peaks: Mapping[Phase, Held]
    at_load: float  # of the weights, so much is there when they have been read
    read: float  # numbers that are read at a time
    twice: float  # of what is tied, until it is


class UntraceableError(InputError):
    """A model whose step needs values to be run."""


class Estimator:
    """Estimates runs on one base. Each trace is made once: plans that differ in where and how things are kept share it.

    `kept`: traces of this model that were made before, to find them and to keep what is made.
    """

    def __init__(self, config: PretrainedConfig, trust_remote_code: bool = False, kept: TraceCache | None = None):
        self.config, self.trust, self.kept = config, trust_remote_code, kept
        self._traces: dict[object, Trace] = {}
        self._depths: dict[tuple[object, ...], tuple[int, int, int]] = {}

    def estimate(self, plan: Plan, jobs: Sequence[Work], runtime: Runtime) -> Estimate:
        """The peak of a run of these jobs. Where they take turns the largest counts, and the state of all that may be there.

        Raises `UntraceableError`.
        """
        steps = [_step(self._trace(plan, job), plan, job.config, self._ties) for job in jobs]
        there = sorted(steps, key=lambda s: s.trained + s.state, reverse=True)[: plan.resident_jobs or len(steps)]
        at_once = len(there) if plan.fused_tokens else 1  # with gradients
        whole = replace(
            max(steps, key=lambda s: max(sum(held.values()) for held in s.peaks.values())),
            trained=sum(s.trained for s in there),
            state=sum(s.state for s in there),
            gradients=sum(sorted((s.gradients for s in there), reverse=True)[:at_once]),
            update=max(s.update for s in steps),
        )
        return max(_moments(whole, runtime), key=lambda e: e.total)

    def state(self, plan: Plan, jobs: Sequence[Work]) -> float:
        """Bytes of what one of these jobs trains and its optimizer remembers, on the average."""
        steps = [_step(self._trace(plan, job), plan, job.config, self._ties) for job in jobs]
        return sum(step.trained + step.state for step in steps) / len(steps)

    @property
    def _ties(self) -> bool:
        return bool(getattr(self.config.get_text_config(), "tie_word_embeddings", False))

    @functools.cached_property
    def numbers(self) -> int:
        """Of the base, in all its weights."""
        plain = Plan("cpu", "fp32", 1, "none", HEAD_ROWS, 1, "fp32")
        return sum(parameter.numel() for parameter in hollow_model(self.config, plain, self.trust).parameters())

    def _trace(self, plan: Plan, job: Work) -> Trace:
        plain = _as_traced(plan)
        kind = (plain, job.config.method, job.config.objective, job.config.optimizer.by_matrix)
        key = (kind, job.lengths, job.scored)
        if key not in self._traces and self.kept is not None and (known := self.kept.get(key)) is not None:
            self._traces[key] = known
        if key not in self._traces:
            try:
                self._traces[key] = self._traced(plain, job)
                if self.kept is not None:
                    self.kept.put(key, self._traces[key])
            except Exception as error:  # whatever a model's own code does where tensors have no values
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UntraceableError(f"the peak of a {self.config.model_type} cannot be predicted: {reason}") from error
        return self._traces[key]

    def _traced(self, plan: Plan, job: Work) -> Trace:
        """The trace of a step of the whole model, from traces of a few blocks."""
        depth, low, high = self._blocks(plan)
        if not METHODS[type(job.config.method)].even(job.config.method):
            low = high = depth
        few = self._at(plan, job, low)
        return _trace(few if high == low else _line(few, self._at(plan, job, high), (depth - low) / (high - low)))

    def _blocks(self, plan: Plan) -> tuple[int, int, int]:
        """How many the model has, and two numbers of them to look at."""
        every = plan.recompute if isinstance(plan.recompute, int) else 1  # of so many blocks one is recomputed
        least = WRITES_AHEAD + 1 if plan.offload == "activations" else 2  # from there on no more inputs wait
        key = (plan.weights, plan.compute, plan.double_quant, every, least)
        if key not in self._depths:
            model = hollow_model(self.config, plan, self.trust)
            self._depths[key] = (len(blocks_of(model)), *_depths(model, every, least))
        return self._depths[key]

    def _at(self, plan: Plan, job: Work, blocks: int) -> _Numbers:
        model = hollow_model(self.config, plan, self.trust, blocks)
        base = hollow_base(model, plan, self.config.model_type)
        return _numbers(trace_step(base, [(job.config, _chunk(job))], plan))


def _as_traced(plan: Plan) -> Plan:
    """The plan without what makes no difference to a trace."""
    offload = "none" if plan.offload == "weights" else plan.offload
    return replace(
        plan, gradients="kept", micro_batch=0, threads=0, fused_tokens=0, resident_jobs=0, optimizer_state="fp32", offload=offload
    )


def _step(trace: Trace, plan: Plan, config: JobConfig, ties: bool) -> _Step:
    """`ties`: the model's head is its embedding, which gets memory of its own until it is tied (transformers' loading)."""
    optimizer, kept = config.optimizer, plan.optimizer_state
    flat = (round(trace.flat),)
    state = sum(count * optimizer.state_bytes(shape, kept) for shape, count in trace.matrices.items())
    state += optimizer.state_bytes(flat, kept) + trace.small * optimizer.state_bytes((1,), kept)
    update = max(optimizer.update_bytes(shape, kept) for shape in (*trace.matrices, flat))
    there = trace.weights - (trace.linears if plan.offload == "weights" else 0)
    weights = there + (BUFFERS * trace.block if plan.offload == "weights" else 0)
    one_by_one = plan.weights in NARROW or plan.offload == "weights"
    read = trace.largest if one_by_one else trace.largest_four
    gradients = trace.tied if plan.gradients == "released" else trace.gradients
    twice = trace.largest * DTYPES[plan.compute].itemsize if ties else 0.0
    return _Step(weights, trace.trained, gradients, state, update, trace.peaks, there, read, twice)


def _moments(step: _Step, runtime: Runtime) -> Iterable[Estimate]:
    """What is held at each moment that may be the fullest."""
    rest = Estimate(_whole(step.weights), _whole(step.trained), _whole(step.gradients), _whole(step.state), 0, 0, 0, 0, "load")
    read = _whole(max(step.read * runtime.stored, step.twice))
    nothing = {"adapters": 0, "gradients": 0, "optimizer": 0}
    yield replace(rest, **nothing, weights=_whole(step.at_load), transients=read, runtime=runtime.process)
    yield _with(rest, runtime, "optimizer", 0, 0, step.update)
    yield replace(rest, gradients=0, runtime=runtime.process + runtime.grows + runtime.written, when="save")
    kept = step.peaks["head"].get("body", 0.0) if "head" in step.peaks else 0.0
    for phase, held in step.peaks.items():
        stays = min(kept, held.get("body", 0.0))
        comes = held.get("body", 0.0) - stays + held.get("backward", 0.0)
        yield _with(rest, runtime, phase, stays, held.get("head", 0.0), comes)


def _with(rest: Estimate, runtime: Runtime, when: Moment, kept: float, logits: float, comes: float) -> Estimate:
    holes = _whole(runtime.holes * (kept + logits + comes))
    process = runtime.process + runtime.grows + holes
    moving = {"activations": _whole(kept), "logits": _whole(logits), "transients": _whole(comes), "holes": holes}
    return replace(rest, **moving, runtime=process, when=when)


def _whole(count: float) -> int:
    return round(count)


def _chunk(job: Work) -> Chunk:
    """One of the same lengths, of which as many tokens are scored, the first ones."""
    tokens = torch.zeros(sum(job.lengths), dtype=torch.long)
    rows = torch.arange(job.scored)
    return Chunk(job.config.name, 0, 0, 0, tokens, job.lengths, rows, torch.zeros_like(rows), torch.ones(job.scored))


def _depths(model: PreTrainedModel, every: int = 1, least: int = 2) -> tuple[int, int]:
    """Two numbers of blocks, so that from one to the other each kind comes as often as in the whole model; `least` at least.

    The first of each `every` blocks is a kind of its own, as it is recomputed. Where kinds do not come again in turns, that is
    all of them, twice. The first block alone needs less than others: its input is given.
    """
    modules = dict(model.named_modules())
    kinds = [(_kind(modules[name]), at % every == 0) for at, name in enumerate(blocks_of(model))]
    for period in range(1, len(kinds)):
        for start in range(max(0, least - period), len(kinds) - 2 * period + 1):
            whole = (len(kinds) - start) % period == 0
            if whole and all(kinds[i] == kinds[i - period] for i in range(start + period, len(kinds))):
                if start + 2 * period < len(kinds):
                    return start + period, start + 2 * period
                break
    return len(kinds), len(kinds)


def _kind(block: torch.nn.Module) -> object:
    """What decides what a block holds: its parts, their shapes, and whether its attention slides."""
    parts = tuple((name, type(module), getattr(module, "sliding_window", None)) for name, module in block.named_modules())
    return parts, tuple(
        (name, tensor.shape, tensor.dtype) for name, tensor in (*block.named_parameters(), *block.named_buffers())
    )


_SCALARS = ("weights", "linears", "block", "largest", "largest_four", "trained", "gradients", "flat", "small", "tied")


def _numbers(trace: Trace) -> _Numbers:
    scalars: _Numbers = {("", name): getattr(trace, name) for name in _SCALARS}
    scalars |= {("matrices", shape): count for shape, count in trace.matrices.items()}
    return scalars | {(phase, made): size for phase, held in trace.peaks.items() for made, size in held.items()}


def _trace(numbers: _Numbers) -> Trace:
    phases: tuple[Phase, ...] = ("body", "head", "backward")
    peaks: dict[Phase, Held] = {p: {m: numbers[p, m] for m in phases if (p, m) in numbers} for p in phases}
    matrices = {shape: count for (kind, shape), count in numbers.items() if kind == "matrices" and isinstance(shape, tuple)}
    return Trace({p: h for p, h in peaks.items() if h}, matrices=matrices, **{name: numbers["", name] for name in _SCALARS})


def _line(at_zero: _Numbers, at_one: _Numbers, x: float) -> _Numbers:
    return {k: at_zero.get(k, 0.0) + x * (at_one.get(k, 0.0) - at_zero.get(k, 0.0)) for k in at_zero | at_one}
