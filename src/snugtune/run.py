"""The whole road: config -> plan -> load -> train -> report; and back from a run folder to answers."""

import difflib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from snugtune.config import JobConfig, RunConfig, read_config
from snugtune.data.mix import split
from snugtune.data.render import Renderer, render_all
from snugtune.data.sources import Conversation, Drops, SourceConfig, read_conversations
from snugtune.errors import InputError, Interrupted
from snugtune.files import remove_leftovers, whole_folder, write_whole
from snugtune.memory.budget import Watch
from snugtune.memory.plan import Planned, make_plan
from snugtune.methods import METHODS
from snugtune.methods.lora import CONFIG_FILE, Lora
from snugtune.model.base import Base, load_base
from snugtune.model.generate import Sampling, generate
from snugtune.model.source import find_model
from snugtune.train.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from snugtune.train.job import Job, JobData, start_job
from snugtune.train.metrics import MetricsFile, StepMetrics, read_metrics
from snugtune.train.trainer import StopRequestedError, Trainer
from snugtune.types import Plan

AUTO_CHECKPOINTS = 10
"""Checkpoints in a run that does not say how often."""


class Observer(Protocol):
    """Whoever watches a run: the console, a notebook, a test."""

    def note(self, text: str) -> None: ...
    def track(self, items: Sequence[Any], what: str) -> Any: ...
    def begin(self, jobs: Sequence[Job]) -> None: ...
    def step(self, metrics: StepMetrics) -> None: ...
    def end(self) -> None: ...


