"""Whatever goes wrong in one job is its own: it is given up with its reason, the others end as in a clean run, to the bit.

And what is nobody's own (a stop, the base's disk) costs the steps that it broke into, and no bit of anything.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.function import once_differentiable

from conftest import tiny_base
from joint import JOBS, STEPS, End, Run, running, together, unlike
from quantised import plan_of
from snugtune.config import to_config
from snugtune.errors import (
    DivergedError,
    InputError,
    JobFailedError,
    OutOfMemoryError,
    StopRequestedError,
    StorageError,
    UnreadableError,
)
from snugtune.methods.lora import LoraAttached
from snugtune.model.base import Base
from snugtune.run import train
from snugtune.training import evaluation
from snugtune.training import step as step_module
from snugtune.training.job import Job
from snugtune.training.schedule import Served, faults
from snugtune.training.trainer import Trainer
from snugtune.types import Chunk

MANY = settings(deadline=None, derandomize=True, max_examples=60)
FUSED = {"interleaved": 0, "fused": 64}
NAMES = ("short", "all", "headed")  # "all" is the one in trouble: between the others, and with adapters everywhere
BAD = "all"
GONE = UnreadableError("the disk is gone")


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base(intermediate_size=128)


@pytest.fixture(scope="module")
def truths() -> dict[str, End]:
    return {}


@pytest.fixture
def clean(base: Base, truths: dict[str, End]) -> dict[str, End]:
    """How the jobs end when nothing goes wrong."""
    if not truths:
        truths |= together(base, plan_of("fp32", fused_tokens=64), {name: JOBS[name] for name in NAMES})
    return truths


@pytest.fixture(params=FUSED.values(), ids=FUSED)
def run(request: pytest.FixtureRequest, base: Base, clean: dict[str, End]) -> Iterator[Run]:
    with running(base, plan_of("fp32", fused_tokens=request.param), {name: JOBS[name] for name in NAMES}) as started:
        yield started


class Boom(Exception):
    """What a user's code may raise."""


def at_step(job: Job, step: int, wrong: Callable[..., Any], right: Callable[..., Any]) -> Callable[..., Any]:
    """`wrong` at one step of the job, else `right`."""
    return lambda *inputs: (wrong if job.step == step else right)(*inputs)


def boom(*inputs: object) -> Any:
    raise Boom("it broke")


class Odd:
    """An objective that is another's, but for its loss at the job's second step."""

    def __init__(self, job: Job, loss: Callable[[Callable[[], Tensor], Tensor], Tensor]):
        self.job, self.inner, self.odd = job, job.objective, loss

    def size(self, chunk: Chunk) -> float:
        return self.inner.size(chunk)

    def loss(self, head: Any, hidden: Tensor, chunk: Chunk, training: bool = True) -> Tensor:
        def own() -> Tensor:
            return self.inner.loss(head, hidden, chunk, training)

        return self.odd(own, hidden) if self.job.step == 1 else own()


class _BoomsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise Boom("it broke")


def _data(job: Job) -> None:
    job.chunks = at_step(job, 1, boom, job.chunks)  # pyright: ignore[reportAttributeAccessIssue]


def _objective(loss: Callable[[Callable[[], Tensor], Tensor], Tensor]) -> Callable[[Job], None]:
    def plant(job: Job) -> None:
        job.objective = Odd(job, loss)  # pyright: ignore[reportAttributeAccessIssue]

    return plant


def _size(job: Job) -> None:
    odd = Odd(job, lambda own, hidden: own())
    odd.size = at_step(job, 1, boom, job.objective.size)  # pyright: ignore[reportAttributeAccessIssue]
    job.objective = odd  # pyright: ignore[reportAttributeAccessIssue]


def _optimizer(job: Job) -> None:
    job.optimizer.step = at_step(job, 1, boom, job.optimizer.step)


def _after_the_head(own: Callable[[], Tensor], hidden: Tensor) -> Tensor:
    own().backward()  # half a gradient is in its own adapter already
    return boom()


