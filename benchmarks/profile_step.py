"""Where the time and the bytes of a training step go.

    python benchmarks/profile_step.py                                    # the demo's model, 8 sequences of 256 tokens a step
    python benchmarks/profile_step.py --length 64 --chunk 512 --labelled 0.6 --recompute

One LoRA job (r=8, all linears, AdamW) over random tokens. Time: on the wall, inside the functions that `PARTS` names, less what
these call of one another; the rest is the models' own code, autograd, the optimizer, and Python around them. torch's profiler is
not used: it remembers so much meanwhile that whatever makes a large tensor takes up to twenty times as long. Matrix products are
set against the speed that this machine reaches in products of the model's own shapes (`gemm_ceiling`). Bytes: what forward keeps
for backward, each storage once, by the kind of module that keeps it.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from common import spread, table
from random_jobs import examples, loaded, started
from torch import Tensor, nn

from snugtune.memory.budget import Watch
from snugtune.model import attention, formats, gated, head, norms, remade, routed
from snugtune.model.base import Base
from snugtune.model.routed import RoutedLinear
from snugtune.training.trainer import Trainer

_MATMULS = [kind.__dict__ for kind in (formats._Decoded, formats.Outliers, formats.W8A8)]
PARTS: dict[str, list[Any]] = {
    "frozen weights, forward (head's included)": [kind["matmul"] for kind in _MATMULS],
    "frozen weights, backward (head's included)": [kind["matmul_t"] for kind in _MATMULS if "matmul_t" in kind],
    "adapters, forward": [routed.Apart.add],
    "adapters, backward": [routed.Apart.back],
    "attention, forward": [attention._Attention.forward],
    "attention, backward": [attention._Attention.backward],
    "norms": [norms._RmsNorm.forward, norms._RmsNorm.backward, norms._again],
    "gated product, and its gradient": [gated.GatedMLP._product, remade.through],
    "softmax of the head": [head._nll],
}
"""Parts of a step, and the functions that do them."""


class Clock:
    """Seconds in each part, as a profile function of the interpreter (`sys.setprofile`)."""

    def __init__(self) -> None:
        codes = {label: [getattr(f, "__wrapped__", f).__code__ for f in functions] for label, functions in PARTS.items()}
        self.label_of: dict[CodeType, str] = {code: label for label, found in codes.items() for code in found}
        self.seconds = Counter[str]()
        self.open: list[tuple[float, float]] = []  # of each call under way: when it began, and what inner parts took

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event not in ("call", "return") or (label := self.label_of.get(frame.f_code)) is None:
            return
        now = time.perf_counter()
        if event == "call":
            self.open.append((now, 0.0))
            return
        begun, inner = self.open.pop()
        self.seconds[label] += now - begun - inner  # pyright: ignore[reportArgumentType] (Counter takes any number)
        if self.open:
            self.open[-1] = (self.open[-1][0], self.open[-1][1] + now - begun)


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


def products(base: Base, tokens: int, labelled: float) -> float:
    """FLOPs of a step with frozen weights: 2 a weight and token forward, 2 back; labelled tokens alone meet the head."""
    blocks = sum(m.in_features * m.out_features for m in base.model.modules() if isinstance(m, RoutedLinear))
    head = base.model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return 4 * tokens * (blocks + labelled * head.weight.numel())  # pyright: ignore[reportCallIssue, reportOperatorIssue]


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
    clock, timed = Clock(), []
    sys.setprofile(clock)
    for _ in range(told.steps):
        begun = time.perf_counter()
        trainer.step()
        timed.append(time.perf_counter() - begun)
    sys.setprofile(None)
    flops, slowed = products(base, tokens, told.labelled), sum(timed) / told.steps
    parts = {label: seconds / told.steps for label, seconds in clock.seconds.items()}
    parts["the rest"] = slowed - sum(parts.values())
    chunks, rate = -(-tokens // max(told.chunk, told.length)), flops / 1e9 / wall
    print(f"{tokens} tokens a step in {chunks} forwards: {spread(walls, 3)} s, {tokens / wall:.0f} tokens/s")
    print(f"{flops / 1e9:.0f} GFLOP in products with frozen weights: {rate:.0f} GFLOP/s")
    print(f"{ceiling:.0f} GFLOP/s that these shapes reach by themselves: {rate / ceiling:.0%}")
    print(f"peak {peak / 2**20:.0f} MiB")
    print(f"watched, a step took {slowed:.3f} s\n")
    print(shares(parts, slowed), "", sep="\n")
    sizes = [[name, f"{count / 2**20:.1f}", f"{count / tokens / 1024:.1f}"] for name, count in kept.most_common()]
    print(table(["kept for backward by", "MiB a step", "KiB a token"], sizes))
    print(json.dumps({"wall": wall, "peak": peak, "gflop": flops / 1e9, "ceiling": ceiling, "parts": parts}))


if __name__ == "__main__":
    main()
