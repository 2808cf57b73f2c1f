"""The layout of a run's output folder, and what it says about its state."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from snugtune.config import JobConfig, RunConfig, read_config
from snugtune.config_yaml import read_yaml
from snugtune.errors import InputError
from snugtune.files import is_leftover, read_json, user_path, write_whole
from snugtune.memory.fit import CHOSEN, Fitted
from snugtune.memory.plan import Kept, Planned, make_plan
from snugtune.methods import METHODS
from snugtune.methods.adapter_folder import CONFIG_FILE
from snugtune.training.recut import Change

MODEL_FILE = "config.json"
"""What makes a folder one of a transformers model."""
MOST_CHANGES = 3
"""Differences from the config of a run that are named."""
RUNS_NAMED = 8
"""Runs that a message names; there may be hundreds."""


@dataclass(frozen=True)
class RunFolder:
    """`config.yaml`, `plan.json`, `metrics.jsonl`, `checkpoints/`, and an adapter or model folder for each finished job."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def jobs(self) -> Path:
        """How each job stands; see `Session.statuses`."""
        return self.path / "jobs.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def tracking(self) -> Path:
        """How the experiment trackers know this run."""
        return self.path / "tracking.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def artefact(self, job: JobConfig) -> Path:
        """Where the finished adapter (or model) of a job goes."""
        return self.path / METHODS[type(job.method)].artefacts / job.name

    def finished(self, jobs: Sequence[JobConfig]) -> bool:
        """Whether every job has its artefact (they appear whole, after the last step) and the run was closed."""
        return all(self.artefact(job).is_dir() for job in jobs) and self.read_plan().get("measured_peak_bytes") is not None

    def check(self, config: RunConfig) -> None:
        """Refuse a folder that is something else, or a run of another config."""
        path = self.path
        if path.exists() and not path.is_dir():
            raise InputError(f"output: {path} is a file; give a folder")
        parent = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not parent.is_dir():
            raise InputError(f"output: {parent} is a file, so {path} cannot be made")
        if not path.is_dir() or all(is_leftover(p) for p in path.iterdir()):
            return
        if not self.config.is_file():
            raise InputError(f"output: {path} is not empty and holds no run; give a new folder")
        changes = _changes(self._config_before(), _flat(config.model_dump(mode="json")))
        changes = [change for change in changes if not change.startswith("memory: ")]  # the plan stays; more of it may be needed
        if changes:
            make_plan(config)  # a device or a pin that cannot be had is the mistake to tell first
            more = f" and {len(changes) - MOST_CHANGES} more" if len(changes) > MOST_CHANGES else ""
            undo = ", ".join(changes[:MOST_CHANGES]) + more
            raise InputError(f"output: {path} holds a run of another config; give a new folder or undo: {undo}")

    def _config_before(self) -> dict[str, Any]:
        """The run's config as this version writes it: fields that are new since then have their defaults."""
        try:
            return _flat(read_config(self.config).model_dump(mode="json"))
        except InputError:
            pass  # of an older version, or changed by hand: compared as it stands
        try:
            return _flat(read_yaml(self.config))
        except InputError as error:
            raise InputError(f"output: the config of the run there is damaged: {error}; give a new folder") from error

    def read_plan(self) -> dict[str, Any]:
        """`plan.json`, empty when there is none yet."""
        return read_json(self.plan) if self.plan.is_file() else {}

    def read_jobs(self) -> dict[str, dict[str, Any]]:
        """`jobs.json`; empty where there is none or it is damaged: nothing depends on it."""
        try:
            found = read_json(self.jobs)
        except InputError:
            return {}
        return {name: job for name, job in found.items() if isinstance(job, dict)}

    def write_jobs(self, statuses: Mapping[str, Mapping[str, Any]]) -> None:
        """One line a job; there may be thousands, and it is written often."""
        lines = (f"  {json.dumps(name)}: {json.dumps(job)}" for name, job in statuses.items())
        write_whole(self.jobs, "{\n" + ",\n".join(lines) + "\n}\n")

    def read_kept(self) -> Kept:
        """How the run kept its frozen weights. Raises `InputError` for what no run has written."""
        fields = self.read_plan().get("plan")
        try:
            return Kept.of(fields if isinstance(fields, dict) else {})
        except ValueError as error:
            raise InputError(f"{self.plan}: {error}; bring back what the run wrote") from error

    def write_plan(
        self, planned: Planned, changes: Sequence[Change], peak: int | None, measured: Any = None, fitted: Fitted | None = None
    ) -> None:
        """`changes`: of the plan, under way; `peak`: measured, in bytes; None while the run goes on; `measured`: by category.

        What an earlier session knew of how the plan was chosen stays.
        """
        chosen = {k: v for k, v in self.read_plan().items() if k in CHOSEN} if fitted is None else fitted.facts()
        told = [asdict(change) for change in changes]
        plan = {"plan": asdict(planned.plan), "reasons": planned.reasons, "changes": told}
        content = {**chosen, **plan, "measured": measured, "measured_peak_bytes": peak}
        write_whole(self.plan, json.dumps(content, indent=2) + "\n")