BREAKS: dict[str, Callable[[Job], None]] = {
    "its data": _data,
    "the size of its loss": _size,
    "its objective, at once": _objective(lambda own, hidden: boom()),
    "its objective, after the head": _objective(_after_the_head),
    "its backward": _objective(lambda own, hidden: _BoomsBackward.apply(own())),  # pyright: ignore[reportArgumentType]
    "its optimizer": _optimizer,
}


@pytest.mark.parametrize("place", BREAKS)
def test_a_job_that_breaks_is_given_up_alone(place: str, run: Run, clean: dict[str, End]) -> None:
    bad = run.trainer.jobs[BAD]
    BREAKS[place](bad)
    run.train()
    assert bad.failure == f"job '{BAD}': Boom: it broke" and isinstance(bad.error, Boom)
    assert bad.step == 1 and run.history[BAD] == clean[BAD].history[:1]
    assert unlike({name: end for name, end in run.ends().items() if name != BAD}, clean) == {}
    assert not run.trainer.turns and all(job.attached.parameters()[0].grad is None for job in run.trainer.jobs.values())


def test_a_loss_of_another_shape_is_the_jobs_own_trouble(run: Run, clean: dict[str, End]) -> None:
    bad = run.trainer.jobs[BAD]
    bad.objective = Odd(bad, lambda own, hidden: hidden.sum(dim=1))  # pyright: ignore[reportAttributeAccessIssue]
    run.train()
    assert bad.failure is not None and "scalar" in bad.failure
    assert unlike({name: end for name, end in run.ends().items() if name != BAD}, clean) == {}


def _nan_weights(job: Job) -> None:
    with torch.no_grad():
        job.attached.parameters()[0][::7] = float("nan")


def _infinite_weights(job: Job) -> None:
    with torch.no_grad():
        job.attached.parameters()[0][::7] = float("inf")


def _infinite_loss(job: Job) -> None:
    job.objective = Odd(job, lambda own, hidden: own() * float("inf"))  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("plant", [_nan_weights, _infinite_weights, _infinite_loss])
def test_a_job_that_is_not_finite_is_given_up_alone(
    plant: Callable[[Job], None], run: Run, clean: dict[str, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step is skipped; after some of them in a row it is given up."""
    monkeypatch.setattr(step_module, "MAX_SKIPS", 2)
    bad = run.trainer.jobs[BAD]
    run.train(until=lambda: bad.step == 1)
    plant(bad)
    run.train()
    if plant is _infinite_loss:
        assert run.history[BAD][1] == (None, None) and bad.failure is None and bad.step == STEPS  # one step, and it goes on
    else:
        assert bad.failure is not None and "2 steps in a row had no finite gradient (step 3)" in bad.failure
        assert run.history[BAD][1:] == [(None, None)] * 2
    assert unlike({name: end for name, end in run.ends().items() if name != BAD}, clean) == {}


# --- what is nobody's own -----------------------------------------------------------------------------------------------


class Interrupts:
    """Raises once, at the k-th call of what it wraps; `after`: when that has done its work."""

    def __init__(self, inner: Callable[..., Any], k: int, error: BaseException, after: bool = False):
        self.inner, self.left, self.error, self.after = inner, k, error, after

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            if self.after:
                self.inner(*inputs, **named)
            raise self.error
        return self.inner(*inputs, **named)


def _goes_on_to(clean: dict[str, End], run: Run, error: type[BaseException]) -> None:
    with pytest.raises(error):
        run.train()
    assert all(job.failure is None for job in run.trainer.jobs.values())
    run.train()
    assert unlike(run.ends(), clean) == {}


@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_stop_between_two_batches_costs_nothing(k: int, run: Run, clean: dict[str, End]) -> None:
    asked = iter(range(1000))
    run.trainer.stop_requested = lambda: next(asked) == k
    _goes_on_to(clean, run, StopRequestedError)


@pytest.mark.parametrize(("error", "k"), [(GONE, 1), (KeyboardInterrupt(), 3), (GONE, 6)])
def test_steps_that_the_base_breaks_off_begin_anew(error: Exception, k: int, run: Run, clean: dict[str, End]) -> None:
    """In forward, before any job's own part."""
    base = run.trainer.base
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "hidden", Interrupts(base.hidden, k, error))
        _goes_on_to(clean, run, type(error))


@pytest.mark.parametrize(("error", "k"), [(GONE, 1), (KeyboardInterrupt(), 2), (GONE, 7)])
def test_steps_that_break_off_in_backward_begin_anew(error: Exception, k: int, run: Run, clean: dict[str, End]) -> None:
    """When blocks above have added to the gradients already."""
    layer = run.trainer.base.sites["model.layers.0.mlp.down_proj"].frozen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "matmul_t", Interrupts(layer.matmul_t, k, error))
        _goes_on_to(clean, run, type(error))


