"""LoRA on a model of Llama-2 7B's shape within 2 GiB: random weights in nf4, streamed from disk, peak memory of each phase.

    python benchmarks/streamed_7b.py /tmp/7b                  # writes 4.1 GB there, and 3.4 GiB of blocks to stream
    python benchmarks/streamed_7b.py /tmp/1b --layers 16 --width 2048 --inner 5632 --heads 32 --limit 1 --json result.json

The training is that of `snugtune train`, which is told `memory: 2GiB` and plans by itself how to stay within it, in a process
whose RLIMIT_DATA is the limit: what asks for more dies. A phase's peak is that of its resident memory (VmHWM, set back after
each), which counts the pages of programs and libraries too. Exits with 1 where a peak is above the limit, or where the training
did not survive it. What is written stays, and is used again; `--resident` tries it with the weights in memory.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import table

from snugtune.allocator import environment, installed

MIB = 1 << 20


class Phases:
    """An observer that measures what lies between a run's messages. `ended`: phase -> seconds, and peak in bytes."""

    def __init__(self, begun: float) -> None:
        self.ended: dict[str, tuple[float, int]] = {}
        self._begin()
        self.begun = begun

    def _begin(self) -> None:
        from snugtune.memory.budget import Watch

        self.watch, self.begun = Watch("cpu"), time.perf_counter()

    def end_of(self, phase: str) -> None:
        seconds, peak = self.ended[phase] = time.perf_counter() - self.begun, self.watch.peak()
        print(f"{phase}: {seconds:.0f} s, peak {peak / MIB:.0f} MiB", file=sys.stderr, flush=True)
        self._begin()

    def note(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)
        for begin, phase in (("plan: ", "planning"), ("model: ", "loading"), ("checked: ", "self-test")):
            if text.startswith(begin) and phase not in self.ended:
                self.end_of(phase)

    def track(self, items: Sequence[Any], what: str) -> Iterable[Any]:
        return items

    def begin(self, jobs: Sequence[Any]) -> None: ...
    def status(self, job: str, status: str) -> None: ...
    def results(self, result: Any) -> None: ...

    def step(self, metrics: Any) -> None:
        self.end_of("evaluation" if metrics.step == 0 else f"step {metrics.step}")

    def end(self) -> None: ...


def train(folder: Path, steps: int, rank: int, resident: bool, limit: int, over_imports: bool) -> dict[str, Any]:
    """In this process: what each phase took."""
    begun = time.perf_counter()
    from snugtune.console import quiet_libraries

    quiet_libraries()
    import bitsandbytes  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import transformers.models.llama.modeling_llama  # noqa: F401  # pyright: ignore[reportUnusedImport]

    import snugtune.run
    from snugtune.config import to_config

    phases = Phases(begun)
    phases.end_of("imports")
    if over_imports:
        status = Path("/proc/self/status").read_text().splitlines()
        limit += next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    config: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": str(_data(folder)),
        "output": str(folder / "run"),
        "max_seq_len": 64,
        "batch_size": 2,
        "steps": steps,
        "validation": 0.1,
        "method": {"type": "lora", "r": rank},
    }
    if not over_imports:  # else there is what the limit leaves
        config["memory"] = f"{limit}B"
    if resident:
        config |= {"memory": "1TiB", "plan": {"offload": "none", "recompute": "blocks"}}
    snugtune.run.train(to_config(config), phases)
    phases.end_of("saving")
    found = [{"phase": phase, "seconds": seconds, "peak": peak} for phase, (seconds, peak) in phases.ended.items()]
    plan = json.loads((folder / "run" / "plan.json").read_text(encoding="utf-8"))
    predicted = plan["estimate"]["total_bytes"]
    return {"limit": limit, "predicted": predicted, "peak": max(phase["peak"] for phase in found), "phases": found}


def _data(folder: Path) -> Path:
    """Sixteen short conversations."""
    asked = [("user", f"What is {n} plus {n}?", "assistant", f"It is {2 * n}.") for n in range(1, 17)]
    lines = [{"messages": [{"role": a, "content": b}, {"role": c, "content": d}]} for a, b, c, d in asked]
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name, default in (("layers", 32), ("width", 4096), ("inner", 11008), ("heads", 32), ("vocab", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rank", type=int, default=1, help="of LoRA, on all linears")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--limit", type=float, default=2.0, help="GiB")
    parser.add_argument(
        "--over-imports", action="store_true", help="the limit is on top of what the imports take, and no memory is told"
    )
    parser.add_argument("--resident", action="store_true", help="the weights stay in memory")
    parser.add_argument("--json", type=Path, help="write what was measured there")
    parser.add_argument("--here", action="store_true", help="only train, in this process, and print JSON")
    told = parser.parse_args()
    limit = int(told.limit * 2**30)
    if told.here:
        print(json.dumps(train(told.folder, told.steps, told.rank, told.resident, limit, told.over_imports)))
        return
    if not (told.folder / "model" / "model.safetensors.index.json").exists():
        from synthetic import write_llama

        write_llama(told.folder / "model", told.layers, told.width, told.inner, told.heads, told.vocab, nf4=True)
    shutil.rmtree(told.folder / "run", ignore_errors=True)
    variables = environment(os.environ, installed()) or os.environ  # as the command starts itself
    place = {"SNUGTUNE_CACHE": os.environ.get("SNUGTUNE_CACHE") or str(told.folder / "cache")}
    command = [sys.executable, __file__, *sys.argv[1:], "--here"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**variables, **place})
    if done.returncode:
        raise SystemExit(f"the training did not survive its limit: exit code {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    rows = [(p["phase"], f"{p['seconds']:.0f}", f"{p['peak'] / MIB:.0f}") for p in found["phases"]]
    print(table(("phase", "seconds", "peak MiB"), rows))
    print(f"predicted before it was loaded: {found['predicted'] / MIB:.0f} MiB")
    if told.json is not None:
        told.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if found["peak"] > found["limit"]:
        raise SystemExit(f"peak {found['peak'] / MIB:.0f} MiB is above the limit of {found['limit'] / MIB:.0f} MiB")


if __name__ == "__main__":
    main()
