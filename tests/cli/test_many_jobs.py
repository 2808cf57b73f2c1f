"""Many jobs in one run, as a user meets them: status, exit codes, a disk that refuses one of them, kills, memory, rules.

The truth is an undisturbed run in a process of its own: whatever befalls one job, the others end with its bits.
"""

import gc
import json
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import pytest
import torch
from common import (
    FINE,
    Ran,
    Trouble,
    assert_refused,
    command,
    exact,
    files_below,
    forked,
    here,
    in_a_process,
    messages,
    metrics_of,
    write_config,
    write_lines,
)

import snugtune.session
from conftest import tiny_config, tiny_tokenizer
from snugtune.config import read_config, to_config
from snugtune.errors import InputError, JobFailedError, StorageError
from snugtune.objectives.sft import Sft
from snugtune.observer import RunResult, Silent
from snugtune.run import train
from snugtune.training.job import Job
from snugtune.training.metrics import StepMetrics

RECORDS = [messages(f"What about {i}?", f"It is {i * i}, or so.", "Sure?", "Yes" + "!" * (i % 4)) for i in range(12)]
LONG, SHORT, WIDE = {"name": "long", "steps": 12}, {"name": "short", "steps": 3}, {"name": "wide", "steps": 7, "weight": 2}
WIDE["method"] = {"r": 16, "lora_dropout": 0}
BAD = {"name": "bad", "steps": 30, "optimizer": {"lr": 1e30}, "max_grad_norm": None}
"""Its weights are so large after a step that no later gradient is finite."""


def write_run(place: Path, model: Path, jobs: list[dict[str, Any]], **fields: Any) -> None:
    write_lines(place / "data.jsonl", RECORDS)
    write_lines(place / "held_out.jsonl", RECORDS[:2])
    base: dict[str, Any] = {
        "model": model, "data": "data.jsonl", "validation": "held_out.jsonl", "output": "run", "max_seq_len": 96, "batch_size": 2,
        "method": {"type": "lora", "r": 4, "lora_dropout": 0.1}, "optimizer": {"lr": 5e-3}, "jobs": jobs,
        "plan": {"weights": "fp32", "execution": "fused"},
    }  # fmt: skip
    write_config(place / "config.yaml", **base | fields)


def run(place: Path, trouble: Trouble = FINE) -> Ran:
    return forked("train", "config.yaml", cwd=place, trouble=trouble)


def statuses(place: Path) -> dict[str, dict[str, Any]]:
    return json.loads((place / "run/jobs.json").read_text(encoding="utf-8"))


def told(place: Path) -> dict[str, str]:
    return {name: job["status"] for name, job in statuses(place).items()}


def adapters(place: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in sorted((place / "run/adapters").glob("*/adapter_model.safetensors"))}


def by_job(place: Path) -> dict[str, list[dict[str, Any]]]:
    """What each job reported, without measurements. How jobs' lines alternate is nobody's result."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in exact(metrics_of(place / "run")):
        found.setdefault(line["job"], []).append(line)
    return found


def results(place: Path) -> set[str]:
    return {name for name in files_below(place / "run") if not name.startswith("checkpoints")}


def new(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Three jobs and no trouble."""
    place = tmp_path_factory.mktemp("clean")
    write_run(place, model_folder, [LONG, SHORT, WIDE])
    ran = run(place)
    assert ran.code == 0, ran.err
    return place


def test_all_is_well(clean: Path) -> None:
    """Each job has its adapter, its metrics and its status; nobody failed, so the exit code is 0."""
    assert statuses(clean) == {
        job["name"]: {"status": "finished", "step": job["steps"], "total_steps": job["steps"]} for job in (LONG, SHORT, WIDE)
    }
    assert set(adapters(clean)) == {"long", "short", "wide"} and len(set(adapters(clean).values())) == 3
    assert {name: [line["step"] for line in lines] for name, lines in by_job(clean).items()} == {
        job["name"]: list(range(job["steps"] + 1)) for job in (LONG, SHORT, WIDE)
    }


# --- one job fails ----------------------------------------------------------------------------------------------------