@pytest.mark.parametrize(
    ("error", "after", "k"),
    [
        (KeyboardInterrupt(), False, 1),
        (GONE, True, 1),
        (GONE, False, 3),
        (KeyboardInterrupt(), True, 3),
        (KeyboardInterrupt(), False, 6),
        (GONE, True, 6),
    ],
)
def test_steps_that_break_off_before_their_optimizer_begin_anew(
    error: BaseException, after: bool, k: int, run: Run, clean: dict[str, End]
) -> None:
    """Steps that others have done at that moment are reported nevertheless."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "clip_grad_norm", Interrupts(step_module.clip_grad_norm, k, error, after))
        _goes_on_to(clean, run, type(error))


def _torn(place: str, job: Job, k: int, error: BaseException) -> None:
    """Break off the job's k-th step: as its optimizer begins, when that has changed its weights, or just before it counts."""
    owner, name = (job.attached, "publish") if place == "publish" else (job.optimizer, "step")
    setattr(owner, name, Interrupts(getattr(owner, name), k, error, after=place != "begin"))


@pytest.mark.parametrize(
    ("error", "place", "k"),
    [
        (KeyboardInterrupt(), "begin", 1),
        (KeyboardInterrupt(), "step", 1),
        (KeyboardInterrupt(), "publish", 1),
        (MemoryError(), "step", 3),
        (MemoryError(), "publish", 3),
    ],
    ids=["Ctrl-C-begin", "Ctrl-C-step", "Ctrl-C-publish", "memory-step", "memory-publish"],
)
def test_a_job_that_is_broken_off_in_its_optimizer_is_given_up(
    error: BaseException, place: str, k: int, run: Run, clean: dict[str, End]
) -> None:
    """It stands between two steps. It goes on from its last saved state, to the bit; the others need none."""
    bad = run.trainer.jobs[BAD]
    run.train(until=lambda: bad.step == k - 1)
    tensors, numbers = bad.state()
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    _torn(place, bad, 1, error)
    with pytest.raises(OutOfMemoryError if isinstance(error, MemoryError) else type(error)):
        run.train()
    said = f"was broken off in the middle of its optimizer step ({type(error).__name__})"
    assert bad.failure == f"job '{BAD}': {said}; let it go on from its last saved state" and bad.error is not None
    assert bad.step == k - 1 and BAD not in run.trainer.turns and bad.attached.parameters()[0].grad is None
    run.train()
    assert unlike({name: end for name, end in run.ends().items() if name != BAD}, clean) == {}
    bad.load_state(tensors, numbers)
    run.train()
    assert unlike(run.ends(), clean) == {}


