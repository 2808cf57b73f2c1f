"""Run folders as training leaves them, written without training: for what reads them."""

import json
import math
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from snugtune.config import to_config

PROMPTS = [
    (
        "How do I send back the blue mug?",
        "The blue mug is a popular item that",
        "Open Orders, choose the mug and press Return. A label follows.",
    ),
    (
        "Do you ship to Norway?",
        "As a language model I cannot",
        "Yes: four to six working days, and nine euros below an order of 80.",
    ),
]
REMARKS = {
    "cut to max_seq_len": {"count": 37, "places": [f"data/support.jsonl:{13 * k + 4}" for k in range(25)]},
    "no answer to learn": {"count": 2, "places": ["data/support.jsonl:88", "data/support.jsonl:1402"]},
}


def write_run(
    folder: Path,
    jobs: Sequence[str] = ("default",),
    steps: int = 60,
    finished: bool = True,
    every: int = 12,
    skipped: Collection[int] = (),
) -> Path:
    """`steps` steps of each job, evaluated `every` so many; of twice as many where the run is not `finished`."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "data": "data/support.jsonl", "output": str(folder)}
    config |= {"epochs": 3, "validation": 0.05, "jobs": [{"name": name} for name in jobs] if len(jobs) > 1 else []}
    (folder / "config.yaml").write_text(to_config(config).to_yaml(), encoding="utf-8")
    plan = {"device": "cpu", "weights": "bf16", "micro_batch": 4, "recompute": "none", "head_rows": 512, "threads": 2}
    content = {"plan": plan, "reasons": ["device cpu (2 threads)"], "measured_peak_bytes": 2 * 2**30 if finished else None}
    (folder / "plan.json").write_text(json.dumps(content), encoding="utf-8")
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as stream:
        for line in _metrics(jobs, steps, finished, every, skipped):
            stream.write(json.dumps(line) + "\n")
    (folder / "data.json").write_text(json.dumps({job: _data() for job in jobs}), encoding="utf-8")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for step in sorted({0, steps // 2, steps}):
            for job in jobs:
                for index, (prompt, before, after) in enumerate(PROMPTS):
                    answer = after if step else before
                    stream.write(
                        json.dumps({"job": job, "step": step, "index": index, "prompt": prompt, "answer": answer}) + "\n"
                    )
    for job in jobs if finished else ():
        (folder / "adapters" / job).mkdir(parents=True)
    return folder


def _metrics(jobs: Sequence[str], steps: int, finished: bool, every: int, skipped: Collection[int]):
    rng = random.Random(0)
    for step in range(steps + 1):
        for place, job in enumerate(jobs):
            course = 1.1 + 0.1 * place + 2.4 * math.exp(-4 * step / steps)
            line: dict[str, Any] = {
                "job": job,
                "step": step,
                "total_steps": steps if finished else 2 * steps,
                "epoch": 3 * step / steps,
            }
            line |= {
                "tokens": 875 if step else 0,
                "label_tokens": 409 if step else 0,
                "peak_memory": int(9e8 + 1e9 * min(1, step / 6)),
            }
            if step and step in skipped:
                line["skipped"] = True
            elif step:
                line |= {
                    "loss": course + rng.gauss(0, 0.13),
                    "grad_norm": abs(rng.gauss(0.8, 0.15)) + math.exp(-6 * step / steps),
                }
            if step:
                line |= {"lr": 1e-4 * (1 + math.cos(math.pi * step / steps)), "tokens_per_second": rng.gauss(430, 25)}
            if step % every == 0 or step == steps:
                line |= {"eval_loss": course + 0.16, "eval_tokens": 824}
            yield line


def _data() -> dict[str, Any]:
    lengths = [[1 + 64 * k, 64 * (k + 1), 5 + int(400 * math.exp(-(((k - 4) / 3) ** 2)))] for k in range(16)]
    return {"examples": 3120, "held_out": 164, "tokens": 912345, "label_tokens": 401234, "lengths": lengths, "remarks": REMARKS}
