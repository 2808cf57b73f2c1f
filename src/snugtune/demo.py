"""The main job on the embedded default: a small model learns to triage support messages, before your eyes.

What it learns is a format nobody describes to it: every message is answered with a four-line card of topic, urgency,
summary and a reply.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from snugtune.config import RunConfig, to_config
from snugtune.console import Console, arrow
from snugtune.run import train
from snugtune.words import gib

SHOWN = 3


def demo_config(output: Path) -> RunConfig:
    """The demo as a config; `config.yaml` in its run folder is the same, ready to be changed."""
    data = Path(str(files("snugtune").joinpath("demo_data")))
    return to_config(
        {
            "model": "demo",
            "data": str(data / "train.jsonl"),
            "validation": str(data / "heldout.jsonl"),
            "max_seq_len": 256,
            "method": {"type": "lora", "r": 16, "lora_alpha": 32},
            "batch_size": 6,
            "epochs": 2,
            "optimizer": {"lr": 1.2e-3},
            "schedule": {"type": "cosine", "warmup": 0.1},
            "samples": {"prompts": _questions(data / "heldout.jsonl"), "max_new_tokens": 90},
            "output": str(output),
        }
    )


def run_demo(output: Path, console: Console) -> None:
    """Answer, train, answer again; then say where everything lies."""
    config = demo_config(output)
    device = f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else f"cpu ({torch.get_num_threads()} threads)"
    console.say("snugtune demo", style="bold")
    console.say(f"SmolLM2-135M-Instruct learns to turn support messages into triage cards. Device found: {device}.")
    console.say()
    result = train(config, console)
    before, after = ([s for s in result.samples if s["step"] == step] for step in (0, result.metrics[-1]["step"]))
    for was, now in zip(before, after, strict=True):
        console.say()
        console.say(f"message  {was['prompt']}", style="bold")
        _answer(console, "before", was["answer"], "yellow")
        _answer(console, "after", now["answer"], "green")
    held = [m["eval_loss"] for m in result.metrics if "eval_loss" in m]
    speed = _speed(result.metrics)
    console.say()
    console.say(f"held-out loss  {arrow(held)}  (16 messages the model never saw)", style="bold")
    took = "trained earlier" if result.already_finished else f"trained in {result.seconds:.0f} s"
    console.say(f"{took} at {speed:.0f} tokens/s; peak memory {gib(result.peak_bytes or 0)}")
    console.say(f"adapter  {result.artefacts['default']}  (a PEFT folder)")
    console.say(f"metrics  {output / 'metrics.jsonl'}; config  {output / 'config.yaml'}")
    console.say(f"next     snugtune chat {output}   |   snugtune export {output} --to merged")


def _questions(held_out: Path) -> list[str]:
    lines = held_out.read_text(encoding="utf-8").splitlines()[:SHOWN]
    return [json.loads(line)["messages"][0]["content"] for line in lines]


def _answer(console: Console, label: str, text: str, style: str) -> None:
    for index, line in enumerate(text.splitlines() or [""]):
        console.say(f"{label if index == 0 else '':<9}{line}", style=style)


def _speed(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Tokens per second over all steps."""
    steps = [m for m in metrics if "loss" in m]
    return sum(m["tokens"] for m in steps) / sum(m["tokens"] / m["tokens_per_second"] for m in steps)
