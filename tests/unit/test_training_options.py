"""Optimizers, early stopping, keeping the best, samples, noise and smoothing, on a tiny model and real folders."""

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from safetensors.torch import load_file
from torch import Tensor
from transformers.optimization import Adafactor

import snugtune
from conftest import sequences, tiny_base, tiny_tokenizer
from snugtune.config import JobConfig, to_config
from snugtune.data.pack import collate, make_chunk
from snugtune.errors import InputError, Interrupted
from snugtune.memory.plan import Planned, unless_idle
from snugtune.methods.lora import Lora, LoraConfig
from snugtune.observer import Silent
from snugtune.optim import AdafactorConfig, AdamWConfig, LionConfig, SgdConfig
from snugtune.report import write_report
from snugtune.run import train
from snugtune.training.examples import JobData
from snugtune.training.job import Job, quarantine
from snugtune.training.metrics import StepMetrics
from snugtune.types import Example, Plan

OPTIMIZERS = {
    "adamw": (AdamWConfig(lr=0.01, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
    "sgd": (SgdConfig(lr=0.1, momentum=0.8, nesterov=True), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True)),
    "plain sgd": (SgdConfig(lr=0.1, momentum=0.0), lambda p: torch.optim.SGD(p, lr=0.1)),
    "lion": (LionConfig(lr=0.01, weight_decay=0.1), lambda p: Lion(p, lr=0.01, weight_decay=0.1)),
    "adafactor": (
        AdafactorConfig(lr=0.01),
        lambda p: Adafactor(p, lr=0.01, scale_parameter=False, relative_step=False),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_steps_each_weight_as_if_it_stood_alone(name: str) -> None:
    """LoRA's factors lie in one flat buffer; what an optimizer makes of them must not depend on that."""
    config, truth = OPTIMIZERS[name]
    attached = Lora().attach(tiny_base(), "job", LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), seed=0)
    weights = attached.matrices()
    assert sum(w.numel() for w in weights) == attached.flat.numel()
    copies = [w.detach().clone().requires_grad_() for w in weights]
    ours, theirs = config.build(weights if config.by_matrix else attached.parameters()), truth(copies)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for weight, copy in zip(weights, copies, strict=True):
            assert weight.grad is not None
            weight.grad.copy_(torch.randn(weight.shape, generator=generator))
            copy.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    for weight, copy in zip(weights, copies, strict=True):
        torch.testing.assert_close(weight.detach(), copy.detach(), rtol=1e-6, atol=1e-7)


def test_adafactor_keeps_rows_and_columns_alone() -> None:
    attached = Lora().attach(tiny_base(), "job", LoraConfig(r=8), seed=0)
    optimizer = AdafactorConfig().build(attached.matrices())
    optimizer.step()
    state = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    assert sum(v.numel() for v in state) < attached.flat.numel() / 4


# --- whole runs -------------------------------------------------------------------------------------------------------


def fields(place: Path, model: Path, **more: Any) -> dict[str, Any]:
    """A short run with a held-out part."""
    lines = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(12)
    ]
    for name, part in (("train.jsonl", lines[:8]), ("held_out.jsonl", lines[8:])):
        (place / name).write_text("".join(json.dumps(line) + "\n" for line in part), encoding="utf-8")
    return {
        "model": str(model),
        "data": str(place / "train.jsonl"),
        "validation": str(place / "held_out.jsonl"),
        "output": str(place / "run"),
        "max_seq_len": 64,
        "batch_size": 4,
        "steps": 8,
        "eval_every": 2,
        "checkpoint_every": 3,
        "method": {"type": "lora", "r": 4, "lora_dropout": 0.1},
        "plan": {"weights": "fp32"},
        **more,
    }


class Stopper(Silent):
    """Asks the run to stop after a step, and keeps what it is told."""

    def __init__(self, after: int | None = None):
        self.after = after
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, metrics: StepMetrics) -> None:
        if metrics.step == self.after:
            os.kill(os.getpid(), signal.SIGTERM)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def adapter(run: Path) -> Mapping[str, Tensor]:
    return load_file(run / "adapters" / "default" / "adapter_model.safetensors")


def result(run: Path) -> Mapping[str, Tensor]:
    """Of whatever method."""
    (file,) = (*run.glob("adapters/default/*.safetensors"), *run.glob("models/default/*.safetensors"))
    return load_file(file)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_measurements(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k not in ("tokens_per_second", "peak_memory")} for e in entries]


