"""Several jobs on one tiny base, for tests: five that differ in all that jobs may differ in, and how each of them ends."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conftest import NoWatch, sequences
from snugtune.config import JobConfig
from snugtune.model.base import Base
from snugtune.training.examples import JobData
from snugtune.training.job import Job, start_job
from snugtune.training.metrics import StepMetrics
from snugtune.training.trainer import Trainer
from snugtune.types import Example, Plan

Fields = Mapping[str, Any]

JOBS: dict[str, dict[str, Any]] = {
    "all": {
        "method": {"type": "lora", "r": 4, "lora_dropout": 0.2},
        "optimizer": {"type": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        "schedule": {"type": "cosine", "warmup": 0.25},
        "max_grad_norm": 0.5,
        "lengths": (9, 14, 5, 20, 31, 3, 12),
    },
    "noisy": {
        "method": {"type": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]},
        "optimizer": {"type": "lion", "lr": 1e-3},
        "schedule": {"type": "linear"},
        "neftune_noise_alpha": 5.0,
        "batch_size": 3,
        "lengths": (4, 17, 23, 8),
        "seed": 1,
    },
    "short": {  # its chunks are below 16 tokens
        "method": {"type": "lora", "r": 16, "target_modules": ["o_proj", "down_proj"], "use_rslora": True},
        "optimizer": {"type": "adafactor", "lr": 1e-2},
        "batch_size": 1,
        "lengths": (3, 7, 2, 11, 5),
        "seed": 2,
        "weight": 2.0,
    },
    "late": {  # nothing below the last block trains
        "method": {"type": "lora", "r": 8, "target_modules": r".*layers\.3\..*", "lora_dropout": 0.1},
        "optimizer": {"type": "sgd", "lr": 0.1},
        "max_grad_norm": None,
        "batch_size": 4,
        "lengths": (13, 13, 6, 30, 1, 22),
        "objective": {"type": "sft", "label_smoothing": 0.1},
        "seed": 3,
        "weight": 0.3,
    },
    "headed": {  # the output head carries an adapter
        "method": {"type": "lora", "r": 32, "target_modules": ["up_proj", "lm_head"]},
        "optimizer": {"type": "adamw", "lr": 3e-3},
        "max_seq_len": 48,
        "batch_size": 2,
        "lengths": (40, 19, 27),
        "seed": 4,
    },
}
"""Name -> fields of its config; `lengths`: of its examples, in tokens."""
STEPS = 4


@dataclass(frozen=True)
class End:
    """How a job ended: (loss, gradient norm) of each step, weights and optimizer state, and plain numbers of its progress."""

    history: list[tuple[float | None, float | None]]
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    def unlike(self, other: "End") -> list[str]:
        """What is not the same to the last bit."""
        found = [f"step {k}" for k, (a, b) in enumerate(itertools.zip_longest(self.history, other.history), 1) if a != b]
        found += [k for k in sorted(self.tensors.keys() ^ other.tensors.keys())]
        found += [k for k in self.tensors.keys() & other.tensors.keys() if not _same(self.tensors[k], other.tensors[k])]
        return found + [k for k in self.numbers if self.numbers[k] != other.numbers[k]]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def unlike(ends: Mapping[str, End], truths: Mapping[str, End]) -> dict[str, list[str]]:
    """Of each job that did not end as in `truths`: what differs."""
    return {name: found for name, end in ends.items() if (found := end.unlike(truths[name]))}


def data_of(lengths: Sequence[int], seed: int = 0) -> JobData:
    """Examples of random tokens; the first half of each is context."""
    weights = [torch.tensor([0.0] * max(1, n // 2) + [1.0] * (n - max(1, n // 2))) for n in lengths]
    examples = [Example(ids, w, "invented") for ids, w in zip(sequences(*lengths, seed=seed), weights, strict=True)]
    return JobData(tuple(examples))


def start(base: Base, plan: Plan, name: str, fields: Fields) -> Job:
    """A job of these fields, at step 0, with its data."""
    fields = {"max_seq_len": 32, "batch_size": 2, "data": "invented.jsonl", "lengths": (9, 14), "steps": STEPS} | dict(fields)
    data = data_of(fields.pop("lengths"), fields.pop("data_seed", 7 + fields.get("seed", 0)))
    if fields.get("epochs") is not None:
        del fields["steps"]
    return start_job(base, JobConfig.model_validate({"name": name} | fields), data, plan)


@dataclass
class Run:
    """A trainer, and what was reported of its jobs."""

    trainer: Trainer
    history: dict[str, list[tuple[float | None, float | None]]]

    def add(self, name: str, fields: Fields) -> Job:
        job = start(self.trainer.base, self.trainer.plan, name, fields)
        self.trainer.add(job)
        self.history.setdefault(name, [])
        return job

    def note(self, reports: Sequence[StepMetrics]) -> None:
        for report in reports:
            self.history[report.job].append((report.loss, report.grad_norm))

    def train(self, until: Callable[[], bool] = lambda: False) -> None:
        """Steps until all jobs are done, or something holds."""
        while not until() and (reports := self.trainer.step()):
            self.note(reports)

    def end_of(self, job: Job) -> End:
        tensors, numbers = job.state()
        numbers = {k: v for k, v in numbers.items() if k != "served"}  # from where it joined
        return End(self.history[job.name], {k: v.clone() for k, v in tensors.items()}, numbers)

    def ends(self) -> dict[str, End]:
        return {name: self.end_of(job) for name, job in self.trainer.jobs.items()}


@contextmanager
def running(base: Base, plan: Plan, jobs: Mapping[str, Fields], kind: type[Trainer] = Trainer) -> Iterator[Run]:
    """A trainer with these jobs; the base forgets them afterwards."""
    run = Run(kind(base, plan, NoWatch()), {})
    try:
        for name, fields in jobs.items():
            run.add(name, fields)
        yield run
    finally:
        for name in list(run.trainer.jobs):
            run.trainer.remove(name)


def together(base: Base, plan: Plan, jobs: Mapping[str, Fields], kind: type[Trainer] = Trainer) -> dict[str, End]:
    """Train these jobs to their ends, as one run."""
    with running(base, plan, jobs, kind) as run:
        run.train()
        return run.ends()


def alone(base: Base, plan: Plan, jobs: Mapping[str, Fields]) -> dict[str, End]:
    """Train each of these jobs by itself, one run after the other."""
    return {name: end for name, fields in jobs.items() for name, end in together(base, plan, {name: fields}).items()}
