"""Trackers are given what metrics.jsonl holds, each step once whatever happened in between, without a network; read back by
each tool's own reader. A tracker that fails is named at the start and forgiven later."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from common import here, messages, metrics_of, write_config, write_lines

from snugtune import tracking
from snugtune.config import RunConfig
from snugtune.errors import InputError
from snugtune.observer import Silent
from snugtune.run import train
from snugtune.training.metrics import StepMetrics

Points = dict[str, list[tuple[int, float]]]
"""Job -> (step, loss) in the order they were stored."""


def needs(tool: str) -> pytest.MarkDecorator:
    missing = not all(find_spec(name) for name in tracking.KINDS[tool].packages)
    return pytest.mark.skipif(missing, reason=f"{tool} is not installed: pip install 'snugtune[{tool}]'")


@pytest.fixture(autouse=True, scope="session")
def _own_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B stays offline; trackio (which reads its variable once, when it is imported) keeps its files in a temporary place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        for name in ("MLFLOW_TRACKING_URI", "WANDB_PROJECT", "TRACKIO_PROJECT", "TRACKIO_SPACE_ID", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every address outside of this machine that this process connects to."""
    seen: list[Any] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            seen.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    return seen


def config_of(model: Path, place: Path, tools: list[str], **fields: Any) -> dict[str, Any]:
    write_lines(place / "data.jsonl", [messages("Hi?", "Hello!")] * 4)
    good = {"model": str(model), "data": str(place / "data.jsonl"), "output": str(place / "run"), "batch_size": 2, "steps": 4}
    good |= {"max_seq_len": 32, "plan": {"weights": "fp32"}, "checkpoint_every": 2, "validation": 0.25, "tracking": tools}
    return good | fields


class BreaksOff(Silent):
    """Breaks a run off after a step of job c."""

    def __init__(self, last: int):
        self.last = last

    def step(self, metrics: StepMetrics) -> None:
        if (metrics.job, metrics.step) == ("c", self.last):
            raise KeyboardInterrupt


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def in_tensorboard(run: Path, measure: str) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for folder in (run / "tensorboard").iterdir():
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        found[folder.name] = [(e.step, e.value) for e in events.Scalars(measure)]
    return found


def hyperparameters_in_tensorboard(job: Path) -> Any:
    """What TensorBoard's HPARAMS tab is given for the run in this folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = EventAccumulator(str(job)).Reload().PluginTagToContent("hparams")["_hparams_/session_start_info"]
    return HParamsPluginData.FromString(content).session_start_info.hparams


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format (blocks of 32 KiB; checksum, length, type, content), as W&B keeps its runs."""
    place, whole = 7, b""  # after W&B's own header
    while place < len(log):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        whole += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def wandb_records(file: Path) -> list[Any]:
    """W&B's own process writes the file; it is whole when its last record says so."""
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(100):
        records = [Record.FromString(content) for content in leveldb_records(file.read_bytes())]
        if records and records[-1].HasField("exit"):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} is never finished")


def in_wandb(run: Path, measure: str) -> Points:
    found: Points = {}
    ids: dict[str, set[str]] = {}
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        records = wandb_records(file)
        [session] = [record.run for record in records if record.HasField("run")]
        job = session.display_name.split("/")[1]
        ids.setdefault(job, set()).add(session.run_id)
        for record in records:
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if measure in values:
                found.setdefault(job, []).append((int(values["_step"]), values[measure]))
    assert all(len(same) == 1 for same in ids.values())  # resumed, not begun anew
    return found


def in_mlflow(run: Path, measure: str) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'mlflow/mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "snugtune"]
    [only] = client.search_runs([experiment.experiment_id])
    assert only.data.params["optimizer.lr"] == "0.0002"
    histories = {job: client.get_metric_history(only.info.run_id, f"{job}/{measure}") for job in ("b", "c")}
    return {job: [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] for job, history in histories.items()}


def in_trackio(run: Path, measure: str) -> Points:
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads((run / "tracking.json").read_text())["trackio"][""]
    logs = SQLiteStorage.get_logs("snugtune", name)
    return {job: [(line["step"], line[f"{job}/{measure}"]) for line in logs if f"{job}/{measure}" in line] for job in ("b", "c")}


READERS: dict[str, Callable[[Path, str], Points]] = {
    "tensorboard": in_tensorboard,
    "wandb": in_wandb,
    "mlflow": in_mlflow,
    "trackio": in_trackio,
}


@pytest.mark.parametrize("tool", [pytest.param(name, marks=needs(name)) for name in READERS])
def test_two_jobs_broken_off_and_resumed(model_folder: Path, tmp_path: Path, addresses: list[Any], tool: str) -> None:
    """Step 3 is done twice, as the checkpoint was written after step 2, and is stored once."""
    config = RunConfig.model_validate(config_of(model_folder, tmp_path, [tool], jobs=[{"name": "b"}, {"name": "c", "seed": 1}]))
    with pytest.raises(KeyboardInterrupt):
        train(config, BreaksOff(3))
    time.sleep(1.1)  # W&B names a session's files by the second
    train(config)
    run = tmp_path / "run"
    for measure in ("eval_loss", "loss"):
        stored = READERS[tool](run, measure)
        for job in ("b", "c"):
            truth = [(m["step"], m[measure]) for m in metrics_of(run) if m["job"] == job and measure in m]
            assert [step for step, _ in stored[job]] == [step for step, _ in truth]
            assert [v for _, v in stored[job]] == pytest.approx([v for _, v in truth], rel=1e-6)
    assert addresses == []