OPTIONS: dict[str, dict[str, Any]] = {
    "sgd, samples": {"optimizer": {"type": "sgd", "lr": 0.1}, "samples": {"every": 2, "max_new_tokens": 6, "count": 2}},
    "lion, noise and smoothing": {
        "optimizer": "lion",
        "neftune_noise_alpha": 5,
        "objective": {"type": "sft", "label_smoothing": 0.2},
    },
    "adafactor": {"optimizer": {"type": "adafactor", "lr": 0.01}},
    "galore": {"optimizer": {"type": "galore", "rank": 2, "update_every": 3}},
    "apollo": {"optimizer": {"type": "apollo", "rank": 2, "update_every": 3}},
    "apollo mini, full": {"method": "full", "optimizer": {"type": "apollo", "rank": 1, "scaling": "tensor"}},
    "gradients released": {
        "method": "full",
        "max_grad_norm": None,
        "plan": {"weights": "bf16", "gradients": "released"},
        "optimizer": {"lr": 1e-3},
    },
    "blocks in turns": {"method": {"type": "rotate", "every": 2, "ends": True}, "plan": {"weights": "bf16"}},
    "the best of blocks in turns": {
        "method": {"type": "rotate", "every": 3},
        "plan": {"weights": "bf16"},
        "optimizer": {"lr": 0.05},
        "keep_best": True,
    },
    "adamw in 8 bits": {"plan": {"weights": "fp32", "optimizer_state": "8bit"}},
    "lion in 8 bits, the best": {
        "plan": {"optimizer_state": "8bit"},
        "optimizer": {"type": "lion", "lr": 0.1},
        "keep_best": True,
    },
    "keep_best": {"keep_best": True, "optimizer": {"lr": 0.5}},
    "early_stopping": {"early_stopping": {"patience": 2}, "optimizer": {"lr": 0.5}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_with_any_option_a_resumed_run_ends_bit_equal(tmp_path: Path, model_folder: Path, name: str) -> None:
    whole = fields(tmp_path, model_folder, **OPTIONS[name])
    parted = whole | {"output": str(tmp_path / "parted")}
    train(to_config(whole))
    with pytest.raises(Interrupted):
        train(to_config(parted), Stopper(after=4))
    train(to_config(parted))
    assert equal(result(tmp_path / "run"), result(tmp_path / "parted"))
    for log in ("metrics.jsonl", "samples.jsonl"):
        ours, truth = tmp_path / "parted" / log, tmp_path / "run" / log
        assert ours.exists() == truth.exists()
        if truth.exists():
            assert without_measurements(lines(ours)) == without_measurements(lines(truth))


def test_the_best_state_is_kept(tmp_path: Path, model_folder: Path) -> None:
    """A rate that is far too high makes the held-out loss rise: the result must be the run cut at its best step."""
    config = fields(tmp_path, model_folder, keep_best=True, optimizer={"lr": 0.05})
    seen = Stopper()
    train(to_config(config), seen)
    evaluations = {m["step"]: m["eval_loss"] for m in lines(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in m}
    best = min((loss, step) for step, loss in evaluations.items() if step)[1]
    assert best < 8, "the loss never rose; the test shows nothing"
    assert any(f"the state of step {best}" in note for note in seen.notes)
    cut = config | {"output": str(tmp_path / "cut"), "steps": best, "keep_best": False, "schedule": "constant"}
    train(to_config(cut))
    assert equal(adapter(tmp_path / "run"), adapter(tmp_path / "cut"))
    card = (tmp_path / "run" / "adapters" / "default" / "README.md").read_text()
    assert f"those of step {best}, held-out loss {evaluations[best]:.4f}" in card


def test_a_loss_that_rises_stops_the_job(tmp_path: Path, model_folder: Path) -> None:
    """And where it goes back to its best state, the last samples are of that: they are what the result answers."""
    options = {"early_stopping": {"patience": 3}, "keep_best": True, "samples": {"prompts": ["What is 3?"], "max_new_tokens": 12}}
    fp32 = {"weights": "fp32"}  # in bf16 what this untrained model answers next is often a tie
    config = fields(tmp_path, model_folder, optimizer={"lr": 0.5}, eval_every=1, steps=30, plan=fp32, **options)
    seen = Stopper()
    train(to_config(config), seen)
    entries = lines(tmp_path / "run" / "metrics.jsonl")
    evaluations = [m["eval_loss"] for m in entries if m["step"] > 0]
    best = evaluations.index(min(evaluations))
    assert entries[-1]["step"] == best + 1 + 3 < 30
    assert any("no longer falls" in note for note in seen.notes)
    assert train(to_config(config)).already_finished
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert [e["step"] for e in samples] == [0, entries[-1]["step"]]
    tuned = snugtune.load(tmp_path / "run", weights="fp32")
    assert tuned.reply("What is 3?", max_new_tokens=12) == samples[-1]["answer"]
    assert not list((tmp_path / "run" / "checkpoints").glob("best-*")), "the best state is the result now"


def judged(losses: Sequence[float | None], patience: int, min_delta: float = 0.0) -> tuple[list[bool], Job]:
    """A job that is shown these held-out losses, from step 1."""
    config = JobConfig.model_validate(
        {
            "data": "x",
            "validation": 0.1,
            "eval_every": 1,
            "steps": 99,
            "early_stopping": {"patience": patience, "min_delta": min_delta},
        }
    )
    example = Example(torch.tensor([1, 2]), torch.tensor([0.0, 1.0]), "x:1")
    attached = Lora().attach(tiny_base(), "default", LoraConfig(), seed=0)
    job = Job(config, JobData((example,)), attached, config.optimizer.build(attached.parameters()), capacity=0)
    improved = []
    for step, loss in enumerate(losses, 1):
        improved.append(job.judge(StepMetrics("default", step, 99, 0.0, eval_loss=loss, eval_tokens=1)))
    return improved, job


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "improved", "stopped"),
    [
        ([3.0, 2.0, 2.5, 2.4], 2, 0.0, [True, True, False, False], True),
        ([3.0, 2.0, 2.5, 1.9], 2, 0.0, [True, True, False, True], False),
        ([3.0, 2.95, 2.9], 2, 0.2, [True, True, True], True),
        ([3.0, 2.9, 2.7], 2, 0.2, [True, True, True], False),
        ([None, None], 2, 0.0, [False, False], True),
        ([None, 5.0], 2, 0.0, [False, True], False),
    ],
)
def test_patience(losses: list[float | None], patience: int, min_delta: float, improved: list[bool], stopped: bool) -> None:
    """Small gains do not count for patience, but the best is the best; a loss that is not finite never is."""
    seen, job = judged(losses, patience, min_delta)
    assert seen == improved and job.stopped_early is stopped


def test_the_state_before_training_is_no_evaluation_to_beat() -> None:
    _, job = judged([], 1)
    assert not job.judge(StepMetrics("default", 0, 99, 0.0, eval_loss=0.1, eval_tokens=1))
    assert job.best is None


def test_a_result_no_better_than_the_base_says_so(tmp_path: Path, model_folder: Path) -> None:
    """And every count of its held-out loss is that of the state that is kept."""
    learned = {"method": "full", "steps": 40, "optimizer": {"lr": 3e-3}, "output": str(tmp_path / "learned")}
    good = train(to_config(fields(tmp_path, model_folder, **learned))).artefacts["default"]
    seen = Stopper()
    options = {"keep_best": True, "eval_every": 1, "steps": 3, "optimizer": {"lr": 5.0}}
    result = train(to_config(fields(tmp_path, good, **options)), seen)
    evaluations = [m["eval_loss"] for m in lines(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in m]
    assert min(evaluations[1:]) > evaluations[0], "the loss fell; the test shows nothing"
    assert any("no evaluation was better than the untuned model's" in note for note in seen.notes)
    assert (result.held_out["default"][0], result.held_out["default"][-1]) == (evaluations[0], min(evaluations[1:]))
    kept = evaluations.index(min(evaluations[1:]))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"{min(evaluations[1:]):.3f} (step {kept})" in page
    assert kept == 3 or f"(the state of step {kept})" in page


def test_a_report_writes_over_reports_alone(tmp_path: Path, model_folder: Path) -> None:
    train(to_config(fields(tmp_path, model_folder, steps=1)))
    data = (tmp_path / "train.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"train\.jsonl: it exists and is no report"):
        write_report(tmp_path / "run", tmp_path / "train.jsonl")
    assert (tmp_path / "train.jsonl").read_bytes() == data
    for _ in range(2):
        assert write_report(tmp_path / "run", tmp_path / "page.html").is_file()


def test_a_failure_outlives_a_checkpoint(tmp_path: Path) -> None:
    """A job that has just been given up is not tried again on resume."""
    _, job = judged([3.0], 2)
    job.failure = "ten steps in a row"
    _, again = judged([], 2)
    again.load_state(*job.state())
    assert again.ended and again.failure == job.failure and again.best == job.best


def test_what_a_job_is_judged_by_may_stand_in_the_job(tmp_path: Path, model_folder: Path) -> None:
    """Fields at the top are defaults of the jobs: only a whole job can lack something."""
    config = fields(tmp_path, model_folder, keep_best=True)
    held_out = config.pop("validation")
    jobs = to_config(config | {"jobs": [{"name": "a", "validation": held_out}]}).resolved_jobs()
    assert jobs[0].keep_best and jobs[0].validation == held_out
    with pytest.raises(InputError, match="keep_best: needs validation"):
        to_config(config | {"jobs": [{"name": "a"}]})


@pytest.mark.parametrize("method", ["full", {"type": "freeze", "embeddings": True}, {"type": "freeze", "last_blocks": 1}])
def test_noise_goes_with_every_method(tmp_path: Path, model_folder: Path, method: Any) -> None:
    """Embeddings that train themselves too."""
    train(to_config(fields(tmp_path, model_folder, steps=2, method=method, neftune_noise_alpha=5)))
    losses = [m["loss"] for m in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in m]
    assert len(losses) == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"early_stopping": {}, "validation": None}, "early_stopping: needs validation"),
        ({"keep_best": True, "eval_every": None}, "keep_best: needs eval_every"),
        ({"optimizer": {"type": "sgd", "momentum": 0, "nesterov": True}}, "nesterov: needs momentum"),
        ({"objective": {"type": "sft", "label_smoothing": 1.0}}, "objective.label_smoothing"),
        ({"neftune_noise_alpha": 0}, "neftune_noise_alpha"),
        ({"optimizer": "lyon"}, "did you mean 'lion'"),
        ({"samples": {"prompt": "Hi"}}, "did you mean 'prompts'"),
        ({"samples": {"prompts": [" "]}}, "samples.prompts: an empty prompt"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, model_folder: Path, wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        to_config(fields(tmp_path, model_folder, **wrong))


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_what_the_result_answers(tmp_path: Path, model_folder: Path) -> None:
    """Straight from the training weights, and equal to what the saved adapter says; step 0 is the base."""
    prompts = ["What is 3?", "Say <|im_end|> aloud."]
    config = fields(tmp_path, model_folder, samples={"prompts": prompts, "max_new_tokens": 12}, optimizer={"lr": 0.01})
    train(to_config(config))
    entries = lines(tmp_path / "run" / "samples.jsonl")
    assert [(e["step"], e["index"], e["prompt"]) for e in entries] == [(s, i, p) for s in (0, 8) for i, p in enumerate(prompts)]
    tuned = snugtune.load(tmp_path / "run")
    after = [e["answer"] for e in entries if e["step"] == 8]
    assert [tuned.reply(p, max_new_tokens=12) for p in prompts] == after
    assert [e["answer"] for e in entries if e["step"] == 0] != after


def test_without_prompts_the_held_out_examples_ask(tmp_path: Path, model_folder: Path) -> None:
    train(to_config(fields(tmp_path, model_folder, samples={"every": 4, "count": 2, "max_new_tokens": 3})))
    entries = lines(tmp_path / "run" / "samples.jsonl")
    assert [(e["step"], e["prompt"]) for e in entries] == [(s, f"What is {i}?") for s in (0, 4, 8) for i in (8, 9)]


def test_a_document_is_gone_on_with(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 6)
    config = fields(tmp_path, model_folder, samples={"every": 4, "max_new_tokens": 3}, objective="clm")
    config |= {"data": str(tmp_path / "text.txt"), "validation": None, "eval_every": None}
    train(to_config(config))
    entries = lines(tmp_path / "run" / "samples.jsonl")
    assert {e["prompt"] for e in entries} == {entries[0]["prompt"]}
    assert "The quick brown fox jumps over the lazy dog. ".startswith(entries[0]["prompt"][:20])
    assert 1 < len(tiny_tokenizer()(entries[0]["prompt"])["input_ids"]) <= 32


def test_asking_changes_nothing_of_what_is_learned(tmp_path: Path, model_folder: Path) -> None:
    quiet = fields(tmp_path, model_folder, steps=4)
    train(to_config(quiet))
    train(to_config(quiet | {"output": str(tmp_path / "asked"), "samples": {"every": 1, "max_new_tokens": 4}}))
    assert equal(adapter(tmp_path / "run"), adapter(tmp_path / "asked"))


# --- token statistics, noise ------------------------------------------------------------------------------------------


def test_tokens_are_counted(tmp_path: Path, model_folder: Path) -> None:
    train(to_config(fields(tmp_path, model_folder, steps=3)))
    steps = [m for m in lines(tmp_path / "run" / "metrics.jsonl") if m["step"]]
    assert all(m["examples"] == 4 for m in steps)
    for total, each in (("total_tokens", "tokens"), ("total_label_tokens", "label_tokens")):
        assert [m[total] for m in steps] == torch.tensor([m[each] for m in steps]).cumsum(0).tolist()


def chunk(job: str, *lengths: int, seed: int = 0) -> Any:
    examples = [Example(t, torch.ones(len(t)), "x:1") for t in sequences(*lengths, seed=seed)]
    return make_chunk(examples, job, step=0, index=0, job_seed=seed)


def test_noise_is_neftunes_and_for_its_job_alone() -> None:
    """Uniform within +-alpha / sqrt(L D) of each sequence, a function of the chunk: the same beside any neighbour."""
    base = tiny_base()
    base.embedding_noise["noisy"] = 5.0
    embeddings = base.model.get_input_embeddings()
    noisy, quiet = chunk("noisy", 40, 9), chunk("quiet", 12, seed=1)

    def embedded(*chunks: Any, training: bool = True) -> Tensor:
        batch = collate(chunks, 16)
        base.model.train(training)
        with base.routed(batch), torch.no_grad():
            return embeddings(batch.input_ids)[0]

    plain = embeddings.weight.detach()[noisy.tokens]
    alone = embedded(noisy) - plain
    for part in (slice(0, 40), slice(40, 49)):
        size = 5.0 / (alone[part].numel() ** 0.5)
        assert float(alone[part].abs().max()) <= size * (1 + 1e-4)
        assert float(alone[part].std()) == pytest.approx(size / 3**0.5, rel=0.1)
        assert abs(float(alone[part].mean())) < size / 10
    beside = embedded(quiet, noisy)
    assert torch.equal(beside[12:61], embedded(noisy))
    assert torch.equal(beside[:12], embeddings.weight[quiet.tokens])
    assert torch.equal(embedded(noisy, training=False), plain), "an evaluation hears no noise"
    assert not torch.equal(embedded(chunk("noisy", 40, 9, seed=1))[:40], embedded(noisy)[:40])


def test_smoothing_is_for_training_alone(tmp_path: Path, model_folder: Path) -> None:
    """The first held-out loss is that of the base, smoothed or not; the first training loss is not."""
    losses = []
    for name, smoothing in (("plain", 0.0), ("smooth", 0.5)):
        objective = {"type": "sft", "label_smoothing": smoothing}
        config = fields(tmp_path, model_folder, output=str(tmp_path / name), steps=1, objective=objective)
        train(to_config(config))
        losses.append(lines(tmp_path / name / "metrics.jsonl"))
    assert losses[0][0]["eval_loss"] == losses[1][0]["eval_loss"]
    assert losses[0][1]["loss"] != losses[1][1]["loss"]


def test_a_shortage_of_memory_is_no_jobs_own() -> None:
    """torch tells of it on CPU by a plain RuntimeError; any other is the job's."""
    job: Any = SimpleNamespace(name="j", failure=None, error=None)
    with pytest.raises(RuntimeError, match="can't allocate memory"), quarantine(job):
        torch.empty(2**60)
    assert job.failure is None
    with quarantine(job):
        raise RuntimeError("a bug")
    assert job.failure == "job 'j': RuntimeError: a bug"


@pytest.mark.parametrize(
    ("chunks", "room", "shared"),
    [([16.0, 16.0], 512, True), ([256.0, 256.0, 1000.0], 512, True), ([16.0, 300.0], 512, False), ([300.0, 400.0], 0, False)],
)
def test_forwards_are_shared_where_two_chunks_are_short(chunks: list[float], room: int, shared: bool) -> None:
    plan = Planned(Plan("cpu", "fp32", 1, "none", 512, 1, "fp32", fused_tokens=room), ())
    found = unless_idle(plan, chunks)
    assert bool(found.plan.fused_tokens) == shared and (found is plan) == (shared or not room)
    assert found is plan or found.reasons[-1].startswith("jobs take turns after all")
