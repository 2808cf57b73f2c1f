"""Training with weights on disk against weights in memory: throughput by tokens a step, peak memory, and what the disk gives.

    python benchmarks/streaming.py demo --weights bf16
    python benchmarks/synthetic.py /tmp/llama --layers 8 --width 2048 --inner 5632 --heads 16 --vocab 8192
    python benchmarks/streaming.py /tmp/llama --weights nf4 --tokens 128 512 2048 8192

A step is the forward, recompute and backward of one row of so many tokens under LoRA, in a process of its own; the processes
take turns, round after round, and ratios are those of medians. `cold` forgets every block's pages once it was read, as
happens to a model that is larger than the memory. Prints a table, and one line of JSON for scripts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODES = ("resident", "streamed", "cold")
SEQUENCE = 128


def measure(model: str, weights: str, mode: str, tokens: list[int], steps: int) -> dict[str, Any]:
    """In this process: seconds a step for each count of tokens, peak memory, and the bandwidth of reading the file."""
    import torch

    from snugtune.console import quiet_libraries
    from snugtune.memory.budget import Watch
    from snugtune.methods.lora import Lora, LoraConfig
    from snugtune.model.base import load_base
    from snugtune.model.source import find_model
    from snugtune.model.stream import StreamedLinear
    from snugtune.types import Plan

    quiet_libraries()
    compute = "fp32" if weights == "fp32" else "bf16"
    offload = "none" if mode == "resident" else "weights"
    plan = Plan("cpu", weights, 1, "blocks", 512, torch.get_num_threads(), compute, offload=offload)  # pyright: ignore
    base = load_base(find_model(model), plan)
    base.configure(recompute=True, head_rows=plan.head_rows)
    attached = Lora().attach(base, "job", LoraConfig(), seed=0)
    found: dict[str, Any] = {}
    if mode != "resident":
        source: Any = next(m for m in base.model.modules() if isinstance(m, StreamedLinear)).stream.source
        found["disk"] = bandwidth(source, mode == "cold")
        if mode == "cold":
            source.read = forgetful(source.name)
    watch = Watch("cpu")
    for count in tokens:
        found[str(count)] = statistics.median(_step(base, attached, count) for _ in range(steps + 1))  # the first warms up
    return found | {"peak": watch.peak()}


def _step(base: Any, attached: Any, count: int) -> float:
    import torch

    from snugtune.types import Batch, Segment

    lengths = tuple(min(SEQUENCE, count - at) for at in range(0, count, SEQUENCE))
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(3, min(base.vocab_size, 250), (1, count), generator=generator)
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    segment = Segment("job", slice(0, count), 0, lengths)
    batch = Batch(ids, places, lengths, (segment,))
    base.model.train()
    attached.zero_grad()
    started = time.perf_counter()
    with base.routed(batch):
        hidden = base.hidden(batch)[: count - 1]
        base.head.for_segment(segment).nll(hidden, ids[0, 1:], torch.ones(count - 1)).backward()
    return time.perf_counter() - started


def forgetful(file: Path) -> Any:
    """Reads of a file that leave nothing of it in the page cache."""
    handle = os.open(file, os.O_RDONLY)

    def read(view: memoryview, offset: int) -> int:
        count = os.preadv(handle, [view], offset)
        os.posix_fadvise(handle, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    return read


def bandwidth(source: Any, cold: bool) -> float:
    """Bytes a second of reading all blocks one after the other."""
    read, buffer = forgetful(source.name) if cold else source.read, memoryview(bytearray(max(source.index.sizes())))
    for timed in (False, True):
        started, total = time.perf_counter(), 0
        for offset, size in (run for runs in source.index.runs for run in runs):
            done = 0
            while done < size:
                done += read(buffer[done:size], offset + done)
            total += size
        if timed:
            return total / (time.perf_counter() - started)
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="demo, a folder or a GGUF file")
    parser.add_argument("--weights", choices=("fp32", "bf16", "int8", "nf4"), default="bf16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round")
    parser.add_argument("--mode", choices=MODES, help="only measure this, in this process, and print JSON")
    told = parser.parse_args()
    if told.mode:
        print(json.dumps(measure(told.model, told.weights, told.mode, told.tokens, told.steps)))
        return
    results: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for _ in range(told.rounds):
        for mode in MODES:
            command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[mode].append(json.loads(done.stdout.splitlines()[-1]))
    report(told, results)


def report(told: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    middle = {mode: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for mode, runs in results.items()}
    print(f"{told.model} in {told.weights}, {told.rounds} rounds in turn; tokens/s (share of resident)")
    print("tokens a step  " + "".join(f"{mode:>20}" for mode in MODES))
    for count in map(str, told.tokens):
        speeds = {mode: int(count) / middle[mode][count] for mode in MODES}
        print(f"{count:>13}  " + "".join(f"{s:>12.1f} ({s / speeds['resident']:5.2f})" for s in speeds.values()))
    print(f"{'peak memory':>13}  " + "".join(f"{middle[mode]['peak'] / 2**30:>16.2f} GiB" for mode in MODES))
    disk = {mode: middle[mode]["disk"] / 2**30 for mode in MODES[1:]}
    print(f"{'disk':>13}  {'':>20}" + "".join(f"{disk[mode]:>14.2f} GiB/s" for mode in MODES[1:]))
    print(json.dumps({"model": told.model, "weights": told.weights, "medians": middle}))


if __name__ == "__main__":
    main()
