"""Runs whose base is kept in fewer bits, by the commands a user types: train, go on, chat, export; and what is refused.

The truths are an uninterrupted run (bit for bit), and PEFT over plain transformers with the weights that were computed with.
"""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import assert_refused, files_below, here, messages, metrics_of, write_lines
from peft import PeftModel
from safetensors.torch import load_file
from spoil import config, edit, edit_json, refused
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import snugtune
import snugtune.observer
import snugtune.prepare
import snugtune.run
from conftest import relative, sequences, tiny_model, tiny_tokenizer
from quantised import loaded
from snugtune.model.frozen import FrozenLinear
from snugtune.model.selftest import Checked

pytest_plugins = ("places",)

STEPS = 6
PINS: dict[str, dict[str, Any]] = {
    "nf4": {"weights": "nf4"},
    "nf4-double": {"weights": "nf4", "double_quant": True},
    "int8": {"weights": "int8"},
    "int8-products": {"weights": "int8", "outlier_threshold": 2.0},
    "w8a8": {"weights": "w8a8"},
}
LORA = {"type": "lora", "r": 4, "lora_dropout": 0.1}


class Interrupting(snugtune.observer.Silent):
    """Presses Ctrl-C when the metrics of a step are out; remembers what was said."""

    def __init__(self, step: int):
        self.at: int | None = step

    def step(self, metrics: Any) -> None:
        if metrics.step == self.at:
            self.at = None
            signal.raise_signal(signal.SIGINT)


def _config(place: Path, output: str, pins: dict[str, Any], **fields: Any) -> Path:
    common = {
        "steps": STEPS,
        "checkpoint_every": 2,
        "validation": 0.3,
        "eval_every": 2,
        "optimizer": {"lr": 1e-2},
        "method": LORA,
    }
    return config(place, output=output, plan=pins, **common | fields)


def _adapter(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapters/default/adapter_model.safetensors")


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=sequences(21)[0][None], use_cache=False).logits


def _plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _computed_with(run: Path, model: Path) -> Any:
    """Plain transformers with the weights that a run computed with: those of linears, and all others in its dtype."""
    plan = json.loads((run / "plan.json").read_text())["plan"]
    kind = {"weights": plan["weights"], "double_quant": plan["double_quant"]}
    base, plain = loaded(model, compute=plan["compute"], **kind), _plain(model)
    with torch.no_grad():
        for name, layer in base.model.named_modules():
            if isinstance(layer, FrozenLinear) and layer.format.name in ("nf4", "int8"):
                weight = plain.get_submodule(name).weight
                weight.copy_(layer.weight.t() if layer.transposed else layer.weight)
                if layer.bias is not None:
                    plain.get_submodule(name).bias.copy_(layer.bias)
        for name, parameter in base.model.named_parameters():
            plain.get_parameter(name).copy_(parameter)
    return plain


@pytest.fixture
def gpt2(place: Path) -> Path:
    """The model of `place` is a GPT-2, whose weights lie transposed."""
    shutil.rmtree(place / "model")
    tiny_model("gpt2").save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    return place


@pytest.mark.parametrize("kind", PINS)
def test_a_run_goes_on_where_it_was_interrupted(kind: str, place: Path) -> None:
    """And tells what it does: the format, and that gradients were checked; resumed, too."""
    ran = here("train", _config(place, "truth", PINS[kind]))
    assert ran.code == 0, ran.err
    assert f"plan: weights {PINS[kind]['weights']} (as asked, products in " in ran.err
    assert "checked: gradients of 14 linears and of the head agree with plain autograd\n" in ran.err
    from snugtune.config import read_config
    from snugtune.errors import Interrupted

    path = _config(place, "run", PINS[kind])
    with pytest.raises(Interrupted):
        snugtune.run.train(read_config(path), Interrupting(3))
    again = here("train", path)
    assert again.code == 0 and "checked: gradients" in again.err and "resuming after step" in again.err
    assert _equal(_adapter(place / "run"), _adapter(place / "truth"))
    losses = [[line.get("eval_loss") for line in metrics_of(place / name)] for name in ("run", "truth")]
    assert losses[0] == losses[1] and None not in losses[0][::2]
    card = (place / "run/adapters/default/README.md").read_text()
    assert f"The base's weights were kept in {PINS[kind]['weights']} meanwhile, and computed with in " in card


