"""Many LoRA jobs on the demo's model: throughput and memory of sharing forwards and of taking turns, against one process a job.

    python benchmarks/many_jobs.py --only speed --tokens 16 64            # uniform chunks: fused, interleaved, one by one
    python benchmarks/many_jobs.py --only speed --tokens 256 --rounds 1
    python benchmarks/many_jobs.py --only ragged --tokens 64              # rows of 8 to twice the mean, against padding
    python benchmarks/many_jobs.py --only adapters                        # a thousand adapters
    python benchmarks/many_jobs.py --plot docs                            # ... and write docs/many-jobs-*.svg

Every measurement is a process of its own. Those of a table stand ready side by side and work in turn, a lap of about
`--lap` tokens at a time, so that a busy minute meets all alike; ratios are those of laps of the same round, and medians are
shown with the least and the greatest. Jobs are LoRA of r=8 on all linears with AdamW, a sequence of random tokens a chunk, all
of them scored. Throughput counts real tokens from the second step of every job on, so that all have their optimizer state; the
peak is that of the resident memory since the base was loaded. One process a job, in turn, is what one job does by itself; its
start-up, to the end of its first step, is told apart. Prints tables, and a line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import in_laps, in_turn, lane, ratios, spread, table
from random_jobs import examples, loaded, started

PARTS = ("speed", "ragged", "adapters")
MILESTONES = (1, 10, 100, 1000)
ACTIVE = 4
LEAST = 8
"""Tokens of the shortest ragged row; the longest has twice the mean less these, so that the mean is what is asked for."""


# --- in the measuring process ---


def lengths_of(jobs: int, rows: int, mean: int, ragged: bool) -> list[list[int]]:
    """Tokens of each row of each job."""
    import torch

    generator = torch.Generator().manual_seed(mean)
    drawn = torch.randint(LEAST, max(LEAST, 2 * mean - LEAST) + 1, (jobs, rows), generator=generator)
    return drawn.tolist() if ragged else [[mean] * rows for _ in range(jobs)]


def padded(lengths: Sequence[Sequence[int]]) -> list[list[int]]:
    """As m-LoRA does it: the rows that share a forward, one of each job, are as long as the longest of them."""
    return [[max(row) for row in zip(*lengths, strict=True)] for _ in lengths]


def measure_speed(told: dict[str, Any]) -> None:
    """Real tokens a second of some jobs together, lap by lap, and their peak memory."""
    from snugtune.memory.budget import Watch
    from snugtune.training.trainer import Trainer

    jobs, chunks, rows = told["jobs"], told["chunks"], told["chunks"] * 4
    real = lengths_of(jobs, rows, told["tokens"], told["ragged"])
    laid = padded(real) if told["way"] == "padded" else real
    told["fused_tokens"] = {"interleaved": 0, "fused": 512, "padded": jobs * max(map(max, laid))}[told["way"]]
    base, plan = loaded("demo", told["weights"], fused_tokens=told.get("fused_tokens", 0))
    trainer = Trainer(base, plan, Watch("cpu"))
    for at in range(jobs):
        trainer.add(started(base, plan, f"job-{at}", examples(real[at], laid[at], at), chunks, {"type": "lora"}))

    def steps(more: int) -> dict[str, float]:
        goal = {name: job.step + more for name, job in trainer.jobs.items()}
        count, scored, began = 0, 0, time.perf_counter()
        while any(job.step < goal[name] for name, job in trainer.jobs.items()):
            for metrics in trainer.step():
                count, scored = count + metrics.tokens, scored + metrics.label_tokens + chunks  # a row's first token has no label
        seconds = time.perf_counter() - began
        return {"speed": (scored if told["way"] == "padded" else count) / seconds}

    steps(1)
    state = sum(3 * weight.nbytes for weight in trainer.jobs["job-0"].attached.parameters())
    a_lap = max(1, round(told["lap"] / (jobs * chunks * told["tokens"])))
    lane({"state": state}, lambda: steps(a_lap), lambda: {"peak": trainer.watch.peak()})


def measure_adapters(told: dict[str, Any]) -> dict[str, float]:
    """Seconds to add the k-th adapter, to let it rest, and of a step of four among so many."""
    from snugtune.memory.budget import Watch
    from snugtune.training.trainer import Trainer

    base, plan = loaded("demo", told["weights"], fused_tokens=told.get("fused_tokens", 0))
    method = {"type": "lora", "target_modules": ["q_proj", "v_proj"]}
    rows = examples([told["tokens"]] * 8, [told["tokens"]] * 8, 0)
    most, found = told["adapters"], dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(base, plan, Watch("cpu"), resting=Path(folder))
        adding, resting = list[float](), list[float]()
        for at in range(most):
            adding.append(timed(lambda at=at: trainer.add(started(base, plan, f"job-{at}", rows, 2, method))))
            if at == ACTIVE - 1:
                found["step of few"] = step_of_active(trainer, told["steps"])
            if at >= ACTIVE:
                resting.append(timed(lambda at=at: trainer.rest(f"job-{at}")))
        found["step of many"] = step_of_active(trainer, told["steps"])
        for k in (k for k in MILESTONES if k <= most):
            found[f"add {k}"] = statistics.median(adding[max(0, k - max(1, k // 10)) : k])  # of the tenth of them before it
        found["rest"], found["peak"] = statistics.median(resting), trainer.watch.peak()
        found["wake"] = timed(lambda: trainer.wake(f"job-{most - 1}"))
        trainer.close()
    return found


def step_of_active(trainer: Any, rounds: int) -> float:
    """Seconds of one step of each of the active jobs; the first round is left out."""
    return statistics.median([timed(lambda: [trainer.step() for _ in range(ACTIVE)]) for _ in range(rounds + 1)][1:])


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- in the process that asks ---


def command(told: argparse.Namespace, **what: Any) -> list[str]:
    """Measures `what` in a process of its own."""
    task = {"weights": told.weights, "chunks": told.chunks, "lap": told.lap} | what
    return [sys.executable, __file__, "--measure", json.dumps(task)]


def measured(told: argparse.Namespace, **what: Any) -> Callable[[int], dict[str, float]]:
    def program(_: int) -> dict[str, float]:
        done = subprocess.run(command(told, **what), check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    return program


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


Found = dict[str, dict[str, Any]]
""""{way} {jobs} {tokens}" -> `speeds` of its laps, and `peak`, `state` (bytes) and `ready` (seconds)."""


def speed(told: argparse.Namespace, ragged: bool) -> Found:
    """One job alone, interleaved, is what others are compared with. Only programs of one length are in memory together."""
    found = Found()
    for tokens in told.tokens:
        commands = {
            f"{way} {jobs} {tokens}": command(told, part="speed", way=way, jobs=jobs, tokens=tokens, ragged=ragged)
            for jobs in sorted({*told.jobs, *(() if ragged else (1,))})
            for way in (("fused", "padded") if ragged else ("interleaved", "fused"))
            if jobs > 1 or way == "interleaved"
        }
        for name, (laps, said) in in_laps(commands, told.rounds).items():
            found[name] = said | {"speeds": [lap["speed"] for lap in laps]}
    return found


def speed_table(found: Found, tokens: int, counts: Sequence[int]) -> str:
    """One process a job in turn has the throughput and the peak of one job; its start-up comes on top, once a job."""
    one, mib = found[f"interleaved 1 {tokens}"], 2**20
    alone = spread(one["speeds"])
    rows = [["1", alone, "", "", "", "", f"{one['peak'] / mib:.0f}", "", "", f"{one['ready']:.1f}"]]
    for jobs in (count for count in counts if count > 1):
        turns, fused = found[f"interleaved {jobs} {tokens}"], found[f"fused {jobs} {tokens}"]
        shares = [
            said for way in (fused, turns) for said in (spread(way["speeds"]), spread(ratios(way["speeds"], one["speeds"]), 2))
        ]
        bound = one["peak"] + 1.1 * (jobs - 1) * one["state"]
        peaks = [f"{bytes / mib:.0f}" for bytes in (turns["peak"], bound, fused["peak"])]
        rows.append([str(jobs), alone, *shares, *peaks, f"{jobs * one['ready']:.1f}"])
    head = ["jobs", "one by one, tokens/s", "fused", "of one by one", "interleaved", "of one by one", "peak interleaved, MiB",
            "its bound", "peak fused", "start-ups one by one, s"]  # fmt: skip
    return table(head, rows)


def ragged_table(found: Found, tokens: int, counts: Sequence[int]) -> str:
    rows = []
    for jobs in (count for count in counts if count > 1):
        ours, theirs = found[f"fused {jobs} {tokens}"], found[f"padded {jobs} {tokens}"]
        peaks = [f"{way['peak'] / 2**20:.0f}" for way in (ours, theirs)]
        speeds = [spread(ours["speeds"]), spread(theirs["speeds"]), spread(ratios(ours["speeds"], theirs["speeds"]), 2)]
        rows.append([str(jobs), *speeds, *peaks])
    return table(["jobs", "fused, real tokens/s", "padded", "ratio", "peak fused, MiB", "peak padded"], rows)


def adapters_table(found: dict[str, float]) -> str:
    rows = [[f"add adapter {name.split()[1]}", f"{1e3 * value:.1f}"] for name, value in found.items() if name.startswith("add")]
    rows += [["let one rest", f"{1e3 * found['rest']:.1f}"], ["wake one", f"{1e3 * found['wake']:.1f}"]]
    rows += [[f"a step of each of {ACTIVE}, of {ACTIVE} in all", f"{1e3 * found['step of few']:.0f}"]]
    rows += [[f"a step of each of {ACTIVE}, the others at rest", f"{1e3 * found['step of many']:.0f}"]]
    return table(["what", "ms"], rows)


def write_plots(folder: Path, found: Found, lengths: Sequence[int], counts: Sequence[int]) -> None:
    """`many-jobs-speed.svg`: throughput against one by one; `many-jobs-memory.svg`: peaks, and the bound of taking turns."""
    from plot import Line, write_plot

    def over(way: str, tokens: int, key: str) -> list[Any]:
        return [found[f"{way if n > 1 else 'interleaved'} {n} {tokens}"][key] for n in counts]

    def gain(speeds: Sequence[float], tokens: int) -> float:
        return statistics.median(ratios(speeds, ones[tokens]["speeds"]))

    ones = {tokens: found[f"interleaved 1 {tokens}"] for tokens in lengths}
    lines = [
        Line(f"{way}, {tokens} tokens a chunk", counts, [gain(speeds, tokens) for speeds in over(way, tokens, "speeds")])
        for tokens in lengths
        for way in ("fused", "interleaved")
    ]
    write_plot(folder / "many-jobs-speed.svg", "Throughput of so many jobs, one process a job in turn being 1", lines)
    tokens = lengths[0]
    bound = [(ones[tokens]["peak"] + 1.1 * (n - 1) * ones[tokens]["state"]) / 2**20 for n in counts]
    lines = [Line(way, counts, [peak / 2**20 for peak in over(way, tokens, "peak")]) for way in ("fused", "interleaved")]
    title = f"Peak memory of so many jobs, MiB, {tokens} tokens a chunk"
    write_plot(folder / "many-jobs-memory.svg", title, [*lines, Line("bound of interleaved", counts, bound)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256], help="of a chunk; ragged: on average")
    parser.add_argument("--chunks", type=int, default=2, help="chunks of a step")
    parser.add_argument("--lap", type=int, default=512, help="tokens of a lap, roughly: some whole steps of every job")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--weights", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--plot", type=Path, help="write SVGs of the speed part into this folder")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.measure:
        if told.measure["part"] == "adapters":
            print(json.dumps(measure_adapters(told.measure)))
        else:
            measure_speed(told.measure)
        return
    counts, found = sorted({1, *told.jobs}), dict[str, Any]()
    if "speed" in told.only:
        found["speed"] = speed(told, ragged=False)
        for tokens in told.tokens:
            print(f"\n{tokens} tokens a chunk, {told.weights}\n\n{speed_table(found['speed'], tokens, counts)}")
        if told.plot:
            write_plots(told.plot, found["speed"], told.tokens, counts)
    if "ragged" in told.only:
        found["ragged"] = speed(told, ragged=True)
        for tokens in told.tokens:
            print(f"\nrows of {LEAST} to {max(LEAST, 2 * tokens - LEAST)} tokens, {told.weights}\n")
            print(ragged_table(found["ragged"], tokens, counts))
    if "adapters" in told.only:
        program = measured(told, part="adapters", adapters=told.adapters, tokens=64, steps=5)
        found["adapters"] = medians(in_turn({"adapters": program}, min(3, told.rounds))["adapters"])
        print(f"\n{told.adapters} adapters, {told.weights}\n\n{adapters_table(found['adapters'])}")
    print(json.dumps({"weights": told.weights} | found))


if __name__ == "__main__":
    main()