def test_a_step_that_was_done_is_not_done_again(run: Run, clean: dict[str, End]) -> None:
    """Where only the report of it is broken off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.trainer, "_report", Interrupts(run.trainer._report, 2, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run.train()
    run.train()
    assert {name: end.tensors.keys() for name, end in run.ends().items()} == {n: end.tensors.keys() for n, end in clean.items()}
    assert all(torch.equal(v, clean[name].tensors[k]) for name, end in run.ends().items() for k, v in end.tensors.items())


# --- whole runs ---------------------------------------------------------------------------------------------------------


def _runs(place: Path, model: Path, fused: bool) -> Any:
    """The config of three jobs, each evaluated at its end."""
    data = place / "data.jsonl"
    if not data.exists():
        data.write_text("".join(f'{{"text": "{"a word or another " * (1 + i % 3)}"}}\n' for i in range(9)))
    fields = {"model": str(model), "data": str(data), "objective": "clm", "max_seq_len": 48, "batch_size": 2, "steps": 2}
    plan = {"weights": "fp32", "execution": "fused" if fused else "interleaved"}
    jobs = [{"name": "a", "seed": 1}, {"name": "b", "seed": 2, "method": {"type": "lora", "r": 4}}, {"name": "c", "seed": 3}]
    return to_config(fields | {"validation": 0.3, "plan": plan, "output": str(place / "run"), "jobs": jobs})


def _results(place: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in place.glob("run/adapters/*/adapter_model.safetensors")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, bytes]:
    """Of a run in which nothing goes wrong."""
    place = tmp_path_factory.mktemp("clean")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(_runs(place, model_folder, fused=True))
    torch.set_num_threads(threads)
    return _results(place)


def _only_for(name: str, right: Callable[..., Any], wrong: Callable[..., Any]) -> Callable[..., Any]:
    """`wrong` for the job of this name, once it has trained."""

    def either(first: Any, *inputs: Any) -> Any:
        subject = inputs[0] if isinstance(first, Trainer) else first
        name_of = subject.job if isinstance(subject, LoraAttached) else subject.name
        begun = isinstance(subject, LoraAttached) or subject.step > 0
        return (wrong if name_of == name and begun else right)(first, *inputs)

    return either


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("owner", "method", "raises", "said", "reason"),
    [
        (evaluation, "evaluate", Boom("it broke"), Boom, "it broke"),
        (evaluation, "evaluate", InputError("it is no good"), JobFailedError, "job 'b': it is no good"),
        (LoraAttached, "save", Boom("it broke"), Boom, "it broke"),
        (LoraAttached, "save", StorageError("the disk is full"), StorageError, "the disk is full"),
    ],
)
def test_a_run_goes_on_without_the_job_that_breaks(
    owner: Any, method: str, raises: Exception, said: type[Exception], reason: str, fused: bool,
    tmp_path: Path, model_folder: Path, results: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In its evaluation, or when its result is saved. What broke it is told when the others are done."""

    def wrong(*inputs: object) -> Any:
        raise raises

    monkeypatch.setattr(owner, method, _only_for("b", getattr(owner, method), wrong))
    with pytest.raises(said, match=reason):
        train(_runs(tmp_path, model_folder, fused))
    assert results.keys() == set("abc")
    assert _results(tmp_path) == {name: results[name] for name in "ac"}


