"""Jobs driven from Python, on tiny models: held against scheduled steps, plain autograd, and jobs that are alone."""

import gc
import itertools
import json
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import snugtune
from conftest import lora_gradients, peft_twin, relative, sequences, shake, tiny_base, tiny_model
from snugtune.config import JobConfig
from snugtune.data.mix import step_indices
from snugtune.errors import DivergedError, InputError, JobFailedError, StorageError
from snugtune.live import LiveJob, LiveTrainer
from snugtune.methods.lora import LoraAttached
from snugtune.training.job import Job
from snugtune.types import Example, Plan

PLAN = Plan("cpu", "fp32", 1, "none", 512, 1, "fp32", fused_tokens=96)
"""A chunk holds as many tokens as the longest sequence may have: steps have several."""
FIELDS: dict[str, Any] = {"max_seq_len": 48, "method": {"r": 4, "lora_dropout": 0.1}, "optimizer": {"lr": 1e-2}, "seed": 3}
RECORDS = [
    {"prompt": f"{'What is ' * (i % 4)}{i}?", "completion": f"It is {'very ' * (i % 3)}{i}.", "weight": 1.0 + i % 2}
    for i in range(9)
]


def live(arch: str = "llama", **plan: Any) -> LiveTrainer:
    return LiveTrainer(tiny_base(arch), replace(PLAN, **plan))


def inner(trainer: LiveTrainer, name: str = "default") -> Job:
    return trainer._bench.trainer.jobs[name]