def test_a_job_that_fails_is_told_of(clean: Path, tmp_path: Path, model_folder: Path) -> None:
    """As a shell sees it: code 2, a table of how each ended, one last line; the others as if it had never been there."""
    write_run(tmp_path, model_folder, [LONG, BAD, SHORT, WIDE])
    ran = command("train", "config.yaml", cwd=tmp_path)
    last = assert_refused(ran, "job 'bad': 10 steps in a row had no finite gradient", "give a new output and only it in jobs")
    assert "'long'" not in last
    head, *rows = ran.out.splitlines()[:5]
    assert head.split()[-1] == "status"
    assert [(row.split()[0], row.split()[-1]) for row in rows] == [
        ("long", "finished"), ("bad", "failed"), ("short", "finished"), ("wide", "finished")
    ]  # fmt: skip
    assert adapters(tmp_path) == adapters(clean)
    assert {name: lines for name, lines in by_job(tmp_path).items() if name != "bad"} == by_job(clean)
    bad = statuses(tmp_path)["bad"]
    assert (bad["status"], bad["step"], bad["total_steps"], "traceback" in bad) == ("failed", 11, 30, False)
    assert bad["reason"].startswith("10 steps in a row had no finite gradient (step 11); ")
    assert_refused(forked("chat", "run", "--adapter", "bad", "--prompt", "Hi", cwd=tmp_path), "job 'bad' failed", bad["reason"])


def breaking(job: str, error: Exception) -> Callable[..., Any]:
    """The objective's loss, with a bug that shows at the third step of one job."""
    sound = Sft.loss

    def loss(self: Any, head: Any, hidden: Any, chunk: Any, training: bool = True) -> Any:
        if chunk.job == job and chunk.step == 2:
            raise error
        return sound(self, head, hidden, chunk, training)

    return loss


def _train_with_a_bug(args: list[str], cwd: Path, kind: str) -> None:
    errors = {"bug": ZeroDivisionError("the third\nstep"), "input": InputError("data: a bad example")}
    Sft.loss = breaking("bad", errors[kind])  # of this process, which is nobody else's
    common._command(args, cwd, FINE)


def with_a_bug(place: Path, kind: str) -> Ran:
    code = in_a_process(_train_with_a_bug, ["train", "config.yaml"], place, kind)
    return Ran(code, (place / ".stdout").read_text(), (place / ".stderr").read_text())


def test_a_bug_in_one_job(clean: Path, tmp_path: Path, model_folder: Path) -> None:
    """Code 1 with its traceback, after the others were trained and saved; it is told of again, not tried again."""
    write_run(tmp_path, model_folder, [LONG, {"name": "bad", "steps": 5}, SHORT, WIDE])
    ran = with_a_bug(tmp_path, "bug")
    assert ran.code == 1
    assert "Traceback (most recent call last)" in ran.err and "ZeroDivisionError: the third\nstep" in ran.err
    assert "in loss" in ran.err, "where it broke"
    assert ran.err.splitlines()[-1] == "to train it again, give a new output and only it in jobs"
    assert adapters(tmp_path) == adapters(clean)
    bad = statuses(tmp_path)["bad"]
    assert (bad["status"], bad["step"], bad["reason"]) == ("failed", 2, "ZeroDivisionError: the third step")
    assert "in loss" in bad["traceback"]
    before, known = adapters(tmp_path), statuses(tmp_path)
    assert_refused(run(tmp_path), "job 'bad': ZeroDivisionError: the third step; to train it again")  # the bug is mended now
    assert adapters(tmp_path) == before
    assert statuses(tmp_path) == known, "its traceback too"
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "failed, at step 2 of 5: ZeroDivisionError: the third step" in page and "in loss" in page
    assert "What has failed stays so in this run." in page and "command goes on with it" not in page
    told_of = here("report", tmp_path / "run")
    assert told_of.code == 0
    assert told_of.err.splitlines() == ["  bad: failed, at step 2 of 5: ZeroDivisionError: the third step"]


def test_what_a_person_can_mend_in_one_job(clean: Path, tmp_path: Path, model_folder: Path) -> None:
    """Bad input is no bug: code 2 and no traceback."""
    write_run(tmp_path, model_folder, [LONG, {"name": "bad", "steps": 5}, SHORT, WIDE])
    ran = with_a_bug(tmp_path, "input")
    assert_refused(ran, "job 'bad': data: a bad example; to train it again")
    assert adapters(tmp_path) == adapters(clean)
    assert "traceback" not in statuses(tmp_path)["bad"]


def test_nothing_else_to_show_of_a_single_job(tmp_path: Path, model_folder: Path) -> None:
    """A run of one job that fails has no table, and is trained again as a whole."""
    write_run(tmp_path, model_folder, [], **{k: v for k, v in BAD.items() if k != "name"})
    for _ in range(2):
        ran = run(tmp_path)
        assert assert_refused(ran, "job 'default'").endswith("; to train it again, give a new output")
        assert ran.out == ""


