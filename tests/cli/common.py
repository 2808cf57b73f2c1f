"""Helpers of the command-line tests: configs and data on disk, and the command in this process and in others."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

SNUGTUNE = (sys.executable, "-m", "snugtune")

EXACT = ("job", "step", "total_steps", "epoch", "loss", "tokens", "label_tokens", "lr", "grad_norm", "skipped", "eval_loss",
         "eval_tokens")  # fmt: skip
"""What a step must report alike in every run of the same config; the other keys are measurements."""


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


def messages(*texts: str) -> dict[str, Any]:
    """One record in messages form: question, answer, question, answer ..."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def write_config(path: Path, **fields: Any) -> Path:
    """A config file; paths become text, and fields that are None are left out."""
    plain = json.loads(json.dumps({k: v for k, v in fields.items() if v is not None}, default=str))
    path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    return path


def command(*args: object, cwd: Path, stdin: str | None = None) -> Ran:
    """`python -m snugtune ARGS` as a user would run it. Starting it takes seconds: use sparingly."""
    done = subprocess.run(
        [*SNUGTUNE, *map(str, args)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def here(*args: object, stdin: str | None = None) -> Ran:
    """The same command in this process. An exception that would be a traceback for the user is code 1."""
    from typer.testing import CliRunner

    from snugtune.cli import app

    result = CliRunner().invoke(app, [str(a) for a in args], input=stdin, prog_name="snugtune")
    trace = ""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        trace = "".join(traceback.format_exception(result.exception))
    return Ran(result.exit_code, result.stdout, result.stderr + trace)


# --- the command in processes of its own, without their start-up time -------------------------------------------------


@dataclass(frozen=True)
class Trouble:
    """What befalls a process."""

    signal: int | None = None  # sent `delay` seconds after the process has brought `watched` to `after_lines` lines
    after_lines: int = 0
    delay: float = 0.0
    watched: str = "run/metrics.jsonl"  # or ".stderr": what the process has said so far
    file_limit: int | None = None  # bytes beyond which no file can grow: a full disk
    threads: int = 1


FINE = Trouble()

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(
    ["torch", "snugtune.console", "snugtune.run", "transformers.models.llama.modeling_llama", "safetensors.torch"]
)


def forked(*args: object, cwd: Path, trouble: Trouble = FINE) -> Ran:
    """The command in a real process, forked from one that has imported everything. A negative code is a signal's."""
    code = in_a_process(_command, [str(a) for a in args], cwd, trouble)
    out, err = ((cwd / name).read_text(encoding="utf-8") for name in (".stdout", ".stderr"))
    return Ran(code, out, err)


def in_a_process(function: Callable[..., None], *args: object) -> int:
    """Call a module's function in such a process; returns the exit code."""
    child = _forkserver.Process(target=function, args=args)
    child.start()
    child.join(300)
    if child.exitcode is None:
        child.kill()
        raise AssertionError("still running after 300 s")
    return child.exitcode


def _command(args: list[str], cwd: Path, trouble: Trouble) -> None:
    os.chdir(cwd)
    for name, descriptor in ((".stdout", 1), (".stderr", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    torch.set_num_threads(trouble.threads)
    if trouble.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (trouble.file_limit, trouble.file_limit))
    if trouble.signal is not None:
        # From inside: a watcher of another process could come too late on a busy machine.
        threading.Thread(target=_strike, args=(Path(trouble.watched), trouble), daemon=True).start()
    sys.argv = ["snugtune", *args]
    from snugtune.cli import main

    main()


def _strike(watched: Path, trouble: Trouble) -> None:
    before = watched.stat().st_mtime_ns if watched.exists() else 0  # what an earlier process left does not count
    while not watched.exists() or watched.stat().st_mtime_ns == before or count_lines(watched) < trouble.after_lines:
        time.sleep(0.0005)
    time.sleep(trouble.delay)
    assert trouble.signal is not None
    os.kill(os.getpid(), trouble.signal)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def random_moments(count: int, steps: int, seed: int) -> list[Trouble]:
    """SIGKILLs in ascending order, spread over a run of `steps` steps, each somewhere within a step."""
    draw = random.Random(seed)
    at = sorted(draw.sample(range(1, steps), count))
    return [Trouble(signal.SIGKILL, after_lines=line, delay=draw.uniform(0.0, 0.02)) for line in at]


# --- looking at results -----------------------------------------------------------------------------------------------


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def exact(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: line[k] for k in EXACT if k in line} for line in lines]


def files_below(folder: Path) -> set[str]:
    """Every file and empty folder below `folder`, hidden ones too."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() or not any(p.iterdir())}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below `folder`: to see that a command changed nothing. Whole shards of tokens, and traces, are a cache's."""
    caches = ("tokens/*.safetensors", "traces/*.json")
    kept = [p for p in sorted(folder.rglob("*")) if p.name not in ("tokens", "traces") and not any(map(p.match, caches))]
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in kept}


def assert_same_run(run: Path, truth: Path) -> None:
    """`run` ended exactly as `truth` did: same files, same adapters bit for bit, same metrics, each step once."""
    assert files_below(run) == files_below(truth)
    for theirs in sorted(truth.glob("adapters/*/adapter_model.safetensors")):
        ours, expected = load_file(run / theirs.relative_to(truth)), load_file(theirs)
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(ours[name], tensor), name
    lines = exact(metrics_of(run))
    assert len({(line["job"], line["step"]) for line in lines}) == len(lines)
    assert lines == exact(metrics_of(truth))


def assert_refused(ran: Ran, *named: str) -> str:
    """Exit code 2 and exactly one `error: ` line, the last, naming each of `named`; before it only indented notes."""
    assert ran.code == 2, f"exit code {ran.code}\n{ran.err}"
    *notes, last = ran.err.splitlines() or [""]
    assert last.startswith("error: "), ran.err
    assert all(line.startswith("  ") and "Traceback" not in line for line in notes), ran.err
    assert not last.endswith(":"), f"a sentence cut off: {last}"
    for text in named:
        assert text in last, f"{text!r} is not named: {last}"
    return last
