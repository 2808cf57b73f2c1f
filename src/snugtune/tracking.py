"""Metrics to experiment trackers (TensorBoard, W&B, MLflow, trackio), through accelerate's trackers.

TensorBoard and W&B lay runs over each other: each job is one there. MLflow and trackio hold one run at a time: all jobs go
into it, as `<job>/loss`. Names and values are those of `metrics.jsonl`. Nothing is imported before a config asks for it.
"""

import io
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from snugtune.config import JobConfig, RunConfig, Tracker
from snugtune.errors import InputError
from snugtune.files import read_json, write_whole
from snugtune.folder import RunFolder
from snugtune.training.metrics import StepMetrics, read_metrics

PROJECT = "snugtune"
"""Where runs are gathered unless WANDB_PROJECT, TRACKIO_PROJECT or MLFLOW_EXPERIMENT_NAME says otherwise."""


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with. `job`: None where all jobs share it; `key`: what the tool knew it by before a resume."""

    folder: Path
    job: str | None
    hyperparameters: Mapping[str, Any]
    key: str | None

    @property
    def name(self) -> str:
        """What a person reads: the run's folder, and the job where each has its own."""
        return self.folder.resolve().name + (f"/{self.job}" if self.job else "")


@dataclass
class Opened:
    """A tracker at work. `where`: what a person looks at; `key`: how to find it again after a resume."""

    tracker: Any
    where: str
    finish: Callable[[], None]
    key: str = ""
    kind: str = ""
    job: str | None = None


@dataclass
class Tracking:
    """Hands each step to the trackers of a run. One that fails is left out with a word; training goes on."""

    opened: list[Opened]
    note: Callable[[str], None]
    several: bool = False  # jobs
    reported: Mapping[str, int] = field(default_factory=dict)

    def step(self, metrics: StepMetrics) -> None:
        """A step that was handed over before a resume is not handed over again: its values are the same."""
        if metrics.step <= self.reported.get(metrics.job, -1):
            return
        values = {
            k: v for k, v in asdict(metrics).items() if k not in ("job", "step", "total_steps", "skipped") and v is not None
        }
        values |= {"skipped": 1} if metrics.skipped else {}
        for opened in [o for o in self.opened if o.job in (None, metrics.job)]:
            prefix = f"{metrics.job}/" if opened.job is None and self.several else ""
            with self._forgiven(opened):
                opened.tracker.log({f"{prefix}{k}": v for k, v in values.items()}, step=metrics.step)

    def end(self) -> None:
        """Close what is open: the last points are written now."""
        for opened in reversed(self.opened.copy()):
            with self._forgiven(opened), redirect_stdout(io.StringIO()):
                opened.finish()
        self.opened.clear()

    @contextmanager
    def _forgiven(self, opened: Opened) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.opened.remove(opened)
            self.note(f"tracking: {opened.kind} stopped, training goes on without it: {_first_line(error)}")


def check_tracking(trackers: Sequence[Tracker]) -> None:
    """Refuse what cannot work, before anything is loaded or written. Raises `InputError`."""
    for kind in trackers:
        missing = [name for name in ("accelerate", *KINDS[kind].packages) if find_spec(name) is None]
        if missing:
            raise InputError(f"tracking: {kind} needs {', '.join(missing)}: pip install 'snugtune[{kind}]'")
        KINDS[kind].check()


def start_tracking(config: RunConfig, folder: RunFolder, note: Callable[[str], None]) -> Tracking:
    """Open the trackers of a run, as before where it is resumed; call it before the metrics are cut back.

    Raises `InputError` where one cannot be opened; then none is, and a new run folder holds nothing of them.
    """
    keys = read_json(folder.tracking) if folder.tracking.is_file() else {}
    jobs = config.resolved_jobs()
    before = {path for path in folder.path.iterdir()}
    tracking = Tracking([], note, len(jobs) > 1, _reported(folder.metrics))
    try:
        for kind in config.tracking:
            for job in jobs if KINDS[kind].each_job else (None,):
                _open(tracking, kind, config, job, folder.path, keys.get(kind, {}).get(job.name if job else ""))
    except InputError:
        tracking.end()
        for path in {p for p in folder.path.iterdir() if p.name in config.tracking} - before:
            shutil.rmtree(path, ignore_errors=True)
        raise
    if tracking.opened:
        new: dict[str, dict[str, str]] = {}
        for opened in tracking.opened:
            new.setdefault(opened.kind, {})[opened.job or ""] = opened.key
        write_whole(folder.tracking, json.dumps(new, indent=2) + "\n")
        for kind, where in dict.fromkeys((o.kind, o.where) for o in tracking.opened):
            note(f"tracking: {kind}: {where}")
    return tracking


def _open(tracking: Tracking, kind: Tracker, config: RunConfig, job: JobConfig | None, folder: Path, key: str | None) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)  # accelerate's trackers ask it which process they are in; the device is ours
    name = job.name if job else None
    try:
        with redirect_stdout(io.StringIO()):  # stdout is for results
            opened = KINDS[kind].open(Opening(folder, name, hyperparameters(config, job), key))
    except Exception as error:
        raise InputError(
            f"tracking: {kind} cannot be opened: {_first_line(error)}; mend that, or take it out of 'tracking'"
        ) from error
    opened.kind, opened.job = kind, name
    tracking.opened.append(opened)


