"""Checkpoints that bitsandbytes quantised: made by transformers and bitsandbytes themselves, which are the truth about them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from conftest import relative, sequences, tiny_tokenizer
from quantised import loaded, plan_of, saved
from snugtune.errors import InputError
from snugtune.methods.lora import Lora, LoraConfig
from snugtune.model.base import load_base
from snugtune.model.frozen import FrozenLinear
from snugtune.model.load import load_config, stored_width
from snugtune.model.selftest import check_gradients
from snugtune.model.source import ModelSource

HOW: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
WIDE = {"intermediate_size": 128}
"""Rows of whole blocks: on others bitsandbytes' own way back is wrong on CPU (0.50.2)."""
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bitsandbytes")


def _made(made: Path, how: str, arch: str = "llama", **more: Any) -> Path:
    """The folder of a tiny model that bitsandbytes quantised; once."""
    folder = made / f"{arch}-{how}-{'-'.join(more)}"
    if not folder.exists():
        plain = saved(made / arch, arch, **(WIDE if arch == "llama" else {}))
        config = BitsAndBytesConfig(**HOW[how], **more)
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32, device_map="cpu")
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def _theirs(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every quantised weight as bitsandbytes dequantises it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and hasattr(weight, "quant_state"):
            yield name, dequantize_4bit(weight.data, weight.quant_state)
        elif weight is not None and hasattr(weight, "SCB"):
            yield name, torch.ops.bitsandbytes.int8_vectorwise_dequant.default(weight.data, weight.SCB)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("how", HOW)
def test_its_weights_are_bitsandbytes_own(how: str, arch: str, made: Path) -> None:
    """And kept as they were stored, in the bits they came in."""
    folder = _made(made, how, arch)
    base = loaded(folder, "int8" if how == "int8" else "nf4")
    theirs = dict(_theirs(folder))
    assert len(theirs) == (14 if arch == "llama" else 8)
    for name, weight in theirs.items():
        layer = base.model.get_submodule(name)
        assert isinstance(layer, FrozenLinear) and layer.format.name == how.partition("-")[0]
        torch.testing.assert_close(layer.weight, weight, rtol=2e-6, atol=0)
    assert sum(m.format.name in ("nf4", "fp4", "int8") for m in base.model.modules() if isinstance(m, FrozenLinear)) == len(
        theirs
    )


@pytest.mark.parametrize("how", HOW)
def test_it_trains_as_it_is(how: str, made: Path) -> None:
    base = loaded(_made(made, how), "int8" if how == "int8" else "nf4", "bf16")
    Lora().attach(base, "j", LoraConfig(r=2), 0)
    assert check_gradients(base) == (14, 14)


@pytest.mark.parametrize("how", HOW)
def test_it_can_be_dequantised_and_that_is_said(how: str, made: Path) -> None:
    """The same weights and the same fingerprint, now in plain layers; other notes than of its own formats."""
    folder = _made(made, how)
    narrow, wide, narrower = (
        loaded(folder, "int8" if how == "int8" else "nf4"),
        loaded(folder, "fp32"),
        loaded(folder, "bf16", "bf16"),
    )
    assert {wide.fingerprint, narrower.fingerprint} == {narrow.fingerprint}
    assert "its quantised weights are dequantised to fp32: their error stays, their size does not" in wide.notes
    assert not any("dequantised" in note for note in narrow.notes)
    (part,) = sequences(17)
    with torch.no_grad(), narrow.answering(None), wide.answering(None):
        assert relative(wide.model(input_ids=part[None]).logits, narrow.model(input_ids=part[None]).logits) <= 1e-6
    up = narrower.model.get_submodule(UP.removesuffix(".weight"))
    assert isinstance(up, FrozenLinear) and up.format.name == "bf16"


def test_int8_products_are_the_plans(made: Path) -> None:
    base = loaded(_made(made, "int8"), "int8-products")
    up = base.model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(up, FrozenLinear) and getattr(up.format, "threshold") == 2.0  # noqa: B009 (of one format)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_what_was_left_wide_stays_wide(how: str, made: Path) -> None:
    """Some quantise all but a few layers, for they are worth it; those are not quantised behind their backs."""
    folder = _made(made, how, llm_int8_skip_modules=["lm_head", "layers.0.mlp.up_proj"])
    base = loaded(folder, how)
    formats = {n: m.format.name for n, m in base.model.named_modules() if isinstance(m, FrozenLinear)}
    assert formats.pop("model.layers.0.mlp.up_proj") == "fp32" and set(formats.values()) == {how} and len(formats) == 13


def test_linears_that_are_only_told_by_name_are_read_too(made: Path) -> None:
    """bitsandbytes quantises routers that are linears as well."""
    folder = _made(made, "nf4", "hunyuan")
    assert any(name.endswith("wg.weight.absmax") for name in load_file(folder / "model.safetensors"))
    base = loaded(folder)
    router = base.model.get_submodule("model.layers.0.mlp.gate.wg")
    assert isinstance(router, FrozenLinear) and router.format.name == "nf4"


@pytest.mark.parametrize("how", HOW)
def test_the_config_tells_its_format(how: str, made: Path) -> None:
    source = ModelSource("x", str(_made(made, how)))
    assert stored_width(source, load_config(source, False)) == ("int8" if how == "int8" else "nf4")


# ---------------------------------------------------------------- what cannot be read


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return act


def _without(part: str) -> Callable[[Path], None]:
    return _tensors(lambda tensors: tensors.pop(_key(part)))


def _with(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return _tensors(lambda tensors: tensors.update({_key(part): change(tensors[_key(part)]).contiguous()}))


def _key(part: str) -> str:
    return UP.removesuffix("weight") + part if part in ("SCB", "weight_format") else f"{UP}.{part}" if part else UP


STATE = "quant_state.bitsandbytes__nf4"


def _state(**changes: Any) -> Callable[[Path], None]:
    def change(stored: Tensor) -> Tensor:
        about = json.loads(bytes(stored.tolist())) | changes
        text = json.dumps({k: v for k, v in about.items() if v is not None})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return _with(STATE, change)


def _bytes(raw: bytes) -> Callable[[Path], None]:
    return _with(STATE, lambda stored: torch.tensor(list(raw), dtype=torch.uint8))


def _not_finite(stored: Tensor) -> Tensor:
    stored[1] = float("nan")
    return stored


def _config(**changes: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return act


def _plain_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for file in folder.iterdir():
        file.unlink()
    saved_again = saved(folder / "tmp", **WIDE)
    for file in saved_again.iterdir():
        file.rename(folder / file.name)
    (folder / "tmp").rmdir()
    _config(quantization_config=config)(folder)


def _shards(folder: Path, **weight_map: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for name, half in halves.items():
        save_file(half, folder / name, metadata={"format": "pt"})
    index = {tensor: name for name, half in halves.items() for tensor in half} | weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def _of_another_shape(tensors: dict[str, Tensor]) -> None:
    down = UP.replace("up_proj", "q_proj").replace("mlp", "self_attn")
    for name in list(tensors):
        if name.startswith(UP):
            tensors[name] = tensors[down + name.removeprefix(UP)].clone()


def _without_parts(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith(f"{UP}.")]:
        tensors.pop(name)


def _quantised_head(tensors: dict[str, Tensor]) -> None:
    tensors |= {name.replace(UP, "lm_head.weight"): t.clone() for name, t in tensors.items() if name.startswith(UP)}


BAD_4BIT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no absmax": (_without("absmax"), f"{UP}: there is no absmax"),
    "no nested absmax": (_without("nested_absmax"), f"{UP}"),
    "no nested code": (_without("nested_quant_map"), f"{UP}: there is no nested_quant_map"),
    "no quant state": (_without(STATE), f"{UP}: is kept in 4 bits, but how is not said"),
    "no weight": (_without(""), f"there are scales of {UP}, but not the weight itself"),
    "no part at all": (_tensors(_without_parts), f"{UP} is kept in whole numbers"),
    "state is no json": (_bytes(b"{{{"), f"{UP}: {STATE} cannot be read"),
    "state is a list": (_bytes(b"[]"), f"{UP}: {STATE} cannot be read"),
    "state is no text": (_bytes(b"\xff\xfe\xfd"), f"{UP}: {STATE} cannot be read"),
    "state is empty": (_bytes(b"{}"), f"{UP}: there is no quant_type"),
    "of unknown kind": (_state(quant_type="int4"), f"{UP}: is int4"),
    "of a list of kinds": (_state(quant_type=["nf4"]), f"{UP}: is ['nf4']"),
    "block of zero": (_state(blocksize=0), "in blocks of 0"),
    "block that is negative": (_state(blocksize=-64), "in blocks of -64"),
    "block that is odd": (_state(blocksize=63), "in blocks of 63"),
    "block that is text": (_state(blocksize="64"), "in blocks of 64"),
    "another block": (_state(blocksize=128), f"{UP}: its absmax"),
    "another shape": (_state(shape=[64, 128]), f"{UP}: is nf4 (64, 128)"),
    "shape that is a number": (_state(shape=7), f"{UP}: {STATE} cannot be read"),
    "other blocks of scales": (_state(nested_blocksize=128), "only 256 is read"),
    "offset that is text": (_state(nested_offset="much"), f"{UP}: {STATE} cannot be read"),
    "offset that is no number": (_state(nested_offset=float("nan")), f"{UP}: its offset is not finite"),
    "absmax too short": (_with("absmax", lambda t: t[:-1]), f"{UP}: its absmax"),
    "absmax of another kind": (_with("absmax", lambda t: t.float()), f"{UP}: its absmax"),
    "scales not finite": (_with("nested_absmax", lambda t: t * float("inf")), f"{UP}: its nested_absmax is not finite"),
    "code not finite": (_with("nested_quant_map", _not_finite), f"{UP}: its nested_code is not finite"),
    "another code": (_with("quant_map", lambda t: t.flip(0)), f"{UP}: its quant_map is not the code of nf4"),
    "packed too short": (_with("", lambda t: t[:-3]), f"{UP}: its packed"),
    "packed in 16 bits": (_with("", lambda t: t.view(-1).view(torch.int16)), f"{UP}"),
    "another layer's": (_tensors(_of_another_shape), f"{UP}: is nf4 (64, 64)"),
    "a quantised head": (_tensors(_quantised_head), "lm_head.weight"),
    "cut off": (_cut, "weights"),
    "a shard that is not there": (lambda folder: _shards(folder, **{UP: "model-9.safetensors"}), "model-9.safetensors"),
    "config says nothing": (_config(quantization_config=None), "config.json does not say so"),
    "plain weights": (_plain_weights, "its files hold plain weights"),
}  # fmt: skip
BAD_8BIT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no scales": (_without("SCB"), f"{UP}: is kept in 8 bits, but its scales (SCB) are missing"),
    "nothing but the weight": (lambda f: (_without("SCB")(f), _without("weight_format")(f)), f"{UP} is kept in whole numbers"),
    "scales not finite": (_with("SCB", _not_finite), f"{UP}: its scale is not finite"),
    "scales too short": (_with("SCB", lambda t: t[1:]), f"{UP}: its scale"),
    "transposed": (_with("", lambda t: t.t()), f"{UP}: its int8"),
    "another order": (_with("weight_format", lambda t: t + 1), f"{UP}: its 8 bits lie in an order"),
    "config says nothing": (_config(quantization_config=None), "config.json does not say so"),
}


def _spoilt(made: Path, how: str, place: Path, spoil: Callable[[Path], Any]) -> ModelSource:
    for file in _made(made, how).iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    spoil(place)
    return ModelSource("x", str(place))


def _refused(source: ModelSource, width: str, named: str) -> None:
    with pytest.raises(InputError) as refusal:
        load_base(source, plan_of(width))
    assert named in str(refusal.value) and "\n" not in str(refusal.value) and str(refusal.value).startswith("model: ")


@pytest.mark.parametrize("width", ["nf4", "fp32"])
@pytest.mark.parametrize("case", BAD_4BIT)
def test_damaged_4bit_files_are_refused_in_a_line(case: str, width: str, made: Path, tmp_path: Path) -> None:
    """Whether they are kept or dequantised."""
    spoil, named = BAD_4BIT[case]
    _refused(_spoilt(made, "nf4-double", tmp_path, spoil), width, named)


@pytest.mark.parametrize("width", ["int8", "fp32"])
@pytest.mark.parametrize("case", BAD_8BIT)
def test_damaged_8bit_files_are_refused_in_a_line(case: str, width: str, made: Path, tmp_path: Path) -> None:
    spoil, named = BAD_8BIT[case]
    _refused(_spoilt(made, "int8", tmp_path, spoil), width, named)


def test_shards_of_quantised_weights_are_read(made: Path, tmp_path: Path) -> None:
    """The parts of one weight may lie in several files."""
    source = _spoilt(made, "nf4-double", tmp_path, _shards)
    assert load_base(source, plan_of("nf4")).fingerprint == loaded(_made(made, "nf4-double")).fingerprint


FOREIGN = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8"},
    "mxfp4": {"quant_method": "mxfp4"},
    "a stranger": {"quant_method": "rounding"},
    "nameless": {"bits": 3},
    "no table": "4 bits",
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_quantised_formats_are_refused_in_a_line(case: str, made: Path, tmp_path: Path) -> None:
    source = _spoilt(made, "nf4", tmp_path, _config(quantization_config=FOREIGN[case]))
    with pytest.raises(InputError) as refusal:
        stored_width(source, load_config(source, False))
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith("model: ")


def test_neither_head_nor_embeddings_of_theirs_are_narrow(made: Path) -> None:
    base = loaded(_made(made, "nf4"))
    assert type(base.model.get_output_embeddings()) is nn.Linear
