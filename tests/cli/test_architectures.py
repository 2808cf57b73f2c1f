"""The whole road for many families of models: train, interrupt and resume, save, load, merge, answer; and PEFT agrees.

Each is a tiny random model in a folder on disk and goes through what a script would call. The truths are an uninterrupted
run (bit for bit), PEFT over a fresh copy of the base, and plain transformers on the merged folder.
"""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from common import messages, write_lines
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import snugtune
from conftest import ARCHS, relative, sequences, tiny_model, tiny_tokenizer
from snugtune.config import to_config
from snugtune.errors import Interrupted
from snugtune.export import export
from snugtune.memory.plan import make_plan
from snugtune.methods.lora import Lora
from snugtune.model.base import load_base
from snugtune.model.source import find_model, mute
from snugtune.run import Silent
from snugtune.run import train as train_watched
from snugtune.training.metrics import StepMetrics

STEPS = 5
RECORDS = [messages(f"What about {i}?", f"It is {i * i}{', or so' * (i % 3)}.") for i in range(8)]
MOE = {"gptoss", "mixtral", "qwen3moe", "qwen2moe", "hunyuan", "phimoe", "afmoe", "llama4", "jamba", "deepseek_v3", "qwen3next"}
NEVER_ALIKE = {"phimoe"}  # it draws its experts at random while training, and the run says so
NARROW = ("llama", "gpt2", "gemma2", "mamba", "qwen3moe", "bloom")
"""Also in bf16: untied, Conv1D, capped and tied, a state, experts, ALiBi."""


class InterruptedAfter(Silent):
    """Presses Ctrl-C when a step's metrics are out; the run stops in the step that follows."""

    def __init__(self, step: int):
        self.at: int | None = step

    def step(self, metrics: StepMetrics) -> None:
        if metrics.step == self.at:
            self.at = None  # once: a second one would not let the state be saved
            signal.raise_signal(signal.SIGINT)


def _run(place: Path, output: str, **fields: Any) -> dict[str, Any]:
    """A run's config; it saves its state every second step."""
    return {
        "model": str(place / "model"),
        "data": str(place / "data.jsonl"),
        "output": str(place / output),
        "device": "cpu",
        "max_seq_len": 64,
        "batch_size": 2,
        "steps": STEPS,
        "checkpoint_every": 2,
        "method": {"type": "lora", "r": 4, "lora_dropout": 0.1},
        "optimizer": {"lr": 1e-2},
        "plan": {"weights": "fp32"},
    } | fields


@pytest.fixture
def place(tmp_path: Path, arch: str) -> Path:
    """A folder with the model and the data."""
    tiny_model(arch).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", RECORDS)
    return tmp_path


def _interrupted_and_resumed(config: dict[str, Any]) -> None:
    """Interrupted between two checkpoints; the same call then goes on."""
    with pytest.raises(Interrupted, match=r"interrupted at step (2 to )?3"):
        train_watched(to_config(config), InterruptedAfter(3))
    assert not snugtune.train(config).already_finished


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _assert_equal(folder: Path, truth: Path) -> None:
    ours, theirs = _weights(folder), _weights(truth)
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


def _plain(folder: Path) -> PreTrainedModel:
    """What transformers makes of a model folder by itself."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=sequences(21)[0][None], use_cache=False).logits


def _our_logits(config: dict[str, Any], adapter: Path) -> Tensor:
    """The base as a run loads it, with an adapter as chat does."""
    base = load_base(find_model(config["model"]), make_plan(to_config(config)).plan)
    Lora().load(base, adapter.name, adapter)
    with base.answering(adapter.name):
        return _logits(base.model)


def _check_adapter(place: Path, config: dict[str, Any], job: str) -> None:
    """Every factor has trained, and the base with the adapter is one model: here, in PEFT, and merged on disk."""
    run = place / "run"
    adapter = run / "adapters" / job
    factors = _weights(adapter)
    assert factors and all(bool(tensor.isfinite().all()) for tensor in factors.values())
    assert [name for name, tensor in factors.items() if not tensor.any()] == []  # B starts at zero
    ours, bare = _our_logits(config, adapter), _plain(place / "model")
    assert relative(ours, _logits(bare)) > 1e-3
    assert relative(_logits(PeftModel.from_pretrained(bare, str(adapter)).eval()), ours) <= 1e-5
    merged = export(run, "merged", place / f"merged-{job}", job, None, mute)
    assert relative(_logits(_plain(merged)), ours) <= 1e-5


def _check_answer(run: Path, job: str | None) -> None:
    """An answer comes out as it streams; some tokens are no text, so it may be short."""
    pieces: list[str] = []
    answer = snugtune.load(run, job).reply("What about 3?", on_text=pieces.append, max_new_tokens=6)
    assert pieces and "".join(pieces).strip() == answer
    assert "<|im_" not in answer


@pytest.mark.parametrize("arch", ARCHS)
def test_lora_goes_the_whole_road(arch: str, place: Path) -> None:
    """MoE bases with two jobs, of different ranks."""
    jobs = {"jobs": [{"name": "one"}, {"name": "two", "method": {"r": 2}, "seed": 1}]} if arch in MOE else {}
    names = ("one", "two") if jobs else ("default",)
    config = _run(place, "run", **jobs)
    _interrupted_and_resumed(config)
    snugtune.train(_run(place, "truth", **jobs))
    for name in names:
        if arch not in NEVER_ALIKE:
            _assert_equal(place / "run/adapters" / name, place / "truth/adapters" / name)
        _check_adapter(place, config, name)
    _check_answer(place / "run", names[-1])


@pytest.mark.parametrize("arch", NARROW)
def test_lora_in_bf16(arch: str, place: Path) -> None:
    """Trained in bf16: resumed as never interrupted; in fp32 PEFT and the merged folder are one model."""
    narrow = {"plan": {"weights": "bf16"}}
    _interrupted_and_resumed(_run(place, "run", **narrow))
    snugtune.train(_run(place, "truth", **narrow))
    _assert_equal(place / "run/adapters/default", place / "truth/adapters/default")
    _check_adapter(place, _run(place, "run"), "default")
    _check_answer(place / "run", None)


@pytest.mark.parametrize("method", [{"type": "full"}, {"type": "freeze", "last_blocks": 1}], ids=lambda m: m["type"])
@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "mamba", "qwen3moe", "falcon"])
def test_whole_models_go_the_whole_road(arch: str, method: dict[str, Any], place: Path) -> None:
    """Full and partial training end in a folder that plain transformers loads: what should move has moved, no more."""
    config = _run(place, "run", method=method, optimizer={"lr": 1e-3})
    _interrupted_and_resumed(config)
    snugtune.train(config | {"output": str(place / "truth")})
    model = place / "run/models/default"
    _assert_equal(model, place / "truth/models/default")
    before, after = _plain(place / "model").state_dict(), _plain(model)
    stayed = {name for name, tensor in after.state_dict().items() if torch.equal(tensor, before[name])}
    assert stayed == (set() if method["type"] == "full" else {name for name in before if ".1." not in name})
    base = load_base(find_model(str(model)), make_plan(to_config(config)).plan)
    with base.answering(None):
        assert torch.equal(_logits(base.model), _logits(after))
    _check_answer(place / "run", None)
