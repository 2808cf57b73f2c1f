"""Programs run in turn in one session, each in a process of its own, and what they took."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

Result = TypeVar("Result")


@dataclass(frozen=True)
class Trained:
    """What one `snugtune train` took: real tokens a second (median step, the first left out), peak bytes, held-out loss."""

    tokens_per_second: float
    peak_bytes: int
    held_out: float | None


def train(config: Mapping[str, Any], folder: Path) -> Trained:
    """Train as `config` says, with its output in `folder`, which must be new."""
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "output": str(folder / "run")}), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "snugtune", "train", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{path}: {done.stderr.strip().splitlines()[-1:]}")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if line["step"] > 1 and line.get("tokens_per_second")]
    held = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    return Trained(statistics.median(speeds), max(line["peak_memory"] for line in lines), held[-1] if held else None)


def in_turn(programs: Mapping[str, Callable[[int], Result]], rounds: int) -> dict[str, list[Result]]:
    """Every program once a round, in the same order, so that a busy minute meets all of them alike."""
    results: dict[str, list[Result]] = {name: [] for name in programs}
    for index in range(rounds):
        for name, program in programs.items():
            print(f"round {index + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            results[name].append(program(index))
    return results


class Lane:
    """A program that stands ready in a process of its own and works a lap whenever it is told to.

    Laps of several alternate within seconds, where whole runs would alternate within minutes: what else the machine does
    meets all alike. The process runs `lane` below.
    """

    def __init__(self, command: Sequence[str]):
        started = time.perf_counter()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.begun = self._read() | {"ready": time.perf_counter() - started}

    def lap(self) -> dict[str, float]:
        """What a lap took."""
        assert self.process.stdin is not None
        print("lap", file=self.process.stdin, flush=True)
        return self._read()

    def end(self) -> dict[str, float]:
        """Let the process go; what it says in the end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        told = self._read()
        self.process.wait()
        return told

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.process.args}: ended with code {self.process.wait()}")


def lane(begun: Mapping[str, float], lap: Callable[[], Mapping[str, float]], end: Callable[[], Mapping[str, float]]) -> None:
    """In the process of a `Lane`: say that it is ready, work a lap for each line that comes, say what it took."""
    print(json.dumps(begun), flush=True)
    for _ in sys.stdin:
        print(json.dumps(lap()), flush=True)
    print(json.dumps(end()), flush=True)


def in_laps(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, tuple[list[dict[str, float]], dict[str, float]]]:
    """(laps, what was said at the start and in the end) of each program. All are in memory at once; one works at a time.

    `ready`: the seconds that each took to start.
    """
    lanes = dict[str, Lane]()
    for name, command in commands.items():
        print(f"starting {name}", file=sys.stderr, flush=True)
        lanes[name] = Lane(command)
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in lanes}
    for index in range(rounds):
        print(f"round {index + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, program in lanes.items():
            laps[name].append(program.lap())
    return {name: (laps[name], program.begun | program.end()) for name, program in lanes.items()}


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, with the least and the greatest where they differ."""
    middle, least, most = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least}-{most})"


def ratios(ours: Sequence[float], others: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(ours, others, strict=True)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
