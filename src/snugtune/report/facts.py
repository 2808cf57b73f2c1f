"""What a run folder's files say, read so that a running, broken off or older run still makes a page."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from snugtune.config import JobConfig, RunConfig, read_config
from snugtune.errors import InputError
from snugtune.folder import RunFolder, runs_near

Entry = TypeVar("Entry", bound=BaseModel)

SERIES = ("loss", "eval_loss", "lr", "grad_norm", "tokens_per_second", "peak_memory")


@dataclass
class Series:
    """One measure over the steps of one job. `ys` holds None where there is no finite value: a gap."""

    xs: list[int] = field(default_factory=list)
    ys: list[float | None] = field(default_factory=list)

    def finite(self) -> list[tuple[int, float]]:
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if y is not None]


class Remark(BaseModel):
    """Why examples were cut or left out, how many, and where some of them stand."""

    count: int = 0
    places: list[str] = []


class DataFacts(BaseModel):
    """One job's entry of `data.json`. `lengths`: (lowest, highest, examples) of each bin, in tokens."""

    examples: int = 0
    held_out: int = 0
    tokens: int = 0
    label_tokens: int = 0
    lengths: list[tuple[int, int, int]] = []
    remarks: dict[str, Remark] = {}


class Sample(BaseModel):
    """One line of `samples.jsonl`: what the model answered to a prompt after `step` steps."""

    job: str
    step: int
    index: int
    prompt: Any
    answer: str


class Status(BaseModel):
    """One job's entry of `jobs.json`."""

    status: str
    step: int = 0
    total_steps: int = 0
    reason: str = ""
    traceback: str = ""


@dataclass
class JobFacts:
    """One job of the run, as far as it came. `artefact`: where its result lies or will lie (None: unknown)."""

    name: str
    total: int = 0
    step: int = 0
    tokens: int = 0
    label_tokens: int = 0
    skipped: list[int] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=lambda: {name: Series() for name in SERIES})
    data: DataFacts | None = None
    samples: list[Sample] = field(default_factory=list)
    artefact: Path | None = None
    keep_best: bool = False
    config: JobConfig | None = None
    status: Status | None = None

    @property
    def failed(self) -> bool:
        return self.status is not None and self.status.status == "failed" and not self.finished

    @property
    def finished(self) -> bool:
        return self.artefact is not None and self.artefact.is_dir()

    def add(self, line: dict[str, Any]) -> None:
        """Take in one line of `metrics.jsonl`."""
        step = self.step = int(line["step"])
        self.total = max(self.total, step, int(line.get("total_steps") or 0))
        self.tokens += int(line.get("tokens") or 0)
        self.label_tokens += int(line.get("label_tokens") or 0)
        if line.get("skipped"):
            self.skipped.append(step)
        for name in SERIES:
            value = _finite(line.get(name))
            if value is not None or (step > 0 and name in ("loss", "grad_norm")):  # a gap is shown where one is due
                self.series[name].xs.append(step)
                self.series[name].ys.append(value)


@dataclass
class RunFacts:
    """Everything the page shows. `problems`: files that could not be read, in a person's words."""

    folder: Path
    config: str
    model: str | None  # None: unknown
    plan: dict[str, Any]
    jobs: list[JobFacts]
    problems: list[str]

    @property
    def finished(self) -> bool:
        return bool(self.jobs) and all(job.finished for job in self.jobs)

    @property
    def goes_on(self) -> bool:
        """Whether the same command has anything left to do."""
        return any(not (job.finished or job.failed) for job in self.jobs)


def read_facts(path: Path) -> RunFacts:
    """Read a run folder. Raises `InputError` where it is none; files that are missing or broken only leave gaps."""
    run = RunFolder(path)
    if not run.config.is_file():
        raise InputError(f"{path} is not a run folder (no config.yaml); {runs_near(path)}")
    problems: list[str] = []
    jobs: dict[str, JobFacts] = {}
    config = _config(run, problems)
    for job in config.resolved_jobs() if config else ():
        jobs[job.name] = JobFacts(job.name, artefact=run.artefact(job), keep_best=job.keep_best, config=job)

    def take_step(line: dict[str, Any]) -> None:
        facts = jobs.get(line["job"]) or JobFacts(str(line["job"]))
        facts.add(line)
        jobs[facts.name] = facts

    def take_sample(line: dict[str, Any]) -> None:
        sample = Sample.model_validate(line)
        jobs.setdefault(sample.job, JobFacts(sample.job)).samples.append(sample)

    _each_line(run.metrics, take_step, problems)
    for name, facts in _by_job(run.data, DataFacts, "the facts about the data", problems).items():
        jobs.setdefault(name, JobFacts(name)).data = facts
    for name, status in _by_job(run.jobs, Status, "how the jobs ended", problems).items():
        facts = jobs.setdefault(name, JobFacts(name))
        facts.status, facts.total = status, facts.total or status.total_steps
    _each_line(run.samples, take_sample, problems)
    text = run.config.read_text(encoding="utf-8", errors="replace")
    return RunFacts(path, text, config.model if config else None, _plan(run, problems), list(jobs.values()), problems)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and abs(value) < math.inf else None


def _config(run: RunFolder, problems: list[str]) -> RunConfig | None:
    try:
        return read_config(run.config)
    except InputError as error:
        problems.append(f"config.yaml cannot be used, so results are not looked for: {error}")
        return None


def _plan(run: RunFolder, problems: list[str]) -> dict[str, Any]:
    try:
        return run.read_plan()
    except InputError:
        problems.append("plan.json cannot be read; the plan is left out")
        return {}


def _by_job(path: Path, kind: type[Entry], what: str, problems: list[str]) -> dict[str, Entry]:
    """A file that has an entry for each job."""
    if not path.is_file():
        return {}
    try:
        entries = TypeAdapter(dict[str, dict[str, Any]]).validate_json(path.read_bytes())
        return {name: kind.model_validate(entry) for name, entry in entries.items()}
    except (OSError, ValidationError):
        problems.append(f"{path.name} cannot be read; {what} are left out")
        return {}


def _each_line(path: Path, take: Callable[[dict[str, Any]], None], problems: list[str]) -> None:
    """Hand over the objects of a JSONL file, up to a last line that is only half written; what is none is counted and named."""
    if not path.is_file():
        return
    bad: list[int] = []
    with path.open(encoding="utf-8", errors="replace") as stream:
        for number, text in enumerate(takewhile(lambda line: line.endswith("\n"), stream), 1):
            try:
                take(json.loads(text))
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):  # whatever stands there
                bad.append(number)
    if bad:
        which = f"line {bad[0]} is" if len(bad) == 1 else f"{len(bad)} lines (the first is line {bad[0]}) are"
        problems.append(f"{path.name}: {which} broken and left out")
