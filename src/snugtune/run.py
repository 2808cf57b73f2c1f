"""The whole road: config -> plan -> load -> train -> report."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NoReturn

from snugtune.config import JobConfig, RunConfig
from snugtune.errors import (
    DivergedError,
    InputError,
    Interrupted,
    JobFailedError,
    OutOfMemoryError,
    SnugtuneError,
    StopRequestedError,
    StorageError,
    UnreadableError,
)
from snugtune.files import claimed, made_folder, remove_leftovers, user_path, write_whole
from snugtune.folder import RunFolder
from snugtune.interrupt import stop_flag
from snugtune.observer import Observer, RunResult, Silent
from snugtune.prepare import prepare
from snugtune.report import write_report
from snugtune.session import Logs, Session
from snugtune.tracking import Tracking, check_tracking, start_tracking
from snugtune.training.checkpoint import drop_best
from snugtune.training.evaluation import evaluated, sampled
from snugtune.training.job import quarantine
from snugtune.training.metrics import Sample, by_job, held_out_course, read_metrics
from snugtune.training.recut import Short, unless_short
from snugtune.training.verdict import warning
from snugtune.words import one_line


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
        fresh = not folder.config.exists()
        claims.enter_context(made_folder(folder.path))  # input that is refused leaves nothing behind
        claims.enter_context(claimed(folder.path))  # from the first moment: jobs at rest lie there before anything is trained
        if fresh and folder.config.exists():
            raise InputError(f"output: another process began a run in {folder.path} meanwhile; run the command again")
        remove_leftovers(folder.path)
        session = prepare(config, observer, stop)
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
        except OutOfMemoryError as error:
            raise OutOfMemoryError(f"{error}; {_kept(session)}") from error
        finally:
            seconds = time.perf_counter() - started
            _tell(session, observer, at_once=True)
            observer.end()
            logs.close()
        _warn(session, observer)
        if session.parked or any(job.failure for job in session.ended):
            _fail(session, observer, seconds)
        session.write_plan(finished=True)
        drop_best(folder.checkpoints)
    return _result(folder, jobs, seconds=seconds)


def _write_outset(session: Session) -> None:
    """What is known of a run before it trains."""
    session.write_plan()
    write_whole(session.folder.data, json.dumps(session.data, indent=2) + "\n")


def _fail(session: Session, observer: Observer, seconds: float) -> NoReturn:
    """Raise what is to be told of the jobs that did not end well; the state of all is saved, the results of others shown."""
    if len(session.all_jobs) > 1:
        observer.results(_result(session.folder, session.config.resolved_jobs(), seconds=seconds))
    kept = True
    try:
        session.save()
    except StorageError:  # told of as what it did to the jobs
        kept = False
    bugs = [error for error in session.errors.values() if not isinstance(error, SnugtuneError)]
    ended = {job.name: job for job in session.ended}
    given_up = [job for c in session.config.resolved_jobs() if (job := ended.get(c.name)) and job.failure]  # in this order always
    failures = [str(job.failure) for job in given_up]
    waiting = [str(error) for error in session.parked.values()]
    if given_up:
        failures.append(_again([job.name for job in given_up], len(session.all_jobs)))
    if bugs:
        for told in (*failures, *waiting):
            bugs[0].add_note(told)
        raise bugs[0]
    if waiting:
        unkept = [] if kept else ["nor could their state be saved: the same command goes on from the checkpoint before"]
        raise StorageError("; ".join([*failures, *waiting, *unkept]))
    kind = DivergedError if all(job.diverged for job in given_up) else JobFailedError
    raise kind("; ".join(failures))


def _kept(session: Session) -> str:
    """Keep what was trained before memory ran out, where it lets that be; says where the run can go on from."""
    if any(job.failure for job in session.trainer.jobs.values()):  # one was broken off; the last checkpoint has it whole
        return "the same command goes on from the last checkpoint"
    try:
        saved = not isinstance(unless_short(session.save), Short)
    except StorageError:
        saved = False
    kept = f"state saved at {session.place}, the same command goes on from there" if saved else "its state could not be saved"
    return kept if saved else f"{kept}, the same command goes on from the last checkpoint"


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


def _report(folder: RunFolder, observer: Observer) -> None:
    """Write the page of the run. Whatever stands against it: the run's own end is what counts."""
    try:
        write_report(folder.path)
    except Exception as error:
        observer.note(f"report: {folder.report} is not written: {error}")


def _loop(session: Session, logs: Logs, observer: Observer) -> None:
    """Steps until every job is done; evaluations and checkpoints where they are due.

    Jobs that the disk refused are tried once more when the others are done.
    """
    trainer, tried = session.trainer, False
    _tell(session, observer, at_once=True)
    while True:
        while session.pending:
            _report_step(session, logs, observer)
        session.retire(observer.note)
        _tell(session, observer)
        if not any(job.active for job in trainer.jobs.values()):
            if tried or not session.parked:
                return
            tried = True
            session.unpark()
        elif session.save_is_due():
            logs.sync()
            _checkpoint(session, observer)
        if not session.pending:
            session.work()


def _checkpoint(session: Session, observer: Observer) -> None:
    """Write one. Where the disk refuses it, a job alone stops there; many go on, since it may be the file of one of them."""
    try:
        session.save()
    except StorageError as error:
        if len(session.all_jobs) == 1:
            raise
        observer.note(f"no checkpoint at {session.place}, the jobs go on: {error}")


def _report_step(session: Session, logs: Logs, observer: Observer) -> None:
    """Evaluate and sample the first of the steps that are done, where that is due, and report it."""
    trainer, metrics = session.trainer, session.pending[0]
    job, samples = trainer.jobs[metrics.job], list[Sample]()
    with quarantine(job):
        if metrics.eval_tokens is None:  # else it was evaluated before a disk failed under its samples
            metrics = evaluated(trainer, metrics)
            session.judge(metrics)
            session.pending[0] = metrics
        samples = sampled(trainer, metrics)
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


def _result(folder: RunFolder, jobs: Sequence[JobConfig], already_finished: bool = False, seconds: float = 0.0) -> RunResult:
    artefacts = {job.name: path for job in jobs if (path := folder.artefact(job)).is_dir()}
    statuses = {name: str(job.get("status")) for name, job in folder.read_jobs().items()}
    peak = folder.read_plan()["measured_peak_bytes"]
    samples = read_metrics(folder.samples) if folder.samples.exists() else []
    metrics = read_metrics(folder.metrics)
    lines = by_job(metrics)
    held = {job.name: held_out_course(lines.get(job.name, []), job.keep_best) for job in jobs}
    return RunResult(folder.path, artefacts, metrics, samples, held, peak, seconds, already_finished, statuses)
