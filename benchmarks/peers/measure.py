"""One run of a program: its steps, timed from outside as they are written, and the peak of its memory."""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

POLL = 0.02
"""Seconds between looks: little against a step, and little work."""
SKIPPED = 2
"""Steps before the speed counts: caches fill, allocators grow."""
LAST = 10
"""Steps whose mean is the loss at the end; half of them where there are fewer."""


@dataclass(frozen=True)
class Step:
    """`at`: seconds from the start of the process to the end of the step."""

    at: float
    tokens: int
    label_tokens: int
    loss: float


@dataclass(frozen=True)
class Run:
    """What one run took. `peak_bytes` is the resident set of the process that trains, at its largest."""

    steps: tuple[Step, ...]
    peak_bytes: int

    @property
    def speed(self) -> float:
        """Real tokens a second, by the clock on the wall, from the end of the skipped steps to the end of the last."""
        counted = self.steps[SKIPPED:]
        return sum(step.tokens for step in counted) / (counted[-1].at - self.steps[SKIPPED - 1].at)

    @property
    def labelled(self) -> float:
        """The share of the tokens that is learned."""
        return sum(step.label_tokens for step in self.steps) / sum(step.tokens for step in self.steps)

    @property
    def loss(self) -> float:
        """Mean over the labels of the last steps."""
        last = self.steps[-min(LAST, len(self.steps) // 2) :]
        return sum(step.loss * step.label_tokens for step in last) / sum(step.label_tokens for step in last)

    def as_dict(self) -> dict[str, Any]:
        return {"steps": [list(asdict(step).values()) for step in self.steps], "peak_bytes": self.peak_bytes}

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> "Run":
        return cls(tuple(Step(*step) for step in kept["steps"]), kept["peak_bytes"])


class FailedError(Exception):
    """A program ended badly, or did not take the steps it was asked for."""


def watched(command: Sequence[str], lines: Path, steps: int, env: Mapping[str, str], log: Path) -> Run:
    """Run `command` to its end; it appends a line of JSON to `lines` at the end of each step. Raises `FailedError`."""
    ends, peak = list[float](), 0
    with log.open("wb") as out:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=dict(env))
        try:
            while process.poll() is None:
                now = time.monotonic() - began
                ends += [now] * (len(_steps(lines)) - len(ends))
                peak = max(peak, _peak(process.pid))
                time.sleep(POLL)
        finally:
            process.kill()  # where this one is interrupted
    found = _steps(lines)
    if process.returncode or len(found) != steps or len(ends) != steps:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise FailedError(f"exit code {process.returncode}, {len(found)} of {steps} steps; {' '.join(said)[:300]}")
    told = [(step["tokens"], step["label_tokens"], step["loss"]) for step in found]
    return Run(tuple(Step(at, *rest) for at, rest in zip(ends, told, strict=True)), peak)


def _steps(lines: Path) -> list[dict[str, Any]]:
    """The complete lines of optimizer steps; snugtune's step 0 is the state before training."""
    try:
        text = lines.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in found if line.get("step") != 0]


def _peak(pid: int) -> int:
    """VmHWM in bytes; 0 when the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def environment(scratch: Path, offline: bool) -> dict[str, str]:
    """What a run finds set: nothing of this Python's paths but for snugtune, caches of its own, no questions to a hub."""
    kept = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
    told = {"HF_DATASETS_CACHE": str(scratch / "datasets"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | told | ({"HF_HUB_OFFLINE": "1"} if offline else {})
