"""Jobs at rest: of many on one base a few are in memory, and each ends where it ends when all are."""

import gc
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from conftest import NoWatch, sequences, tiny_base
from snugtune import prepare
from snugtune.config import JobConfig, to_config
from snugtune.errors import InputError, Interrupted, StopRequestedError, StorageError
from snugtune.memory.plan import make_plan
from snugtune.methods.lora import LoraAttached
from snugtune.model.base import Base
from snugtune.model.generate import Sampling, generate
from snugtune.observer import RunResult, Silent
from snugtune.run import train
from snugtune.training.checkpoint import save_checkpoint
from snugtune.training.evaluation import evaluate
from snugtune.training.examples import JobData
from snugtune.training.job import Job, start_job
from snugtune.training.metrics import StepMetrics
from snugtune.training.trainer import Trainer
from snugtune.types import Example, Plan

PLAN = Plan("cpu", "fp32", 1, "none", 512, 1, "fp32")
STEPS = 3
JOBS: dict[str, dict[str, Any]] = {
    "a": {"method": {"type": "lora", "r": 4}, "optimizer": {"type": "apollo", "rank": 2, "update_every": 2}},
    "b": {"method": {"type": "lora", "r": 8, "lora_dropout": 0.2}, "optimizer": {"type": "lion", "lr": 1e-3}},
    "c": {
        "method": {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        "optimizer": {"type": "galore", "rank": 1, "update_every": 2},
        "weight": 2.0,
    },
    "d": {"optimizer": {"type": "adafactor", "lr": 1e-2}},
    "e": {"batch_size": 3, "optimizer": {"type": "sgd", "lr": 0.1}},
    "f": {"max_grad_norm": 0.01, "neftune_noise_alpha": 5.0},
}


def started(base: Base, name: str, plan: Plan = PLAN, **fields: Any) -> Job:
    """A job of six short sequences, in chunks of one or two."""
    lengths = [5 + (3 * at + len(name) + ord(name[0])) % 11 for at in range(6)]
    parts = sequences(*lengths, seed=ord(name[0]))
    data = tuple(
        Example(ids, torch.ones(len(ids)).index_fill(0, torch.tensor(0), 0.0), f"{name}:{i}") for i, ids in enumerate(parts)
    )
    plain = {"name": name, "data": "x.jsonl", "batch_size": 2, "steps": STEPS, "max_seq_len": 16, "seed": ord(name[0])}
    config = JobConfig.model_validate({"optimizer": {"lr": 1e-2}} | plain | fields)
    return start_job(base, config, JobData(data, data[:2]), plan)


def lora(job: Job) -> LoraAttached:
    assert isinstance(job.attached, LoraAttached)
    return job.attached


def trainer_of(base: Base, plan: Plan, place: Path | None, names: str = "abcdef") -> Trainer:
    trainer = Trainer(base, plan, NoWatch(), resting=place)
    for name in names:
        fields = JOBS[name] if plan.optimizer_state == "fp32" else JOBS[name] | {"optimizer": {"lr": 1e-2}}
        trainer.add(started(base, name, plan, **fields))
    return trainer


def in_memory(trainer: Trainer) -> list[str]:
    return [job.name for job in trainer.jobs.values() if job.at_rest is None]


def outcome(trainer: Trainer, most: int) -> dict[str, Any]:
    """What is reported of every step, and every job's whole state at its end. At most so many are in memory meanwhile."""
    history: list[tuple[Any, ...]] = []
    while steps := trainer.step():
        assert len(in_memory(trainer)) <= most
        for m in steps:
            loss = evaluate(trainer, trainer.jobs[m.job])[0]
            history.append((m.job, m.step, m.loss, m.grad_norm, m.total_tokens, loss))
        assert len(in_memory(trainer)) <= most
    ended: dict[str, Any] = {"history": sorted(history)}
    for name, job in trainer.jobs.items():
        trainer.wake(name)
        tensors, numbers = job.state()
        ended[name] = {k: v.clone() for k, v in tensors.items()}, numbers
    return ended


def equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    assert a.keys() == b.keys() and a["history"] == b["history"]
    for name in a.keys() - {"history"}:
        (tensors, numbers), (others, more) = a[name], b[name]
        assert tensors.keys() == others.keys() and [k for k in tensors if not torch.equal(tensors[k], others[k])] == []
        assert {k: v for k, v in numbers.items() if k != "served"} == {k: v for k, v in more.items() if k != "served"}
    return True


@pytest.fixture
def base() -> Base:
    return tiny_base()


@pytest.mark.parametrize("fused", [0, 40], ids=["interleaved", "fused"])
@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_it_changes_nothing_of_what_is_learned(tmp_path: Path, fused: int, state: Any) -> None:
    """Six jobs with optimizers of every kind, ranks, dropout, noise, weights: every loss, norm and number of their states."""
    plan = replace(PLAN, fused_tokens=fused, optimizer_state=state)
    truth = outcome(trainer_of(tiny_base(), plan, tmp_path), 6)
    for limit in (1, 2):
        trainer = trainer_of(tiny_base(), replace(plan, resident_jobs=limit), tmp_path)
        assert len(in_memory(trainer)) == limit, "the others rest before anything is trained"
        assert equal(outcome(trainer, limit), truth)


# --- memory -----------------------------------------------------------------------------------------------------------


def bytes_alive() -> int:
    """Of all tensors that Python can reach, each storage once."""
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, Tensor)]
    found += [t.grad for t in found if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def most_bytes(count: int, plan: Plan) -> tuple[int, int]:
    """(bytes alive at the worst moment of a forward, those of one job's adapter and AdamW state), jobs alike but in name."""
    base, peaks = tiny_base(), list[int]()
    base.model.get_input_embeddings().register_forward_hook(lambda *_: peaks.append(bytes_alive()))
    trainer = Trainer(base, plan, NoWatch())
    parts = sequences(9, 12)
    data = JobData(tuple(Example(ids, torch.ones(len(ids)).index_fill(0, torch.tensor(0), 0.0), "x") for ids in parts))
    for at in range(count):
        plain = {"name": f"job-{at}", "data": "x.jsonl", "batch_size": 2, "steps": 2, "max_seq_len": 16}
        trainer.add(start_job(base, JobConfig.model_validate(plain), data, plan))
    while trainer.step():
        pass
    (flat,) = trainer.jobs["job-0"].attached.parameters()
    return max(peaks), 3 * flat.nbytes + 4  # and the count of steps


def test_an_idle_job_costs_its_adapter_and_its_optimizers_state() -> None:
    """To the byte, in turns: no gradient but that of the job at work. At rest it costs nothing."""
    gc.collect()
    gc.freeze()  # what there is already is not looked at
    (one, each), (many, _) = most_bytes(1, PLAN), most_bytes(5, PLAN)
    few, _ = most_bytes(5, replace(PLAN, resident_jobs=2))
    assert many - one == 4 * each
    assert few - one == each


def test_jobs_in_turns_hand_on_one_gradient_buffer(base: Base, tmp_path: Path) -> None:
    """Fresh ones would leave holes in the heap. It is as large as the largest needs it; sharing forwards, no second is kept."""
    for fused in (0, 64):
        trainer = trainer_of(base, replace(PLAN, fused_tokens=fused), tmp_path)
        seen = set[int]()
        while trainer.step():
            assert base.spare.buffer is not None
            seen.add(base.spare.buffer.data_ptr())
        assert base.spare.buffer is not None and len(base.spare.buffer) == max(lora(j).total for j in trainer.jobs.values())
        assert fused or len(seen) == 1
        assert all(lora(job).flat.grad is None for job in trainer.jobs.values())
        for name in list(trainer.jobs):
            trainer.remove(name)


@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_what_rests_is_freed(tmp_path: Path, state: Any) -> None:
    """Every storage of its weights, gradients and optimizer state, whatever the optimizer held on to."""
    trainer = trainer_of(tiny_base(), replace(PLAN, optimizer_state=state), tmp_path)
    while trainer.step():
        pass
    for name, job in trainer.jobs.items():
        held = [*lora(job).matrices(), *(v for entry in job.optimizer.state.values() for v in entry.values())]
        storages = [StorageWeakRef(t.untyped_storage()) for t in held if isinstance(t, Tensor)]
        del held
        assert not any(storage.expired() for storage in storages)
        trainer.rest(name)
        assert all(storage.expired() for storage in storages)
        assert not any(name in site.slots for site in trainer.base.sites.values())


def test_no_more_steps_are_begun_than_there_is_enough_to_choose_from(base: Base, tmp_path: Path) -> None:
    """A step that waits for room in a forward has gradients, which are memory. Steps of one chunk each."""
    trainer = Trainer(base, replace(PLAN, fused_tokens=32), NoWatch(), resting=tmp_path)
    for at in range(30):
        trainer.add(started(base, f"job-{at}", batch_size=1))
    for _ in range(4):
        trainer.step()
        begun = [job for job in trainer.jobs.values() if lora(job).flat.grad is not None]
        assert 0 < len(begun) <= 13, "two forwards of at least 5 tokens a chunk"
    assert max(job.step for job in trainer.jobs.values()) == 1, "the hindmost go first"


def test_who_rests_is_who_is_needed_last(base: Base, tmp_path: Path) -> None:
    """Jobs alike go round: with places for five of six, hardly more than one change of places in each of 7 rounds."""
    trainer = Trainer(base, replace(PLAN, resident_jobs=5), NoWatch(), resting=tmp_path)
    for at in range(6):
        trainer.add(started(base, f"job-{at}", steps=8))
    woken, asleep = 0, {name for name, job in trainer.jobs.items() if job.at_rest}
    while any(job.step < 7 for job in trainer.jobs.values()):
        trainer.step()
        now = {name for name, job in trainer.jobs.items() if job.at_rest}
        woken, asleep = woken + len(asleep - now), now
    assert 0 < woken <= 9


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_a_job_let_rest_takes_no_part_until_it_is_woken(base: Base, tmp_path: Path) -> None:
    """And then has no arrears to catch up with."""
    truth = outcome(trainer_of(tiny_base(), PLAN, tmp_path, "ab"), 2)
    trainer = trainer_of(base, PLAN, tmp_path, "ab")
    trainer.rest("b")
    history = [(m.job, m.step, m.loss) for _ in range(2) for m in trainer.step()]
    trainer.wake("b")
    assert trainer.jobs["b"].served == trainer.jobs["a"].served > 0
    history += [(m.job, m.step, m.loss) for _ in range(STEPS) for m in trainer.step()]
    trainer.rest("a")
    assert [(job, step) for job, step, _ in history[:2]] == [("a", 1), ("a", 2)]
    trainer.wake("a")
    while steps := trainer.step():
        history += [(m.job, m.step, m.loss) for m in steps]
    assert sorted(history) == [entry[:3] for entry in truth["history"]]
    for name, job in trainer.jobs.items():
        assert all(torch.equal(v, truth[name][0][k]) for k, v in job.tensors().items())


@pytest.mark.parametrize("limit", [0, 1])
def test_arrears_are_forgiven_to_those_that_come_late_alone(limit: int, tmp_path: Path) -> None:
    """A job that waited for its first step when its run was broken off is the next one after a resume, not the last again."""
    plan = replace(PLAN, resident_jobs=limit)
    before = trainer_of(tiny_base(), plan, tmp_path, "ab")
    assert [m.job for m in before.step()] == ["a"]
    states: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
    for name, job in before.jobs.items():
        before.wake(name)
        states[name] = {k: v.clone() for k, v in job.tensors().items()}, job.numbers()
    after = Trainer(tiny_base(), plan, NoWatch(), resting=tmp_path)
    for name in "ab":
        job = started(after.base, name, plan, **JOBS[name])
        job.load_state(*states[name])
        after.add(job)
    assert after.jobs["b"].served == 0 < after.jobs["a"].served == before.jobs["a"].served
    assert [m.job for m in after.step()] == ["b"]
    after.add(started(after.base, "c", plan, **JOBS["c"]))
    assert after.jobs["c"].served == min(after.jobs[name].served for name in "ab") > 0


def test_all_at_rest_is_nothing_to_do(base: Base, tmp_path: Path) -> None:
    trainer = trainer_of(base, PLAN, tmp_path, "ab")
    for name in "ab":
        trainer.rest(name)
        trainer.rest(name)  # again is no matter
    assert trainer.step() == []
    trainer.remove("a")
    trainer.wake("b")
    assert trainer.step()[0].job == "b"


def test_not_in_the_middle_of_a_step(base: Base, tmp_path: Path) -> None:
    """Be it the trainer's own, or one that is driven by hand."""
    stop = iter([False, True])
    trainer = trainer_of(base, PLAN, tmp_path, "ab")
    trainer.stop_requested = lambda: next(stop)
    with pytest.raises(StopRequestedError):
        trainer.step()
    with pytest.raises(InputError, match=r"^job 'a' is in the middle of a step; let it rest after that$"):
        trainer.rest("a")
    trainer.rest("b")
    trainer.wake("b")
    trainer.forward_backward({"b": trainer.jobs["b"].chunks()})
    with pytest.raises(InputError, match="middle"):
        trainer.rest("b")


def test_what_is_at_rest_is_not_the_bare_base(base: Base, tmp_path: Path) -> None:
    """Its factors are not there: an answer without them would pass for its own. Evaluating wakes it."""
    trainer = trainer_of(base, PLAN, tmp_path, "ab")
    before = evaluate(trainer, trainer.jobs["a"])
    trainer.rest("a")
    with pytest.raises(InputError, match=r"^job 'a' is at rest on disk; wake it first$"):
        generate(base, "a", [[5, 6, 7]], [2], Sampling(max_new_tokens=2))
    assert evaluate(trainer, trainer.jobs["a"]) == before
    generate(base, "a", [[5, 6, 7]], [2], Sampling(max_new_tokens=2))


@pytest.mark.parametrize("method", ["full", {"type": "freeze", "last_blocks": 1}])
def test_the_base_itself_cannot_rest(base: Base, tmp_path: Path, method: Any) -> None:
    trainer = Trainer(base, replace(PLAN, resident_jobs=1), NoWatch(), resting=tmp_path)
    trainer.add(started(base, "a", method=method))
    with pytest.raises(InputError, match="trains the base itself, which cannot rest"):
        trainer.rest("a")
    assert trainer.step()[0].step == 1
    assert list(tmp_path.iterdir()) == []


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_nothing_stays_on_disk(tmp_path: Path) -> None:
    """Neither when it is closed, nor when it is dropped."""
    for way in (Trainer.close, lambda _: None):
        trainer = trainer_of(tiny_base(), replace(PLAN, resident_jobs=1), tmp_path, "abc")
        assert sorted(p.name for p in tmp_path.rglob("*.safetensors")) == ["a.safetensors", "b.safetensors"]
        trainer.wake("a")
        assert sorted(p.name for p in tmp_path.rglob("*.safetensors")) == ["b.safetensors", "c.safetensors"]
        way(trainer)
        del trainer
        gc.collect()
        assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_links_what_rests(base: Base, tmp_path: Path) -> None:
    """It wakes nobody, and holds what it would hold of all in memory; what is done to the job later leaves it alone."""
    trainer = trainer_of(base, replace(PLAN, resident_jobs=2), tmp_path, "abc")
    while any(job.step < 2 for job in trainer.jobs.values()):
        trainer.step()
    asleep = [job for job in trainer.jobs.values() if job.at_rest is not None]
    assert asleep
    truth = {job.name: {k: v.clone() for k, v in job.tensors().items()} for job in trainer.jobs.values() if job not in asleep}
    truth |= {job.name: {k: v.clone() for k, v in load_file(job.at_rest).items()} for job in asleep if job.at_rest is not None}
    saved = save_checkpoint(tmp_path / "checkpoints", 6, trainer.plan, [], "x", list(trainer.jobs.values()), [], [], 2)
    assert all(job.at_rest is not None and (saved / f"{job.name}.safetensors").samefile(job.at_rest) for job in asleep)
    while trainer.step():
        pass
    for name in "abc":
        stored = load_file(saved / f"{name}.safetensors")
        assert stored.keys() == truth[name].keys() and all(torch.equal(v, truth[name][k]) for k, v in stored.items())


@pytest.mark.parametrize("fused", [0, 40])
def test_what_the_disk_refuses_is_that_jobs_trouble(tmp_path: Path, fused: int) -> None:
    """It stands as it stood, in memory; the others go on and end bit-equal."""
    plan = replace(PLAN, fused_tokens=fused)
    truth = outcome(trainer_of(tiny_base(), plan, tmp_path), 6)
    trainer = trainer_of(tiny_base(), replace(plan, resident_jobs=2), tmp_path)
    while trainer.jobs["c"].step == 0:
        trainer.step()
    trainer.wake("c")
    stuck = next(tmp_path.glob(".part-resting-*")) / "c.safetensors"
    stuck.mkdir()  # no file can take that name
    while trainer.step():
        pass
    c = trainer.jobs["c"]
    assert isinstance(c.error, StorageError) and str(c.error).startswith(f"cannot write {stuck}: ")
    assert c.at_rest is None and 0 < c.step < STEPS
    for name in "abdef":
        trainer.wake(name)
        assert all(torch.equal(v, truth[name][0][k]) for k, v in trainer.jobs[name].tensors().items())
    stuck.rmdir()
    c.failure = c.error = None
    while trainer.step():
        pass
    assert all(torch.equal(v, truth["c"][0][k]) for k, v in c.tensors().items())


def test_a_place_that_cannot_be_is_told_before_anything_is_trained(base: Base, tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("no folder")
    trainer = trainer_of(base, replace(PLAN, resident_jobs=1), place, "a")
    with pytest.raises(StorageError, match=f"^cannot make a folder in {place}: "):
        trainer.add(started(base, "b"))
    assert list(trainer.jobs) == ["a"] and trainer.step()[0].job == "a"


def test_a_file_that_is_damaged_is_that_jobs_trouble(base: Base, tmp_path: Path) -> None:
    trainer = trainer_of(base, replace(PLAN, resident_jobs=1), tmp_path, "abc")
    file = trainer.jobs["b"].at_rest
    assert file is not None
    file.write_bytes(file.read_bytes()[:50])
    while trainer.step():
        pass
    assert [job.step for job in trainer.jobs.values()] == [STEPS, 0, STEPS]
    assert isinstance(trainer.jobs["b"].error, StorageError) and str(file) in str(trainer.jobs["b"].error)
    assert trainer.jobs["b"].at_rest == file, "as it stood"


# --- whole runs -------------------------------------------------------------------------------------------------------


def fields(place: Path, model: Path, **plan: Any) -> dict[str, Any]:
    """A run of six jobs."""
    turns = [[{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}] for i in range(8)]
    (place / "talk.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    own = [{"name": name, "seed": at} | {k: v for k, v in JOBS[name].items()} for at, name in enumerate(JOBS)]
    return {
        "model": str(model),
        "data": str(place / "talk.jsonl"),
        "validation": 0.25,
        "output": str(place / "run"),
        "max_seq_len": 32,
        "batch_size": 2,
        "steps": STEPS,
        "eval_every": 1,
        "checkpoint_every": 1,
        "keep_best": True,
        "samples": {"count": 1, "max_new_tokens": 2},
        "plan": {"weights": "fp32"} | plan,
        "jobs": own,
    }


class Doing(Silent):
    """Does something after a step, once."""

    def __init__(self, what: Callable[[StepMetrics], bool]):
        self.what = what
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, metrics: StepMetrics) -> None:
        if self.what(metrics):
            self.what = lambda _: False


def adapters(result: RunResult) -> dict[str, Tensor]:
    return {
        f"{job}.{k}": v for job, at in result.artefacts.items() for k, v in load_file(at / "adapter_model.safetensors").items()
    }


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Tensor]:
    place = tmp_path_factory.mktemp("whole")
    return adapters(train(to_config(fields(place, model_folder, execution="interleaved"))))


@pytest.mark.parametrize("execution", ["interleaved", "fused"])
def test_a_run_that_rests_resumes_and_ends_equal(
    tmp_path: Path, model_folder: Path, whole: dict[str, Tensor], execution: str
) -> None:
    """Killed by SIGTERM with jobs at rest; what a SIGKILL would have left there goes too."""
    config = to_config(fields(tmp_path, model_folder, execution=execution, resident_jobs=2))
    seen = list[set[str]]()

    def stop(metrics: StepMetrics) -> bool:
        seen.append({p.stem for p in (tmp_path / "run").glob(".part-resting-*/*.safetensors")})
        if metrics.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics.step == 2

    with pytest.raises(Interrupted):
        train(config, Doing(stop))
    assert all(len(names) == 4 for names in seen), "four of six rest"
    assert not list((tmp_path / "run").glob(".part-*"))
    (tmp_path / "run" / ".part-resting-killed").mkdir()
    observer = Doing(lambda _: False)
    assert same(adapters(train(config, observer)), whole)
    assert not list((tmp_path / "run").rglob(".part-*"))


def test_the_plan_says_so(tmp_path: Path, model_folder: Path) -> None:
    def reasons(**plan: Any) -> str:
        return " ".join(make_plan(to_config(fields(tmp_path, model_folder, **plan))).reasons)

    assert "2 of 6 jobs in memory at a time, the others rest on disk" in reasons(resident_jobs=2)
    assert "rest" not in reasons() + reasons(resident_jobs=6) + reasons(resident_jobs="auto")
    config = {k: v for k, v in fields(tmp_path, model_folder, resident_jobs=1).items() if k != "jobs"} | {"method": "full"}
    with pytest.raises(InputError, match=r"^plan.resident_jobs: method: full trains the base itself, which cannot rest on disk"):
        make_plan(to_config(config))
    with pytest.raises(InputError, match=r"plan.resident_jobs: must be at least 1"):
        to_config(fields(tmp_path, model_folder, resident_jobs=0))


def test_a_job_whose_rest_is_refused_goes_on_when_the_others_are_done(
    tmp_path: Path, model_folder: Path, whole: dict[str, Tensor]
) -> None:
    config = to_config(fields(tmp_path, model_folder, execution="interleaved", resident_jobs=2))

    def block(metrics: StepMetrics) -> bool:
        if metrics.job != "c":
            return False
        (next((tmp_path / "run").glob(".part-resting-*")) / "c.safetensors").mkdir()
        return True

    observer = Doing(block)
    result = train(config, observer)
    assert any(note.startswith("c: waits as it is, the others go on: cannot write") for note in observer.notes)
    assert [line["job"] for line in result.metrics][-2:] == ["c", "c"]
    assert not list((tmp_path / "run").glob(".part-*"))
    assert same(adapters(result), whole)


def test_refused_input_leaves_nothing_behind(tmp_path: Path, model_folder: Path) -> None:
    """Although jobs rested in the run's folder by then."""
    config = fields(tmp_path, model_folder, resident_jobs=1)
    config["jobs"][-1]["method"] = {"target_modules": ["nothing"]}
    with pytest.raises(InputError, match="matches no linear"):
        train(to_config(config))
    assert not (tmp_path / "run").exists()


def test_a_new_folder_has_one_writer_from_the_first_moment(
    tmp_path: Path, model_folder: Path, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run begins while the jobs of the first one are being started, and rest there: it is refused, and takes nothing."""
    config = to_config(fields(tmp_path, model_folder, execution="interleaved", resident_jobs=2))
    refused: list[int] = []

    def second(*_: object) -> None:
        at_rest = list((tmp_path / "run").glob(".part-resting-*/*.safetensors"))
        with pytest.raises(
            InputError, match=rf"^output: another process is training in .*run \(pid {os.getpid()}\); wait for it"
        ):
            train(config)
        assert list((tmp_path / "run").glob(".part-resting-*/*.safetensors")) == at_rest
        refused.append(len(at_rest))

    monkeypatch.setattr(prepare, "length_remark", second)  # as each job starts
    assert same(adapters(train(config)), whole)
    assert refused == [0, 0, 0, 1, 2, 3]
    assert not (tmp_path / "run" / ".lock").exists()


# --- costs that do not grow -------------------------------------------------------------------------------------------


def calls(work: Callable[[], object]) -> Counter[str]:
    """What Python functions `work` calls, and how often."""
    counted = Counter[str]()

    def count(frame: Any, event: str, arg: object) -> None:
        if event == "call":
            counted[frame.f_code.co_qualname] += 1

    gc.disable()  # a collection would call torch's hooks, and comes when it comes
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return counted


def test_the_thousandth_costs_what_the_first_costs(tmp_path: Path) -> None:
    """In function calls: of adding an adapter, and of a step with 4 active, among 4 and among 200 with the others at rest."""
    base = tiny_base(num_hidden_layers=1)
    trainer = Trainer(base, replace(PLAN, fused_tokens=64), NoWatch(), resting=tmp_path)

    def add(at: int) -> None:
        trainer.add(started(base, f"job-{at}", steps=50, method={"type": "lora", "r": 1, "target_modules": ["q_proj"]}))

    def steps() -> None:
        for _ in range(4):
            trainer.step()

    for at in range(4):
        add(at)
    steps()
    few = calls(steps)
    first = calls(lambda: add(4))  # as a late one, which the last is too
    trainer.rest("job-4")
    for at in range(5, 200):
        add(at)
        trainer.rest(f"job-{at}")
    last = calls(lambda: add(200))
    trainer.rest("job-200")
    steps()
    many = calls(steps)
    idle = Job.active.fget.__qualname__  # who takes part is asked of every job: the one thing that may grow
    scans = {name for name in many if "<genexpr>" in name or "<listcomp>" in name}
    grown = {name: (few[name], many[name]) for name in many.keys() - scans - {idle} if many[name] > few[name]}
    assert grown == {}
    assert many[idle] - few[idle] <= 3 * 4 * 200
    assert {n for n in last if last[n] > first[n]} <= scans | {idle}
