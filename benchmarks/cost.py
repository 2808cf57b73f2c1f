"""What a token costs, in time and memory, by the length of a sequence, the sequences of a step and the size of the model.

    python benchmarks/cost.py                                     # the demo's model: 128 to 8192 tokens, 1 to 64 sequences
    python benchmarks/cost.py --sizes demo 1B 3B --folder /tmp/models   # random models of these shapes, written there first
    python benchmarks/cost.py --plot docs                         # ... and write docs/cost-*.svg

A LoRA job (r=8, all linears, AdamW) over random tokens, all of them scored, bf16 base, blocks recomputed; each measurement is a
process of its own: the fastest of some steps after a first one, and the peak of the resident memory since the base was loaded.
Prints a table, and a line of JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import table
from plot import Line, write_plot

SHAPES = {
    "1B": {"layers": 16, "width": 2048, "inner": 8192, "heads": 32, "vocab": 32000},
    "3B": {"layers": 28, "width": 3072, "inner": 8192, "heads": 24, "vocab": 32000},
}
"""Llamas of about so many weights; `demo` is SmolLM2-135M."""
MOST = {"demo": 1 << 14, "1B": 1 << 12, "3B": 1 << 11}
"""Tokens of a step, at most: two cores take minutes for more."""


def measure(told: dict[str, Any]) -> dict[str, float]:
    """In this process: seconds a token and peak bytes."""
    from random_jobs import examples, loaded, started

    from snugtune.memory.budget import Watch
    from snugtune.training.trainer import Trainer
    from snugtune.types import FULL_FORWARD

    length, count = told["length"], told["sequences"]
    base, plan = loaded(told["model"], "bf16", recompute="blocks" if told["recompute"] else "none")
    trainer = Trainer(base, plan, Watch("cpu"))
    rows = examples([length] * count, [length] * count, 0)
    trainer.add(started(base, plan, "job", rows, count, {"type": "lora"}, max(FULL_FORWARD, length)))
    took = []
    for _ in range(told["steps"] + 1):
        begun = time.perf_counter()
        trainer.step()
        took.append(time.perf_counter() - begun)
    return {"seconds": min(took[1:]) / (length * count), "peak": trainer.watch.peak(), "whole": took[0]}


def asked(told: argparse.Namespace, model: str, length: int, sequences: int) -> dict[str, float]:
    task = {"model": model, "length": length, "sequences": sequences, "steps": told.steps, "recompute": not told.keep}
    print(f"{model}: {sequences} x {length}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--measure", json.dumps(task)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def model_of(size: str, folder: Path | None) -> str:
    """The demo's, or a random one, which is written where it is not there yet."""
    if size == "demo":
        return size
    if folder is None:
        raise SystemExit(f"--sizes {size} needs --folder, where the model is written (2 bytes a weight)")
    from synthetic import write_llama

    write_llama(folder / size, nf4=False, **SHAPES[size])
    return str(folder / size)


def lines_of(found: dict[str, dict[str, float]], key: str, unit: float, sizes: Sequence[str], kind: str) -> list[Line]:
    lines = []
    for size in sizes:
        ours = {int(name.split()[2]): one[key] / unit for name, one in found.items() if name.startswith(f"{size} {kind} ")}
        lines.append(Line(size, list(ours), list(ours.values())))
    return lines


def write_plots(folder: Path, found: dict[str, dict[str, float]], told: argparse.Namespace) -> None:
    for kind, xs, what in (
        ("length", told.lengths, "tokens of a sequence"),
        ("sequences", told.sequences, "sequences of a step"),
    ):
        if len(xs) > 1:
            title = f"Milliseconds a token, by {what}"
            write_plot(folder / f"cost-time-{kind}.svg", title, lines_of(found, "seconds", 1e-3, told.sizes, kind))
            title = f"Peak memory in MiB, by {what}"
            write_plot(folder / f"cost-memory-{kind}.svg", title, lines_of(found, "peak", 2**20, told.sizes, kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=("demo", *SHAPES), default=["demo"])
    parser.add_argument("--folder", type=Path, help="where random models lie")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep activations instead of recomputing blocks")
    parser.add_argument("--plot", type=Path, help="write SVGs into this folder")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.measure:
        print(json.dumps(measure(told.measure)))
        return
    found: dict[str, dict[str, float]] = {}
    for size in told.sizes:
        model = model_of(size, told.folder)
        found |= {f"{size} length {n}": asked(told, model, n, 1) for n in told.lengths if n <= MOST[size]}
        found |= {f"{size} sequences {n}": asked(told, model, 256, n) for n in told.sequences if 256 * n <= MOST[size]}
    rows = [[*name.split(), f"{1e3 * one['seconds']:.2f}", f"{one['peak'] / 2**20:.0f}"] for name, one in found.items()]
    print(table(["model", "by", "tokens, or sequences of 256", "ms a token", "peak, MiB"], rows))
    if told.plot:
        write_plots(told.plot, found, told)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