# --- the disk refuses one job -----------------------------------------------------------------------------------------


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(("where", "occupy"), [("adapters/wide", a_file), ("checkpoints/best-wide", a_link_to_nowhere)])
def test_the_disk_refuses_one_job(tmp_path: Path, model_folder: Path, where: str, occupy: Callable[[Path], None]) -> None:
    """It waits as it is, and the others end; once the disk takes it, the same command finishes it, and trains nothing twice."""
    wide = WIDE | {"keep_best": True, "eval_every": 2}
    truth, place = new(tmp_path / "truth"), new(tmp_path / "place")
    for folder in (truth, place):
        write_run(folder, model_folder, [LONG, wide, SHORT], checkpoint_every=1)
    assert run(truth).code == 0
    assert run(place, Trouble(signal.SIGTERM, after_lines=4)).code == 130
    in_the_way = place / "run" / where
    in_the_way.parent.mkdir(exist_ok=True)
    occupy(in_the_way)
    ran = run(place)
    assert_refused(ran, "cannot write", where, "not a directory", "run again")
    assert "wide: waits as it is, the others go on" in ran.err
    assert told(place) == {"long": "finished", "wide": "parked", "short": "finished"}
    assert where in statuses(place)["wide"]["reason"]
    assert statuses(place)["wide"]["step"] == (7 if where.startswith("adapters") else 2)
    assert {name: adapters(truth)[name] for name in ("long", "short")} == adapters(place)
    assert "parked, at step" in (place / "run/report.html").read_text(encoding="utf-8")
    since = {name: (place / "run/adapters" / name).stat().st_mtime_ns for name in adapters(place)}
    assert in_the_way.is_symlink() or in_the_way.read_text() == "mine"
    in_the_way.unlink()
    ran = run(place)
    assert ran.code == 0, ran.err
    assert set(told(place).values()) == {"finished"}
    assert adapters(place) == adapters(truth)
    assert by_job(place) == by_job(truth)
    assert {name: (place / "run/adapters" / name).stat().st_mtime_ns for name in since} == since


@pytest.mark.parametrize(("what", "call"), [("save_best", 1), ("save_best", -1), ("save_artefact", 0)])
def test_a_disk_that_refuses_for_a_while(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, call: int
) -> None:
    """One job is refused once, in mid-run or at its last step, and tried again when the others are done: as if it never was."""
    wide = WIDE | {"keep_best": True, "eval_every": 2}
    truth, place = new(tmp_path / "truth"), new(tmp_path / "place")
    for folder in (truth, place):
        write_run(folder, model_folder, [LONG, wide, SHORT])
    real, calls = getattr(snugtune.session, what), list[str]()

    def name_of(arguments: tuple[Any, ...]) -> str:
        return next(a.name for a in arguments if isinstance(a, Job))

    def counting(*arguments: Any) -> None:
        calls.append(name_of(arguments))
        real(*arguments)

    monkeypatch.chdir(truth)
    monkeypatch.setattr(snugtune.session, what, counting)
    train(read_config("config.yaml"))
    refused_at = range(calls.count("wide"))[call]
    calls.clear()

    def refusing(*arguments: Any) -> None:
        calls.append(name_of(arguments))
        if calls[-1] == "wide" and calls.count("wide") == refused_at + 1:
            raise StorageError("cannot write: no space")
        real(*arguments)

    monkeypatch.chdir(place)
    monkeypatch.setattr(snugtune.session, what, refusing)
    train(read_config("config.yaml"))
    assert calls.count("wide") > refused_at + 1
    assert told(place) == {"long": "finished", "wide": "finished", "short": "finished"}
    assert adapters(place) == adapters(truth) and by_job(place) == by_job(truth)


@pytest.mark.parametrize("checkpoint_every", [1000, 2])
def test_an_adapter_too_large_for_the_disk(tmp_path: Path, model_folder: Path, checkpoint_every: int) -> None:
    """No room for the large one alone, nor for a checkpoint: the small ones' adapters are there, and equal."""
    jobs = [{"name": "small", "steps": 4, "method": {"r": 2}}, {"name": "large", "steps": 3, "method": {"r": 64}}]
    truth, place = new(tmp_path / "truth"), new(tmp_path / "place")
    for folder in (truth, place):
        write_run(folder, model_folder, jobs, checkpoint_every=checkpoint_every)
    assert run(truth).code == 0
    limit = len(adapters(truth)["large"]) - 100
    assert len(adapters(truth)["small"]) < limit // 4
    ran = run(place, Trouble(file_limit=limit))
    assert_refused(ran, "cannot write", "adapters/large", "File too large", "goes on from the checkpoint before")
    assert ("no checkpoint at step" in ran.err) == (checkpoint_every == 2)
    assert told(place) == {"small": "finished", "large": "parked"}
    assert adapters(place) == {"small": adapters(truth)["small"]}
    assert run(place).code == 0
    assert adapters(place) == adapters(truth) and by_job(place) == by_job(truth)


