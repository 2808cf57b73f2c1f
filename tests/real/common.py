"""What the real tier shares: short conversations, plain PEFT and torch as the independent truth, plans, comparisons.

Nothing here calls snugtune's own rendering, packing, head or attention: it is what those are compared with.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from conftest import NoWatch, packed
from snugtune.config import JobConfig, to_config
from snugtune.methods.lora import LoraAttached
from snugtune.model.base import Base
from snugtune.observer import Observer, RunResult
from snugtune.run import train as run_train
from snugtune.training.examples import JobData
from snugtune.training.job import Job, start_job
from snugtune.training.trainer import Trainer
from snugtune.types import NARROW, Example, Plan, Recompute, Width

IGNORE = -100
OPENING, END = "<|im_start|>assistant\n", "<|im_end|>"  # ChatML: where an answer begins, and the token that closes it

_FACTS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Italy": "Rome",
    "Peru": "Lima",
    "Norway": "Oslo",
    "Kenya": "Nairobi",
    "Egypt": "Cairo",
    "Cuba": "Havana",
    "Greece": "Athens",
    "Spain": "Madrid",
    "Austria": "Vienna",
}


def _said(*turns: str) -> list[dict[str, str]]:
    roles = ["system"] + ["user", "assistant"] * (len(turns) // 2)
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]


CONVERSATIONS = [
    *(_said("Be brief.", f"Capital of {land}?", f"{town}, of course.") for land, town in _FACTS.items()),
    _said("Be brief.", "Hi!", "Hello.", "And the capital of Chile?", "Santiago, of course."),
    _said("Be brief.", "Name the capitals of Sweden, Poland and Portugal.", "Stockholm, Warsaw and Lisbon, of course."),
    _said("Be brief, and explain what you mean.", "Is Berlin a capital?", "Yes: it is the capital of Germany, of course."),
]
"""Short, of uneven lengths (20 to 36 tokens), one of them with two answers: a whole real-model step stays in seconds."""

RUN: dict[str, Any] = {
    "model": "demo",
    "max_seq_len": 64,
    "method": {"type": "lora", "r": 8, "lora_alpha": 16},
    "batch_size": 4,
    "steps": 20,
    "seed": 3,
    "optimizer": {"lr": 1e-3, "weight_decay": 0.01},
    "schedule": {"type": "cosine", "warmup": 0.1},
    "max_grad_norm": 1.0,
    "plan": {"weights": "fp32", "micro_batch": 1},
}
"""The run of the `trained` fixture, less its data and output. Two sequences fit a chunk, so each step is cut in two."""


def write_data(path: Path, conversations: Sequence[Sequence[Mapping[str, str]]] = CONVERSATIONS) -> Path:
    """The conversations as `.jsonl` in OpenAI's form."""
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations), encoding="utf-8")
    return path


def plan(weights: Width = "fp32", micro_batch: int = 1, recompute: Recompute = "none") -> Plan:
    compute = "bf16" if weights in NARROW else weights
    return Plan("cpu", weights, micro_batch, recompute, 512, torch.get_num_threads(), compute)


# --- the truth ---


def labelled(conversation: Sequence[Mapping[str, str]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """(ids, labels) by walking ChatML's tokens: labelled is what follows an opening, up to and with the end token."""
    text = tokenizer.apply_chat_template([dict(m) for m in conversation], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    opening = tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(END)
    labels, answering = [], False
    for at, token in enumerate(ids):
        labels.append(token if answering else IGNORE)
        answering = (answering and token != end) or ids[at + 1 - len(opening) : at + 1] == opening
    return torch.tensor(ids), torch.tensor(labels)


def padded(rows: Sequence[tuple[Tensor, Tensor]], at_least: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, labels), padded on the right, as every textbook loop does it."""
    length = max(at_least, *(len(ids) for ids, _ in rows))

    def fill(side: Sequence[Tensor], value: int) -> Tensor:
        return torch.stack([F.pad(t, (0, length - len(t)), value=value) for t in side])

    ids, labels = [row[0] for row in rows], [row[1] for row in rows]
    return fill(ids, 0), fill([torch.ones_like(i) for i in ids], 0), fill(labels, IGNORE)


def sum_nll(model: nn.Module, ids: Tensor, mask: Tensor | None, labels: Tensor) -> Tensor:
    """From the full logits, summed over the labels.

    The loss alone is taken in fp64: over 49152 classes torch's own fp32 cross entropy is off by 3e-6, and the gradients
    behind it by up to 1.4e-4 (measured against a model in fp64), more than what is asked of ours.
    """
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


def label_count(rows: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(int((labels[1:] != IGNORE).sum()) for _, labels in rows)


def mean_nll(model: nn.Module, rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of the labels' losses / their number, from one padded batch."""
    return sum_nll(model, *padded(rows)) / label_count(rows)


def mean_nll_one_by_one(model: nn.Module, rows: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """The same mean as summands, one unpadded sequence each: backward them in turn.

    Only what is shorter than 16 tokens is padded to that: MKL's fp32 products of fewer rows with the whole vocabulary are
    up to 40 times less exact.
    """
    for ids, labels in rows:
        row = padded([(ids, labels)], 16) if len(ids) < 16 else (ids[None], None, labels[None])
        yield sum_nll(model, *row) / label_count(rows)


def peft_gradients(twin: PeftModel) -> dict[str, Tensor]:
    """The gradients of all trainable parameters of a PEFT model, by name."""
    found = {name: p.grad.clone() for name, p in twin.named_parameters() if p.requires_grad and p.grad is not None}
    assert found and all(".lora_" in name for name in found)
    return found


def whole(gradients: Mapping[str, Tensor]) -> Tensor:
    """All tensors as one vector, ordered by name."""
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


# --- ours ---


def train(observer: Observer | None = None, /, **fields: Any) -> RunResult:
    """A run of these config fields."""
    return run_train(to_config(fields), observer)


def examples(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Example, ...]:
    """The truth's rows as our examples, without our rendering in between."""
    return tuple(Example(ids, (labels != IGNORE).float(), f"invented:{at}") for at, (ids, labels) in enumerate(rows))


def job_config(**fields: Any) -> JobConfig:
    return JobConfig.model_validate({"data": "invented.jsonl", "max_seq_len": 64} | fields)


@contextmanager
def one_job(base: Base, use: Plan, rows: Sequence[tuple[Tensor, Tensor]], **fields: Any) -> Iterator[tuple[Trainer, Job]]:
    """A trainer with one job whose step holds exactly `rows`; the shared base forgets the job afterwards."""
    trainer = Trainer(base, use, NoWatch())
    job = start_job(base, job_config(batch_size=len(rows), **fields), JobData(examples(rows)), use)
    trainer.add(job)
    try:
        yield trainer, job
    finally:
        job.attached.detach()


def accumulate(trainer: Trainer, job: Job) -> float:
    """One step's gradients, without the optimizer. Returns the loss."""
    job.attached.zero_grad()
    return float(trainer.forward_backward({job.name: job.chunks()})[job.name])


def lora(job: Job) -> LoraAttached:
    assert isinstance(job.attached, LoraAttached)
    return job.attached


def our_logits(base: Base, job: str | None, ids: Tensor) -> Tensor:
    """Logits [L, V] of one sequence the way training computes them: packed attention, our head, `job`'s adapter."""
    batch = packed([ids], job)
    head = base.head.for_segment(batch.segments[0]) if batch.segments else base.head
    base.model.eval()
    with torch.no_grad(), base.routed(batch):
        return head.logits(base.hidden(batch))
