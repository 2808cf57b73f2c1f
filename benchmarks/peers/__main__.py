"""snugtune, TRL with PEFT, and LLaMA-Factory: the same work, in turn, each run a process of its own.

    python -m benchmarks.peers --json results.jsonl                     # from the repository's folder
    python -m benchmarks.peers --json results.jsonl --resume            # goes on where it broke off
    python -m benchmarks.peers --only snugtune lf-neat --steps 6 --rounds 1
    python -m benchmarks.peers --json results.jsonl --show              # the table of what was measured, and nothing else

Each peer gets an environment of its own, made at the first run. README.md beside this says what is compared, and how fairly.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import ceiling
from .environments import CACHE, interpreter
from .measure import SKIPPED, FailedError, environment, watched
from .results import GEMM, Results, report
from .rows import ROWS, Row
from .task import Work, arguments, prepared

DATA = Path(__file__).parents[2] / "src" / "snugtune" / "demo_data" / "train.jsonl"


def measure_row(row: Row, work: Work, index: int, envs: Path) -> dict[str, Any]:
    """What one run took, or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        told, lines = arguments(row, work, index, scratch)
        env = environment(work.folder, Path(work.model).is_dir())
        if row.peer != "snugtune":
            env.pop("PYTHONPATH", None)
        try:
            return watched([str(interpreter(row.peer, envs)), *told], lines, work.steps, env, scratch / "log").as_dict()
        except FailedError as failure:
            print(f"{row.title}: {failure}", file=sys.stderr)
            return {"failed": str(failure)}


def measure_gemm(work: Work) -> dict[str, Any]:
    """The ceiling of this round."""
    command = [sys.executable, ceiling.__file__, work.model]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(rows: Sequence[Row], work: Work, rounds: int, envs: Path, results: Results) -> None:
    """Every row once a round, in the same order; what `results` has already is not done again."""
    for index in range(rounds):
        if not results.has(GEMM, index):
            results.add({"row": GEMM, "round": index} | measure_gemm(work))
        for row in rows:
            if not results.has(row.key, index):
                print(f"round {index + 1} of {rounds}: {row.title}", file=sys.stderr, flush=True)
                results.add({"row": row.key, "round": index} | measure_row(row, work, index, envs))


def machine() -> str:
    """The processor, and how many threads programs are told to take, where they are told."""
    from snugtune.machine import processor

    found, threads = processor(), os.environ.get("OMP_NUM_THREADS")
    return f"{found.model}, {found.usable} cores" + (f", OMP_NUM_THREADS={threads}" if threads else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[row.key for row in ROWS], help="rows; default: all")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default=str(DATA), help="conversations, in any format that snugtune reads")
    parser.add_argument("--steps", type=int, default=12, help=f"of each run; the first {SKIPPED} do not count for the speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--envs", type=Path, default=CACHE, help="where the peers are installed")
    parser.add_argument("--json", type=Path, help="append every run to this file, a line each")
    parser.add_argument("--resume", action="store_true", help="go on with the session that --json holds")
    parser.add_argument("--show", action="store_true", help="only show what --json holds")
    parser.add_argument(
        "--against", default="snugtune", choices=[row.key for row in ROWS], help="the row that is compared with all"
    )
    told = parser.parse_args()
    if told.steps <= SKIPPED:
        parser.error(f"--steps: more than {SKIPPED}")
    if (told.resume or told.show) and told.json is None:
        parser.error("--resume and --show need --json")
    if told.show:
        print(report(Results.kept(told.json), told.against))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the run under way is ended with this
    rows = [row for row in ROWS if not told.only or row.key in told.only]
    for peer in dict.fromkeys(row.peer for row in rows):
        interpreter(peer, told.envs)
    with tempfile.TemporaryDirectory() as folder:
        work = prepared(told.model, told.data, Path(folder), told.batch, told.max_length, told.steps)
        facts = work.facts | {"data": Path(told.data).name, "machine": machine()}
        results = Results.begun(told.json, facts, told.resume)
        measure(rows, work, told.rounds, told.envs, results)
    print(report(results, told.against))


if __name__ == "__main__":
    main()
