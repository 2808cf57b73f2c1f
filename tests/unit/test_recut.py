"""Memory that runs out at any operator of a step: the step is done again on the same data in smaller pieces, and is recorded.

The allocator's error is raised where a test wants it, at the n-th operator that torch's dispatcher is given; backward's and
recompute's are among them, as they run in the thread that calls them.
"""

import gc
import json
import random
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import NoWatch, tiny_base
from joint import End, data_of, running, unlike
from quantised import plan_of
from snugtune.config import to_config
from snugtune.data.pack import cut_step
from snugtune.errors import InputError, OutOfMemoryError
from snugtune.live import LiveTrainer
from snugtune.methods.full import FullAttached
from snugtune.model.base import Base
from snugtune.observer import Silent
from snugtune.run import train
from snugtune.session import Session
from snugtune.training import evaluation
from snugtune.training.checkpoint import latest_checkpoint, save_checkpoint
from snugtune.training.evaluation import evaluate, sampled
from snugtune.training.job import Job
from snugtune.training.metrics import StepMetrics
from snugtune.training.recut import Change, Short, tighter, unless_short
from snugtune.training.step import Turn
from snugtune.training.trainer import Trainer
from snugtune.types import Batch, Plan, Prompt

SAID = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."
ONE = {"batch_size": 5, "lengths": (9, 14, 5, 20, 31, 3, 12), "seed": 1, "steps": 2, "optimizer": {"lr": 1e-2}}
TWO = {"a": ONE, "b": ONE | {"seed": 2, "lengths": (7, 30, 22, 14, 6, 19)}}
PLAN = plan_of("fp32", micro_batch=3)  # two chunks a step, of 2 and 3 sequences or so


class RunsOut(TorchDispatchMode):
    """The allocator's error at the n-th operator inside the block, once; 0: never. `count`: how many there were."""

    def __init__(self, at: int = 0):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise RuntimeError(SAID)
        return func(*args, **(kwargs or {}))


class Spy(Trainer):
    """Notes what each completed step was trained on."""

    def __init__(self, base: Base, plan: Plan, watch: NoWatch):
        self.seen: list[tuple[str, list[list[int]]]] = []
        self.said: list[str] = []
        super().__init__(base, plan, watch, say=self.said.append)

    def _report(self, job: Job, turn: Turn, norm: float) -> StepMetrics:
        sequences = [part.tolist() for chunk in turn.chunks for part in chunk.tokens.split(chunk.lengths)]
        self.seen.append((job.name, sorted(sequences)))
        return super()._report(job, turn, norm)


def trained(base: Base, plan: Plan, jobs: Any, at: int = 0) -> tuple[dict[str, End], Spy, int]:
    with running(base, plan, jobs, Spy) as run:
        with RunsOut(at) as mode:
            run.train()
        assert isinstance(run.trainer, Spy)
        return run.ends(), run.trainer, mode.count


def apart(end: End, truth: End) -> float:
    """The largest relative L2 distance of a tensor from the truth."""
    pairs = [(end.tensors[k].double(), v.double()) for k, v in truth.tensors.items()]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs if b.norm() > 0)