# --- killed and interrupted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["fused", "interleaved"])
def test_killed_and_interrupted(tmp_path: Path, model_folder: Path, execution: str) -> None:
    """Before any checkpoint, after one job has finished, after another has failed: every job ends with the truth's bits."""
    truth, place = new(tmp_path / "truth"), new(tmp_path / "place")
    for folder in (truth, place):
        plan = {"weights": "fp32", "execution": execution}
        write_run(folder, model_folder, [SHORT, BAD, LONG, WIDE], checkpoint_every=1, plan=plan)
    reason = assert_refused(run(truth), "job 'bad'")
    assert run(place, Trouble(signal.SIGKILL, after_lines=5)).code == -signal.SIGKILL
    ran = run(place, Trouble(signal.SIGINT, after_lines=14))
    assert ran.code == 130
    assert ran.err.splitlines()[-1].startswith("error: interrupted at step ")
    assert ran.err.splitlines()[-1].endswith(" of 4 jobs; state saved, the same command goes on from there")
    assert told(place)["long"] == told(place)["bad"] == "training"
    for name, lines in by_job(place).items():  # a step that was about to be evaluated is not reported yet
        assert statuses(place)[name]["step"] - lines[-1]["step"] in (0, 1), "as it stands"
    for lines in (24, 33):
        assert run(place, Trouble(signal.SIGKILL, after_lines=lines)).code == -signal.SIGKILL
    assert "short" in adapters(place)
    for _ in range(2):  # the second time nothing is left to do
        assert assert_refused(run(place), "job 'bad'") == reason
        assert adapters(place) == adapters(truth)
        assert by_job(place) == by_job(truth)
        assert results(place) - {"run/.lock"} == results(truth)
        assert statuses(place) == statuses(truth)


def test_no_status_without_need(clean: Path, tmp_path: Path, model_folder: Path) -> None:
    """`jobs.json` is for people: damaged, gone or of an older version, it stops nothing, and is written anew."""
    write_run(tmp_path, model_folder, [LONG, SHORT, WIDE])
    assert run(tmp_path, Trouble(signal.SIGTERM, after_lines=8)).code == 130
    (tmp_path / "run/jobs.json").write_text('{"long": {"status": ["')
    told_of = here("report", tmp_path / "run")
    assert told_of.code == 0 and "jobs.json cannot be read" in told_of.err
    assert run(tmp_path).code == 0
    assert statuses(tmp_path) == statuses(clean)
    (tmp_path / "run/jobs.json").unlink()
    assert "this run is finished" in run(tmp_path).err


# --- memory -----------------------------------------------------------------------------------------------------------


class Weigher(Silent):
    """Holds weak references to what each job keeps in memory, and looks which of it is left when a job has gone."""

    def __init__(self) -> None:
        self.kept: dict[str, list[weakref.ref[Any]]] = {}
        self.jobs: dict[str, weakref.ref[Job]] = {}
        self.ended: dict[str, str] = {}
        self.left: dict[str, int] = {}
        self.control: list[bool] = []
        self.result: RunResult | None = None

    def begin(self, jobs: Any) -> None:
        self.jobs = {job.name: weakref.ref(job) for job in jobs}

    def step(self, metrics: StepMetrics) -> None:
        job = self.jobs[metrics.job]()
        assert job is not None
        if metrics.step == 2:
            self.kept[job.name] = [weakref.ref(tensor.untyped_storage()) for tensor in held_by(job)]
        for name in self.ended.keys() - self.left.keys():
            self.left[name] = self.alive(name)
            self.control.append(self.alive("lasting") == 1 + len(self.kept["lasting"]))

    def alive(self, name: str) -> int:
        return sum(ref() is not None for ref in self.kept[name]) + (self.jobs[name]() is not None)

    def status(self, job: str, status: str) -> None:
        if status in ("finished", "stopped early", "failed"):
            self.ended[job] = status

    def results(self, result: RunResult) -> None:
        self.result = result