def test_why_jobs_failed_is_told_alike_after_a_resume(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Type and words: of one that diverged; and in a run of two, of which another broke, in whatever order they ended."""
    bad = {"optimizer": {"lr": 1e30}, "max_grad_norm": None, "steps": 30, "name": "b"}

    def told(kind: type[Exception], place: Path, *jobs: dict[str, Any]) -> str:
        config = _runs(place, model_folder, fused=True).model_dump(mode="json", exclude_unset=True)
        with pytest.raises(JobFailedError) as raised:
            train(to_config(config | {"jobs": list(jobs)}))
        assert type(raised.value) is kind
        return str(raised.value)

    def wrong(*_: object) -> Any:
        raise InputError("it is no good")

    first, second = tmp_path / "first", tmp_path / "second"
    for place in (first, second):
        place.mkdir()
    said = told(DivergedError, first, {"name": "a"}, bad)
    assert said.startswith("job 'b': 10 steps in a row had no finite gradient (step 11)")
    assert told(DivergedError, first, {"name": "a"}, bad) == told(DivergedError, first, {"name": "a"}, bad) == said
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", _only_for("c", evaluation.evaluate, wrong))
        both = told(JobFailedError, second, bad, {"name": "c"})
    assert both.index("job 'b': 10 steps") < both.index("job 'c': it is no good"), "although c ended first"
    assert told(JobFailedError, second, bad, {"name": "c"}) == both


# --- the trainer's own batches ------------------------------------------------------------------------------------------


class Notes(Trainer):
    """A trainer that notes its batches and computes nothing."""

    def __init__(self, *inputs: Any):
        super().__init__(*inputs)
        self.batches: list[list[Chunk]] = []

    def _accumulate(self, chunks: Sequence[Chunk], sizes: Any, guard: Any) -> dict[str, Tensor]:
        self.batches.append(list(chunks))
        return {chunk.job: torch.zeros(()) for chunk in chunks}


some_jobs = st.lists(
    st.fixed_dictionaries(
        {
            "lengths": st.lists(st.integers(2, 12), min_size=2, max_size=8),
            "batch_size": st.integers(1, 5),
            "epochs": st.integers(1, 3),
            "weight": st.sampled_from([0.3, 1.0, 4.0]),
            "max_seq_len": st.sampled_from([12, 16, 30]),
            "seed": st.integers(0, 3),
        }
    ),
    min_size=2,
    max_size=4,
)


@pytest.fixture(scope="module")
def smallest() -> Base:
    return tiny_base(num_hidden_layers=1)


@MANY
@given(jobs=some_jobs, fused=st.sampled_from([24, 60, 17, 33, 0]), micro_batch=st.sampled_from([1, 2]))
def test_every_example_is_trained_once_an_epoch(jobs: list[dict[str, Any]], fused: int, micro_batch: int, smallest: Base) -> None:
    """And the batches that the trainer makes are faultless."""
    method = {"type": "lora", "r": 1, "target_modules": ["q_proj"]}
    fields = {f"job-{j}": {**own, "method": method, "optimizer": "sgd"} for j, own in enumerate(jobs)}
    with running(smallest, plan_of("fp32", fused_tokens=fused, micro_batch=micro_batch), fields, Notes) as run:
        run.train()
        trainer = run.trainer
        assert isinstance(trainer, Notes) and all(job.finished for job in trainer.jobs.values())
        for name, job in trainer.jobs.items():
            own = [chunk for batch in trainer.batches for chunk in batch if chunk.job == name]
            _check_epochs(job, own, fields[name]["epochs"])
            assert all(len(c.tokens) <= micro_batch * job.config.max_seq_len or len(c.lengths) == 1 for c in own)
        _check_batches(trainer, fused)


def _check_epochs(job: Job, own: Sequence[Chunk], epochs: int) -> None:
    """At no step was one example trained twice more than another, and at the end all were as often as there are epochs."""
    examples = [tuple(example.tokens.tolist()) for example in job.data.train]
    kinds = {kind: examples.count(kind) for kind in examples}  # short ones may be alike
    seen = dict.fromkeys(kinds, 0)
    for step in range(job.total):
        parts = [part for chunk in own if chunk.step == step for part in chunk.tokens.split(chunk.lengths)]
        assert sum(map(len, parts)) > 0
        for part in parts:
            seen[tuple(part.tolist())] += 1
        full, rest = divmod(min((step + 1) * job.config.batch_size, len(examples) * epochs), len(examples))
        assert sum(seen.values()) == full * len(examples) + rest
        assert all(full * n <= seen[kind] <= full * n + min(n, rest) for kind, n in kinds.items())
    assert seen == {kind: n * epochs for kind, n in kinds.items()}


def _check_batches(trainer: Notes, fused: int) -> None:
    queues: dict[str, list[int]] = {name: [] for name in trainer.jobs}
    batches: list[list[Served]] = []
    for batch in trainer.batches:
        batches.append([Served(chunk.job, len(queues[chunk.job]), len(chunk.tokens)) for chunk in batch])
        for chunk in batch:
            queues[chunk.job].append(len(chunk.tokens))
    order = {name: [(c.step, c.index) for batch in trainer.batches for c in batch if c.job == name] for name in queues}
    assert all(own == sorted(set(own)) for own in order.values())
    if fused:
        assert faults(batches, queues, {name: job.config.weight for name, job in trainer.jobs.items()}, fused) == []
        return
    assert all(len(batch) == 1 for batch in batches)
    steps = [(batch[0].job, batch[0].step) for batch in trainer.batches]  # a step at a time, so with one job's gradients
    assert len({step for step, _ in itertools.groupby(steps)}) == len(list(itertools.groupby(steps)))