class Silent:
    """An observer that shows nothing."""

    def note(self, text: str) -> None: ...
    def track(self, items: Sequence[Any], what: str) -> Any:
        return items

    def begin(self, jobs: Sequence[Job]) -> None: ...
    def step(self, metrics: StepMetrics) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class RunFolder:
    """The layout of a run's output folder."""

    path: Path

    config = property(lambda self: self.path / "config.yaml")
    plan = property(lambda self: self.path / "plan.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    checkpoints = property(lambda self: self.path / "checkpoints")

    def artefact(self, job: JobConfig) -> Path:
        """Where the finished adapter (or model) of a job goes."""
        return self.path / METHODS[type(job.method)].artefacts / job.name

    def finished(self, jobs: Sequence[JobConfig]) -> bool:
        return all(self.artefact(job).is_dir() for job in jobs)


@dataclass(frozen=True)
class RunResult:
    """What a run left behind. `artefacts`: job name -> adapter or model folder; `seconds` of this session's training."""

    folder: Path
    artefacts: Mapping[str, Path]
    metrics: Sequence[Mapping[str, Any]]
    peak_bytes: int | None
    seconds: float = 0.0
    already_finished: bool = False


@dataclass
class Session:
    """A run in progress: what `train` holds between its steps."""

    config: RunConfig
    folder: RunFolder
    planned: Planned
    trainer: Trainer
    step: int = 0  # of the run; every unfinished job takes one step in each
    finished: list[Job] = field(default_factory=list)

    @property
    def checkpoint_every(self) -> int:
        jobs = [*self.trainer.jobs.values(), *self.finished]
        return self.config.checkpoint_every or max(1, -(-max(j.total for j in jobs) // AUTO_CHECKPOINTS))

    def save(self) -> None:
        active = list(self.trainer.jobs.values())
        save_checkpoint(self.folder.checkpoints, self.step, self.planned.plan, active, self.finished, self.config.keep_checkpoints)


def train(config: RunConfig, observer: Observer | None = None) -> RunResult:
    """Train as `config` says, resuming what is there. Raises `SnugtuneError`; `Interrupted` after Ctrl-C, state saved."""
    observer = observer or Silent()
    folder, jobs = RunFolder(Path(config.output)), config.resolved_jobs()
    _check_output(folder, config)
    if folder.finished(jobs):
        observer.note(f"this run is finished; results are in {folder.path}")
        return _result(folder, jobs, already_finished=True)
    with stop_flag() as stop:
        session = prepare(config, observer, stop)
        folder.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.path)
        remove_leftovers(folder.checkpoints)
        write_whole(folder.config, config.to_yaml())
        _write_plan(folder, session.planned, None)
        log = MetricsFile(folder.metrics, {j.name: j.step for j in _all_jobs(session)} if session.step else None)
        observer.begin(list(session.trainer.jobs.values()))
        started = time.perf_counter()
        try:
            _loop(session, log, observer)
        except StopRequestedError:
            session.save()
            raise Interrupted(f"interrupted at step {session.step}; state saved, the same command goes on from there") from None
        finally:
            observer.end()
            log.close()
        _write_plan(folder, session.planned, session.trainer.watch.peak())
    return _result(folder, jobs, seconds=time.perf_counter() - started)


def prepare(config: RunConfig, observer: Observer, stop: threading.Event) -> Session:
    """Read data, plan, load the base and start or restore every job. Writes nothing."""
    folder = RunFolder(Path(config.output))
    conversations = {job.name: _read(job) for job in config.resolved_jobs()}
    checkpoint = latest_checkpoint(folder.checkpoints)
    planned = make_plan(config) if checkpoint is None else _planned_before(checkpoint)
    torch.set_num_threads(planned.plan.threads)
    for reason in planned.reasons:
        observer.note(f"plan: {reason}")
    base = load_base(find_model(config.model), planned.plan, config.trust_remote_code)
    for note in base.notes:
        observer.note(f"model: {note}")
    trainer = Trainer(base, planned.plan, Watch(planned.plan.device), stop.is_set)
    session = Session(config, folder, planned, trainer, 0 if checkpoint is None else checkpoint.step)
    for job_config in config.resolved_jobs():
        data = _tokenize(job_config, conversations[job_config.name], base, observer)
        job = start_job(base, job_config, data, planned.plan)
        before = {} if checkpoint is None else checkpoint.jobs.get(job.name, {})
        if before.get("finished"):
            job.step = before["step"]
            job.attached.detach()
            session.finished.append(job)
            continue
        if checkpoint is not None:
            checkpoint.restore(job)
        trainer.add(job)
    if checkpoint is not None:
        observer.note(f"resuming after step {checkpoint.step}")
    return session


def _loop(session: Session, log: MetricsFile, observer: Observer) -> None:
    """Steps until every job is done; evaluations and checkpoints where they are due."""

    def report(metrics: StepMetrics) -> None:
        log.write(metrics)
        observer.step(metrics)

    trainer = session.trainer
    if session.step == 0:
        for job in list(trainer.jobs.values()):
            for metrics in _evaluated_before(trainer, job):
                report(metrics)
    while trainer.jobs:
        for metrics in trainer.step():
            report(metrics)
        session.step += 1
        for job in [j for j in trainer.jobs.values() if j.finished]:
            save_artefact(session, job)
            session.finished.append(trainer.remove(job.name))
        if session.step % session.checkpoint_every == 0 and trainer.jobs:
            log.sync()
            session.save()


def _evaluated_before(trainer: Trainer, job: Job) -> Iterator[StepMetrics]:
    evaluation = trainer.evaluate(job)
    if evaluation is not None:
        yield StepMetrics(job.name, 0, job.total, 0.0, eval_loss=evaluation[0], eval_tokens=evaluation[1],
                          peak_memory=trainer.watch.peak())  # fmt: skip


def save_artefact(session: Session, job: Job) -> None:
    """Write a finished job's adapter or model folder, whole, with its model card and the tokenizer."""
    with whole_folder(session.folder.artefact(job.config)) as made:
        job.attached.save(made)
        session.trainer.base.tokenizer.save_pretrained(made)
        (made / "README.md").write_text(_card(session, job), encoding="utf-8")


def _card(session: Session, job: Job) -> str:
    """A model card: where this comes from and how to load it."""
    c, base = job.config, session.trainer.base
    lines = ["---", f"base_model: {base.name}", "library_name: peft" if c.method.type == "lora" else "library_name: transformers",
             "tags: [snugtune]", "---", "", f"# {c.name}", "",
             f"Fine-tuned from `{base.name}` with snugtune: method `{c.method.type}`, {job.total} steps of {c.batch_size} examples, "
             f"{len(job.data.train)} training examples, seed {c.seed}.", "",
             f"Base fingerprint: `{base.fingerprint}`", ""]  # fmt: skip
    return "\n".join(lines)


def _read(job: JobConfig) -> tuple[list[Conversation], list[Conversation], Drops]:
    """(training, held out, drops) of a job, before any tokens."""
    drops = Drops()
    conversations = read_conversations(job.data, drops)
    if job.validation is None:
        return conversations, [], drops
    if isinstance(job.validation, str):
        return conversations, read_conversations((SourceConfig(path=job.validation, format="auto"),), drops), drops
    if len(conversations) < 2:
        raise InputError(f"validation: {len(conversations)} example cannot be split; give more data or no validation")
    return (*split(conversations, job.validation, job.seed), drops)


def _tokenize(job: JobConfig, read: tuple[list[Conversation], list[Conversation], Drops], base: Base, observer: Observer) -> JobData:
    training, held_out, drops = read
    tokens = [
        tuple(render_all(observer.track(part, f"tokenising {job.name}"), base.tokenizer, job.max_seq_len, drops)) if part else ()
        for part in (training, held_out)
    ]
    for line in drops.lines():
        observer.note(f"data ({job.name}): {line}")
    sizes = f"{len(tokens[0])} training examples, {sum(len(e.tokens) for e in tokens[0]):,} tokens"
    observer.note(f"data ({job.name}): {sizes}" + (f"; {len(tokens[1])} held out" if tokens[1] else ""))
    return JobData(*tokens)


def _planned_before(checkpoint: Checkpoint) -> Planned:
    if checkpoint.plan.device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{checkpoint.folder}: this run was started on cuda, which is not here; resume it where it began")
    return Planned(checkpoint.plan, ("as planned when the run began",))


def _check_output(folder: RunFolder, config: RunConfig) -> None:
    """Refuse an output folder that is something else, or another run."""
    path = folder.path
    if path.exists() and not path.is_dir():
        raise InputError(f"output: {path} is a file; give a folder")
    parent = next(p for p in (path, *path.parents) if p.exists())
    if not parent.is_dir():
        raise InputError(f"output: {parent} is a file, so {path} cannot be made")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not folder.config.is_file():
        raise InputError(f"output: {path} is not empty and holds no run; give a new folder")
    before = folder.config.read_text(encoding="utf-8")
    now = config.to_yaml()
    if before != now:
        diff = [d for d in difflib.unified_diff(before.splitlines(), now.splitlines(), n=0, lineterm="") if not d.startswith(("---", "+++", "@@"))]
        raise InputError(f"output: {path} holds a run of another config; give a new folder or undo: {' | '.join(diff)}")


def _write_plan(folder: RunFolder, planned: Planned, peak: int | None) -> None:
    content = {"plan": asdict(planned.plan), "reasons": planned.reasons, "measured_peak_bytes": peak}
    write_whole(folder.plan, json.dumps(content, indent=2) + "\n")


def _all_jobs(session: Session) -> list[Job]:
    return [*session.trainer.jobs.values(), *session.finished]


def _result(folder: RunFolder, jobs: Sequence[JobConfig], already_finished: bool = False, seconds: float = 0.0) -> RunResult:
    peak = json.loads(folder.plan.read_text(encoding="utf-8"))["measured_peak_bytes"]
    artefacts = {job.name: folder.artefact(job) for job in jobs}
    return RunResult(folder.path, artefacts, read_metrics(folder.metrics), peak, seconds, already_finished)


@contextmanager
def stop_flag() -> Iterator[threading.Event]:
    """A flag that the first Ctrl-C or SIGTERM sets; a second one interrupts at once. Needs the main thread to do so."""
    flag = threading.Event()

    def ask(number: int, frame: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Tuned:
    """A base with one adapter (or fully tuned), ready to answer."""

    base: Base
    job: str | None  # None: the base's own weights were tuned
    renderer: Renderer

    def reply(
        self,
        messages: str | Sequence[Mapping[str, str]],
        sampling: Sampling | None = None,
        on_text: Callable[[str], None] | None = None,
        **how: Any,
    ) -> str:
        """Answer a question, or a conversation of {role, content}. `how` sets fields of `Sampling`."""
        return self.replies([messages], replace(sampling or Sampling(), **how), on_text)[0]

    def replies(
        self, conversations: Sequence[str | Sequence[Mapping[str, str]]], sampling: Sampling, on_text: Callable[[str], None] | None = None
    ) -> list[str]:
        """Answer several conversations together."""
        prompts = [
            self.renderer.template([{"role": "user", "content": c}] if isinstance(c, str) else c, for_answer=True) for c in conversations
        ]
        return generate(self.base, self.job, prompts, self.renderer.stop_ids, sampling, on_text)


def load(path: Path, adapter: str | None = None) -> Tuned:
    """Load a run folder (`adapter` picks a job) or a PEFT adapter folder. Raises `InputError`."""
    model, adapter_folder, remote = locate(path, adapter)
    config = RunConfig(model=model, output=".", data=({"path": "-"},), trust_remote_code=remote)  # pyright: ignore
    base = load_base(find_model(model), make_plan(config).plan, remote)
    job = None if adapter_folder is None else adapter_folder.name
    if adapter_folder is not None and job is not None:
        Lora().load(base, job, adapter_folder)
    return Tuned(base, job, Renderer(base.tokenizer))


def locate(path: Path, adapter: str | None) -> tuple[str, Path | None, bool]:
    """(model reference, adapter folder or None, trust_remote_code) of a run or adapter folder."""
    if (path / CONFIG_FILE).is_file():
        name = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not name:
            raise InputError(f"{path / CONFIG_FILE}: names no base model")
        return name, path, False
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path} is neither a run folder (no config.yaml) nor an adapter folder (no {CONFIG_FILE})")
    config, folder = read_config(path / "config.yaml"), RunFolder(path)
    jobs = {job.name: job for job in config.resolved_jobs()}
    name = adapter or next(iter(jobs))
    if name not in jobs or (adapter is None and len(jobs) > 1):
        raise InputError(f"{path}: pick one of its adapters with --adapter: {', '.join(jobs)}")
    artefact = folder.artefact(jobs[name])
    if not artefact.is_dir():
        raise InputError(f"{path}: job '{name}' is not finished; run 'snugtune train' again to go on")
    if METHODS[type(jobs[name].method)].routable:
        return config.model, artefact, config.trust_remote_code
    return str(artefact), None, config.trust_remote_code


def plan_of(folder: RunFolder) -> Plan:
    """The plan a run was trained with."""
    return Plan(**json.loads(folder.plan.read_text(encoding="utf-8"))["plan"])
