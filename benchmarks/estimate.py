"""Predicted against measured peaks: `python benchmarks/estimate.py --folder F`, each run a process of its own.

Every run has all its knobs pinned, trains two or three steps on sequences of equal length, and writes what was predicted before
it loaded and what it took (`plan.json`). Interrupted, the same command goes on; `--show` prints what is there.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from common import table
from plot import Line, write_plot

MIB = 2**20
Named = tuple[str, dict[str, Any]]
TEXT = "the cat sat on a mat and looked at all of those birds in some tree near my old house while it rained again"

SMALL: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 6, "n_head": 12, "n_positions": 1024},
    "qwen2": {
        **{"model_type": "qwen2", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10},
        **{"num_attention_heads": 8, "num_key_value_heads": 2},
    },
    "gemma2": {
        **{"model_type": "gemma2", "hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 8, "head_dim": 80},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 256},
    },
}
"""Other architectures, with random weights in bf16 and the demo's tokenizer."""

LORA = {"type": "lora", "r": 8}
PLAIN = {"recompute": "none", "offload": "none", "optimizer_state": "fp32", "micro_batch": 1}


def configurations() -> Iterator[Named]:
    """Name and fields of each run."""
    yield from _adapters()
    yield from _of_the_base()
    yield from _jobs()
    for model in SMALL:
        for length in (256, 768):
            yield _one("lora", length, model)
        yield _one("lora recompute", 512, model, plan={"recompute": "blocks"})
        yield _one("lora nf4", 512, model, plan={"weights": "nf4"})
        yield _one("full", 128, model, method={"type": "full"})


def _one(name: str, length: int = 512, model: str = "demo", batch: int = 1, **fields: Any) -> Named:
    pins = {"weights": "fp32", **PLAIN, **fields.pop("plan", {})}
    common = {"max_seq_len": length, "batch_size": batch, "method": LORA, "model": model, "plan": pins}
    return f"{model} {name}, {batch * length} tokens", {**common, **fields}


def _adapters() -> Iterator[Named]:
    for length in (128, 256, 512, 1024):
        yield _one("lora", length)
    for weights in ("bf16", "int8", "nf4", "w8a8"):
        yield _one(f"lora {weights}", 256, plan={"weights": weights})
    yield _one("lora nf4 double", 512, plan={"weights": "nf4", "double_quant": True})
    for rank in (1, 64, 256):
        yield _one(f"lora r={rank}", 256, method={"type": "lora", "r": rank})
    for length in (256, 1024):
        yield _one("lora recompute", length, plan={"recompute": "blocks"})
    yield _one("lora recompute 2", 512, plan={"recompute": 2})
    yield _one("lora spilled", 512, plan={"recompute": "blocks", "offload": "activations"})
    yield _one("lora streamed", 256, plan={"offload": "weights"})
    yield _one("lora nf4 streamed recompute", 512, plan={"weights": "nf4", "offload": "weights", "recompute": "blocks"})
    yield _one("lora 8bit", 256, plan={"optimizer_state": "8bit"}, method={"type": "lora", "r": 64})
    for batch in (2, 4):
        yield _one("lora batch", 256, batch=batch, plan={"micro_batch": batch})
    yield _one("lora accumulated", 256, batch=4)


def _of_the_base() -> Iterator[Named]:
    full = {"type": "full"}
    for method in (full, {"type": "freeze", "last_blocks": 4}):
        yield _one(f"{method['type']}", 128, method=method)
    yield _one("rotate", 128, method={"type": "rotate", "blocks": 2, "every": 1}, steps=16)  # the lowest blocks keep the most
    yield _one("full bf16", 128, method=full, plan={"weights": "bf16"})
    yield _one("full recompute", 256, method=full, plan={"recompute": "blocks"})
    yield _one("full 8bit", 128, method=full, plan={"optimizer_state": "8bit"})
    yield _one("full released", 128, method=full, max_grad_norm=None, plan={"gradients": "released"})
    for optimizer in ("sgd", "lion", "adafactor", "galore", "apollo"):
        yield _one(f"full {optimizer}", 128, method=full, optimizer={"type": optimizer})


