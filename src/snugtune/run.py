"""The whole road: config -> plan -> load -> train -> report."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from snugtune.config import JobConfig, RunConfig
from snugtune.data.cache import tokenizer_identity
from snugtune.errors import (
    DivergedError,
    InputError,
    Interrupted,
    JobFailedError,
    SnugtuneError,
    StopRequestedError,
    StorageError,
    UnreadableError,
)
from snugtune.files import check_can_make, claimed, make_folder, remove_leftovers, user_path, write_whole
from snugtune.folder import RunFolder
from snugtune.memory.budget import Watch, give_back_large_blocks
from snugtune.memory.plan import Planned, make_plan
from snugtune.model.base import Base, load_base
from snugtune.model.load import load_config, stored_width
from snugtune.model.proofs import obstacle_to_sharing
from snugtune.model.selftest import check_gradients
from snugtune.model.source import ModelSource, Say, find_model
from snugtune.report import write_report
from snugtune.session import Logs, Session
from snugtune.tracking import Tracking, check_tracking, start_tracking
from snugtune.training.checkpoint import Checkpoint, drop_best, latest_checkpoint
from snugtune.training.examples import JobText, read_job, tokenize_job
from snugtune.training.job import Job, length_remark, quarantine, start_job
from snugtune.training.metrics import Sample, StepMetrics, by_job, held_out_course, read_metrics
from snugtune.training.trainer import Trainer
from snugtune.training.verdict import warning
from snugtune.types import NARROW
from snugtune.words import one_line


class Observer(Protocol):
    """Whoever watches a run: the console, a notebook, a test."""

    def note(self, text: str) -> None: ...
    def track(self, items: Sequence[Any], what: str) -> Iterable[Any]: ...
    def begin(self, jobs: Sequence[Job]) -> None: ...
    def step(self, metrics: StepMetrics) -> None: ...
    def status(self, job: str, status: str) -> None:
        """A job's status, as `jobs.json` has it, is another one now."""
        ...

    def end(self) -> None: ...
    def results(self, result: "RunResult") -> None:
        """What the jobs left, where `train` does not return it: some of them did not end well."""
        ...


class Stop(threading.Event):
    """Set by the first Ctrl-C or SIGTERM. While `saves` is false there is nothing to save, and that ends the run at once."""

    saves = False


class Silent:
    """An observer that shows nothing."""

    def note(self, text: str) -> None: ...
    def track(self, items: Sequence[Any], what: str) -> Iterable[Any]:
        return items

    def begin(self, jobs: Sequence[Job]) -> None: ...
    def step(self, metrics: StepMetrics) -> None: ...
    def status(self, job: str, status: str) -> None: ...
    def end(self) -> None: ...
    def results(self, result: "RunResult") -> None: ...


@dataclass(frozen=True)
class RunResult:
    """What a run left behind. `artefacts`: job name -> adapter or model folder, where there is one; `seconds` of this
    session's training; `statuses`: job name -> how it stands, as in `jobs.json`.

    `metrics` and `samples` are the lines of `metrics.jsonl` and `samples.jsonl`; `held_out`: each job's held-out losses,
    from before training to that of its result.
    """

    folder: Path
    artefacts: Mapping[str, Path]
    metrics: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    held_out: Mapping[str, Sequence[float]]
    peak_bytes: int | None
    seconds: float = 0.0
    already_finished: bool = False
    statuses: Mapping[str, str] = field(default_factory=dict)


