"""Budgets, kept or refused: `python benchmarks/budget.py --folder F`. SmolLM2 under LoRA, each run a process of its own.

First 2 GiB, 1 GiB and the smallest budget that the planner claims, then the same under a limit on data that the system holds
(RLIMIT_DATA), then `--random` budgets between the smallest and 2 GiB. With `exact: true`: losses are the same to rounding.
Prints a table; `--json` one line for scripts. The exit code is 1 where a budget was not kept.
"""

import argparse
import json
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from common import table
from estimate import write_data

MIB = 2**20
STEPS, LENGTH, BATCH = 3, 512, 2


def trained(folder: Path, name: str, budget: int | None, limit: int | None = None) -> dict[str, Any]:
    """One run within `budget` bytes, or in a process that may have `limit` bytes of data: what it was planned and took."""
    place = folder / name
    shutil.rmtree(place, ignore_errors=True)  # a run that was broken off would be resumed
    place.mkdir(parents=True)
    fields: dict[str, Any] = {"model": "demo", "data": str(folder / "data.jsonl"), "objective": {"type": "clm"}}
    fields |= {"steps": STEPS, "max_seq_len": LENGTH, "batch_size": BATCH, "method": {"type": "lora"}, "plan": {"exact": True}}
    fields |= {"output": str(place / "run")} | ({} if budget is None else {"memory": f"{budget / MIB:.0f}MiB"})
    (place / "config.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    command = [sys.executable, "-m", "snugtune", "train", str(place / "config.yaml")]
    before = None if limit is None else _limited(limit)
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=before)
    found: dict[str, Any] = {"name": name, "budget": budget, "limit": limit, "code": done.returncode}
    if done.returncode:
        return {**found, "said": (done.stderr.strip().splitlines() or [""])[-1]}
    plan = json.loads((place / "run" / "plan.json").read_text())
    metrics = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    knobs = {k: plan["plan"][k] for k in ("weights", "micro_batch", "recompute", "offload", "head_rows")}
    numbers = {"predicted": plan["estimate"]["total_bytes"], "measured": plan["measured_peak_bytes"]}
    return {**found, **numbers, "knobs": knobs, "changes": len(plan["changes"]), "losses": losses}


def _limited(limit: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def smallest(folder: Path) -> int:
    """Bytes of the smallest budget that the planner claims, from what it says of one that is too small."""
    refused = trained(folder, "too small", 100 * MIB)
    claimed = re.search(r"smallest budget that works here is ([0-9.]+) GiB", refused.get("said", ""))
    if refused["code"] != 3 or claimed is None:
        raise SystemExit(f"a budget of 100 MiB was not refused as it should be: {refused}")
    return round(float(claimed[1]) * 1024) * MIB


def kept(row: dict[str, Any]) -> bool:
    return row["code"] == 0 and (row["budget"] is None or row["measured"] <= row["budget"])


def report(rows: list[dict[str, Any]]) -> str:
    body = []
    for row in rows:
        asked = row["budget"] or row["limit"]
        if row["code"]:
            body.append((row["name"], f"{asked / MIB:.0f}", "", "", f"refused with code {row['code']}", ""))
            continue
        ways = ", ".join(f"{k} {v}" for k, v in row["knobs"].items())
        loss = " ".join(f"{loss:.5f}" for loss in row["losses"])
        body.append(
            (row["name"], f"{asked / MIB:.0f}", f"{row['predicted'] / MIB:.0f}", f"{row['measured'] / MIB:.0f}", ways, loss)
        )
    return table(("run", "budget, MiB", "predicted", "measured", "plan", "losses"), body)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for data and runs")
    parser.add_argument("--random", type=int, default=20, help="how many random budgets")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    told = parser.parse_args()
    told.folder.mkdir(parents=True, exist_ok=True)
    write_data(told.folder / "data.jsonl")
    least = smallest(told.folder)
    draw = random.Random(0)
    budgets = [("2 GiB", 2048 * MIB), ("1 GiB", 1024 * MIB), ("the smallest", least)]
    budgets += [(f"random {n}", draw.randrange(least, 2048 * MIB, MIB)) for n in range(told.random)]
    rows = [trained(told.folder, name, budget) for name, budget in budgets]
    below = trained(told.folder, "below the smallest", least - 32 * MIB)
    limited = [trained(told.folder, f"limit {limit >> 20} MiB", None, limit) for limit in (2048 * MIB, 1280 * MIB)]
    if told.json:
        print(json.dumps([*rows, *limited, below]))
    else:
        print(report([*rows, *limited, below]))
    return 0 if all(map(kept, [*rows, *limited])) and below["code"] == 3 else 1


if __name__ == "__main__":
    sys.exit(main())