def bits(trainer: LiveTrainer, name: str = "default") -> dict[str, Tensor]:
    """Everything that a job remembers."""
    return {k: v.clone() for k, v in inner(trainer, name).state()[0].items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def gradient(trainer: LiveTrainer, name: str = "default") -> Tensor:
    (weight,) = inner(trainer, name).attached.parameters()
    assert weight.grad is not None
    return weight.grad.clone()


def invented(*lengths: int, seed: int = 0) -> list[Example]:
    """Sequences with random weights, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for ids in sequences(*lengths, seed=seed):
        weights = torch.rand(len(ids), generator=generator).mul(1.5).sub(0.3).clamp(min=0.0)
        weights[0], weights[-1] = 0.0, 1.0
        found.append(Example(ids, weights, "invented"))
    return found


def scored(example: Example) -> Tensor:
    return example.weights[example.weights != 0]


def mean_nll(logprobs: Sequence[Tensor], examples: Sequence[Example]) -> Tensor:
    weights = [scored(e) for e in examples]
    total = torch.stack([(lp * w).sum() for lp, w in zip(logprobs, weights, strict=True)]).sum()
    return -total / torch.cat(weights).sum()


def _write(folder: Path) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return _write(tmp_path)


# --- the verbs are the trainer's own steps ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"schedule": {"type": "cosine", "warmup": 0.25}, "objective": {"label_smoothing": 0.1}, "neftune_noise_alpha": 5},
        {"method": {"type": "full"}, "max_grad_norm": None},
        {"optimizer": {"type": "adafactor"}},
    ],
    ids=["lora", "full", "by matrix"],
)
def test_verbs_give_the_bits_of_scheduled_steps(more: dict[str, Any], data: str) -> None:
    fields = FIELDS | more | {"steps": 4}
    steps, hand = live(), live()
    a, b = steps.add(fields | {"data": data, "batch_size": 4}), hand.add(fields)
    examples = b.examples(RECORDS)
    for step in range(4):
        (truth,) = steps.step()
        assert len(inner(steps).chunks()) > 1
        chosen = [examples[i] for i in step_indices(step, len(examples), 4, None, 4, FIELDS["seed"])]
        loss, done = b.forward_backward(chosen), b.optim_step()
        assert (loss.loss, done.lr, done.grad_norm, done.step) == (truth.loss, truth.lr, truth.grad_norm, step + 1)
        assert (done.examples, done.tokens, done.label_tokens, done.total_tokens) == (
            truth.examples, truth.tokens, truth.label_tokens, truth.total_tokens)  # fmt: skip
    assert same(bits(steps), bits(hand))
    assert a.finished and b.finished and steps.step() == [] and hand.step() == []
    b.forward_backward(examples)
    with pytest.raises(InputError, match="has done its 4 steps"):
        b.optim_step()
    assert b.optim_step(lr=0.5).lr == 0.5


def test_an_objective_may_be_another_for_once() -> None:
    smooth, examples = {"type": "sft", "label_smoothing": 0.2}, invented(9, 30)
    trainer = live()
    own, given = trainer.add(FIELDS | {"name": "own", "objective": smooth}), trainer.add(FIELDS | {"name": "given"})
    plain = given.forward_backward(examples).loss
    given.optim_step(lr=0.0)
    assert given.forward_backward(examples, objective=smooth).loss != plain
    own.forward_backward(examples)
    own.optim_step(lr=0.0)  # both at the same step, with the same dropout
    own.forward_backward(examples)
    assert torch.equal(gradient(trainer, "own"), gradient(trainer, "given"))


@pytest.mark.parametrize("plan", [{"recompute": "blocks"}, {"recompute": "blocks", "offload": "activations"}], ids=str)
def test_what_is_recomputed_or_kept_elsewhere_changes_no_bit(
    plan: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("snugtune.model.spill.lies_in_memory", lambda _: False)  # here /tmp may do so
    found = []
    for how in ({}, plan):
        trainer = live(**how)
        job = trainer.add(FIELDS)
        job.forward_backward(invented(9, 30))
        job.forward_backward_custom(invented(30, 17), mean_nll)
        found.append(gradient(trainer))
    assert torch.equal(*found)


def test_examples_are_those_of_files(data: str) -> None:
    trainer = live()
    trainer.add(FIELDS | {"name": "a", "data": data})
    b = trainer.add(FIELDS | {"name": "b"})
    ours, truth = b.examples(RECORDS), inner(trainer, "a").data.train
    assert len(ours) == len(truth) == len(RECORDS)
    assert all(torch.equal(x.tokens, y.tokens) and torch.equal(x.weights, y.weights) for x, y in zip(ours, truth, strict=True))
    assert ours[3].source == "record 3"


def test_examples_of_several_kinds_keep_their_order() -> None:
    b = live().add(FIELDS)
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bye"}]}
    text = {"text": "The quick brown fox."}
    mixed = b.examples([talk, text, RECORDS[0], text])
    apart = [b.examples([record])[0] for record in (talk, text, RECORDS[0], text)]
    assert [e.tokens.tolist() for e in mixed] == [e.tokens.tolist() for e in apart]
    assert all((e.weights[1:] > 0).all() for e in (mixed[1], mixed[3])) and not (mixed[0].weights[1:] > 0).all()
    (renamed,) = b.examples([{"q": "Hi", "a": "Bye"}], columns={"prompt": "q", "completion": "a"})
    assert torch.equal(renamed.tokens, mixed[0].tokens)


@pytest.mark.parametrize("arch", ["llama", "bloom"])  # of the second only one sequence goes through at a time
def test_logprobs_are_those_of_the_model(arch: str) -> None:
    trainer = live(arch)
    job, examples = trainer.add(FIELDS), invented(9, 30, 17, 3, 22)
    inside = trainer._bench.trainer.base.model
    training = inside.training
    ours, model = job.logprobs(examples), tiny_model(arch)
    assert inside.training == training
    for example, values in zip(examples, ours, strict=True):
        with torch.no_grad():
            every = F.log_softmax(model(input_ids=example.tokens[None]).logits[0, :-1].double(), -1)
        truth = every.gather(1, example.tokens[1:, None])[:, 0][example.weights[1:] != 0]
        assert relative(values, truth) < 1e-5 and not values.requires_grad


# --- losses of the user's own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_a_custom_likelihood_is_the_objectives_gradient(size: float) -> None:
    """With dropout: the logprobs are those that are differentiated."""
    trainer, examples = live(), invented(9, 30, 17, 40, 22)
    ours, theirs = trainer.add(FIELDS | {"name": "ours"}), trainer.add(FIELDS | {"name": "theirs"})
    for name in ("ours", "theirs"):
        _shake(trainer, name)
    a = ours.forward_backward_custom(examples, lambda logprobs, given: mean_nll(logprobs, given) * size)
    b = theirs.forward_backward(examples)
    assert a.loss == pytest.approx(b.loss * size, rel=1e-5) and (a.tokens, a.label_tokens) == (b.tokens, b.label_tokens)
    assert relative(gradient(trainer, "ours") / size, gradient(trainer, "theirs")) < 1e-5


def test_small_slopes_are_not_lost_in_fp16() -> None:
    """They would be below its smallest number."""
    trainer, examples = LiveTrainer(tiny_base(dtype=torch.float16), replace(PLAN, compute="fp16")), invented(9, 30, 17)
    ours, theirs = trainer.add(FIELDS | {"name": "ours"}), trainer.add(FIELDS | {"name": "theirs"})
    for name in ("ours", "theirs"):
        _shake(trainer, name)
        inner(trainer, name).scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    ours.forward_backward_custom(examples, lambda logprobs, given: mean_nll(logprobs, given) * 1e-4)
    theirs.forward_backward(examples)
    assert relative(gradient(trainer, "ours") / 1e-4, gradient(trainer, "theirs")) < 0.01


def _dpo(beta: float, reference: Sequence[Tensor]) -> Callable[[Sequence[Tensor], Sequence[Example]], Tensor]:
    def loss(logprobs: Sequence[Tensor], examples: Sequence[Example]) -> Tensor:
        gains = torch.stack([(lp - ref).sum() for lp, ref in zip(logprobs, reference, strict=True)])
        return -F.logsigmoid(beta * (gains[0::2] - gains[1::2])).mean()

    return loss


def test_a_loss_on_pairs_has_the_gradient_of_plain_autograd() -> None:
    trainer, pairs = live(), invented(9, 30, 17, 40, 22, 12)
    job = trainer.add(FIELDS | {"method": {"r": 4}})
    reference = [values.double() for values in job.logprobs(pairs)]  # LoRA begins as the base
    _shake(trainer)
    attached = inner(trainer).attached
    assert isinstance(attached, LoraAttached)
    twin = peft_twin(tiny_model("llama", torch.float64), attached)
    every = [F.log_softmax(twin(input_ids=e.tokens[None]).logits[0, :-1], -1).gather(1, e.tokens[1:, None])[:, 0] for e in pairs]
    truth = _dpo(0.3, reference)([lp[e.weights[1:] != 0] for lp, e in zip(every, pairs, strict=True)], pairs)
    truth.backward()
    truth = truth.detach()
    done = job.forward_backward_custom(pairs, _dpo(0.3, reference))
    assert done.loss == pytest.approx(float(truth), rel=1e-5)
    for name, ours in lora_gradients(attached).items():
        theirs = twin.get_parameter(name).grad
        assert theirs is not None and relative(ours, theirs) < 2e-4, name


def _refuse(logprobs: Sequence[Tensor], examples: Sequence[Example]) -> Tensor:
    raise RuntimeError("mine")


def test_what_a_custom_loss_raises_changes_nothing() -> None:
    trainer, examples = live(), invented(9, 30, 17)
    job = trainer.add(FIELDS)
    job.forward_backward(examples[:2])
    before, accumulated = bits(trainer), gradient(trainer)
    with pytest.raises(RuntimeError, match=r"^mine$"):
        job.forward_backward_custom(examples, _refuse)
    for wrong in (lambda *_: 0.5, lambda *_: torch.zeros(()), lambda lps, _: lps[0]):
        with pytest.raises(InputError, match="scalar tensor"):
            job.forward_backward_custom(examples, wrong)
    assert torch.equal(gradient(trainer), accumulated) and same(bits(trainer), before)
    job.forward_backward(examples[2:])
    undisturbed = live()
    other = undisturbed.add(FIELDS)
    other.forward_backward(examples[:2])
    other.forward_backward(examples[2:])
    assert torch.equal(gradient(trainer), gradient(undisturbed))


# --- accumulation -----------------------------------------------------------------------------------------------------


def test_calls_add_up_to_one_batch() -> None:
    examples = invented(20, 30, 17, 40, 22)
    size = float(torch.cat([e.weights for e in examples]).sum())
    trainer = live()
    plain = FIELDS | {"method": {"r": 4}}
    whole, parts, means = (trainer.add(plain | {"name": name}) for name in ("whole", "parts", "means"))
    one = whole.forward_backward(examples)
    two = [parts.forward_backward(part, size=size).loss for part in (examples[:2], examples[2:])]
    assert one.size == pytest.approx(size) and sum(two) == pytest.approx(one.loss, rel=1e-6)
    assert relative(gradient(trainer, "parts"), gradient(trainer, "whole")) < 1e-5
    for part in (examples[:2], examples[2:]):
        means.forward_backward(part)
    shares = [float(torch.cat([e.weights for e in part]).sum()) for part in (examples[:2], examples[2:])]
    alone = live()
    job = alone.add(plain)
    summed = torch.zeros_like(gradient(trainer, "means"))
    for part, share in zip((examples[:2], examples[2:]), shares, strict=True):
        job.forward_backward(part, size=share)
        summed += gradient(alone)
        job.optim_step(lr=0.0)
    assert relative(gradient(trainer, "means"), summed) < 1e-5


def test_a_step_in_several_calls_draws_other_dropout_in_each() -> None:
    """As the chunks of one step do: the same examples twice are not one call with twice the weight."""
    trainer, examples = live(), invented(20)
    job = trainer.add(FIELDS | {"method": {"r": 4, "lora_dropout": 0.5}})
    job.forward_backward(examples)
    once = gradient(trainer)
    job.forward_backward(examples)
    assert relative(gradient(trainer), 2 * once) > 0.05


# --- neighbours -------------------------------------------------------------------------------------------------------


def _hand_driven(name: str, rank: int) -> dict[str, Any]:
    return FIELDS | {"name": name, "method": {"r": rank, "lora_dropout": 0.1}}


def _programme(job: LiveJob, examples: list[Example]) -> list[Callable[[], object]]:
    """Two steps of verbs, of every kind."""
    return [
        lambda: job.forward_backward(examples[:3]),
        lambda: job.forward_backward_custom(examples, mean_nll),
        lambda: job.optim_step(),
        lambda: job.sample(["Hi"], max_new_tokens=1),
        lambda: job.logprobs(examples),
        lambda: job.forward_backward(examples),
        lambda: job.optim_step(lr=3e-2),
    ]


BY_HAND = {"one": (4, invented(9, 30, 17, 40, seed=1)), "two": (8, invented(25, 11, 33, seed=2))}
SCHEDULED = FIELDS | {"name": "three", "batch_size": 5, "steps": 5}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What each job ends with that never had a neighbour."""
    found = {}
    for name, (rank, examples) in BY_HAND.items():
        trainer = live(fused_tokens=0)
        for verb in _programme(trainer.add(_hand_driven(name, rank)), examples):
            verb()
        found[name] = bits(trainer, name)
    trainer = live(fused_tokens=0)
    trainer.add(SCHEDULED | {"data": _write(tmp_path_factory.mktemp("alone"))})
    while trainer.step():
        pass
    return found | {"three": bits(trainer, "three")}


@pytest.mark.parametrize(("seed", "fused", "resident"), [(0, 0, 0), (1, 96, 0), (2, 200, 0), (3, 0, 1), (4, 96, 2)])
def test_verbs_in_any_order_leave_every_job_its_bits(
    seed: int, fused: int, resident: int, alone: dict[str, dict[str, Tensor]], data: str
) -> None:
    """Two jobs by hand and two with data, whose steps begin and end in between; `resident`: how many are in memory."""
    trainer = live(fused_tokens=fused, resident_jobs=resident)
    todo = [_programme(trainer.add(_hand_driven(name, rank)), examples) for name, (rank, examples) in BY_HAND.items()]
    trainer.add(SCHEDULED | {"data": data})
    trainer.add(SCHEDULED | {"name": "four", "data": data, "steps": 3, "seed": 9})
    todo.append([trainer.step] * 8)
    generator = torch.Generator().manual_seed(seed)
    while any(todo):
        left = [verbs for verbs in todo if verbs]
        left[int(torch.randint(len(left), (1,), generator=generator))].pop(0)()
    assert inner(trainer, "three").finished and inner(trainer, "four").finished
    for name, truth in alone.items():
        trainer.wake(name)
        assert same(bits(trainer, name), truth), name


def test_a_job_at_rest_takes_no_part_until_a_verb_wakes_it(data: str) -> None:
    trainer, examples = live(), invented(9, 30)
    scheduled, by_hand = trainer.add(SCHEDULED | {"data": data}), trainer.add(FIELDS | {"name": "by-hand"})
    before = bits(trainer, scheduled.name)
    trainer.rest(scheduled.name)
    assert trainer.step() == [] and inner(trainer, scheduled.name).at_rest is not None
    by_hand.forward_backward(examples)
    with pytest.raises(InputError, match="in the middle of a step"):
        trainer.rest("by-hand")
    assert all(torch.isfinite(logprobs).all() for logprobs in scheduled.logprobs(examples))
    assert inner(trainer, scheduled.name).at_rest is None and same(bits(trainer, scheduled.name), before)
    assert [m.job for m in trainer.step()] == [scheduled.name]
    with pytest.raises(InputError, match="there is no job 'nobody'"):
        trainer.rest("nobody")


def test_a_step_applies_its_own_gradient_alone() -> None:
    trainer, examples = live(), invented(9, 30)
    one, two = (trainer.add(FIELDS | {"name": name}) for name in ("one", "two"))
    one.forward_backward(examples)
    with pytest.raises(InputError, match="job 'two' has no gradient to step on"):
        two.optim_step()
    two.forward_backward(examples)
    before, accumulated = bits(trainer, "one"), gradient(trainer, "one")
    two.optim_step()
    assert same(bits(trainer, "one"), before) and torch.equal(gradient(trainer, "one"), accumulated)
    with pytest.raises(InputError, match="no gradient"):
        two.optim_step()
    one.optim_step()
    assert not same(bits(trainer, "one"), before)


def test_scheduled_jobs_and_those_by_hand_do_not_mix(data: str, tmp_path: Path) -> None:
    trainer = live(fused_tokens=0)
    b = trainer.add(FIELDS | {"name": "b"})
    assert trainer.step() == [] and b.steps_done == 0
    a = trainer.add(FIELDS | {"name": "a", "data": data, "steps": 2, "batch_size": 9})
    examples = invented(9)
    for verb in (lambda: a.forward_backward(examples), lambda: a.forward_backward_custom(examples, mean_nll), a.optim_step):
        with pytest.raises(InputError, match=r"job 'a' has data, and trainer.step\(\) drives it"):
            verb()
    b.forward_backward(examples)
    accumulated = gradient(trainer, "b")
    assert [m.job for m in trainer.step()] == ["a"] and b.steps_done == 0
    assert torch.equal(gradient(trainer, "b"), accumulated)
    a.save_state(tmp_path / "a")
    assert len(a.logprobs(examples)) == 1 and len(a.sample(["Hi"], max_new_tokens=1)) == 1


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_a_saved_state_goes_on_bit_for_bit(state: str, tmp_path: Path) -> None:
    fields = FIELDS | {"steps": 9, "schedule": "linear"}
    examples, first = invented(9, 30, 17, 40), live(optimizer_state=state)
    job = first.add(fields)
    inner(first).scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    _steps(job, examples, 2)
    job.forward_backward(examples)
    job.save_state(tmp_path / "state")
    job.load_state(job.save_state(tmp_path / "state"))  # over itself; what was accumulated is gone
    _steps(job, examples, 2)

    second = live(optimizer_state=state)
    again = second.add(fields | {"name": "again"})
    inner(second, "again").scaler = torch.amp.GradScaler("cpu")
    again.load_state(tmp_path / "state")
    assert again.steps_done == 2
    _steps(again, examples, 2)
    assert same(bits(first), bits(second, "again"))
    assert inner(first).state()[1] == inner(second, "again").state()[1]


def test_a_scheduled_job_goes_on_from_its_state(data: str, tmp_path: Path) -> None:
    """Also in the middle of a step: that one begins anew."""
    fields = FIELDS | {"data": data, "batch_size": 6, "steps": 6}
    alone = live()
    alone.add(fields)
    while alone.step():
        pass
    trainer = live(fused_tokens=200)
    trainer.add(fields | {"name": "short", "batch_size": 1, "steps": 30})
    job = trainer.add(fields)
    while job.steps_done < 2 or "default" not in trainer._bench.trainer.turns:
        assert trainer.step()
    job.save_state(tmp_path / "state")
    inner(trainer).served += 1000  # as of one that joined later
    joined = inner(trainer).served
    job.load_state(tmp_path / "state")
    assert "default" not in trainer._bench.trainer.turns and inner(trainer).served == joined
    while trainer.step():
        pass
    assert same(bits(trainer), bits(alone))


def test_states_that_do_not_fit_are_refused_whole(data: str, tmp_path: Path) -> None:
    trainer, examples = live(), invented(9, 30)
    job = trainer.add(FIELDS)
    _steps(job, examples, 1)
    state = job.save_state(tmp_path / "state")
    _steps(job, examples, 1)
    before = bits(trainer)

    def refused(other: LiveJob, words: str, folder: Path = state) -> None:
        with pytest.raises(InputError, match=words):
            other.load_state(folder)

    # q_proj at rank 8 has as many numbers as q_proj and o_proj at rank 4
    fewer = trainer.add(FIELDS | {"name": "fewer", "method": {"r": 8, "target_modules": ["q_proj"]}})
    more = trainer.add(FIELDS | {"name": "more", "method": {"r": 4, "target_modules": ["q_proj", "o_proj"]}})
    refused(more, "another method than job 'more'", fewer.save_state(tmp_path / "fewer"))
    refused(trainer.add(FIELDS | {"name": "sgd", "optimizer": "sgd"}), "another optimizer")
    refused(live(optimizer_state="8bit").add(FIELDS), "another optimizer")
    refused(live("qwen3").add(FIELDS), "another base")
    refused(trainer.add(FIELDS | {"name": "d", "data": data}), "other data")
    refused(job, "cannot be read as JSON", tmp_path)
    text = (state / "state.json").read_text()
    (state / "state.json").write_text(text.replace('"format": ', '"format": 9'))
    refused(job, "another version")
    (state / "state.json").write_text(text.replace('"step": 1', '"step": "x"'))
    refused(job, "cannot be read: step")
    (state / "state.json").write_text(text)
    (state / "state.safetensors").write_bytes((state / "state.safetensors").read_bytes()[:-8])
    refused(job, "cannot be read")
    assert same(bits(trainer), before) and job.steps_done == 2


@pytest.mark.parametrize("weights", ["fp32", "nf4"])
def test_saved_adapters_answer_as_their_job(weights: str, model_folder: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bye"}, {"role": "user", "content": "What?"}]
    with snugtune.open(model_folder, plan={"weights": weights}) as trainer:
        job = trainer.add(FIELDS | {"max_seq_len": 64})
        base = job.sample(["Hi", talk], max_new_tokens=8)
        examples = job.examples(RECORDS)
        for _ in range(3):
            job.forward_backward(examples)
            job.optim_step(lr=0.05)
        greedy = job.sample(["Hi", talk], max_new_tokens=8)
        drawn = job.sample(["Hi"], max_new_tokens=8, temperature=1.0, top_p=0.9, seed=4)
        folder = job.save(tmp_path / "adapter")
        assert job.save(folder) == folder and job.sample([]) == []
    tuned = snugtune.load(folder, weights=weights)
    assert greedy != base
    assert greedy[0] == tuned.reply("Hi", max_new_tokens=8)
    assert drawn[0] == tuned.reply("Hi", max_new_tokens=8, temperature=1.0, top_p=0.9, seed=4)
    assert "3 steps driven by hand" in (folder / "README.md").read_text()


def test_a_gradient_that_is_not_finite_is_skipped_and_many_are_told(tmp_path: Path) -> None:
    trainer, examples = live(), invented(9, 30)
    job = trainer.add(FIELDS)
    _steps(job, examples, 1)
    job.save_state(tmp_path / "state")
    before = bits(trainer)
    for step in range(10):
        job.forward_backward_custom(examples, lambda lps, _: lps[0].sum() * math.inf)
        if step == 9:
            with pytest.raises(DivergedError, match="10 steps in a row"):
                job.optim_step()
        else:
            assert job.optim_step().skipped
    assert same(bits(trainer), before)
    with pytest.raises(DivergedError):
        job.save(tmp_path / "adapter")
    assert trainer.step() == []  # it tells of scheduled jobs
    job.load_state(tmp_path / "state")
    _steps(job, examples, 1)
    assert job.failure is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["Ctrl-C", "memory"])
def test_half_a_step_is_not_gone_on_from(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But from the last saved state, to the bit."""
    trainer, undisturbed, examples = live(), live(), invented(9, 30)
    job, other = trainer.add(FIELDS), undisturbed.add(FIELDS)
    _steps(job, examples, 1)
    _steps(other, examples, 2)
    job.save_state(tmp_path / "state")
    before = bits(trainer)
    job.forward_backward(examples)

    def publish() -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(inner(trainer).attached, "publish", publish)
        with pytest.raises(type(error)):
            job.optim_step()
    assert not same(bits(trainer), before) and job.steps_done == 1
    for verb in (lambda: job.forward_backward(examples), lambda: job.save_state(tmp_path / "torn")):
        with pytest.raises(JobFailedError, match="broken off in the middle of its optimizer step"):
            verb()
    job.load_state(tmp_path / "state")
    assert job.failure is None and same(bits(trainer), before)
    _steps(job, examples, 1)
    assert same(bits(trainer), bits(undisturbed))


# --- jobs that come and go --------------------------------------------------------------------------------------------


def test_a_scheduled_job_that_breaks_is_told_when_no_step_is_left(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = live()
    good = trainer.add(FIELDS | {"name": "good", "data": data, "steps": 3, "batch_size": 3})
    bad = trainer.add(FIELDS | {"name": "bad", "data": data, "steps": 3, "batch_size": 3, "seed": 1})
    trainer.step()
    monkeypatch.setattr(inner(trainer, "bad").optimizer, "step", _broken)
    while not good.finished:
        assert trainer.step()
    for _ in range(2):
        with pytest.raises(JobFailedError, match="job 'bad': ZeroDivisionError: mine") as told:
            trainer.step()
        assert isinstance(told.value.__cause__, ZeroDivisionError)
    with pytest.raises(JobFailedError, match="mine"):
        bad.sample(["Hi"])
    trainer.remove("bad")
    assert trainer.step() == []
    alone = live()
    alone.add(FIELDS | {"name": "good", "data": data, "steps": 3, "batch_size": 3})
    while alone.step():
        pass
    assert same(bits(trainer, "good"), bits(alone, "good"))


def _broken(*_: object) -> None:
    raise ZeroDivisionError("mine")


def test_held_out_losses_come_with_the_steps_and_may_end_a_job(data: str) -> None:
    trainer = live()
    more = {"validation": 0.3, "eval_every": 2, "steps": 50, "early_stopping": {"patience": 1, "min_delta": 1e9}}
    job = trainer.add(FIELDS | {"data": data, "batch_size": 3} | more)
    metrics = list(itertools.chain.from_iterable(iter(trainer.step, [])))
    assert [m.step for m in metrics] == [1, 2, 3, 4] and job.finished  # the second is no better by so much
    assert [m.eval_loss is not None for m in metrics] == [False, True, False, True]


def test_jobs_leave_nothing_behind(data: str) -> None:
    trainer = live()
    base = trainer._bench.trainer.base
    job, other = trainer.add(FIELDS | {"neftune_noise_alpha": 5}), trainer.add(FIELDS | {"name": "d", "data": data})
    job.forward_backward(invented(9))
    trainer.remove("default")
    assert not any("default" in site.slots for site in base.sites.values()) and not base.embedding_noise
    with pytest.raises(InputError, match="job 'default' was removed; add it anew"):
        job.optim_step()
    anew = trainer.add(FIELDS)
    with pytest.raises(InputError, match="was removed"):
        job.logprobs(invented(9))
    assert anew.steps_done == 0 and other.steps_done == 0
    gone = weakref.ref(base)
    with trainer:
        pass
    with pytest.raises(InputError, match="closed"):
        anew.sample(["Hi"])
    with pytest.raises(InputError, match="closed"):
        trainer.step()
    trainer.close()
    del base
    gc.collect()
    assert gone() is None


def test_a_job_that_finds_no_room_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path / "file"))  # where "default" would rest
    trainer = live(resident_jobs=1)
    job = trainer.add(FIELDS)
    with pytest.raises(StorageError, match="cannot make a folder"):
        trainer.add(FIELDS | {"name": "second"})
    kept = trainer._bench.trainer
    assert {name for site in kept.base.sites.values() for name in site.slots} == {"default"} == set(kept.jobs)
    _steps(job, invented(9), 1)
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path / "cache"))
    assert trainer.add(FIELDS | {"name": "second"}).steps_done == 0


def test_opening_sweeps_what_killed_processes_left_at_rest(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of those that live: here a trainer of this process, whose job wakes as it was."""
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path / "cache"))
    killed = tmp_path / "cache" / ".part-resting-killed"
    killed.mkdir(parents=True)
    (killed / "a.safetensors").write_bytes(b"x")
    (killed / ".lock").touch()
    trainer = live(resident_jobs=1)
    job, _ = trainer.add(FIELDS), trainer.add(FIELDS | {"name": "second"})
    assert inner(trainer).at_rest is not None and killed.exists()
    with snugtune.open(model_folder):
        pass
    assert not killed.exists()
    _steps(job, invented(9), 1)
    assert job.steps_done == 1