def hyperparameters(config: RunConfig, job: JobConfig | None) -> dict[str, Any]:
    """The resolved config as flat `a.b` -> value, of one job or of the whole run. Logins in addresses are left out."""
    whole = config.model_dump(mode="json", exclude={"tracking"})
    if job is not None:
        whole = {k: v for k, v in whole.items() if k != "jobs"} | job.model_dump(mode="json")
    return dict(_flat(whole, ""))


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{path}.{index}")
    elif value is not None:
        text = json.dumps(value) if isinstance(value, list) else value
        yield path, _without_login(text) if isinstance(text, str) else text


def _without_login(text: str) -> str:
    """Up to the last `@` of an address: passwords may hold `@` and `/`. A path's (`file:///`) is no login."""
    return re.sub(r"(?<=://)[^/\s]\S*@", "", text)


def _reported(path: Path) -> dict[str, int]:
    """Job -> the last step that was handed over: what the metrics file holds, which is written first."""
    return {str(m["job"]): int(str(m["step"])) for m in read_metrics(path)} if path.is_file() else {}


def _first_line(error: Exception) -> str:
    return _without_login((str(error).strip() or type(error).__name__).splitlines()[0])


# --- the tools --------------------------------------------------------------------------------------------------------


def _tensorboard(opening: Opening) -> Opened:
    from accelerate.tracking import TensorBoardTracker
    from torch.utils.tensorboard.summary import hparams

    logs = opening.folder / "tensorboard"
    tracker = TensorBoardTracker(opening.job or "", logs)
    tracker.start()
    writer = tracker.tracker.file_writer
    if (
        opening.key is None and writer is not None
    ):  # not store_init_configuration: it would give them a folder, and with it an empty run, of their own
        for summary in hparams(dict(opening.hyperparameters), {}):
            writer.add_summary(summary)
    return Opened(tracker, f"tensorboard --logdir {logs}", tracker.finish, "here")


def _wandb(opening: Opening) -> Opened:
    import wandb  # pyright: ignore[reportMissingImports]
    from accelerate.tracking import WandBTracker

    key = opening.key or secrets.token_hex(4)
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        id=key,
        name=opening.name,
        group=opening.folder.resolve().name,
        resume=None if _wandb_is_offline() else "allow",
        config=dict(opening.hyperparameters),
        dir=str(opening.folder),
        reinit="create_new",  # jobs side by side, and beside a run of the user's own
        settings=wandb.Settings(silent=True, console="off"),
    )
    tracker.start()
    offline = f"kept here; 'wandb sync {opening.folder / 'wandb'}/offline-run-*' sends it"
    return Opened(tracker, offline if _wandb_is_offline() else str(tracker.tracker.url), tracker.finish, key)


def _wandb_is_offline() -> bool:
    return os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")


def _wandb_check() -> None:
    """Without a login W&B would ask for one in the middle of things."""
    if _wandb_is_offline():
        return
    import wandb  # pyright: ignore[reportMissingImports]

    if not wandb.login(prompt=False, verify=False):
        raise InputError("tracking: wandb has no login: run 'wandb login', or set WANDB_MODE=offline to keep everything here")


def _mlflow(opening: Opening) -> Opened:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before the import: nobody asked for that
    import mlflow  # pyright: ignore[reportMissingImports]
    from accelerate.tracking import MLflowTracker

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    where, artefacts = os.environ.get("MLFLOW_TRACKING_URI"), None
    if not where:
        store = opening.folder.resolve() / "mlflow"
        store.mkdir(exist_ok=True)
        where, artefacts = f"sqlite:///{store / 'mlflow.db'}", (store / "artifacts").as_uri()
    with _kept("MLFLOW_TRACKING_URI"):  # MLflow would write the address there, and the next run would take it for the user's
        mlflow.set_tracking_uri(where)
    tracker = MLflowTracker(PROJECT, logging_dir=artefacts, run_id=opening.key, run_name=opening.name)
    tracker.start()
    if opening.key is None:
        tracker.store_init_configuration(dict(opening.hyperparameters))
    shown = f"mlflow ui --backend-store-uri {_without_login(where)}  (of the whole mlflow package)"
    return Opened(tracker, shown, tracker.finish, tracker.tracker.info.run_id)


@contextmanager
def _kept(variable: str) -> Iterator[None]:
    before = os.environ.get(variable)
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


def _trackio(opening: Opening) -> Opened:
    import trackio  # pyright: ignore[reportMissingImports]
    from accelerate.tracking import TrackioTracker
    from trackio.utils import TRACKIO_DIR  # pyright: ignore[reportMissingImports]

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    key = opening.key or f"{opening.name}-{secrets.token_hex(3)}"  # runs are found by name: another folder's may be the same
    tracker = TrackioTracker(
        project,
        name=key,
        resume="allow",
        config=dict(opening.hyperparameters),
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )
    tracker.start()
    where = f"trackio show --project {project}  (run {key}, in {TRACKIO_DIR})"
    return Opened(tracker, where, trackio.finish, key)  # not tracker.finish: trackio would finish it again, aloud, at exit


@dataclass(frozen=True)
class Kind:
    """One tool. `each_job`: it takes several runs at once, so that each job is one."""

    packages: tuple[str, ...]
    open: Callable[[Opening], Opened]
    each_job: bool
    check: Callable[[], None] = lambda: None


KINDS: Mapping[Tracker, Kind] = {
    "tensorboard": Kind(("tensorboard",), _tensorboard, each_job=True),
    "wandb": Kind(("wandb",), _wandb, each_job=True, check=_wandb_check),
    "mlflow": Kind(("mlflow", "sqlalchemy", "alembic"), _mlflow, each_job=False),
    "trackio": Kind(("trackio",), _trackio, each_job=False),
}
