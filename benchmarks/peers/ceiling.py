"""The most that this machine's bf16 matrix products allow: tokens a second if training were nothing else.

    python benchmarks/peers/ceiling.py MODEL    # a folder; prints JSON

A frozen linear costs a forward and the gradient of its input: 2 FLOPs a weight each, for every token. The head costs as much, but
only for labelled tokens. What adapters, attention, norms, the loss and the optimizer cost comes on top; recompute, too.
"""

import argparse
import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

ROWS = 1024
"""Tokens of each product."""


@dataclass(frozen=True)
class Linears:
    """Shapes [out, in] of the weights of a model's blocks, with how often each occurs, and that of its head."""

    blocks: dict[tuple[int, int], int]
    head: tuple[int, int]

    @property
    def flop_per_token(self) -> int:
        return 4 * sum(out * inner * count for (out, inner), count in self.blocks.items())

    @property
    def flop_per_label(self) -> int:
        return 4 * self.head[0] * self.head[1]

    def ceiling(self, gflops: float, labelled: float) -> float:
        """Tokens a second, where the share `labelled` of them is learned."""
        return 1e9 * gflops / (self.flop_per_token + labelled * self.flop_per_label)


def linears_of(config: Any) -> Linears:
    """From a transformers config; the model is built without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    found = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return Linears(dict(Counter((m.out_features, m.in_features) for m in found)), tuple(head.weight.shape))


def measure(linears: Linears, seconds: float) -> float:
    """GFLOP/s over the products of a step in which every token is learned: the best of each shape, for `seconds` in all."""
    import torch

    products = [
        (count, *operands)
        for (out, inner), count in (*linears.blocks.items(), (linears.head, 1))
        for operands in (
            (torch.randn(ROWS, inner).bfloat16(), torch.randn(out, inner).bfloat16().t()),  # x W^T
            (torch.randn(ROWS, out).bfloat16(), torch.randn(out, inner).bfloat16()),  # dy W
        )
    ]
    best = [float("inf")] * len(products)
    ends = time.perf_counter() + seconds
    while float("inf") in best or time.perf_counter() < ends:
        for at, (_, a, b) in enumerate(products):
            began = time.perf_counter()
            torch.mm(a, b)
            best[at] = min(best[at], time.perf_counter() - began)
    took = sum(count * least for (count, *_), least in zip(products, best, strict=True))
    return ROWS * (linears.flop_per_token + linears.flop_per_label) / took / 1e9


def main() -> None:
    from transformers import AutoConfig

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=10)
    asked = parser.parse_args()
    linears = linears_of(AutoConfig.from_pretrained(asked.model))
    facts = {"flop_per_token": linears.flop_per_token, "flop_per_label": linears.flop_per_label}
    print(json.dumps({"gflops": measure(linears, asked.seconds)} | facts))


if __name__ == "__main__":
    main()