def test_mistakes_are_told_in_a_line(data: str, tmp_path: Path, model_folder: Path) -> None:
    trainer = live()
    b = trainer.add(FIELDS)
    long = RECORDS[0] | {"completion": "word " * 60}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    weightless = [replace(invented(9)[0], weights=torch.zeros(9))]
    outside = [replace(invented(9)[0], tokens=torch.full((9,), 5000))]
    first = [replace(invented(9)[0], weights=torch.ones(9))]
    mistakes: list[tuple[Callable[[], object], str]] = [
        (lambda: trainer.add(FIELDS), "there is a job 'default' already"),
        (lambda: trainer.add({"name": "c", "rank": 4}), "job: .*'rank'.*method.r"),
        (lambda: trainer.add({"name": "c", "batch_size": 4}), "batch_size: is for jobs with data"),
        (lambda: trainer.add({"name": "c", "schedule": "cosine"}), "schedule: needs steps in a job without data"),
        (lambda: trainer.add({"name": "c", "data": data, "samples": {"every": 1}}), "samples: only in runs"),
        (lambda: trainer.add({"name": "c", "data": str(tmp_path / "none.jsonl")}), "none.jsonl"),
        (lambda: trainer.add({"name": "c", "method": {"target_modules": ["x"]}}), "matches no linear"),
        (lambda: trainer.add({"name": "c", "method": "full"}), "'full' of job 'c' cannot share a base"),
        (lambda: trainer.add("c"), "job: expected a mapping of fields, found str"),  # pyright: ignore
        (lambda: trainer.remove("c"), "there is no job 'c'; there are default"),
        (lambda: live("llama", weights="nf4").add({"method": "full"}), "plan.weights: nf4 needs frozen weights"),
        (lambda: live(optimizer_state="8bit").add({"optimizer": "adafactor"}), "8bit is nothing for optimizer: adafactor"),
        (lambda: b.examples([RECORDS[0], {"question": 1}]), "examples: record 1 cannot be used: of no known form"),
        (lambda: b.examples([RECORDS[0], long]), "examples: record 1: examples cut to max_seq_len=48"),
        (lambda: b.examples([{"chosen": "x", "rejected": "y", "prompt": "z"}]), "examples: record 0: preferences"),
        (lambda: b.examples({"text": "x"}), "records: expected a list, found dict"),  # pyright: ignore
        (lambda: b.forward_backward([]), "examples: none are given"),
        (lambda: b.forward_backward(RECORDS), r"example 0 is a dict, no Example; job.examples\(\) makes them"),  # pyright: ignore
        (lambda: b.forward_backward(invented(49)), "example 0 has 49 tokens, more than max_seq_len 48"),
        (lambda: b.forward_backward(weightless), "needs a token to score"),
        (lambda: b.forward_backward(first), "weight 0 for its first"),
        (lambda: b.forward_backward(outside), "gives token 5000"),
        (lambda: b.forward_backward(invented(9), objective="dpo"), "forward_backward: .*dpo"),
        (lambda: b.forward_backward(invented(9), size=0), "size: a loss cannot be divided by 0"),
        (lambda: b.optim_step(), "no gradient to step on"),
        (lambda: b.sample("Hi"), "prompts: expected a list, found str"),
        (lambda: b.sample(["Hi"], temperature=-1), "temperature of at least 0"),
        (lambda: b.sample([5]), "cannot answer a conversation"),  # pyright: ignore
        (lambda: b.save(tmp_path / "full"), "holds something else"),
        (lambda: b.save_state(tmp_path / "full" / "thesis.txt"), "is a file; give a folder"),
        (lambda: b.save(""), "names no folder"),
        (lambda: b.load_state(tmp_path / "none"), "none"),
        (lambda: snugtune.open(model_folder, plan={"weight": "fp32"}), "open: plan: .*'weight'; did you mean 'weights'"),
        (lambda: snugtune.open(tmp_path / "none"), "none"),
        (lambda: snugtune.open(model_folder, device="gpu"), "open: device: .*gpu"),
    ]
    for number, (mistake, words) in enumerate(mistakes):
        with pytest.raises(InputError, match=words) as told:
            mistake()
        assert "\n" not in str(told.value), number
    assert list(trainer._bench.trainer.jobs) == ["default"] and not (tmp_path / "none").exists()
    assert (tmp_path / "full" / "thesis.txt").exists()