def train(config: RunConfig, observer: Observer | None = None) -> RunResult:
    """Train as `config` says, resuming what is there. Raises `SnugtuneError`; `Interrupted` after Ctrl-C, state saved.

    A job that diverges or breaks is given up alone. The others go on, and when they are done it is told what broke it:
    `JobFailedError` (`DivergedError` where its gradients did not stay finite), or what it raised itself.
    """
    observer = observer or Silent()
    folder, jobs = RunFolder(user_path(config.output, "output")), config.resolved_jobs()
    folder.check(config)
    if folder.finished(jobs):
        observer.note(f"this run is finished; results are in {folder.path}")
        return _result(folder, jobs, already_finished=True)
    check_tracking(config.tracking)
    with stop_flag(observer.note) as stop, ExitStack() as claims:
        fresh = not folder.path.is_dir()
        if fresh:
            check_can_make(folder.path)
        else:
            claims.enter_context(claimed(folder.path))
            remove_leftovers(folder.path)
        session = prepare(config, observer, stop)
        if fresh:  # only now: input that is refused leaves nothing behind
            make_folder(folder.path)
            claims.callback(_remove_if_empty, folder.path)
            claims.enter_context(claimed(folder.path))
            if folder.config.exists():
                raise InputError(f"output: another process began a run in {folder.path} meanwhile; run the command again")
        claims.callback(session.trainer.close)
        write_whole(folder.config, config.to_yaml())
        tracking = _start_tracking(config, folder, observer, fresh)
        claims.callback(tracking.end)
        _write_outset(session)
        claims.callback(_report, folder, observer)  # whatever the end is
        logs = Logs.open(session, tracking)
        observer.begin(list(session.trainer.jobs.values()))
        started = time.perf_counter()
        try:
            _loop(session, logs, observer)
        except StopRequestedError:
            session.save()
            raise Interrupted(f"interrupted at {session.place}; state saved, the same command goes on from there") from None
        except UnreadableError as error:
            session.save()
            raise UnreadableError(f"{error}; state saved at {session.place}, the same command goes on from there") from error
        finally:
            seconds = time.perf_counter() - started
            _tell(session, observer, at_once=True)
            observer.end()
            logs.close()
        _warn(session, observer)
        if session.parked or any(job.failure for job in session.ended):
            _fail(session, observer, seconds)
        folder.write_plan(session.planned, session.trainer.watch.peak())
        drop_best(folder.checkpoints)
    return _result(folder, jobs, seconds=seconds)


def _write_outset(session: Session) -> None:
    """What is known of a run before it trains."""
    session.folder.write_plan(session.planned, None)
    write_whole(session.folder.data, json.dumps(session.data, indent=2) + "\n")


def _fail(session: Session, observer: Observer, seconds: float) -> NoReturn:
    """Raise what is to be told of the jobs that did not end well; the state of all is saved, the results of others shown."""
    if len(session.all_jobs) > 1:
        observer.results(_result(session.folder, session.config.resolved_jobs(), seconds=seconds))
    with suppress(StorageError):  # a full disk is told of as what it did to the jobs
        session.save()
    bugs = [error for error in session.errors.values() if not isinstance(error, SnugtuneError)]
    given_up = [job for job in session.ended if job.failure]
    failures = [str(job.failure) for job in given_up]
    waiting = [str(error) for error in session.parked.values()]
    if given_up:
        failures.append(_again([job.name for job in given_up], len(session.all_jobs)))
    if bugs:
        for told in (*failures, *waiting):
            bugs[0].add_note(told)
        raise bugs[0]
    if waiting:
        raise StorageError("; ".join([*failures, *waiting]))
    diverged = not session.errors and all(job in session.ended[session.earlier :] for job in given_up)  # else nobody knows
    kind = DivergedError if diverged else JobFailedError
    raise kind("; ".join(failures))


def _again(names: Sequence[str], jobs: int) -> str:
    """How to train the named jobs, of so many, once more: what a run gave up stays so."""
    what = "it" if len(names) == 1 else "them"
    return f"to train {what} again, give a new output" + (f" and only {what} in jobs" if jobs > 1 else "")


def _tell(session: Session, observer: Observer, at_once: bool = False) -> None:
    for job, status in session.tell(at_once).items():
        observer.status(job, status)


def _start_tracking(config: RunConfig, folder: RunFolder, observer: Observer, fresh: bool) -> Tracking:
    """A new run whose trackers cannot be opened was none."""
    try:
        return start_tracking(config, folder, observer.note)
    except InputError:
        if fresh:
            folder.config.unlink()
        raise


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds something: a run
        folder.rmdir()


def _report(folder: RunFolder, observer: Observer) -> None:
    """Write the page of the run. Whatever stands against it: the run's own end is what counts."""
    try:
        write_report(folder.path)
    except Exception as error:
        observer.note(f"report: {folder.report} is not written: {error}")