def test_the_check_changes_no_bit_of_a_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert here("train", _config(place, "checked", PINS["nf4"])).code == 0
    monkeypatch.setattr(snugtune.prepare, "check_gradients", lambda base: Checked(0, 0))
    assert here("train", _config(place, "unchecked", PINS["nf4"])).code == 0
    assert _equal(_adapter(place / "checked"), _adapter(place / "unchecked"))


def test_wrong_gradients_stop_a_run_before_it_began(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one line and exit code 2; nothing is written."""
    whole = FrozenLinear.matmul_t
    monkeypatch.setattr(FrozenLinear, "matmul_t", lambda layer, dy: whole(layer, dy) * 1.2)
    path = _config(place, "run", PINS["nf4"])
    refused(place, "train", str(path), named=("self-test: model.layers.1.", "differs by 2", "plan.weights: bf16"))
    assert here("train", _config(place, "plain", {"weights": "fp32"})).code == 0  # plain weights are not asked


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_chat_answers_with_the_weights_of_the_run(kind: str, place: Path) -> None:
    assert here("train", _config(place, "run", PINS[kind])).code == 0
    width = PINS[kind]["weights"]
    ran = here("chat", place / "run", "--prompt", "Question 1?", "--max-new-tokens", "5")
    assert ran.code == 0 and f"model: weights {width} (as the run was trained)\n" in ran.err, ran.err
    compared = here("chat", place / "run", "--prompt", "Question 1?", "--max-new-tokens", "5", "--compare")
    assert compared.code == 0 and ran.out.strip() in compared.out
    base = snugtune.load(place / "run").base
    layers = [m for m in base.model.modules() if isinstance(m, FrozenLinear)]
    assert {m.format.name for m in layers} - {"fp32", "bf16"} == {width}
    assert all(getattr(m.format, "double", True) for m in layers)
    for wanted in ("fp32", "nf4"):
        other = here("chat", place / "run", "--prompt", "Question 1?", "--max-new-tokens", "5", "--weights", wanted)
        assert other.code == 0 and f"model: weights {wanted} (as asked)\n" in other.err
    adapter = here("chat", place / "run/adapters/default", "--prompt", "Question 1?", "--max-new-tokens", "5")
    assert adapter.code == 0 and "model: weights" not in adapter.err, "no run says how its base was kept"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--weights", "int3"), ("--weights: int3", "nf4")),
        (("--weights", "fp16"), ("--weights: fp16 is refused on CPU",)),
    ],
)
def test_formats_that_chat_cannot_answer_in(ran: Path, args: tuple[str, ...], named: tuple[str, ...]) -> None:
    refused(ran, "chat", "out", "--prompt", "Hi", *args, named=named)


@pytest.mark.parametrize("changes", [{"weights": "int3"}, {"weights": ["nf4"]}, {"offload": 7}, {"double_quant": "yes"}], ids=str)
def test_a_plan_that_no_run_wrote(ran: Path, changes: dict[str, Any]) -> None:
    plan = json.loads((ran / "out/plan.json").read_text())
    edit_json(ran / "out/plan.json", plan=plan["plan"] | changes)
    refused(ran, "chat", "out", "--prompt", "Hi", named=("plan.json", f"plan: {next(iter(changes))} is"))


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
@pytest.mark.parametrize("model", ["place", "gpt2"])
def test_export_merges_onto_either_base_and_says_which(kind: str, model: str, request: pytest.FixtureRequest) -> None:
    """Each is what PEFT makes of the adapter on that base; they differ, and the dequantized is what was trained."""
    place: Path = request.getfixturevalue(model)
    assert here("train", _config(place, "run", PINS[kind])).code == 0
    run, width = place / "run", PINS[kind]["weights"]
    original = here("export", run, "--to", "merged", "--output", place / "original", "--dtype", "fp32")
    trained = here("export", run, "--to", "merged", "--output", place / "trained", "--dtype", "fp32", "--base", "dequantized")
    assert original.code == trained.code == 0, original.err + trained.err
    assert (
        f"onto the original base: its weights lack the error of {width}" in original.err and "--base dequantized" in original.err
    )
    assert f"onto the base's weights as the adapter was trained on them: with the error of {width}" in trained.err
    truths = [_plain(place / "model"), _computed_with(run, place / "model")]
    truths = [_logits(PeftModel.from_pretrained(truth, str(run / "adapters/default")).eval()) for truth in truths]
    merged = [_logits(_plain(place / folder)) for folder in ("original", "trained")]
    assert relative(merged[0], truths[0]) <= 1e-5 and relative(merged[1], truths[1]) <= 1e-5
    assert relative(merged[0], merged[1]) > 1e-3
    assert files_below(place / "original") == files_below(place / "trained")
    for folder in ("original", "trained"):
        assert "quantization_config" not in json.loads((place / folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--base", "other"), ("--base other", "original, dequantized")),
        (("--base", "dequantized"), ("--base dequantized", "fewer bits")),
    ],
)
def test_bases_that_export_cannot_merge_onto(ran: Path, args: tuple[str, ...], named: tuple[str, ...]) -> None:
    refused(ran, "export", "out", "--to", "merged", *args, named=named)


@pytest.mark.parametrize("method", [{"type": "full"}, {"type": "freeze", "last_blocks": 1}], ids=lambda m: m["type"])
@pytest.mark.parametrize("width", ["nf4", "int8"])
def test_weights_that_train_are_refused_before_the_model_is_read(width: str, method: dict[str, Any], place: Path) -> None:
    """There is nothing but its config."""
    for file in (place / "model").glob("*.safetensors"):
        file.unlink()
    path = _config(place, "run", {"weights": width}, method=method)
    refused(place, "train", str(path), named=(f"plan.weights: {width} needs frozen weights", "method: lora"))


@pytest.mark.parametrize(
    ("pins", "named"),
    [
        ({"weights": "int8", "double_quant": True}, ("double_quant", "nf4")),
        ({"weights": "nf4", "outlier_threshold": 6.0}, ("outlier_threshold", "int8")),
        ({"weights": "int8", "outlier_threshold": -1}, ("outlier_threshold",)),
        ({"weights": "int4"}, ("plan.weights", "int4")),
    ],
)
def test_pins_that_do_not_go_together(pins: dict[str, Any], named: tuple[str, ...], place: Path) -> None:
    refused(place, "train", str(_config(place, "run", pins)), named=named)


# --- models that exist quantised alone ---


@pytest.fixture(scope="module")
def bitsandbytes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of a tiny Llama that bitsandbytes quantised, and a plain one of the weights it stands for."""
    place = tmp_path_factory.mktemp("bitsandbytes")
    tiny_model("llama", intermediate_size=128).save_pretrained(place / "plain")
    tiny_tokenizer().save_pretrained(place / "plain")

    def make(kind: str) -> Path:
        if not (place / kind).exists():
            how = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
            model = AutoModelForCausalLM.from_pretrained(
                place / "plain", quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32, device_map="cpu"
            )
            model.save_pretrained(place / kind)
            tiny_tokenizer().save_pretrained(place / kind)
        return place / kind

    return make


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_model_goes_the_whole_road(kind: str, bitsandbytes: Callable[[str], Path], place: Path) -> None:
    """Trained as it is kept, answered with, and merged onto its dequantised weights, since there are no others."""
    path = _config(place, "run", {"weights": "auto"}, model=bitsandbytes(kind))
    ran = here("train", path)
    assert ran.code == 0 and f"plan: weights {kind} (as the checkpoint keeps them, products in" in ran.err, ran.err
    chat = here("chat", place / "run/adapters/default", "--prompt", "Hi", "--max-new-tokens", "4")
    assert chat.code == 0 and f"model: weights {kind} (as the checkpoint keeps them)" in chat.err
    merged = here("export", place / "run", "--to", "merged", "--output", place / "merged", "--dtype", "fp32")
    assert merged.code == 0 and f"the base exists in {kind} alone: merging onto its weights dequantized" in merged.err, merged.err
    theirs = AutoModelForCausalLM.from_pretrained(bitsandbytes(kind), dtype=torch.float32, device_map="cpu").dequantize().eval()
    truth = PeftModel.from_pretrained(theirs, str(place / "run/adapters/default")).eval()
    assert relative(_logits(_plain(place / "merged")), _logits(truth)) <= 2e-3  # their int8 is dequantized over bf16
    refused(place, "export", "run", "--to", "merged", "--output", "m2", "--base", "original", named=("--base original", kind))


def test_a_quantised_model_can_be_dequantised(bitsandbytes: Callable[[str], Path], place: Path) -> None:
    ran = here("train", _config(place, "run", {"weights": "fp32"}, model=bitsandbytes("nf4")))
    assert ran.code == 0 and "model: its quantised weights are dequantised to fp32" in ran.err
    assert "checked" not in ran.err


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("int8", {"plan": {"weights": "nf4"}}, ("plan.weights: nf4", "int8")),
        ("nf4", {"plan": {"weights": "int8"}}, ("plan.weights: int8", "nf4")),
        ("nf4", {"method": {"type": "full"}, "plan": {"weights": "auto"}}, ("method: full", "nf4")),
    ],
)
def test_what_a_quantised_model_cannot_do(
    kind: str, fields: dict[str, Any], named: tuple[str, ...], bitsandbytes: Callable[[str], Path], place: Path
) -> None:
    path = config(place, model=bitsandbytes(kind), **fields)
    refused(place, "train", str(path), named=named)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