def test_a_base_that_was_trained_itself_takes_no_more_jobs() -> None:
    trainer = live()
    trainer.add({"method": "full"})
    trainer.remove("default")
    with pytest.raises(InputError, match="'default' trained the base's own weights; open the model anew"):
        trainer.add(FIELDS)
    with pytest.raises(InputError, match="cannot share a base"):
        used = live()
        used.add(FIELDS)
        used.remove("default")
        used.add({"method": "full"})


@pytest.mark.parametrize("config", [JobConfig.model_validate, dict], ids=["config", "mapping"])
def test_a_config_is_a_job_too(config: Callable[[Any], Any], data: str) -> None:
    job = live().add(config({"name": "x", "data": data, "method": {"type": "full"}, "steps": 2}))
    assert job.config.method.type == "full" and (job.name, job.config.steps) == ("x", 2)


def test_narrow_bases_are_tested_with_the_first_job(model_folder: Path) -> None:
    with snugtune.open(model_folder, plan={"weights": "nf4"}) as trainer:
        assert not any(note.startswith("checked") for note in trainer.notes)
        job = trainer.add(FIELDS)
        trainer.add(FIELDS | {"name": "second"})
        assert sum(note.startswith("checked: gradients of") for note in trainer.notes) == 1
        assert any("nf4" in note for note in trainer.notes)
        job.forward_backward_custom(invented(20), mean_nll)
        assert not job.optim_step().skipped


def _shake(trainer: LiveTrainer, name: str = "default") -> None:
    attached = inner(trainer, name).attached
    assert isinstance(attached, LoraAttached)
    shake(attached)


def _steps(job: LiveJob, examples: list[Example], count: int) -> None:
    for _ in range(count):
        job.forward_backward(examples)
        job.optim_step()