def prepare(config: RunConfig, observer: Observer, stop: Stop) -> Session:
    """Read data, plan, load the base and start or restore every job; from then on there is a state to save.

    Writes nothing but jobs at rest.
    """
    folder = RunFolder(user_path(config.output, "output"))
    texts = {job.name: read_job(job) for job in config.resolved_jobs()}
    checkpoint = latest_checkpoint(folder.checkpoints)
    source = find_model(config.model, observer.note)
    model_config = load_config(source, config.trust_remote_code)
    planned = (
        make_plan(config, stored_width(source, model_config), obstacle_to_sharing(model_config))
        if checkpoint is None
        else _planned_before(checkpoint)
    )
    torch.set_num_threads(planned.plan.threads)
    if planned.plan.offload == "weights" and give_back_large_blocks():
        observer.note("memory: the allocator gives blocks from 128 KiB on back at once (M_MMAP_THRESHOLD)")
    watch = Watch(planned.plan.device)
    base = _load(source, planned, checkpoint, config, observer)
    planned = proved(planned, base, config.plan.execution == "fused", observer.note)
    trainer = Trainer(base, planned.plan, watch, stop.is_set, folder.path)
    session = Session(config, folder, planned, trainer, told=folder.read_jobs())
    try:
        _start_jobs(session, texts, checkpoint, observer)
    except BaseException:
        trainer.close()
        _remove_if_empty(folder.path)
        raise
    if (planned.plan.weights in NARROW or planned.plan.offload != "none") and (checked := check_gradients(base)).linears:
        observer.note(f"checked: {checked}")
    if checkpoint is None:
        session.pending = trainer.start_metrics()
    else:
        session.pending, session.looked = [StepMetrics(**fields) for fields in checkpoint.pending], session.step
        session.saved, session.earlier = (session.step, frozenset(trainer.jobs)), len(session.ended)
        observer.note(f"resuming after {session.place}")
    stop.saves = True
    return session


def _start_jobs(session: Session, texts: Mapping[str, JobText], checkpoint: Checkpoint | None, observer: Observer) -> None:
    """Tokenise the jobs' data, and start or restore each."""
    trainer, base, plan = session.trainer, session.trainer.base, session.planned.plan
    identity = tokenizer_identity(base.tokenizer)
    for job_config in session.config.resolved_jobs():
        data = tokenize_job(job_config, texts[job_config.name], base.tokenizer, observer.track, observer.note, identity)
        for remark in data.remarks:
            observer.note(f"data ({job_config.name}): {remark}")
        session.data[job_config.name] = data.summary()
        if checkpoint is not None and (ended := checkpoint.ended(job_config)) is not None:
            session.ended.append(ended)
            continue
        job = start_job(base, job_config, data, plan)
        if remark := length_remark(base, job_config, data):
            observer.note(f"data ({job.name}): {remark}")
        if checkpoint is not None:
            checkpoint.restore(job)
        trainer.add(job)


def _load(source: ModelSource, planned: Planned, checkpoint: Checkpoint | None, config: RunConfig, observer: Observer) -> Base:
    """The base, with what there is to say of it. Raises `InputError` where it is not that of the checkpoint."""
    for reason in planned.reasons:
        observer.note(f"plan: {reason}")
    base = load_base(source, planned.plan, config.trust_remote_code, observer.note)
    for note in base.notes:
        observer.note(f"model: {note}")
    if checkpoint is not None and checkpoint.base != base.fingerprint:
        raise InputError(
            f"model: '{base.name}' has other weights now than {checkpoint.folder} was trained on; bring them back, "
            "or give a new output folder"
        )
    return base