def _flat(fields: Any, name: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names: {"optimizer.lr": 1e-4}. Of a list those of its items; one of plain values is whole."""
    items = list(fields.items()) if isinstance(fields, dict) else list(enumerate(fields)) if isinstance(fields, list) else []
    if not items or (isinstance(fields, list) and not any(isinstance(item, (dict, list)) for item in fields)):
        return {name: fields}
    return {k: v for key, inner in items for k, v in _flat(inner, f"{name}.{key}" if name else str(key)).items()}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`optimizer.lr: 0.0002 -> 0.0001` for each field that differs; of a group of another type, that type alone."""
    differ = [
        name for name in dict.fromkeys((*before, *now)) if name not in before or name not in now or before[name] != now[name]
    ]
    types = [name.removesuffix("type") for name in differ if name.endswith(".type")]
    told = [name for name in differ if name.endswith(".type") or not name.startswith(tuple(types))]
    return [f"{name}: {_shown(before, name)} -> {_shown(now, name)}" for name in told]


def _shown(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    return "nothing" if value is None else value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def runs_near(path: Path) -> str:
    """The runs that somebody who wrote `path` may have meant, in words: those in it, beside it, in `runs/` and here."""
    places = (path, path.parent, Path("runs"), Path())
    found = sorted({str(run.parent) for place in places for run in place.glob("*/config.yaml") if _is_run(run.parent)})
    if not found:
        return "no run is here or in runs/; give the 'output' of one"
    more = f" and {len(found) - RUNS_NAMED} more" if len(found) > RUNS_NAMED else ""
    return f"runs that are here: {', '.join(found[:RUNS_NAMED])}{more}"


def _is_run(path: Path) -> bool:
    return RunFolder(path).plan.is_file() or RunFolder(path).metrics.is_file()


@dataclass(frozen=True)
class Located:
    """What a run, adapter or model folder refers to: a model, and the adapter on it (None: the model itself was tuned).

    `origin`: the model that was tuned (the same one where that is not known); `remote_code`: the run was trained with code
    that came with it; `kept`: how the frozen weights were.
    """

    model: str
    adapter: Path | None
    origin: str
    remote_code: bool = False
    kept: Kept = field(default_factory=Kept)

    def check_trust(self, trust_remote_code: bool) -> None:
        """Raises `InputError` where remote code is needed and not trusted. What a folder says is no reason to trust it."""
        if self.remote_code and not trust_remote_code:
            raise InputError(f"model: '{self.model}' brings code of its own; add --trust-remote-code if you trust its source")


def locate(path: Path, adapter: str | None = None) -> Located:
    """Find what `path` (a run, PEFT adapter or model folder) holds; `adapter` picks a job of several. Raises `InputError`."""
    path = user_path(str(path), "RUN")
    if not path.exists():
        raise InputError(f"there is no {path}; {runs_near(path)}")
    if not path.is_dir():
        raise InputError(f"{path} is a file; give a run's folder (the 'output' of its config) or an adapter's")
    is_run, is_adapter, is_model = ((path / name).is_file() for name in ("config.yaml", CONFIG_FILE, MODEL_FILE))
    if is_run and not is_adapter:
        return _in_run(path, adapter)
    if not is_adapter and not is_model:
        lacks = f"neither a run folder (no config.yaml) nor an adapter or model folder (no {CONFIG_FILE}, no {MODEL_FILE})"
        raise InputError(f"{path} is {lacks}; {runs_near(path)}")
    if adapter is not None:
        raise InputError(f"--adapter {adapter}: {path} is no run with several adapters; leave it out")
    if not is_adapter:
        model = str(path.absolute())  # 'demo' alone would be another model
        return Located(model, None, model)
    name = read_json(path / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{path / CONFIG_FILE}: names no base model")
    return Located(name, path, name)


def _in_run(path: Path, adapter: str | None) -> Located:
    config, folder = read_config(path / "config.yaml"), RunFolder(path)
    jobs = {job.name: job for job in config.resolved_jobs()}
    if adapter is None and len(jobs) > 1:
        raise InputError(f"{path} holds several adapters; pick one with --adapter: {', '.join(jobs)}")
    name = adapter or next(iter(jobs))
    if name not in jobs:
        raise InputError(f"{path} has no adapter '{name}'; it has {', '.join(jobs)}")
    artefact = folder.artefact(jobs[name])
    if not artefact.is_dir():
        if (job := folder.read_jobs().get(name, {})).get("status") == "failed":
            raise InputError(f"{path}: job '{name}' failed, so it has no result: {job.get('reason')}")
        raise InputError(f"{path}: job '{name}' is not finished; the same 'snugtune train' command goes on with it")
    if METHODS[type(jobs[name].method)].routable:
        return Located(config.model, artefact, config.model, config.trust_remote_code, folder.read_kept())
    return Located(str(artefact), None, config.model, config.trust_remote_code)
