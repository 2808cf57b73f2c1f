"""The same work for every program: one model folder, the same conversations in each program's own format, the same settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .rows import Row

LORA = {"r": 8, "alpha": 16}
LR = 2e-4


@dataclass(frozen=True)
class Work:
    """What is trained on. Every program trains `batch` sequences a step, or as many packed rows as hold so many tokens."""

    model: str  # a folder that transformers can load
    folder: Path  # holds the data: messages.jsonl, prompts.jsonl, dataset_info.json
    examples: int
    tokens: int  # of all examples, by the model's own template
    label_tokens: int
    batch: int
    max_length: int
    steps: int

    @property
    def packed_rows(self) -> int:
        """Rows of `max_length` that hold about as many tokens as `batch` sequences."""
        return max(1, round(self.batch * self.tokens / self.examples / self.max_length))

    @property
    def facts(self) -> dict[str, Any]:
        """What must be the same for results to be comparable."""
        kept = ("model", "examples", "tokens", "label_tokens", "batch", "max_length", "steps")
        return {name: getattr(self, name) for name in kept}


def prepared(model: str, data: str, folder: Path, batch: int, max_length: int, steps: int) -> Work:
    """Find the model, and write the data into `folder`.

    Kept are conversations with one answer, at their end, that are not longer than `max_length`: programs differ in what
    they do with others. Raises `snugtune.errors.InputError` for a model or data that cannot be read.
    """
    from transformers import AutoTokenizer

    from snugtune.data.forms import Conversation
    from snugtune.data.sources import Drops, SourceConfig, read_sources
    from snugtune.model.source import find_model
    from snugtune.objectives.sft import Sft, SftConfig

    location = find_model(model).location
    tokenizer = AutoTokenizer.from_pretrained(location)
    (items,) = read_sources([SourceConfig(path=data)], Drops())
    kept, tokens, labels = list[Sequence[Mapping[str, Any]]](), 0, 0
    for item in items:
        if not isinstance(item, Conversation) or not _answered_once(item.messages):
            continue
        examples = Sft(SftConfig()).tokenise([item], tokenizer, 2 * max_length, Drops())
        if len(examples) == 1 and len(examples[0].tokens) <= max_length:
            kept.append([{"role": m["role"], "content": m["content"]} for m in item.messages])
            tokens += len(examples[0].tokens)
            labels += int((examples[0].weights > 0).sum())
    if not kept:
        raise SystemExit(f"{data}: no conversation with one answer fits into {max_length} tokens")
    _write(folder, kept)
    return Work(location, folder, len(kept), tokens, labels, batch, max_length, steps)


def _answered_once(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the one answer stands at the end, and is text, as all is that was said before."""
    roles = [message["role"] for message in messages]
    return roles.count("assistant") == 1 and roles[-1] == "assistant" and all(isinstance(m.get("content"), str) for m in messages)


def _write(folder: Path, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    lines = {
        "messages.jsonl": [{"messages": messages} for messages in conversations],
        "prompts.jsonl": [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in conversations],
    }
    for name, records in lines.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }
    about = {"file_name": "messages.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"messages": about}), encoding="utf-8")


def arguments(row: Row, work: Work, seed: int, scratch: Path) -> tuple[list[str], Path]:
    """What follows the interpreter, and the file in which lines with `tokens`, `label_tokens` and `loss` appear step by step."""
    if row.peer == "snugtune":
        return _of_snugtune(row, work, seed, scratch)
    rows = work.packed_rows if row.packed else work.batch
    micro = min(row.micro or rows, rows)
    lines, data = scratch / "steps.jsonl", "prompts.jsonl" if row.peer == "trl" else "messages.jsonl"
    task = LORA | {
        "model": work.model, "data": str(work.folder / data), "output": str(scratch / "out"), "lines": str(lines),
        "steps": work.steps, "max_length": work.max_length, "micro": micro, "accumulate": -(-rows // micro),
        "lr": LR, "seed": seed, "settings": dict(row.settings),
    }  # fmt: skip
    return [str(Path(__file__).with_name(f"with_{row.peer}.py")), json.dumps(task)], lines


def _of_snugtune(row: Row, work: Work, seed: int, scratch: Path) -> tuple[list[str], Path]:
    config = {
        "model": work.model, "data": str(work.folder / "messages.jsonl"), "output": str(scratch / "out"),
        "batch_size": work.batch, "max_seq_len": work.max_length, "steps": work.steps, "seed": seed,
        "method": {"type": "lora", "r": LORA["r"], "lora_alpha": LORA["alpha"]}, "optimizer": {"type": "adamw", "lr": LR},
        "checkpoint_every": work.steps, "plan": dict(row.settings),
    }  # fmt: skip
    file = scratch / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["-m", "snugtune", "train", str(file)], scratch / "out" / "metrics.jsonl"
