"""LoRA on the demo's model with the base in every format: held-out loss, tokens a second against bf16, memory, weight error.

    python benchmarks/precision.py [--steps 60] [--rounds 3] [--formats int8 nf4] [--json]

The loss of a round is that of its seed; the formats of a round share data, order and initial adapter.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Trained, in_turn, ratios, spread, table, train

from snugtune.model.formats import Dense, Format
from snugtune.model.frozen import FrozenLinear
from snugtune.model.load import format_of, load_config, load_model
from snugtune.model.source import find_model
from snugtune.types import HEAD_ROWS, Plan

DATA = Path(__file__).parents[1] / "src" / "snugtune" / "demo_data"
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {"weights": "bf16"},
    "int8": {"weights": "int8"},
    "int8, outliers from 6": {"weights": "int8", "outlier_threshold": 6.0},
    "w8a8": {"weights": "w8a8"},
    "nf4": {"weights": "nf4"},
    "nf4, double": {"weights": "nf4", "double_quant": True},
}


def config(pins: dict[str, Any], steps: int, seed: int, data: str, validation: str) -> dict[str, Any]:
    return {
        "model": "demo", "data": data, "validation": validation, "steps": steps, "batch_size": 8, "max_seq_len": 512,
        "optimizer": {"type": "adamw", "lr": 2e-4}, "seed": seed, "plan": pins,
    }  # fmt: skip


def weights(formats: dict[str, dict[str, Any]]) -> dict[str, tuple[int, float]]:
    """For each format: bytes of the linears' weights, and their relative L2 error against the checkpoint's."""
    source = find_model("demo")
    model, _ = load_model(source, load_config(source, False), "bf16", "cpu", False)
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if FrozenLinear.takes(m) and m is not head]
    return {name: _encoded(linears, format_of(_plan(pins))) for name, pins in formats.items()}


def _plan(pins: dict[str, Any]) -> Plan:
    return Plan(
        "cpu", micro_batch=1, recompute="none", head_rows=HEAD_ROWS, threads=torch.get_num_threads(), compute="bf16", **pins
    )


def _encoded(linears: list[Any], format: Format) -> tuple[int, float]:
    size, wrong, whole = 0, 0.0, 0.0
    for linear in linears:
        weight = linear.weight.detach()
        parts = format.encode(weight)
        decoded = format.decode(parts, tuple(weight.shape), torch.float32)
        size += sum(part.nbytes for part in parts.values())
        wrong += float((decoded.float() - weight.float()).square().sum()) if not isinstance(format, Dense) else 0.0
        whole += float(weight.float().square().sum())
    return size, (wrong / whole) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", default=str(DATA / "train.jsonl"))
    parser.add_argument("--validation", default=str(DATA / "heldout.jsonl"))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    formats = {name: FORMATS[name] for name in ("bf16", *asked.formats)}
    with tempfile.TemporaryDirectory() as scratch:

        def program(name: str, index: int) -> Trained:
            made = config(FORMATS[name], asked.steps, index, asked.data, asked.validation)
            return train(made, Path(scratch) / f"{index}-{name}")

        results = in_turn({name: partial(program, name) for name in formats}, asked.rounds)
    errors = weights(formats)
    facts = {
        name: {
            "held_out": [r.held_out for r in runs],
            "tokens_per_second": [r.tokens_per_second for r in runs],
            "of_bf16": ratios([r.tokens_per_second for r in runs], [r.tokens_per_second for r in results["bf16"]]),
            "peak_bytes": [r.peak_bytes for r in runs],
            "weight_bytes": errors[name][0],
            "weight_error": errors[name][1],
        }
        for name, runs in results.items()
    }
    if asked.json:
        print(json.dumps(facts, indent=2))
        return
    head = ["base", "weights of linears, MB", "weight error", "held-out loss", "tokens/s", "of bf16's", "peak, GiB"]
    rows = [
        [
            name, f"{f['weight_bytes'] / 1e6:.1f}", f"{f['weight_error']:.4f}", spread(f["held_out"], 4),
            spread(f["tokens_per_second"]), spread(f["of_bf16"], 2), spread([b / 2**30 for b in f["peak_bytes"]], 2),
        ]
        for name, f in facts.items()
    ]  # fmt: skip
    print(table(head, rows))


if __name__ == "__main__":
    main()