def held_by(job: Job) -> Iterator[torch.Tensor]:
    """Trained weights, and what the optimizer remembers of them."""
    yield from job.attached.parameters()
    for entry in job.optimizer.state.values():
        yield from (value for value in entry.values() if isinstance(value, torch.Tensor))


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What only the collector of cycles would free is not free when the next job needs it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("execution", ["fused", "interleaved"])
def test_a_job_that_has_gone_leaves_no_memory(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, execution: str
) -> None:
    """Finished, stopped early, diverged or broken by a bug: nothing of it is left while its neighbour trains on."""
    monkeypatch.setattr(Sft, "loss", breaking("broken", RuntimeError("a bug")))
    monkeypatch.chdir(tmp_path)
    stops = {"name": "stops", "steps": 9, "eval_every": 1, "early_stopping": {"patience": 2, "min_delta": 99.0}}
    jobs = [{"name": "lasting", "steps": 20}, SHORT, stops, BAD | {"eval_every": None}, {"name": "broken", "steps": 5}]
    write_run(tmp_path, model_folder, jobs, plan={"weights": "fp32", "execution": execution})
    weigher = Weigher()
    with pytest.raises(RuntimeError, match="a bug"):
        train(read_config("config.yaml"), weigher)
    assert weigher.ended == {
        "short": "finished", "stops": "stopped early", "bad": "failed", "broken": "failed", "lasting": "finished"
    }  # fmt: skip
    assert min(map(len, weigher.kept.values())) > 2, "weights and moments were seen"
    assert weigher.control == [True] * 4, "what is in use is there"
    assert weigher.left == dict.fromkeys(("short", "stops", "bad", "broken"), 0)
    assert weigher.result is not None
    assert set(weigher.result.artefacts) == {"short", "stops", "lasting"}, "what there is"
    assert weigher.result.statuses == weigher.ended
    with pytest.raises(JobFailedError, match="job 'broken': RuntimeError: a bug"):
        train(read_config("config.yaml"))


# --- rules, before anything is loaded ---------------------------------------------------------------------------------


RULES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "weight-of-the-run": ({"weight": 2}, ("unknown field 'weight' of a whole run; it belongs into an entry of 'jobs'",)),
    "name-of-the-run": ({"name": "a"}, ("unknown field 'name' of a whole run; it belongs into an entry of 'jobs'",)),
    "weight-of-nothing": ({"jobs": [LONG | {"weight": 0}]}, ("jobs.0: weight: must be at least 1e-06",)),
    "no-such-execution": ({"plan": {"execution": "both"}}, ("plan.execution", "'auto', 'fused' or 'interleaved'", "'both'")),
    "execution-of-the-run": ({"execution": "fused"}, ("unknown field 'execution'; did you mean 'plan.execution'?",)),
    "full": ({"method": "full"}, ("'long' uses method 'full', which cannot share a base",)),
    "freeze": (
        {"jobs": [LONG, SHORT | {"method": {"type": "freeze", "last_blocks": 1}}]},
        ("'short' uses method 'freeze', which cannot share a base",),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    fields, named = RULES[rule]
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, Path("none"), **{"jobs": [LONG, SHORT]} | fields)
    assert_refused(here("train", "config.yaml"), *named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arch", "why"), [("mixtral", "experts"), ("mamba", "linear_attention layers"), ("falcon_alibi", "ALiBi")]
)
def test_fused_is_refused_where_rows_cannot_be_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, why: str
) -> None:
    """By the model's config alone: there are no weights here that could be loaded."""
    monkeypatch.chdir(tmp_path)
    tiny_config(arch).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_run(tmp_path, tmp_path / "model", [LONG, SHORT])
    last = assert_refused(here("train", "config.yaml"), "plan.execution: fused", "use interleaved")
    assert why.lower() in last.lower()
    assert not (tmp_path / "run").exists()


def test_a_thousand_jobs_are_resolved_once() -> None:
    """They are asked for again and again; the messages still say which one it is."""
    jobs = [{"name": f"job-{i}", "seed": i, "method": {"r": 1 + i % 8}} for i in range(1000)]
    fields = {"model": "m", "output": "run", "data": "d.jsonl"}
    config = to_config(fields | {"jobs": jobs})
    assert config.resolved_jobs() is config.resolved_jobs()
    assert config.resolved_jobs()[999].name == "job-999" and config.resolved_jobs()[999].method.model_dump()["r"] == 8
    assert config == to_config(fields | {"jobs": jobs}) and "_resolved" not in config.to_yaml()
    with pytest.raises(InputError, match=r"jobs\.700: unknown field 'sed'; did you mean 'seed'\?"):
        to_config(fields | {"jobs": [*jobs[:700], {"name": "x", "sed": 1}, *jobs[701:]]})
    with pytest.raises(InputError, match="the name 'job-7' is given twice"):
        to_config(fields | {"jobs": [*jobs, jobs[7]]})