def _jobs() -> Iterator[Named]:
    for jobs in (2, 4):
        for execution in ("fused", "interleaved"):
            named = [{"name": f"job{n}"} for n in range(jobs)]
            yield _one(f"{jobs} jobs {execution}", 128, jobs=named, plan={"execution": execution})


def made_models(folder: Path) -> dict[str, str]:
    """The small models, made where they are not there yet; name -> what a config calls it."""
    found = {"demo": "demo"}
    for name, fields in SMALL.items():
        place = folder / name
        if not (place / "config.json").exists():
            _make(place, dict(fields))
        found[name] = str(place)
    return found


def _make(place: Path, fields: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from snugtune.model.source import find_model

    tokenizer = AutoTokenizer.from_pretrained(find_model("demo").location)
    config = AutoConfig.for_model(fields.pop("model_type"), vocab_size=len(tokenizer), **fields)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place)
    tokenizer.save_pretrained(place)


def measured(name: str, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run: what was predicted, what it took. In bytes."""
    place = folder / "runs" / "".join(c if c.isalnum() else "-" for c in name)
    shutil.rmtree(place, ignore_errors=True)  # a run that was broken off would be resumed
    place.mkdir(parents=True)
    file = place / "config.yaml"
    told = {"steps": 2, **fields, "data": str(folder / "data.jsonl"), "objective": {"type": "clm"}, "output": str(place / "run")}
    file.write_text(yaml.safe_dump(told), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "snugtune", "train", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1:]}")
    plan = json.loads((place / "run" / "plan.json").read_text())
    return {"name": name, "estimate": plan["estimate"], "measured": plan["measured_peak_bytes"]}


def write_data(file: Path) -> None:
    """Documents that are longer than any sequence here."""
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choice(TEXT.split()) for _ in range(3000))}) for _ in range(30)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def error_of(row: Mapping[str, Any]) -> float:
    """Predicted less measured, as a share of what was measured."""
    return row["estimate"]["total_bytes"] / row["measured"] - 1


def report(rows: list[dict[str, Any]]) -> str:
    """The table and its summary."""
    body = [
        (r["name"], f"{r['estimate']['total_bytes'] / MIB:.0f}", f"{r['measured'] / MIB:.0f}", f"{100 * error_of(r):+.1f} %",
         r["estimate"]["when"])
        for r in rows
    ]  # fmt: skip
    errors = [error_of(row) for row in rows]
    allowed = [max(0.05 * r["measured"], 48 * MIB) for r in rows]
    beyond = sum(abs(e) * r["measured"] > a for e, r, a in zip(errors, rows, allowed, strict=True))
    summary = (
        f"{len(rows)} runs: median error {100 * statistics.median(abs(e) for e in errors):.1f} %, "
        f"from {100 * min(errors):+.1f} % to {100 * max(errors):+.1f} %; {beyond} beyond the larger of 5 % and 48 MiB, "
        f"{sum(e < -0.03 for e in errors)} predicted more than 3 % too low"
    )
    return table(("run", "predicted, MiB", "measured, MiB", "error", "fullest"), body) + "\n\n" + summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for models, runs and results")
    parser.add_argument("--only", default="", help="runs whose name holds this")
    parser.add_argument("--show", action="store_true", help="print what is there")
    parser.add_argument("--plot", type=Path, help="write the scatter there, as SVG")
    told = parser.parse_args()
    told.folder.mkdir(parents=True, exist_ok=True)
    results = told.folder / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if not told.show:
        write_data(told.folder / "data.jsonl")
        models = made_models(told.folder)
        done = {row["name"] for row in rows}
        for name, fields in configurations():
            if name not in done and told.only in name:
                rows.append(measured(name, {**fields, "model": models[fields["model"]]}, told.folder))
                with results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(f"{name}: {100 * error_of(rows[-1]):+.1f} %", file=sys.stderr, flush=True)
    print(report(rows))
    if told.plot is not None:
        ordered = sorted(rows, key=lambda row: row["measured"])
        xs = [row["measured"] // MIB for row in ordered]
        predicted = [row["estimate"]["total_bytes"] / MIB for row in ordered]
        taken = [row["measured"] / MIB for row in ordered]
        write_plot(told.plot, "Peak memory, MiB", [Line("predicted", xs, predicted), Line("measured", xs, taken)])


if __name__ == "__main__":
    main()
