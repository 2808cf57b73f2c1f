"""The layout of a run's output folder, and what it says about its state."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from snugtune.config import JobConfig, RunConfig, read_config
from snugtune.errors import InputError
from snugtune.files import is_leftover, read_json, write_whole
from snugtune.memory.plan import Kept, Planned
from snugtune.methods import METHODS
from snugtune.methods.lora import CONFIG_FILE


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
        before, now = self._config_before(), config.to_yaml()
        if before != now:
            diff = difflib.unified_diff(before.splitlines(), now.splitlines(), n=0, lineterm="")
            changes = [d for d in diff if not d.startswith(("---", "+++", "@@"))]
            raise InputError(f"output: {path} holds a run of another config; give a new folder or undo: {' | '.join(changes)}")

    def _config_before(self) -> str:
        """The run's config as this version writes it: fields that are new since then have their defaults."""
        try:
            return read_config(self.config).to_yaml()
        except InputError:
            pass  # of an older version, or changed by hand: compared as it stands
        try:
            return self.config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"output: {self.config} cannot be read: {error}; give a new folder") from error

    def read_plan(self) -> dict[str, Any]:
        """`plan.json`, empty when there is none yet."""
        return read_json(self.plan) if self.plan.is_file() else {}

    def read_kept(self) -> Kept:
        """How the run kept its frozen weights. Raises `InputError` for what no run has written."""
        fields = self.read_plan().get("plan")
        try:
            return Kept.of(fields if isinstance(fields, dict) else {})
        except ValueError as error:
            raise InputError(f"{self.plan}: {error}; bring back what the run wrote") from error

    def write_plan(self, planned: Planned, peak: int | None) -> None:
        """`peak`: measured, in bytes; None while the run goes on."""
        content = {"plan": asdict(planned.plan), "reasons": planned.reasons, "measured_peak_bytes": peak}
        write_whole(self.plan, json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Located:
    """What a run or adapter folder refers to: a model, and the adapter on it (None: the model itself was tuned).

    `origin`: the model that was tuned; `remote_code`: the run was trained with code that came with it; `kept`: how the
    frozen weights were.
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
    """Find what `path` (a run or PEFT adapter folder) holds; `adapter` picks a job of several. Raises `InputError`."""
    if (path / CONFIG_FILE).is_file():
        name = read_json(path / CONFIG_FILE).get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise InputError(f"{path / CONFIG_FILE}: names no base model")
        return Located(name, path, name)
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path} is neither a run folder (no config.yaml) nor an adapter folder (no {CONFIG_FILE})")
    config, folder = read_config(path / "config.yaml"), RunFolder(path)
    jobs = {job.name: job for job in config.resolved_jobs()}
    if adapter is None and len(jobs) > 1:
        raise InputError(f"{path} holds several adapters; pick one with --adapter: {', '.join(jobs)}")
    name = adapter or next(iter(jobs))
    if name not in jobs:
        raise InputError(f"{path} has no adapter '{name}'; it has {', '.join(jobs)}")
    artefact = folder.artefact(jobs[name])
    if not artefact.is_dir():
        raise InputError(f"{path}: job '{name}' is not finished; the same 'snugtune train' command goes on with it")
    if METHODS[type(jobs[name].method)].routable:
        return Located(config.model, artefact, config.model, config.trust_remote_code, folder.read_kept())
    return Located(str(artefact), None, config.model, config.trust_remote_code)
