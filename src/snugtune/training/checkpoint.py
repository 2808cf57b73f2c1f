"""Checkpoints: everything a run needs to go on bit for bit, written whole or not at all.

A checkpoint is a folder `step-00000010` with `run.json` (steps, plan and its changes, thread count) and one safetensors file
a job.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from snugtune.config import JobConfig
from snugtune.errors import InputError
from snugtune.files import read_json, whole_folder
from snugtune.training.job import Best, Ended, Job
from snugtune.training.metrics import StepMetrics
from snugtune.training.recut import Change, Knob
from snugtune.training.rest import write_tensors
from snugtune.training.stored import Stored
from snugtune.types import Plan

FORMAT = 7
_BEST = "best-"
JOB_FILE = "state.json"
"""What makes a folder the state of one job."""


class _Progress(BaseModel):
    """What is known of every job."""

    step: int


class _Best(_Progress):
    eval_loss: float


class _Ended(_Progress):
    """What is kept of a job that has left."""

    total: int
    failure: str | None
    diverged: bool
    untuned: float | None
    best: _Best | None
    largest_weight: float


class _Change(_Progress):
    """A change of the plan."""

    job: str
    knob: Knob
    value: int | str
    cause: str


class _Position(_Progress):
    """Whose step a report is of."""

    job: str


class _Entry(BaseModel):
    """An optimizer's state of one weight."""

    numbers: dict[str, Any]
    tensors: dict[str, list[int]]


class _Numbers(_Progress):
    """The plain numbers of a job that goes on."""

    data: str
    served: float
    skipped_in_a_row: int
    seen_tokens: int
    seen_label_tokens: int
    stale: int
    untuned: float | None
    to_beat: float | None
    failure: str | None
    diverged: bool
    best: _Best | None
    optimizer: dict[str, _Entry]
    scaler: dict[str, Any] | None


@dataclass(frozen=True)
class Checkpoint:
    """A readable checkpoint on disk. `jobs` holds each job's plain numbers, and of one that ended that it did."""

    folder: Path
    step: int  # of the run
    plan: Plan  # as it was when the run began
    changes: list[Change]  # of it, since then
    base: str  # fingerprint
    jobs: dict[str, dict[str, Any]]
    pending: list[dict[str, Any]]  # metrics of steps whose evaluation was not done yet

    def ended(self, config: JobConfig) -> Ended | None:
        """How a job ended; None for one that goes on, or has not begun."""
        numbers = self.jobs.get(config.name, {})
        if not numbers.get("ended"):
            return None
        known = {name: numbers[name] for name in _Ended.model_fields}
        best = None if known["best"] is None else Best(**known["best"])
        return Ended(**known | {"config": config, "best": best})

    def restore(self, job: Job) -> None:
        """Bring a freshly started job to where it stood. Raises `InputError` when its data is not what it was."""
        numbers = self.jobs.get(job.name, {})
        if not _Numbers.model_fields.keys() <= numbers.keys():
            raise InputError(f"{self.folder}: knows too little of job '{job.name}'; delete it to go on from the one before")
        if numbers["data"] != job.data.fingerprint:
            raise InputError(
                f"data: the examples of job '{job.name}' are not those that {self.folder} was trained on (a file, the "
                "tokenizer or the chat template has changed); bring them back, or give a new output folder"
            )
        try:
            _check(_Numbers, numbers)
            job.load_state(Stored(self.folder / f"{job.name}.safetensors"), numbers)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            why = f"the checkpoint of job '{job.name}' cannot be read: {error}"
            raise InputError(f"{self.folder}: {why}; delete it to go on from the one before") from error


