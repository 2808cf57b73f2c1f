"""What is trained here works in PEFT and, merged, in transformers; what PEFT trained works here."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import relative, tiny_model, tiny_tokenizer
from real.common import our_logits, plan, train, write_data
from snugtune.export import export
from snugtune.methods.lora import Lora
from snugtune.model.base import Base, load_base
from snugtune.model.source import find_model, mute
from snugtune.observer import RunResult
from snugtune.tuned import load

pytestmark = pytest.mark.real

IDS = torch.arange(24) * 37 % 300 + 3
"""Tokens that every vocabulary here has."""


def tiny_folder(arch: str, folder: Path) -> Path:
    """A small random model on disk, as a user would have one."""
    tiny_model(arch).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS[None]).logits[0]


def fp32(location: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)


@dataclass(frozen=True)
class Subject:
    """A finished run, where transformers finds its base, and our base with the run's adapter."""

    result: RunResult
    location: str
    base: Base
    job: str

    @property
    def logits(self) -> Tensor:
        return our_logits(self.base, self.job, IDS)


@pytest.fixture(scope="module", params=["demo", "gemma2", "gemma2 and its tied head", "gpt2"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The real model, one with soft-capped scores and logits and a tied head, one with Conv1D instead of linears."""
    if request.param == "demo":
        result, base = request.getfixturevalue("trained"), request.getfixturevalue("base")
        location = find_model("demo").location
    else:
        arch = request.param.split()[0]
        targets = ["q_proj", "down_proj", "lm_head"] if "head" in request.param else "all-linear"
        folder = tmp_path_factory.mktemp(arch)
        location = str(tiny_folder(arch, folder / "model"))
        data = str(write_data(folder / "data.jsonl"))
        method = {"type": "lora", "r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": targets}
        result = train(model=location, data=data, output=str(folder / "run"), max_seq_len=96, method=method, batch_size=4,
                       steps=4, optimizer={"lr": 2e-2}, plan={"weights": "fp32"})  # fmt: skip
        base = load_base(find_model(location), plan())
    attached = Lora().load(base, "round-trip", result.artefacts["default"])
    request.addfinalizer(attached.detach)
    return Subject(result, location, base, "round-trip")


def test_the_adapter_folder_loads_in_peft(subject: Subject) -> None:
    bare = fp32(subject.location)
    before = logits(bare)
    tuned = logits(PeftModel.from_pretrained(bare, str(subject.result.artefacts["default"])))
    assert relative(tuned, before) > 1e-2, "the adapter does next to nothing, so agreeing says little"
    assert relative(subject.logits, tuned) <= 1e-5


def test_merged_equals_unmerged(subject: Subject, tmp_path: Path) -> None:
    written = export(subject.result.folder, "merged", tmp_path / "merged", None, "fp32", mute)
    merged = AutoModelForCausalLM.from_pretrained(written, dtype="auto")
    assert merged.dtype == torch.float32
    assert relative(logits(merged), subject.logits) <= 1e-5


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("gemma2", {"r": 6, "lora_alpha": 9, "target_modules": "all-linear", "use_rslora": True}),
        ("gemma2", {"r": 6, "target_modules": ["q_proj", "v_proj", "lm_head"]}),
        ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "alpha_pattern": {"attn.c_proj": 5}}),
        ("llama", {"r": 4, "lora_alpha": 8, "target_modules": r".*\.1\..*(q|up)_proj", "rank_pattern": {"q_proj": 2}}),
    ],
    ids=["all linears, rsLoRA", "tied head", "Conv1D, alpha pattern", "expression, rank pattern"],
)
def test_an_adapter_made_by_peft_loads_here(arch: str, settings: dict[str, object], tmp_path: Path, exact_answers: None) -> None:
    folder = tiny_folder(arch, tmp_path / "model")
    torch.manual_seed(0)
    twin = get_peft_model(fp32(folder), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings))
    twin.save_pretrained(tmp_path / "adapter")
    tuned = load(tmp_path / "adapter")
    assert relative(our_logits(tuned.base, tuned.job, IDS), logits(twin)) <= 1e-5
    assert relative(our_logits(tuned.base, None, IDS), logits(twin)) > 1e-2