@pytest.mark.parametrize("command", ["train", "export", "chat"])
def test_formats_that_are_not_read(command: str, method: str, ran: Path) -> None:
    """Wherever a model is loaded; the run was trained when the model was another."""
    edit("config.json", quantization_config={"quant_method": method, "bits": 4})(ran / "model")
    args = {"train": [str(config(ran, output="new"))], "export": ["out", "--to", "merged"], "chat": ["out", "--prompt", "Hi"]}
    refused(ran, command, *args[command], named=(f"{method}'s format",))


def test_the_same_records_for_all(place: Path) -> None:
    """Two jobs on one narrow base are what each is alone."""
    write_lines(place / "data.jsonl", [messages(f"Question {i}?", f"Answer {i}.") for i in range(6)])
    jobs = [{"name": "a"}, {"name": "b", "seed": 5, "method": LORA | {"r": 2}}]
    assert here("train", _config(place, "both", PINS["nf4"], jobs=jobs)).code == 0
    for job in jobs:
        assert here("train", _config(place, f"only-{job['name']}", PINS["nf4"], jobs=[job])).code == 0
        file = f"adapters/{job['name']}/adapter_model.safetensors"
        alone, beside = load_file(place / f"only-{job['name']}" / file), load_file(place / "both" / file)
        assert _equal(alone, beside)


def test_a_finished_run_says_so_in_any_format(place: Path) -> None:
    path = _config(place, "run", PINS["int8"])
    assert here("train", path).code == 0
    again = here("train", path)
    assert again.code == 0 and "this run is finished" in again.err
    assert_refused(here("train", _config(place, "run", PINS["nf4"])), "run", "weights")
