"""Where the time and the bytes of a training step go.

    python benchmarks/profile_step.py                                    # the demo's model, 8 sequences of 256 tokens a step
    python benchmarks/profile_step.py --length 64 --chunk 512 --labelled 0.6 --recompute

One LoRA job (r=8, all linears, AdamW) over random tokens. Time: torch's profiler, each operator's own time by what it is for,
and by the part of the step it is called in; what the operators do not explain is Python between them. Matrix products are set
against the speed that this machine reaches in products of the model's own shapes (`gemm_ceiling`). Bytes: what forward keeps
for backward, each storage once, by the kind of module that keeps it.
"""

import argparse
import json
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import spread, table
from random_jobs import examples, loaded, started
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from snugtune.memory.budget import Watch
from snugtune.model.base import Base
from snugtune.model.routed import RoutedLinear
from snugtune.training.trainer import Trainer

KINDS = {
    "products of matrices": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::addmm_",
        "aten::_int_mm",
        "mkldnn::",
        "aten::baddbmm",
    ),
    "fused attention": ("aten::_scaled_dot_product", "aten::_flash_attention"),
    "softmax": ("aten::_softmax", "aten::softmax", "aten::logsumexp", "aten::_log_softmax", "aten::exp", "aten::exp_"),
    "casts and copies": ("aten::copy_", "aten::_to_copy", "aten::cat", "aten::clone", "aten::contiguous", "aten::to"),
    "zeros and fills": ("aten::zero_", "aten::fill_", "aten::zeros", "aten::masked_fill", "aten::masked_fill_"),
    "optimizer": ("aten::_fused_adamw_", "aten::_foreach"),
    "gathers and scatters": ("aten::index", "aten::gather", "aten::scatter", "aten::embedding"),
}
"""What an operator is for, by how its name begins; the rest is elementwise."""
PARTS = {"Optimizer.": "optimizer", "_FrozenNll": "head", "autograd::engine": "backward"}
"""The part of the step, by the name of what an operator was called from; the rest is the base's forward."""


def kind_of(name: str) -> str:
    exact = name.removesuffix("_")
    for kind, beginnings in KINDS.items():
        if any(exact == b.removesuffix("_") or (name.startswith(b) and b not in ("aten::to", "aten::exp")) for b in beginnings):
            return kind
    return "elementwise and the like"


def part_of(event: Any) -> str:
    while event is not None:
        for beginning, part in PARTS.items():
            if event.name.startswith(beginning):
                return part
        event = event.cpu_parent
    return "forward"


def gemm_ceiling(base: Base, tokens: int, seconds: float = 1.0) -> float:
    """GFLOP/s of products of `tokens` rows with the base's own weights, forward and backward, one after the other."""
    weights = [m.frozen.weight for m in base.model.modules() if isinstance(m, RoutedLinear)][:28]
    x = {w.shape[1]: torch.randn(tokens, w.shape[1], dtype=w.dtype) for w in weights}
    y = {w.shape[0]: torch.randn(tokens, w.shape[0], dtype=w.dtype) for w in weights}
    rates, ends = [], time.perf_counter() + seconds
    while not rates or time.perf_counter() < ends:
        begun = time.perf_counter()
        for w in weights:
            torch.mm(x[w.shape[1]], w.t())
            torch.mm(y[w.shape[0]], w)
        rates.append(sum(4 * w.numel() * tokens for w in weights) / (time.perf_counter() - begun) / 1e9)
    return max(rates)


@contextmanager
def kept_by(model: nn.Module) -> Iterator[Counter[str]]:
    """Bytes that forwards inside the block keep for backward, each storage once, by the kind of the innermost module.

    The model's own weights do not count.
    """
    inside, found, seen = (
        ["(outside)"],
        Counter[str](),
        {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())},
    )

    def enter(module: nn.Module, _: Any) -> None:
        inside.append(type(module).__name__)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        inside.pop()

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[inside[-1]] += storage.nbytes()
        return saved

    hooks = [h for m in model.modules() for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def shares(times: dict[str, float], whole: float) -> str:
    rows = [
        [name, f"{1e3 * took:.0f}", f"{100 * took / whole:.1f} %"] for name, took in sorted(times.items(), key=lambda i: -i[1])
    ]
    return table(["what", "ms", "of the step"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a forward")
    parser.add_argument("--labelled", type=float, default=1.0, help="share of the tokens that are scored")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--operators", type=int, default=12, help="so many of the slowest are listed")
    told = parser.parse_args()
    base, plan = loaded(told.model, told.weights, recompute="blocks" if told.recompute else "none")
    trainer = Trainer(base, plan, Watch("cpu"))
    rows = examples([told.length] * told.batch, [told.length] * told.batch, 0, told.labelled)
    trainer.add(started(base, plan, "job", rows, told.batch, {"type": "lora"}, max(told.chunk, told.length)))
    with kept_by(base.model) as kept:
        trainer.step()
    walls = []
    for _ in range(told.steps):
        begun = time.perf_counter()
        trainer.step()
        walls.append(time.perf_counter() - begun)
    wall, tokens = statistics.median(walls), told.length * told.batch
    peak, ceiling = trainer.watch.peak(), gemm_ceiling(base, min(tokens, max(told.chunk, told.length)))
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as traced:
        begun = time.perf_counter()
        trainer.step()
        slowed = time.perf_counter() - begun
    kinds, parts, ops, flops = defaultdict[str, float](float), defaultdict[str, float](float), Counter[str](), 0
    for event in traced.events() or ():
        own = event.self_cpu_time_total / 1e6
        parts[part_of(event)] += own
        kind = kind_of(event.name) if event.name.startswith(("aten::", "mkldnn::")) else "autograd's nodes, and Python in them"
        kinds[kind] += own
        ops[event.name] += own  # pyright: ignore[reportArgumentType]
        flops += event.flops or 0
    kinds["between operators"] = parts["between operators"] = max(0.0, slowed - sum(parts.values()))
    chunks, rate = -(-tokens // max(told.chunk, told.length)), flops / 1e9 / wall
    print(f"{tokens} tokens a step in {chunks} forwards: {spread(walls, 3)} s, {tokens / wall:.0f} tokens/s")
    print(f"{flops / 1e9:.0f} GFLOP in products: {rate:.0f} GFLOP/s of {ceiling:.0f} that its shapes reach, {rate / ceiling:.0%}")
    print(f"peak {peak / 2**20:.0f} MiB")
    print(f"traced, the step took {slowed:.3f} s\n")
    print(shares(kinds, slowed), "", shares(parts, slowed), "", sep="\n")
    print(shares(dict(ops.most_common(told.operators)), slowed), "", sep="\n")
    sizes = [[name, f"{count / 2**20:.1f}", f"{count / tokens / 1024:.1f}"] for name, count in kept.most_common()]
    print(table(["kept for backward by", "MiB a step", "KiB a token"], sizes))
    print(json.dumps({"wall": wall, "peak": peak, "gflop": flops / 1e9, "ceiling": ceiling, "kinds": kinds, "parts": parts}))


if __name__ == "__main__":
    main()