def proved(planned: Planned, base: Base, pinned: bool, note: Say) -> Planned:
    """The plan, with jobs in turns where this base or this machine cannot lay them side by side. `pinned`: they were to be."""
    capacity = planned.plan.fused_tokens
    if not capacity:
        return planned
    if base.apart is not None and pinned:
        raise InputError(f"plan.execution: fused cannot be on '{base.name}' ({base.apart}); use interleaved")
    if base.apart is None and base.rows_are_independent(capacity):
        return planned
    if pinned:
        note("plan: matrix products here give a row other last bits among others: fused, as asked, no job is as if alone")
        return planned
    why = base.apart or "matrix products here give a row other last bits among others"
    note(f"plan: jobs take turns after all ({why})")
    return replace(planned, plan=replace(planned.plan, fused_tokens=0))


def _loop(session: Session, logs: Logs, observer: Observer) -> None:
    """Steps until every job is done; evaluations and checkpoints where they are due."""
    trainer = session.trainer
    _tell(session, observer, at_once=True)
    while True:
        while session.pending:
            _report_step(session, logs, observer)
        session.retire(observer.note)
        _tell(session, observer)
        if not any(job.active for job in trainer.jobs.values()):
            break
        if session.save_is_due():
            logs.sync()
            session.save()
        session.pending = trainer.step()
    session.try_parked(observer.note)


def _report_step(session: Session, logs: Logs, observer: Observer) -> None:
    """Evaluate and sample the first of the steps that are done, where that is due, and report it."""
    trainer, metrics = session.trainer, session.pending[0]
    job, samples = trainer.jobs[metrics.job], list[Sample]()
    with quarantine(job):
        if metrics.eval_tokens is None:  # else it was evaluated before a disk failed under its samples
            metrics = trainer.evaluated(metrics)
            session.judge(metrics)
            session.pending[0] = metrics
        samples = trainer.samples(metrics)
    if session.park(job, observer.note):
        session.held_back.append(session.pending.pop(0))
        return
    logs.write(metrics, samples)
    observer.step(metrics)
    for sample in samples:
        observer.note(f"{sample.job}: step {sample.step}  {_short(sample.prompt)} -> {_short(sample.answer)}")
    session.pending.pop(0)


def _warn(session: Session, observer: Observer) -> None:
    """Say what speaks against the results of the jobs that have ended."""
    lines = by_job(read_metrics(session.folder.metrics))
    for job in session.ended:
        if text := warning(job, lines.get(job.name, [])):
            observer.note(text)


def _short(text: str, width: int = 60) -> str:
    """A text on one line, cut where it is long."""
    line = one_line(text)
    return repr(line if len(line) <= width else line[: width - 1] + "…")


def _planned_before(checkpoint: Checkpoint) -> Planned:
    if checkpoint.plan.device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{checkpoint.folder}: this run was started on cuda, which is not here; resume it where it began")
    return Planned(checkpoint.plan, ("as planned when the run began",))


def _result(folder: RunFolder, jobs: Sequence[JobConfig], already_finished: bool = False, seconds: float = 0.0) -> RunResult:
    artefacts = {job.name: path for job in jobs if (path := folder.artefact(job)).is_dir()}
    statuses = {name: str(job.get("status")) for name, job in folder.read_jobs().items()}
    peak = folder.read_plan()["measured_peak_bytes"]
    samples = read_metrics(folder.samples) if folder.samples.exists() else []
    metrics = read_metrics(folder.metrics)
    lines = by_job(metrics)
    held = {job.name: held_out_course(lines.get(job.name, []), job.keep_best) for job in jobs}
    return RunResult(folder.path, artefacts, metrics, samples, held, peak, seconds, already_finished, statuses)


@contextmanager
def stop_flag(say: Callable[[str], None]) -> Iterator[Stop]:
    """A flag that the first Ctrl-C or SIGTERM sets; a second one interrupts at once. Needs the main thread to do so.

    Raises `Interrupted` where one comes while there is nothing to save.
    """
    flag = Stop()

    def ask(number: int, frame: object) -> None:
        if flag.is_set() or not flag.saves:
            flag.set()  # should a library swallow the exception, the first step sees it
            raise KeyboardInterrupt
        flag.set()
        say("stopping: the state is saved first (once more: stop at once, unsaved)")

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    except KeyboardInterrupt:
        if flag.saves:
            raise
        raise Interrupted("interrupted before training; nothing is lost, the same command begins again") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
