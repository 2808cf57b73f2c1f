"""Models and adapters that are not what they say: cut-off and lying files, other bases, other shapes."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import here, messages, write_lines
from safetensors.torch import load_file, save_file
from spoil import RECORDS, config, edit, refused, replace, truncate
from transformers import CTRLConfig, CTRLLMHeadModel, PreTrainedModel

from conftest import tiny_model, tiny_tokenizer

pytest_plugins = ("places",)

WEIGHTS = "model.safetensors"
NAME = "model.layers.0.mlp.up_proj.weight"


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and the bytes after it (the format: u64 length, JSON, data)."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def act(model: Path) -> None:
        header, rest = header_of((model / WEIGHTS).read_bytes())
        change(header)
        text = json.dumps(header).encode()
        (model / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + rest)

    return act


def cast(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    save_file({k: v.to(torch.int8) for k, v in tensors.items()}, model / WEIGHTS, metadata={"format": "pt"})


def transposed(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    save_file(tensors | {NAME: tensors[NAME].T.contiguous()}, model / WEIGHTS, metadata={"format": "pt"})


def not_a_number(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors[NAME][3, 4] = float("nan")
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def shards(model: Path) -> Path:
    """The weights in several files; gives the index of them."""
    (model / WEIGHTS).unlink()
    tiny_model("llama").save_pretrained(model, max_shard_size="100KB")
    return model / "model.safetensors.index.json"


def index_names_a_missing_file(model: Path) -> None:
    index = shards(model)
    values = json.loads(index.read_text())
    values["weight_map"][NAME] = "model-00099-of-00099.safetensors"
    index.write_text(json.dumps(values))


def index_leaves_the_folder(model: Path) -> None:
    index = shards(model)
    shutil.copy(model / values_of(index)[NAME], model.parent / "outside.bin")
    values = json.loads(index.read_text())
    values["weight_map"][NAME] = "../outside.bin"
    index.write_text(json.dumps(values))


def values_of(index: Path) -> dict[str, str]:
    return json.loads(index.read_text())["weight_map"]


def cut_a_shard(model: Path) -> None:
    shard = model / values_of(shards(model))[NAME]
    shard.write_bytes(shard.read_bytes()[:-100])


def index_of(raw: bytes) -> Callable[[Path], object]:
    return lambda model: shards(model).write_bytes(raw)


def edit_tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def act(model: Path) -> None:
        values = json.loads((model / "tokenizer.json").read_text())
        change(values)
        (model / "tokenizer.json").write_text(json.dumps(values))

    return act


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"

FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    # weights
    "header-of-another-length": (lambda m: replace(WEIGHTS, b"\xff" * 8 + (m / WEIGHTS).read_bytes()[8:])(m), ("weights",)),
    "header-cut-off": (lambda m: replace(WEIGHTS, (m / WEIGHTS).read_bytes()[:100])(m), ("weights",)),
    "header-that-is-no-json": (replace(WEIGHTS, struct.pack("<Q", 4) + b"{{{{"), ("weights",)),
    "shape-that-lies": (with_header(lambda h: h[NAME].update(shape=[9999, 64])), ("weights",)),
    "offsets-beyond-the-end": (with_header(lambda h: h[NAME].update(data_offsets=[0, 2**40])), ("weights",)),
    "unknown-number-format": (with_header(lambda h: h[NAME].update(dtype="F13")), ("weights",)),
    "weight-of-another-name": (with_header(lambda h: h.update({"x": h.pop(NAME)})), (NAME,)),
    "transposed": (transposed, (NAME,)),
    "weights-that-are-a-pointer": (replace(WEIGHTS, POINTER), ("model.safetensors", "Git LFS")),
    "weights-that-are-a-folder": (lambda m: ((m / WEIGHTS).unlink(), (m / WEIGHTS).mkdir()), ("weights",)),
    "weights-not-a-number": (not_a_number, ("weights", "not finite")),
    "shard-missing-from-disk": (index_names_a_missing_file, ("model-00099-of-00099.safetensors",)),
    "shard-cut-off": (cut_a_shard, ("weights",)),
    "index-that-is-no-json": (index_of(b"{"), ("weights",)),
    "index-that-is-a-list": (index_of(b"[]"), ("weights",)),
    "index-without-a-map": (index_of(b"{}"), ("weights",)),
    "index-of-numbers": (index_of(b'{"metadata": {}, "weight_map": {"a": 1}}'), ("weights",)),
    # config
    "config-that-is-a-pointer": (replace("config.json", POINTER), ("config.json", "Git LFS")),
    "config-in-utf-16": (lambda m: replace("config.json", (m / "config.json").read_text().encode("utf-16"))(m), ("cannot load",)),
    "config-that-is-a-folder": (lambda m: ((m / "config.json").unlink(), (m / "config.json").mkdir()), ("no config.json",)),
    "more-words-than-weights": (edit("config.json", vocab_size=400), ("lm_head.weight", "400")),
    "no-words": (edit("config.json", vocab_size=0), ("model",)),
    "no-layers": (edit("config.json", num_hidden_layers=0, layer_types=None), ("model",)),
    "heads-that-do-not-divide": (edit("config.json", num_attention_heads=3), ("model",)),
    "groups-that-do-not-divide": (edit("config.json", num_key_value_heads=3), ("model",)),
    "width-below-zero": (edit("config.json", hidden_size=-64), ("cannot load",)),
    "width-without-end": (edit("config.json", hidden_size=10**9), ("model",)),
    "layers-in-words": (edit("config.json", num_hidden_layers="two", layer_types=None), ("cannot load",)),
    "quantised-by-another-tool": (
        edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ("model", "gptq"),
    ),
    "code-of-its-own": (edit("config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}), ("trust_remote_code: true",)),
    # tokenizer
    "tokenizer-that-is-a-list": (replace("tokenizer.json", b"[]"), ("tokenizer",)),
    "tokenizer-that-is-a-page": (replace("tokenizer.json", b"<html>404</html>"), ("tokenizer",)),
    "tokenizer-of-nothing": (replace("tokenizer.json", b""), ("tokenizer",)),
    "tokenizer-without-a-model": (edit_tokenizer(lambda t: t.pop("model")), ("tokenizer",)),
    "tokenizer-of-another-kind": (edit_tokenizer(lambda t: t["model"].update(type="Telepathy")), ("tokenizer",)),
    "tokenizer-with-odd-merges": (edit_tokenizer(lambda t: t["model"].update(merges=["x"])), ("tokenizer",)),
    "tokenizer-without-words": (edit_tokenizer(lambda t: t["model"].update(vocab={}, merges=[])), ("tokenizer",)),
    "tokenizer-config-cut-off": (truncate("tokenizer_config.json"), ("tokenizer",)),
    "tokenizer-config-that-is-a-list": (replace("tokenizer_config.json", b"[]"), ("tokenizer",)),
    "end-that-is-no-word": (edit("tokenizer_config.json", eos_token=5), ("tokenizer",)),
    "template-that-loops": (
        replace("chat_template.jinja", b"{% for i in range(999999999) %}{{ i }}{% endfor %}"),
        ("chat template"),
    ),
    "template-that-divides": (replace("chat_template.jinja", b"{{ 1 / 0 }}"), ("chat template", "division")),
    "template-that-calls": (replace("chat_template.jinja", b"{{ messages.upper() }}"), ("chat template",)),
    "template-that-breaks-out": (
        replace("chat_template.jinja", b"{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        ("chat template", "unsafe"),
    ),
    "template-that-says-nothing": (replace("chat_template.jinja", b"Hello."), ("chat template", "leaves out")),
    "template-in-latin-1": (replace("chat_template.jinja", b"{{ 'd\xe9j\xe0' }}"), ("tokenizer",)),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_model_folders(place: Path, case: str) -> None:
    spoil, named = FOLDERS[case]
    spoil(place / "model")
    refused(place, "train", "config.yaml", named=named)


@pytest.mark.parametrize("reference", ["https://huggingface.co/org/name", "hf://org/name", "s3://bucket/model"])
def test_addresses(place: Path, reference: str) -> None:
    config(place, model=reference)
    refused(place, "train", "config.yaml", named=("model", reference, "address"))


# --- GGUF -------------------------------------------------------------------------------------------------------------


def gguf(version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


KEY = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")

GGUFS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "magic-alone": (b"GGUF", ("could not be read as GGUF", "ends after 4 bytes",)),
    "header-cut-off": (gguf()[:20], ("could not be read as GGUF", "ends after 20 bytes")),
    "unknown-version": (gguf(version=77), ("could not be read as GGUF", "version 77",)),
    "of-the-other-byte-order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ("could not be read as GGUF", "version 50331648",)),
    "nothing-in-it": (gguf(), ("could not be read as GGUF", "no tensors",)),
    "more-keys-than-bytes": (gguf(keys=2**60), ("could not be read as GGUF", "ends after 24 bytes",)),
    "more-tensors-than-bytes": (gguf(tensors=2**60, keys=1, rest=KEY), ("could not be read as GGUF", "middle of its header",)),
    "key-longer-than-the-file": (gguf(keys=1, rest=text(b"a", 2**50)), ("could not be read as GGUF", "middle of its header",)),
    "key-of-an-unknown-kind": (gguf(keys=1, rest=text(b"a") + struct.pack("<I", 99)), ("could not be read as GGUF", "kind 99",)),
    "key-that-is-no-text": (gguf(keys=1, rest=text(b"\xff\xfe") + struct.pack("<II", 4, 1)), ("could not be read", "utf-8")),
    "keys-that-repeat": (gguf(keys=2, rest=KEY + KEY), ("could not be read as GGUF", "no tensors",)),
    "tensor-of-a-lying-shape": (
        gguf(tensors=1, keys=1, rest=KEY + text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 2**40, 2**30, 0, 0) + bytes(64)),
        ("could not be read as GGUF", "cut off?"),
    ),
    "tensor-of-an-unknown-kind": (
        gguf(tensors=1, keys=1, rest=KEY + text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 4, 250, 0) + bytes(64)),
        ("could not be read as GGUF", "number format 250"),
    ),
    "tensor-beyond-the-end": (
        gguf(tensors=1, keys=1, rest=KEY + text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 4, 0, 2**40) + bytes(64)),
        ("could not be read as GGUF", "cut off?"),
    ),
    "pointer": (POINTER, ("Git LFS",)),
    "page": (b"<html>404</html>", ("not a GGUF file",)),
    "old-format": (b"ggjt" + bytes(40), ("not a GGUF file",)),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUFS)
def test_gguf_files(place: Path, case: str) -> None:
    raw, named = GGUFS[case]
    (place / "bad.gguf").write_bytes(raw)
    config(place, model="bad.gguf")
    refused(place, "train", "config.yaml", named=("model", "bad.gguf", *named))


# --- longer than the model ---

SHORT: dict[str, dict[str, int]] = {  # as the families call their length
    "gpt2": {"n_positions": 40},  # learned
    "gptj": {"n_positions": 40},  # sines made once
    "mpt": {"max_seq_len": 40},  # distances made once
    "llama": {"max_position_embeddings": 40},  # computed as they are needed
}
TALK = messages("What is it?", "It is long. " * 12)


def short_model(place: Path, model: PreTrainedModel) -> None:
    shutil.rmtree(place / "model")
    model.save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")


@pytest.mark.parametrize("arch", [arch for arch in SHORT if arch != "llama"])
def test_examples_beyond_the_positions_of_the_model(place: Path, arch: str) -> None:
    short_model(place, tiny_model(arch, **SHORT[arch]))
    write_lines(place / "data.jsonl", [*RECORDS, TALK])
    config(place)
    refused(place, "train", "config.yaml", named=("max_seq_len", "data.jsonl:7", "40 positions", "at most 40"))


def test_examples_beyond_the_sines_of_ctrl(place: Path) -> None:
    sizes = {"vocab_size": 320, "n_embd": 64, "n_head": 4, "n_layer": 1, "dff": 64, "n_positions": 40}
    short_model(place, CTRLLMHeadModel(CTRLConfig(**sizes)))
    write_lines(place / "data.jsonl", [*RECORDS, TALK])
    config(place)
    refused(place, "train", "config.yaml", named=("max_seq_len", "data.jsonl:7", "40 positions", "at most 40"))


@pytest.mark.parametrize(
    ("arch", "records", "remark"),
    [
        ("llama", [*RECORDS, TALK], "max_seq_len 64 is beyond the 40 tokens that './model' was made for; 1 examples are longer"),
        ("llama", [messages("a", "b")], "40 tokens that './model' was made for; no example is longer"),
        ("mpt", [messages("a", "b")], "40 tokens that './model' was made for; no example is longer"),
        ("bloom", [messages("a", "b")], None),  # it does not tell
    ],
)
def test_a_length_beyond_the_models_is_remarked(place: Path, arch: str, records: list[Any], remark: str | None) -> None:
    """Models that compute their positions learn from longer examples, though not well."""
    short_model(place, tiny_model(arch, **SHORT.get(arch, {})))
    write_lines(place / "data.jsonl", records)
    config(place, steps=1)
    ran = here("train", "config.yaml")
    assert ran.code == 0, ran.err
    assert ("was made for" in ran.err) == (remark is not None) and (remark or "") in ran.err
    config(place, steps=1, max_seq_len=40, output="fitting")
    assert "was made for" not in here("train", "config.yaml").err