def somewhere(count: int, operators: int, seed: int = 0) -> list[int]:
    return sorted(random.Random(seed).sample(range(1, operators), count))


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base(intermediate_size=128)


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kept": ({}, {}),
    "recomputed": ({"recompute": "blocks"}, {}),
    "inputs on disk": ({"recompute": "blocks", "offload": "activations"}, {}),
    "sgd": ({}, {"optimizer": {"type": "sgd", "lr": 0.1}}),
    "lion": ({}, {"optimizer": {"type": "lion", "lr": 1e-3, "weight_decay": 0.1}}),
    "head": ({}, {"method": {"type": "lora", "r": 4, "target_modules": ["up_proj", "lm_head"]}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_as_undisturbed(kind: str, base: Base) -> None:
    """At operators of all parts of a step: nothing lost, nothing trained twice, the same result to rounding."""
    knobs, fields = KINDS[kind]
    plan, jobs = replace(PLAN, **knobs), {"a": ONE | fields}
    truth, undisturbed, operators = trained(base, plan, jobs)
    assert not undisturbed.changes
    for at in somewhere(7, operators):
        ends, spy, _ = trained(base, plan, jobs, at)
        assert spy.seen == undisturbed.seen
        assert apart(ends["a"], truth["a"]) <= 1e-5
        (change,) = spy.changes
        assert change.knob == "capacity" and change.cause == "memory ran out" and change.step in (1, 2)
        assert spy.said == [f"plan (a): {change.told}"]
        assert change.told == f"memory ran out at step {change.step}: chunks of at most {change.value} tokens from here on"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_full_training_ends_as_undisturbed(dtype: torch.dtype) -> None:
    kind = "fp32" if dtype == torch.float32 else "bf16"
    plan = replace(plan_of(kind, kind), micro_batch=3)
    jobs = {"a": ONE | {"method": {"type": "full"}, "optimizer": {"lr": 1e-3}}}

    def once(at: int) -> tuple[dict[str, End], Spy, int]:
        return trained(tiny_base(intermediate_size=128, dtype=dtype), plan, jobs, at)

    truth, undisturbed, operators = once(0)
    for at in somewhere(4, operators, seed=1):
        ends, spy, _ = once(at)
        assert spy.seen == undisturbed.seen and len(spy.changes) == 1
        assert apart(ends["a"], truth["a"]) <= (1e-5 if dtype == torch.float32 else 0.05)


def test_another_job_keeps_its_bits(base: Base) -> None:
    """In turns one is cut anew; where they shared forwards, they no longer do, and nobody's bits change."""
    truth, undisturbed, operators = trained(base, PLAN, TWO)
    for at in somewhere(5, operators):
        ends, spy, _ = trained(base, PLAN, TWO, at)
        (change,) = spy.changes
        assert sorted(spy.seen) == sorted(undisturbed.seen)
        assert unlike({name: end for name, end in ends.items() if name != change.job}, truth) == {}
        assert change.knob == "capacity" and apart(ends[change.job], truth[change.job]) <= 1e-5
    sharing = replace(PLAN, fused_tokens=256)
    _, _, operators = trained(base, sharing, TWO)
    for at in somewhere(4, operators // 2):
        ends, spy, _ = trained(base, sharing, TWO, at)
        assert [change.knob for change in spy.changes] == ["fused_tokens"] and spy.plan.fused_tokens == 0
        assert unlike(ends, truth) == {} and sorted(spy.seen) == sorted(undisturbed.seen)


# --- what is done, in which order -----------------------------------------------------------------------------------------


def cut(*lengths: int, capacity: int) -> Any:
    return cut_step(data_of(lengths).train, capacity, "a", 0, 0)


@pytest.mark.parametrize(
    ("chunks", "capacity", "rows", "sharing", "found"),
    [
        (cut(9, 9, 9, 9, capacity=64), 64, 256, True, ("fused_tokens", 0)),
        (cut(9, 9, 9, 9, capacity=64), 64, 256, False, ("capacity", 18)),
        (cut(9, 9, 9, 9, capacity=18), 1024, 256, False, ("capacity", 9)),  # what was cut counts, not what could be
        (cut(30, 3, 3, capacity=64), 64, 256, False, ("capacity", 30)),  # no sequence is cut
        (cut(80, 4, capacity=80), 80, 256, False, ("head_rows", 20)),  # half of the 40 that are scored
        (cut(80, 4, capacity=80), 80, 20, False, ("head_rows", 16)),
        (cut(80, 4, capacity=80), 80, 16, False, ("recompute", "blocks")),
        (cut(30, capacity=0), 0, 256, False, ("recompute", "blocks")),  # 15 rows are few
    ],
)
def test_what_costs_least_comes_first(chunks: Any, capacity: int, rows: int, sharing: bool, found: Any) -> None:
    assert tighter(PLAN, capacity, rows, chunks, sharing) == found


def test_nothing_is_left_at_the_end(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """All knobs in turn, each told of; then one line that says where, and what to change. The job stands as before."""

    def short(*_: Any) -> Tensor:
        raise MemoryError

    with running(base, PLAN, {"a": ONE | {"lengths": (60,) * 4, "max_seq_len": 64}}, Spy) as run:
        before = run.trainer.jobs["a"].tensors()["weights.flat"].clone()
        monkeypatch.setattr(base, "hidden", short)
        with pytest.raises(
            OutOfMemoryError, match=r"^memory ran out at step 1 of job 'a', and nothing is left to be cut"
        ) as caught:
            run.train()
        assert "one sequence of up to 60 tokens" in str(caught.value) and caught.value.exit_code == 3
        knobs = [(change.knob, change.value) for change in run.trainer.changes]
        assert knobs == [("capacity", 90), ("head_rows", 16), ("recompute", "blocks")]
        assert tighter(run.trainer.plan, 60, 16, run.trainer.jobs["a"].chunks(), False) is None
        job = run.trainer.jobs["a"]
        assert torch.equal(job.tensors()["weights.flat"], before) and not run.trainer.turns and job.failure is None
        assert job.attached.parameters()[0].grad is None
        monkeypatch.undo()
        run.train()
        assert job.finished


def test_what_a_broken_step_held_is_free(base: Base) -> None:
    """Before the next try: activations, half of a graph in autograd's queue, gradients. Without a collection of cycles."""

    def there() -> dict[int, int]:
        tensors = [o for o in gc.get_objects() if type(o) is Tensor]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    class Weighs(NoWatch):
        def __init__(self) -> None:
            self.left: list[int] = []

        def give_back(self) -> None:
            self.left.append(sum(size for place, size in there().items() if place not in before))

    plan = replace(PLAN, recompute="none")
    _, _, operators = trained(base, plan, {"a": ONE})
    for at in somewhere(8, operators // 2):
        with running(base, plan, {"a": ONE}) as run:
            run.trainer.watch = watch = Weighs()
            gc.collect()
            gc.disable()
            try:
                before = there()
                with RunsOut(at):
                    run.trainer.step()
            finally:
                gc.enable()
        assert len(watch.left) == 2, "as memory ran out, and after the first step"
        assert watch.left[0] <= 4096, f"operator {at}"  # tokens, a mask; a state has 20,000


def test_an_error_that_somebody_keeps_holds_nothing() -> None:
    kept: list[BaseException] = []
    alive: list[weakref.ref[Tensor]] = []

    def work() -> None:
        states = torch.ones(3)
        alive.append(weakref.ref(states))
        try:
            raise RuntimeError(SAID)
        except RuntimeError as error:
            kept.append(error)
            raise

    assert isinstance(unless_short(work), Short) and kept and alive[0]() is None


def test_a_watch_asks_for_less(base: Base) -> None:
    """From the next step on: the step under way ends as it began, and nothing is done twice."""

    class Strict(NoWatch):
        asked = 0

        def exceeded(self) -> bool:
            self.asked += 1
            return self.asked == 1

    truth, undisturbed, _ = trained(base, PLAN, {"a": ONE})
    with running(base, PLAN, {"a": ONE}, Spy) as run:
        run.trainer.watch = Strict()
        run.train()
        assert isinstance(run.trainer, Spy)
        (change,) = run.trainer.changes
        assert (change.knob, change.step) == ("capacity", 2) and "more memory was used" in run.trainer.said[0]
        assert run.trainer.seen == undisturbed.seen
        assert run.history["a"][0] == truth["a"].history[0] and apart(run.ends()["a"], truth["a"]) <= 1e-5


def test_tightening_is_no_error_where_nothing_is_left(base: Base) -> None:
    with running(base, replace(PLAN, recompute="blocks"), {"a": ONE | {"batch_size": 1}}) as run:
        run.trainer.tighten("a test wants it")
        run.train()
        assert run.trainer.changes == [] and run.trainer.jobs["a"].finished


# --- going on -------------------------------------------------------------------------------------------------------------


def test_what_goes_on_from_a_checkpoint_is_cut_as_before(base: Base, tmp_path: Path) -> None:
    """Bit for bit as if it had not been stopped after the cut."""
    jobs = {name: fields | {"steps": 4} for name, fields in TWO.items()}
    plan = replace(PLAN, recompute=2)
    _, _, operators = trained(base, plan, jobs)
    with running(base, plan, jobs) as run:
        with RunsOut(operators // 4):
            run.train(until=lambda: bool(run.trainer.changes))
        assert run.trainer.changes and any(job.active for job in run.trainer.jobs.values())
        save_checkpoint(tmp_path, 1, plan, run.trainer.changes, "x", list(run.trainer.jobs.values()), [], [], 2)
        run.train()
        truth, changes = run.ends(), run.trainer.changes
    saved = latest_checkpoint(tmp_path)
    assert saved is not None and saved.changes == changes and saved.plan == plan
    with running(base, saved.plan, {}) as run:
        for name, fields in jobs.items():
            saved.restore(run.add(name, fields))
        for change in saved.changes:
            run.trainer.change(change)
        run.train()
        assert {name: {k for k in end.tensors if not torch.equal(end.tensors[k], truth[name].tensors[k])}
                for name, end in run.ends().items()} == {"a": set(), "b": set()}  # fmt: skip


@pytest.mark.parametrize("damage", [{"knob": "lr"}, {"step": "two"}, {"value": None}, {"extra": 1}], ids=str)
def test_a_checkpoint_with_strange_changes_is_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path, 1, PLAN, [Change("a", 2, "capacity", 64, "memory ran out")], "x", [], [], [], 2)
    text = (saved / "run.json").read_text()
    key, value = next(iter(damage.items()))
    state = json.loads(text)
    state["changes"][0][key] = value
    (saved / "run.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="cannot be used"):
        latest_checkpoint(tmp_path)


def test_a_run_that_does_not_fit_any_more_is_saved_where_it_stood(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """plan.json says what was tried; with memory again the same command goes on, with that, and does no step twice."""
    (tmp_path / "data.jsonl").write_text("".join(f'{{"text": "{"a word or another " * (1 + i % 3)}"}}\n' for i in range(9)))
    fields = {"model": str(model_folder), "data": str(tmp_path / "data.jsonl"), "objective": "clm", "max_seq_len": 48}
    fields |= {"batch_size": 4, "steps": 3, "plan": {"weights": "fp32"}, "output": str(tmp_path / "run")}
    whole = Base.hidden

    class Watching(Silent):
        done = 0
        notes: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

        def step(self, metrics: StepMetrics) -> None:
            self.done = metrics.step

    observer = Watching()

    def hidden(base: Base, batch: Batch) -> Tensor:
        if observer.done == 1:
            raise RuntimeError(SAID)
        return whole(base, batch)

    monkeypatch.setattr(Base, "hidden", hidden)
    with pytest.raises(OutOfMemoryError, match=r"state saved at step 1, the same command goes on from there$"):
        train(to_config(fields), observer)
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    changes = plan["changes"]
    assert changes and {change["step"] for change in changes} == {2}
    assert plan["measured"]["step"] == 1 and plan["measured_peak_bytes"] is None
    monkeypatch.undo()
    observer.notes.clear()
    result = train(to_config(fields), observer)
    assert [note for note in observer.notes if "from here on" in note] == [
        f"plan (default): {Change(**change).told}" for change in changes
    ]
    assert [line["step"] for line in result.metrics if "loss" in line] == [1, 2, 3]
    after = json.loads((tmp_path / "run/plan.json").read_text())
    assert after["changes"] == changes and after["estimate"] == plan["estimate"]
    assert after["measured"]["step"] == 2 and after["measured"]["total_bytes"] == after["measured_peak_bytes"]
    assert after["measured"]["adapters"] == plan["measured"]["adapters"] > 0


# --- around steps ---------------------------------------------------------------------------------------------------------


def test_an_evaluation_is_cut_smaller_too(base: Base) -> None:
    with running(base, PLAN, {"a": ONE}, Spy) as run:
        job = run.trainer.jobs["a"]
        job.data = replace(job.data, held_out=data_of((12, 15, 9, 20, 7), seed=3).train)
        with RunsOut() as mode:
            loss, tokens = evaluate(run.trainer, job)
        capacity = job.capacity
        for at in somewhere(5, mode.count):
            job.capacity = capacity
            run.trainer.changes.clear()
            with RunsOut(at):
                again, scored = evaluate(run.trainer, job)
            assert [change.knob for change in run.trainer.changes] == ["capacity"] and job.capacity < capacity
            assert scored == tokens and abs(again - loss) <= 1e-6 * loss


def test_answers_are_given_by_halves(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def generate(base: Base, job: str, prompts: Sequence[Any], *_: Any) -> list[str]:
        asked.append(len(prompts))
        if len(prompts) > 2 or (7,) in prompts:
            raise RuntimeError(SAID)
        return [str(prompt[0]) for prompt in prompts]

    monkeypatch.setattr(evaluation, "generate", generate)
    with running(base, PLAN, {"a": ONE}, Spy) as run:
        job = run.trainer.jobs["a"]
        prompts = tuple(Prompt(f"what is {n}?", (n,), (2,)) for n in (4, 5, 6, 7))
        job.data = replace(job.data, prompts=prompts)
        found = sampled(run.trainer, StepMetrics("a", 0, job.total, 0.0))
        assert [(sample.index, sample.answer) for sample in found] == [(0, "4"), (1, "5"), (2, "6")] and asked == [4, 2, 2, 1, 1]
        assert run.trainer.said == ["samples (a): memory ran out over 1 of 4 answers after step 0; they are left out"]
        assert not run.trainer.changes


def test_by_hand_the_error_is_the_callers(base: Base) -> None:
    """The job has no half gradient then, and goes on."""
    with LiveTrainer(base, PLAN) as live:
        job = live.add({"name": "mine", "method": {"type": "lora", "r": 4}, "max_seq_len": 32})
        examples = data_of((9, 14, 5)).train
        with RunsOut() as mode:
            loss = job.forward_backward(examples).loss
        job.optim_step(lr=0.0)
        for at in somewhere(4, mode.count):
            with pytest.raises(RuntimeError, match="can't allocate memory"), RunsOut(at):
                job.forward_backward(examples)
            with pytest.raises(InputError, match="has no gradient to step on"):
                job.optim_step(lr=0.0)
        assert job.forward_backward(examples).loss == loss


def test_a_gradient_that_was_not_collected_is_dropped() -> None:
    """Of a broken step, in half precision: it would be added to the next one."""
    attached = FullAttached(tiny_base(dtype=torch.bfloat16), "a")
    weight = next(iter(attached.weights.values()))
    weight.grad = torch.ones_like(weight)
    attached.zero_grad()
    assert weight.grad is None


def test_a_bug_keeps_its_traceback_where_a_stop_comes_before_the_job_leaves(base: Base, tmp_path: Path) -> None:
    with running(base, PLAN, {"a": ONE}) as run:
        job = run.trainer.jobs["a"]

        def wrong() -> Any:
            raise ZeroDivisionError("it broke")

        job.chunks = wrong  # pyright: ignore[reportAttributeAccessIssue]
        run.train()
        config = SimpleNamespace(resolved_jobs=lambda: [job.config])
        session: Any = Session(config, SimpleNamespace(), SimpleNamespace(), run.trainer)  # pyright: ignore[reportArgumentType]
        status = session.statuses()["a"]
        assert status["status"] == "failed" and "in wrong" in status["traceback"]