def save_checkpoint(
    root: Path,
    step: int,
    plan: Plan,
    changes: Sequence[Change],
    base: str,
    active: Sequence[Job],
    ended: Sequence[Ended],
    pending: Sequence[StepMetrics],
    keep: int,
) -> Path:
    """Write the state after run step `step`, then delete all but the newest `keep`. Raises `StorageError`."""
    target = root / f"step-{step:08d}"
    with whole_folder(target) as made:
        numbers: dict[str, dict[str, Any]] = {job.name: {"ended": True} | job.numbers() for job in ended}
        for job in active:
            numbers[job.name] = job.numbers()
            write_tensors(job, made / f"{job.name}.safetensors")
        state = {
            "format": FORMAT,
            "step": step,
            "plan": asdict(plan),
            "changes": [asdict(change) for change in changes],
            "base": base,
            "jobs": numbers,
            "pending": [asdict(metrics) for metrics in pending],
        }
        (made / "run.json").write_text(json.dumps(state, indent=2) + "\n")
    for old in _folders(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def save_job(folder: Path, job: Job, base: str) -> None:
    """Write the state of one job after its last whole step; `base` is the fingerprint. Raises `StorageError`."""
    tensors, numbers = job.state()
    with whole_folder(folder) as made:
        save_file({k: v.contiguous() for k, v in tensors.items()}, made / "state.safetensors")
        state = {"format": FORMAT, "base": base, "kind": _kind(job), "job": numbers}
        (made / JOB_FILE).write_text(json.dumps(state, indent=2) + "\n")


def load_job(folder: Path, job: Job, base: str) -> None:
    """Bring a job to where the one stood that `save_job` wrote. Raises `InputError`, and leaves the job as it was then."""
    state = read_json(folder / JOB_FILE)
    if state.get("format") != FORMAT:
        raise InputError(f"{folder}: written by another version of snugtune (format {state.get('format')}, not {FORMAT})")
    if state.get("base") != base:
        raise InputError(f"{folder}: the state of a job on another base than that of job '{job.name}'")
    kind, own = state.get("kind"), _kind(job)
    if kind != own:
        differ = [name for name in own if not isinstance(kind, dict) or kind.get(name) != own[name]]
        raise InputError(f"{folder}: the state of a job with another {' and another '.join(differ)} than job '{job.name}' has")
    numbers = state.get("job", {})
    if numbers.get("data") != job.data.fingerprint:
        raise InputError(f"{folder}: the state of a job with other data than job '{job.name}' has")
    try:
        _check(_Numbers, numbers)
        tensors = Stored(folder / "state.safetensors")
        weights = {f"weights.{name}": weight.shape for name, weight in job.attached.state().items()}
        if {name: t.shape for name, t in tensors.items() if name.startswith("weights.")} != weights:
            raise ValueError("its weights have other names or shapes")
        job.load_state(tensors, numbers)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: the state of a job cannot be read: {error}") from error


def _kind(job: Job) -> dict[str, Any]:
    """What a job's state follows from, besides its training."""
    return {
        "method": job.config.method.model_dump(mode="json"),
        "optimizer": [job.config.optimizer.type, type(job.optimizer).__name__],
    }


def save_best(root: Path, job: Job) -> None:
    """Keep the job's weights as the best so far. Raises `StorageError`."""
    with whole_folder(_best(root, job)) as made:
        save_file({k: v.contiguous() for k, v in job.attached.state().items()}, made / "weights.safetensors")


def load_best(root: Path, job: Job) -> None:
    """Bring the job's weights back to its best evaluation. Raises `InputError`."""
    file = _best(root, job) / "weights.safetensors"
    try:
        job.attached.load_state(Stored(file))
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{file}: the best state of job '{job.name}' cannot be read: {error}") from error


def drop_best(root: Path) -> None:
    """Forget all jobs' best states: the run is finished, and its results are saved."""
    for folder in root.glob(f"{_BEST}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _best(root: Path, job: Job) -> Path:
    return root / f"{_BEST}{job.name}"


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest checkpoint, or None when there is none. Raises `InputError` when it cannot be read."""
    folders = _folders(root)
    if not folders:
        return None
    newest = folders[-1]
    try:
        state = read_json(newest / "run.json")
        if state["format"] != FORMAT:
            raise InputError(f"{newest}: written by another version of snugtune (format {state['format']}, not {FORMAT})")
        changes = [Change(**change) for change in state["changes"]]
        plan, base, jobs, pending = Plan(**state["plan"]), state["base"], state["jobs"], state["pending"]
        found = Checkpoint(newest, state["step"], plan, changes, base, jobs, pending)
        _check_types(found)
        return found
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{newest}: cannot be used ({error}); delete it to go on from the one before") from error


def _check_types(found: Checkpoint) -> None:
    """Raises `ValueError` or `TypeError` for values that no checkpoint holds."""
    for name, hint in get_type_hints(Plan).items():
        value = getattr(found.plan, name)
        try:
            _check(hint, value)
        except ValueError as error:
            raise ValueError(f"plan: {name} is {value!r}") from error
    _check(int, found.step)
    _check(list[_Change], [asdict(change) for change in found.changes])
    _check(dict[str, _Progress], found.jobs)
    _check(dict[str, _Ended], {name: job for name, job in found.jobs.items() if job.get("ended")})
    for fields in found.pending:
        _check(_Position, asdict(StepMetrics(**fields)))


def _check(kind: Any, value: Any) -> None:
    """Raises `ValueError`, in one line, where `value` is not of the type `kind`."""
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'step'}: {first['msg']}") from error


def _folders(root: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first. Half-written ones have other names and are removed by whoever wrote them."""
    found = [p for p in root.iterdir() if re.fullmatch(r"step-\d+", p.name)] if root.is_dir() else []
    return sorted(found, key=lambda p: p.name)