ADDRESSES = {
    "http://ann:secret@host:1/x": "http://host:1/x",
    "http://ann:s/ecr?et#1@host": "http://host",
    "http://ann:s@cr@t@host, http://token@host": "http://host, http://host",
    "http://host:1/x": "http://host:1/x",
    "sqlite:////home/a@b/mlflow.db": "sqlite:////home/a@b/mlflow.db",
    "ann@host": "ann@host",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_logins_are_left_out(address: str) -> None:
    assert tracking._without_login(address) == ADDRESSES[address]


@needs("mlflow")
def test_a_server_that_is_not_there_is_named_without_the_login(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TRACKING_URI", "http://ann:s3cret@127.0.0.1:9"), ("HTTP_REQUEST_MAX_RETRIES", "0")):
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    with pytest.raises(InputError, match=r"^tracking: mlflow cannot be opened: .*127\.0\.0\.1") as refused:
        train(RunConfig.model_validate(config_of(model_folder, tmp_path, ["mlflow"])))
    assert "s3cret" not in str(refused.value)


@needs("tensorboard")
def test_hyperparameters_are_the_config_without_logins(model_folder: Path, tmp_path: Path) -> None:
    config = RunConfig.model_validate(config_of(model_folder, tmp_path, ["tensorboard"], jobs=[{"name": "b", "batch_size": 1}]))
    job = config.resolved_jobs()[0].model_copy(update={"validation": "https://ann:secret@host/v.jsonl"})
    flat = tracking.hyperparameters(config, job)
    assert (flat["name"], flat["batch_size"], flat["optimizer.lr"], flat["optimizer.betas"]) == ("b", 1, 2e-4, "[0.9, 0.999]")
    assert flat["data.0.path"] == str(tmp_path / "data.jsonl")
    assert flat["validation"] == "https://host/v.jsonl"
    train(config)
    events = [path for path in (tmp_path / "run/tensorboard").rglob("*") if path.is_file()]
    assert {path.parent.name for path in events} == {"b"}, "every folder is shown as a run"
    written = hyperparameters_in_tensorboard(tmp_path / "run/tensorboard/b")
    assert written["optimizer.lr"].number_value == 2e-4
    assert written["method.type"].string_value == "lora"
    assert set(written) == set(tracking.hyperparameters(config, config.resolved_jobs()[0]))


def test_a_missing_package_is_named(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "trackio" else object())
    config = write_config(tmp_path / "config.yaml", **config_of(model_folder, tmp_path, ["trackio"]))
    done = here("train", config)
    assert done.code == 2
    assert "tracking: trackio needs trackio: pip install 'snugtune[trackio]'" in " ".join(done.err.split())
    assert not (tmp_path / "run").exists()


@needs("wandb")
def test_no_login(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(InputError, match="wandb has no login: run 'wandb login', or set WANDB_MODE=offline"):
        train(RunConfig.model_validate(config_of(model_folder, tmp_path, ["wandb"])))
    assert not (tmp_path / "run").exists()


class Fails:
    """A tool of which one step goes wrong, or the opening."""

    def __init__(self, when: int | None):
        self.when, self.steps, self.finished = when, [], False

    def open(self, opening: tracking.Opening) -> tracking.Opened:
        (opening.folder / "trackio").mkdir()
        if self.when is None:
            raise ConnectionError("no route to http://ann:s/ecr@et@host/x\nmore")
        return tracking.Opened(self, "here", self.finish, "key")

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self.when:
            raise ConnectionError("no route to http://ann:s/ecr@et@host/x\nmore")
        self.steps.append(step)

    def finish(self) -> None:
        self.finished = True


def put(monkeypatch: pytest.MonkeyPatch, tool: Fails) -> None:
    monkeypatch.setattr(tracking, "KINDS", {"trackio": tracking.Kind((), tool.open, each_job=False)})


def test_a_tracker_that_cannot_be_opened_leaves_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, Fails(None))
    config = RunConfig.model_validate(config_of(model_folder, tmp_path, ["trackio"]))
    with pytest.raises(
        InputError, match=r"^tracking: trackio cannot be opened: no route to http://host/x; mend that, or take it out"
    ):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_half_way_is_forgiven(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, observer = Fails(2), Notes()
    put(monkeypatch, tool)
    train(RunConfig.model_validate(config_of(model_folder, tmp_path, ["trackio"])), observer)
    assert tool.steps == [0, 1]
    assert [n for n in observer.notes if "stopped" in n] == [
        "tracking: trackio stopped, training goes on without it: no route to http://host/x"
    ]
    assert (tmp_path / "run/adapters/default").is_dir()


@pytest.mark.parametrize(
    ("given", "expected"),
    [("wandb", ("wandb",)), (["mlflow", "wandb", "mlflow"], ("mlflow", "wandb")), ([], ())],
)
def test_names_of_trackers(given: Any, expected: tuple[str, ...]) -> None:
    assert RunConfig.model_validate({"model": "m", "data": "d.jsonl", "output": "o", "tracking": given}).tracking == expected


@pytest.mark.parametrize("given", ["comet", ["wandb", "comet"], 1, [1], {"a": 1}])
def test_unknown_trackers(tmp_path: Path, given: Any) -> None:
    done = here("train", write_config(tmp_path / "c.yaml", model="m", data="d.jsonl", output=str(tmp_path / "o"), tracking=given))
    assert done.code == 2
    assert "tracking" in done.err and "Traceback" not in done.err
