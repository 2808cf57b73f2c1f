"""What a further job costs on the real model, as the system counts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "many_jobs.py"


def measured(jobs: int) -> dict[str, float]:
    """Jobs that take turns, in a process of their own: highest resident memory, and one adapter's with its optimizer state."""
    task = {"part": "speed", "way": "interleaved", "jobs": jobs, "tokens": 16, "chunks": 1, "lap": 16 * jobs, "ragged": False}
    command = [sys.executable, str(BENCHMARK), "--measure", json.dumps(task | {"weights": "bf16"})]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, input="a lap\n")
    begun, _, ended = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return begun | ended


def test_a_further_job_costs_its_adapter_and_its_optimizers_state() -> None:
    """Taking turns: peak(N) <= peak(1) + 1.1 (N - 1) x (adapter + optimizer state)."""
    one, many, jobs = measured(1), measured(8), 8
    assert one["state"] == 3 * 4 * 2442240, "r=8 on all linears of SmolLM2-135M, and AdamW's two moments, in fp32"
    assert many["peak"] <= one["peak"] + 1.1 * (jobs - 1) * one["state"]
