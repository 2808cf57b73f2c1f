"""Which numbers of a run are in which format: said by rule, before anything is loaded. A test holds it against real tensors."""

from collections.abc import Iterator
from dataclasses import dataclass

from snugtune.config import JobConfig, RunConfig
from snugtune.methods.freeze import FreezeConfig
from snugtune.methods.full import FullConfig
from snugtune.methods.rotate import RotateConfig
from snugtune.model.formats import Bits4, Int8
from snugtune.model.load import format_of
from snugtune.optim import ApolloConfig, GaloreConfig
from snugtune.types import Plan

BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.0}


@dataclass(frozen=True)
class Row:
    """One kind of number. `bits` at rest, scales included; None where it is no tensor that is kept."""

    scope: str  # "base", or a job's name
    what: str
    kept: str
    computed: str
    bits: float | None
    note: str = ""


def precision(config: RunConfig, plan: Plan) -> tuple[Row, ...]:
    """The rows for the base and for each job."""
    return (*_base(plan), *(row for job in config.resolved_jobs() for row in _job(job, plan)))


def _base(plan: Plan) -> Iterator[Row]:
    compute, wide = plan.compute, BITS[plan.compute]
    away = "on disk" if plan.device == "cpu" else "in host memory"
    place = f"those of the blocks stay {away} between uses" if plan.offload == "weights" else ""
    yield Row("base", "weights of linears", _kept(plan), _products(plan), weight_bits(plan), place)
    yield Row("base", "embeddings, output head", compute, compute, wide)
    yield Row("base", "norms, biases", compute, compute, wide, "most models take the mean square in fp32")
    spilled = f"the blocks' inputs wait {away}" if plan.offload == "activations" else ""
    yield Row("base", "activations and their gradients", compute, compute, wide, spilled)
    yield Row("base", "attention weights", compute, "fp32", wide, "the softmax; made again in backward")
    yield Row("base", "logits, losses", "fp32", "fp32", None, f"the product with the head in {compute}; some rows at a time")


def _job(job: JobConfig, plan: Plan) -> Iterator[Row]:
    compute, name = plan.compute, job.name
    if isinstance(job.method, (FullConfig, FreezeConfig, RotateConfig)):
        if isinstance(job.method, RotateConfig):
            who = f"{job.method.blocks} blocks at a time have what follows{', and the ends' if job.method.ends else ''}"
            yield Row(name, "weights of blocks in turns", compute, compute, BITS[compute], who)
        if compute == "fp32":
            yield Row(name, "weights that train", "fp32", "fp32", 32.0)
        else:
            yield Row(name, "weights that train", compute, compute, BITS[compute], "copies of the masters after each step")
            yield Row(name, "master weights", "fp32", "fp32", 32.0, "what the optimizer steps")
    else:
        yield Row(name, f"{job.method.type} weights", "fp32", compute, 32.0, "cast for each product; what the optimizer steps")
    if plan.gradients == "kept":
        yield Row(name, "gradients of what trains", "fp32", "fp32", 32.0, f"made in {compute}, summed in fp32 over the step")
    else:
        note = f"one weight's at a time, made in {compute}: it steps in backward"
        yield Row(name, "gradients of what trains", "fp32", "fp32", None, note)
    kept, bits = ("fp32", 32.0) if plan.optimizer_state == "fp32" else ("8 bit", 8 + 32 / 256)
    note = "in the memory of the host" if plan.optimizer_state == "paged" else ""
    if isinstance(job.optimizer, (GaloreConfig, ApolloConfig)):
        note = f"of matrices rank {job.optimizer.rank}, else as many as AdamW's"
    yield Row(name, f"{job.optimizer.type} state", kept, "fp32", bits, note)
    yield Row(name, "gradient norm, loss sums", "fp32", "fp32", None, "taken job by job")
    if compute == "fp16":
        note = "doubles after 2000 good steps, halves and skips one that overflows"
        yield Row(name, "loss scale", "fp32", "fp32", None, note)


def _kept(plan: Plan) -> str:
    doubly = ", scales in 8 bits" if plan.double_quant else ""
    return "int8" if plan.weights == "w8a8" else f"{plan.weights}{doubly}"


def _products(plan: Plan) -> str:
    if plan.weights == "w8a8":
        return "int8, forward and backward"
    if plan.outlier_threshold:
        return f"int8 (from {plan.outlier_threshold:g} on {plan.compute}); backward {plan.compute}"
    return plan.compute


def weight_bits(plan: Plan) -> float:
    """Bits that one weight of a large linear takes, with its share of the scales (rows of 4096 for int8)."""
    format = format_of(plan)
    if isinstance(format, Int8):
        return 8 + 32 / 4096
    if not isinstance(format, Bits4):
        return BITS[plan.weights]
    nested = 8 + 32 / format.nested_block if format.double else 32
    return 4 + nested / format.block
