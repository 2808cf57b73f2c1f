"""What a user can get wrong: each mistake ends in one clear line and exit code 2, and leaves the disk as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import assert_refused, command, contents, here, messages, write_lines
from safetensors.torch import load_file, save_file
from spoil import RECORDS, TWO, config, edit, refused, remove, replace, truncate, unfinish
from transformers import BertConfig, BertForMaskedLM, T5Config, ViTConfig

from conftest import tiny_model, tiny_tokenizer

pytest_plugins = ("places",)


def test_the_config_the_cases_are_made_from_is_good(place: Path) -> None:
    """Otherwise every case below could be refused for the wrong reason."""
    ran = here("train", "config.yaml")
    assert ran.code == 0, ran.err
    assert (place / "out/adapters/default/adapter_model.safetensors").is_file()


# --- config -----------------------------------------------------------------------------------------------------------

FIELDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "typo": ({"batchsize": 4}, ("config.yaml", "'batchsize'", "'batch_size'")),
    "name-of-another-tool": ({"learning_rate": 1e-4}, ("'learning_rate'", "'optimizer.lr'")),
    "typo-in-a-group": ({"method": {"type": "lora", "lora_alhpa": 8}}, ("method", "'lora_alhpa'", "'lora_alpha'")),
    "text-for-a-number": ({"batch_size": "lots"}, ("batch_size", "'lots'")),
    "fraction-for-a-count": ({"batch_size": 2.5}, ("batch_size", "2.5")),
    "switch-for-a-count": ({"eval_every": True}, ("eval_every", "whole number", "got true")),
    "list-for-text": ({"model": ["a", "b"]}, ("model",)),
    "zero": ({"batch_size": 0}, ("batch_size", "at least 1", "got 0")),
    "negative-rate": ({"optimizer": {"lr": -1e-4}}, ("optimizer.lr", "above 0")),
    "endless-rate": ({"optimizer": {"lr": float("inf")}}, ("optimizer.lr", "inf")),
    "beta-above-one": ({"optimizer": {"betas": [2.0, 0.9]}}, ("optimizer.betas",)),
    "dropout-of-everything": ({"method": {"lora_dropout": 1.0}}, ("method.lora_dropout", "below 1")),
    "everything-frozen": ({"method": "freeze"}, ("method", "everything would be frozen", "last_blocks")),
    "more-blocks-than-there-are": ({"method": {"type": "freeze", "last_blocks": 9}}, ("method.last_blocks: 9", "2 blocks")),
    "weights-of-no-name": ({"method": {"type": "freeze", "names": ["*.mpl.*"]}}, ("method.names", "'*.mpl.*'")),
    "unknown-method": ({"method": "lore"}, ("method", "'lore'", "'lora'")),
    "unknown-schedule": ({"schedule": "cosin"}, ("schedule", "'cosin'", "'cosine'")),
    "unknown-optimizer": ({"optimizer": {"type": "rmsprop"}}, ("optimizer", "'adamw'", "'rmsprop'")),
    "unknown-objective": ({"objective": "dpo"}, ("objective", "'sft'", "'dpo'")),
    "no-model": ({"model": None}, ("model: required",)),
    "no-output": ({"output": None}, ("output: required",)),
    "no-data": ({"data": None}, ("data: nothing to train on",)),
    "output-of-nobody": ({"output": "~nobody-by-that-name/run"}, ("output", "nobody-by-that-name")),
    "endless-output": ({"output": "x" * 300}, ("output", "too long")),
    "output-nobody-can-make": ({"output": "/proc/snugtune/run"}, ("cannot make the folder /proc/snugtune/run",)),
    "model-of-nobody": ({"model": "~nobody-by-that-name/model"}, ("model", "nobody-by-that-name")),
    "data-of-nobody": ({"data": "~nobody-by-that-name/d.jsonl"}, ("data", "nobody-by-that-name")),
    "empty-output": ({"output": ""}, ("output", "must not be empty")),
    "number-for-data": ({"data": 5}, ("data",)),
    "typo-in-data": ({"data": {"path": "data.jsonl", "fromat": "alpaca"}}, ("data.0", "'fromat'", "'format'")),
    "epochs-and-steps": ({"epochs": 1}, ("epochs or steps, not both",)),
    "fraction-above-one": ({"validation": 1.5}, ("validation", "between 0 and 1")),
    "unknown-device": ({"device": "tpu"}, ("device", "'tpu'", "'cpu'")),
    "cuda-without-cuda": ({"device": "cuda"}, ("device: cuda", "no CUDA device")),
    "fp16-on-cpu": ({"device": "cpu", "plan": {"weights": "fp16"}}, ("plan.weights: fp16", "CPU")),
    "unknown-weights": ({"plan": {"weights": "fp4"}}, ("plan.weights", "'fp4'")),
    "no-micro-batch": ({"plan": {"micro_batch": 0}}, ("plan.micro_batch", "at least 1")),
    "length-of-one": ({"max_seq_len": 1}, ("max_seq_len", "got 1")),
    "length-drops-everything": ({"max_seq_len": 4}, ("no example is left", "max_seq_len=4", "data.jsonl:1")),
    "seed-beyond-64-bits": ({"seed": 2**64}, ("seed",)),
    "no-such-layer": ({"method": {"target_modules": ["q_projj"]}}, ("method.target_modules", "'q_projj'", "q_proj")),
    "one-layer-of-two": ({"method": {"target_modules": ["q_proj", "query"]}}, ("method.target_modules", "'query'")),
    "no-layers": ({"method": {"target_modules": []}}, ("method.target_modules",)),
    "broken-pattern": ({"method": {"target_modules": "model.(q_proj"}}, ("method.target_modules", "model.(q_proj")),
    "odd-orthogonal-rank": ({"method": {"r": 3, "init_lora_weights": "orthogonal"}}, ("method", "even")),
    "jobs-of-one-name": ({"jobs": [{"name": "a"}, {"name": "a"}]}, ("jobs", "'a'", "twice")),
    "jobs-without-names": ({"jobs": [{"seed": 1}, {"seed": 2}]}, ("jobs", "'default'", "twice")),
    "name-that-is-a-path": ({"jobs": [{"name": "../a"}]}, ("jobs.0", "name", "'../a'")),
    "typo-in-a-job": ({"jobs": [{"name": "a"}, {"name": "b", "sed": 1}]}, ("jobs.1", "'sed'", "'seed'")),
    "a-job-that-is-text": ({"jobs": ["a"]}, ("jobs.0", "'a'")),
    "full-jobs-on-one-base": ({"jobs": TWO, "method": "full"}, ("jobs", "'a'", "'full'", "cannot share")),
    "data-of-a-job-missing": ({"jobs": [{"name": "a"}, {"name": "b", "data": "b.jsonl"}]}, ("data", "b.jsonl")),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_config_fields(place: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, named = FIELDS[case]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config(place, **fields)
    refused(place, "train", "config.yaml", named=named)


FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "broken-yaml": (b"model: demo\ndata: [a.jsonl\noutput: out\n", ("config.yaml:3", "not valid YAML")),
    "tabs": (b"model: demo\nplan:\n\tweights: fp32\n", ("config.yaml:3", "not valid YAML")),
    "unclosed-quote": (b'model: "demo\noutput: out\n', ("config.yaml:", "not valid YAML")),
    "code": (b"model: !!python/object/apply:os.getcwd []\n", ("config.yaml:1", "not valid YAML")),
    "empty": (b"", ("config.yaml", "expected fields", "found nothing")),
    "list": (b"- model: demo\n", ("config.yaml", "expected fields", "a list")),
    "text": (b"demo", ("config.yaml", "expected fields", "text")),
    "number-as-field": (b"1: 2\n", ("config.yaml", "'1'")),
    "number-as-model": (b"model: 135\noutput: out\ndata: a.jsonl\n", ("config.yaml", "model", "expected text", "135")),
    "not-utf-8": ("model: d\xe9mo\n".encode("latin-1"), ("config.yaml",)),
    "binary": (bytes(range(256)), ("config.yaml",)),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("args", [("train",), ("data", "show")], ids=" ".join)
def test_config_files(place: Path, args: tuple[str, ...], case: str) -> None:
    raw, named = FILES[case]
    (place / "config.yaml").write_bytes(raw)
    refused(place, *args, "config.yaml", named=named)


def test_config_that_is_not_there(place: Path) -> None:
    refused(place, "train", "confg.yaml", named=("no config file confg.yaml",))


def test_config_that_is_a_folder(place: Path) -> None:
    refused(place, "train", "model", named=("model is a model's folder", "snugtune init --model model"))


SETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no-value": ("steps", ("--set steps", "field=value")),
    "no-field": ("=5", ("--set =5", "field=value")),
    "typo": ("optimzer.lr=1e-4", ("'optimzer'", "'optimizer'")),
    "typo-in-a-group": ("optimizer.larning_rate=1e-4", ("optimizer", "'larning_rate'")),
    "wrong-type": ("steps=many", ("steps", "'many'")),
    "below-a-number": ("batch_size.x=1", ("--set batch_size.x=1", "batch_size", "not a group")),
    "far-below-a-number": ("batch_size.x.y=1", ("--set batch_size.x.y=1", "not inside a group")),
    "broken-value": ("optimizer=[1", ("--set optimizer=[1", "not valid YAML")),
    "beyond-the-list": ("jobs.2.seed=1", ("--set jobs.2.seed=1", "'2'", "2 positions")),
    "word-in-a-list": ("jobs.first.seed=1", ("--set jobs.first.seed=1", "'first'")),
}


@pytest.mark.parametrize("case", SETS)
def test_overrides(place: Path, case: str) -> None:
    override, named = SETS[case]
    config(place, jobs=TWO)
    refused(place, "train", "config.yaml", "--set", override, named=named)


# --- data -------------------------------------------------------------------------------------------------------------

GOOD = json.dumps(RECORDS[0]).encode()
DATA: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("d.jsonl", b"", ("d.jsonl", "no records")),
    "blank": ("d.jsonl", b"\n \n", ("d.jsonl", "no records")),
    "empty-array": ("d.json", b"[]", ("d.json", "no records")),
    "csv": ("d.csv", b"question,answer\n", ("d.csv", "no records")),
    "csv-without-known-columns": (
        "d.csv",
        b"question,answer\na,b\n",
        ("d.csv:2", "no known form", "columns: {instruction: question, output: answer}"),
    ),
    "csv-with-a-cell-too-many": ("d.csv", b"instruction,output\na,b,c\n", ("d.csv:2", "cells")),
    "half-a-gzip": ("d.jsonl.gz", b"\x1f\x8b\x08\x00", ("d.jsonl.gz", "gzip")),
    "no-parquet": ("d.parquet", b"PAR1", ("d.parquet", "parquet")),
    "plain-text": (
        "d.txt",
        b"Once upon a time.",
        ("1 document,", "d.txt:1", "objective sft does not learn (set objective: clm)"),
    ),
    "no-ending": ("d", GOOD, ("d", "ending", ".jsonl")),
    "binary": ("d.jsonl", bytes(range(256)), ("d.jsonl", "UTF-8")),
    "latin-1": ("d.jsonl", json.dumps(messages("d\xe9j\xe0", "vu"), ensure_ascii=False).encode("latin-1"), ("d.jsonl", "UTF-8")),
    "cut-off-line": ("d.jsonl", GOOD + b"\n\n" + GOOD[:30], ("d.jsonl:3", "not valid JSON")),
    "not-json": ("d.jsonl", b"Hello there\n", ("d.jsonl:1", "not valid JSON")),
    "cut-off-array": ("d.json", b"[\n" + GOOD + b",\n" + GOOD[:30], ("d.json:3", "not valid JSON")),
    "open-array": ("d.json", b"[\n" + GOOD + b"\n", ("d.json:3", "breaks off")),
    "one-text": ("d.json", b'"hello"', ("d.json:1", "array")),
    "nested-too-deeply": ("d.jsonl", b"[" * 100_000, ("d.jsonl:1", "JSON")),
    "numbers": ("d.jsonl", b"1\n2\n", ("d.jsonl:1", "d.jsonl:2", "other than JSON objects")),
    "unknown-form": (
        "d.jsonl",
        b'{"question": "a", "answer": "b"}\n',
        ("d.jsonl:1", "no known form", "instruction: question, output: answer"),
    ),
    "questions-only": ("d.jsonl", json.dumps(messages("a?")).encode(), ("d.jsonl:1", "without an answer")),
    "empty-answers": ("d.jsonl", json.dumps(messages("a?", " ")).encode(), ("d.jsonl:1", "without an answer")),
    "unknown-role": ("d.jsonl", b'{"messages": [{"role": "wizard", "content": "a"}]}', ("d.jsonl:1", "unknown role")),
    "content-in-parts": (
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": [{"type": "text"}]}, {"role": "assistant", "content": "b"}]}',
        ("d.jsonl:1", "parts of 'content' that are not text"),
    ),
    "half-a-character": (
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\ud83d"}]}',
        ("d.jsonl:1",),
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data_files(place: Path, case: str) -> None:
    name, raw, named = DATA[case]
    (place / name).write_bytes(raw)
    config(place, data=name)
    refused(place, "train", "config.yaml", named=("data", *named))


@pytest.mark.parametrize("case", ["empty", "cut-off-line", "unknown-form"])
def test_validation_files(place: Path, case: str) -> None:
    name, raw, named = DATA[case]
    (place / name).write_bytes(raw)
    for validation in (name, {"path": name}):
        config(place, validation=validation)
        refused(place, "train", "config.yaml", named=named)


ELSEWHERE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "missing": ({"data": "no-such.jsonl"}, ("data", "no-such.jsonl")),
    "folder": ({"data": "model"}, ("data", "model/config.json:1")),
    "folder-of-nothing": ({"data": "tmp"}, ("data", "folder tmp", ".jsonl")),
    "hub-offline": ({"data": "someone/something"}, ("data", "'someone/something'", "hub")),
    "conversations-for-clm": ({"objective": "clm"}, ("data.jsonl:1", "objective clm does not learn (set objective: sft)")),
    "weight-without-turns": ({"data": {"path": "data.jsonl", "weight": 2}}, ("data.0.weight", "interleave")),
    "column-that-is-not-there": (
        {"data": {"path": "data.jsonl", "columns": {"messages": "talk"}}},
        ("data.jsonl:1", "'talk'", "messages"),
    ),
    "column-of-no-meaning": ({"data": {"path": "data.jsonl", "columns": {"question": "talk"}}}, ("data.0.columns", "question")),
    "second-missing": ({"data": ["data.jsonl", "more.jsonl"]}, ("data", "more.jsonl")),
    "another-form": ({"data": {"path": "data.jsonl", "format": "alpaca"}}, ("data.jsonl:1", "without an answer")),
    "validation-missing": ({"validation": "held.jsonl"}, ("held.jsonl",)),
    "validation-of-nothing": ({"validation": 0.5, "data": "one.jsonl"}, ("validation", "1 example")),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_data_fields(place: Path, case: str) -> None:
    fields, named = ELSEWHERE[case]
    write_lines(place / "one.jsonl", RECORDS[:1])
    config(place, **fields)
    refused(place, "train", "config.yaml", named=named)


# --- model ------------------------------------------------------------------------------------------------------------


def another_kind(config: Any) -> Callable[[Path], None]:
    return lambda model: config.save_pretrained(model)


def an_encoder(model: Path) -> None:
    """BERT is among transformers' causal models, but as it comes every token sees the answer it should learn to give."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(model)


def drop_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def only_a_pickle(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def lose_a_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(model, max_shard_size="100KB")
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()


def more_words_than_rows(model: Path) -> None:
    """Tokens were added to the tokenizer, and the model's embeddings were not grown: they have no row for '<end>'."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_end|>", "<end>")
    tokenizer.save_pretrained(model)


def no_end_token(model: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)


def few_positions(model: Path) -> None:
    tiny_model("gpt2", n_positions=32).save_pretrained(model)


MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no-config": (remove("config.json"), ("no config.json",)),
    "broken-config": (replace("config.json", b'{"model_type": "llama",'), ("cannot load",)),
    "config-is-a-list": (replace("config.json", b"[]"), ("cannot load",)),
    "config-without-a-type": (edit("config.json", model_type=None), ("model_type",)),
    "unknown-type": (edit("config.json", model_type="llamalama"), ("llamalama",)),
    "unknown-activation": (edit("config.json", hidden_act="gelou"), ("cannot load", "gelou")),
    "unknown-rope": (edit("config.json", rope_parameters={"rope_type": "twist", "rope_theta": 1e4}), ("cannot load",)),
    "no-heads": (edit("config.json", num_attention_heads=0), ("cannot load",)),
    "unknown-dtype": (edit("config.json", dtype="float12"), ("cannot load",)),
    "wrong-type-in-config": (edit("config.json", hidden_size="wide"), ("hidden_size",)),
    "image-model": (another_kind(ViTConfig()), ("vit", "not a causal")),
    "encoder": (an_encoder, ("bert", "causal")),
    "encoder-decoder": (another_kind(T5Config()), ("t5", "encoder-decoder")),
    "no-weights": (remove("*.safetensors"), ("weights",)),
    "only-a-pickle": (only_a_pickle, ("safetensors",)),
    "truncated-weights": (truncate("model.safetensors"), ("weights",)),
    "empty-weights": (replace("model.safetensors", b""), ("weights",)),
    "page-for-weights": (replace("model.safetensors", b"<html>404 not found</html>"), ("weights",)),
    "missing-tensor": (drop_a_tensor, ("model.layers.1.mlp.up_proj.weight",)),
    "missing-shard": (lose_a_shard, ("model-00002-of-",)),
    "more-layers-than-weights": (edit("config.json", num_hidden_layers=3, layer_types=None), ("lacks", "model.layers.2.")),
    "weights-of-another-size": (edit("config.json", intermediate_size=128), (".mlp.",)),
    "no-tokenizer": (remove("tokenizer*"), ("tokenizer",)),
    "broken-tokenizer": (truncate("tokenizer.json"), ("tokenizer",)),
    "tokenizer-without-end": (no_end_token, ("tokenizer", "eos_token")),
    "more-tokens-than-embeddings": (more_words_than_rows, ("token", "320")),
    "broken-template": (replace("chat_template.jinja", b"{% for m in messages %}"), ("chat template",)),
    "template-without-answers": (replace("chat_template.jinja", b"{{ raise_exception('no') }}"), ("chat template", "no")),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_model_folders(place: Path, case: str) -> None:
    spoil, named = MODELS[case]
    spoil(place / "model")
    refused(place, "train", "config.yaml", named=("model", *named))


def test_longer_than_the_models_positions(place: Path) -> None:
    """A table of learned positions has an end; the 33rd token would be looked up behind it."""
    few_positions(place / "model")
    write_lines(place / "long.jsonl", [messages("Why?", "Because of the quick brown fox.")])
    config(place, data="long.jsonl")
    refused(place, "train", "config.yaml", named=("max_seq_len", "32"))


REFERENCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "relative-folder": ("./no-such-model", ("no folder", "no-such-model")),
    "absolute-folder": ("/no/such/model", ("no folder /no/such/model",)),
    "folder-of-the-home": ("~/no-such-model", ("no folder", "no-such-model")),
    "a-file": ("data.jsonl", ("data.jsonl is a file",)),
    "missing-gguf": ("no-such.gguf", ("no file no-such.gguf",)),
    "not-a-gguf": ("text.gguf", ("text.gguf", "not a GGUF")),
    "empty-gguf": ("empty.gguf", ("empty.gguf", "not a GGUF")),
    "hub-offline": ("nobody/no-such-model", ("nobody/no-such-model", "HF_HUB_OFFLINE")),
    "misspelt-demo": ("dmeo", ("'dmeo'", "HF_HUB_OFFLINE", "did you mean 'demo'?")),
    "misspelt-folder": ("modle", ("'modle'", "did you mean 'model'?")),
    "not-even-an-id": ("what is this?", ("what is this?",)),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_model_references(place: Path, case: str) -> None:
    model, named = REFERENCES[case]
    (place / "text.gguf").write_text("once upon a time")
    (place / "empty.gguf").touch()
    config(place, model=model)
    refused(place, "train", "config.yaml", named=("model", *named))


def test_a_model_that_is_not_there_is_refused_before_anything_is_planned(place: Path) -> None:
    config(place, model="./no-such-model")
    assert here("train", "config.yaml").err.count("\n") == 1


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "named"),
    [
        ("data.jsonl", ("output", "data.jsonl is a file")),
        ("data.jsonl/out", ("output", "data.jsonl is a file")),
        ("data.jsonl/deep/out", ("output", "data.jsonl is a file")),
        ("model", ("output", "model is not empty")),
    ],
)
def test_output_that_is_something_else(place: Path, output: str, named: tuple[str, ...]) -> None:
    config(place, output=output)
    refused(place, "train", "config.yaml", named=named)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="/proc is Linux's; nobody, not even root, can make a folder in it")
def test_output_that_cannot_be_made_is_refused_before_anything_is_loaded(place: Path) -> None:
    config(place, output="/proc/snugtune/out")
    ran = here("train", "config.yaml")
    assert_refused(ran, "cannot make the folder /proc/snugtune/out", "give another")
    assert ran.err.count("\n") == 1, "no plan, no data, no model before it"


def test_demo_output_that_is_a_file(place: Path) -> None:
    before = contents(place)
    assert_refused(here("demo", "--output", "data.jsonl"), "data.jsonl is a file")
    assert contents(place) == before


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "one-field": ({"seed": 7}, "undo: seed: 0 -> 7"),
    "in-a-group": ({"optimizer": {"lr": 1e-3}}, "undo: optimizer.lr: 0.0002 -> 0.001"),
    "another-type": ({"schedule": {"type": "wsd", "warmup": 1}}, "undo: schedule.type: constant -> wsd"),
    "another-file": ({"data": "more.jsonl"}, "undo: data.0.path: data.jsonl -> more.jsonl"),
    "what-was-not-there": ({"validation": 0.5}, "undo: validation: nothing -> 0.5"),
    "three": ({"seed": 7, "batch_size": 4, "steps": 9}, "undo: batch_size: 2 -> 4, steps: 3 -> 9, seed: 0 -> 7"),
    "more": (
        {"seed": 7, "batch_size": 4, "steps": 9, "max_seq_len": 32, "eval_every": 1},
        "undo: max_seq_len: 64 -> 32, batch_size: 2 -> 4, steps: 3 -> 9 and 2 more",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_config_is_refused_with_what_changed(ran: Path, case: str) -> None:
    fields, undo = CHANGED[case]
    config(ran, **fields)
    line = refused(ran, "train", "config.yaml", named=("output: out holds a run of another config; give a new folder or ",))
    assert line.endswith(undo)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"device": "cuda"}, ("device: cuda", "no CUDA device")),
        ({"device": "cpu", "plan": {"weights": "fp16"}}, ("plan.weights: fp16", "CPU")),
    ],
)
def test_what_cannot_be_had_is_told_before_what_changed(
    ran: Path, fields: dict[str, Any], named: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new folder would not help."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config(ran, **fields)
    refused(ran, "train", "config.yaml", named=named)


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "without-numbers": (remove("run.json"), ("step-00000002", "delete it")),
    "broken-numbers": (replace("run.json", b'{"format": 1,'), ("step-00000002", "delete it")),
    "empty-numbers": (replace("run.json", b"{}"), ("step-00000002",)),
    "of-another-version": (edit("run.json", format=99), ("step-00000002", "another version")),
    "truncated": (truncate("default.safetensors"), ("step-00000002", "'default'")),
    "without-a-job": (remove("default.safetensors"), ("step-00000002", "'default'")),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_damaged_checkpoints(ran: Path, case: str) -> None:
    spoil, named = CHECKPOINTS[case]
    unfinish(ran / "out")
    spoil(ran / "out/checkpoints/step-00000002")
    refused(ran, "train", "config.yaml", named=named)


# --- chat and export --------------------------------------------------------------------------------------------------


def other_weights(place: Path) -> None:
    tiny_model("llama", seed=1).save_pretrained(place / "model")


def other_shape(place: Path) -> None:
    (place / "out/adapters/default/snugtune.json").unlink()  # an adapter without a stamp is known by its shapes alone
    tiny_model("llama", intermediate_size=128).save_pretrained(place / "model")


def other_architecture(place: Path) -> None:
    (place / "out/adapters/default/snugtune.json").unlink()
    tiny_model("gpt2").save_pretrained(place / "model")


def in_adapter(act: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda place: act(place / "out/adapters/default")


def in_run(act: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda place: act(place / "out")


def nothing(place: Path) -> None:
    """The mistake is in the command."""


RESULTS_USED: dict[str, tuple[Callable[[Path], object], tuple[str, ...], tuple[str, ...]]] = {
    "missing": (nothing, ("no-such-run",), ("there is no no-such-run", "runs that are here: out, two")),
    "misspelt-place": (nothing, ("out/adapters/defaults",), ("there is no out/adapters/defaults", "out, two")),
    "no-run": (nothing, ("tmp",), ("tmp", "neither a run folder", "runs that are here: out, two")),
    "too-long": (nothing, ("x" * 300,), ("xxx", "cannot be a path")),
    "adapter-of-one": (nothing, ("out/adapters/default", "--adapter", "a"), ("--adapter a", "leave it out")),
    "a-file": (nothing, ("data.jsonl",), ("data.jsonl is a file", "a run's folder")),
    "unfinished": (in_run(unfinish), ("out",), ("out", "'default' is not finished")),
    "one-of-two": (nothing, ("two",), ("two", "--adapter", "a, b")),
    "unknown-adapter": (nothing, ("two", "--adapter", "c"), ("two", "'c'", "a, b")),
    "other-weights": (other_weights, ("out",), ("out/adapters/default", "other weights", "./model")),
    "other-shape": (other_shape, ("out/adapters/default",), ("out/adapters/default", "wrong base")),
    "other-architecture": (other_architecture, ("out",), ("out/adapters/default", "wrong base")),
    "base-gone": (lambda place: shutil.rmtree(place / "model"), ("out",), ("model", "no folder")),
    "base-without-weights": (lambda place: (place / "model/model.safetensors").unlink(), ("out",), ("model", "weights")),
    "broken-run-config": (in_run(replace("config.yaml", b"model: [")), ("out",), ("out/config.yaml", "not valid YAML")),
    "broken-adapter-config": (in_adapter(replace("adapter_config.json", b"{")), ("out/adapters/default",),
                              ("adapter_config.json",)),
    "broken-stamp": (in_adapter(replace("snugtune.json", b"{}")), ("out",), ("out/adapters/default",)),
    "adapter-of-no-base": (in_adapter(edit("adapter_config.json", base_model_name_or_path=None)), ("out/adapters/default",),
                           ("adapter_config.json", "no base model")),
    "adapter-of-another-kind": (in_adapter(edit("adapter_config.json", peft_type="IA3")), ("out",), ("IA3",)),
    "adapter-with-dora": (in_adapter(edit("adapter_config.json", use_dora=True)), ("out",), ("use_dora",)),
    "truncated-adapter": (in_adapter(truncate("adapter_model.safetensors")), ("out",),
                          ("out/adapters/default", "cannot be read")),
    "adapter-without-weights": (in_adapter(remove("adapter_model.safetensors")), ("out",), ("adapter_model.safetensors",)),
}  # fmt: skip


@pytest.mark.parametrize("case", RESULTS_USED)
@pytest.mark.parametrize(
    "what", [("chat", "--prompt", "Hi"), ("export", "--to", "merged", "--output", "exported")], ids=lambda w: w[0]
)
def test_results_that_cannot_be_used(ran: Path, what: tuple[str, ...], case: str) -> None:
    spoil, args, named = RESULTS_USED[case]
    spoil(ran)
    refused(ran, what[0], *args, *what[1:], named=named)


EXPORTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown-form": (("--to", "onnx"), ("--to onnx", "merged")),
    "onto-a-folder": (("--to", "merged", "--output", "model"), ("model exists",)),
    "onto-a-file": (("--to", "merged", "--output", "data.jsonl"), ("data.jsonl exists",)),
    "below-a-file": (("--to", "merged", "--output", "data.jsonl/merged"), ("data.jsonl",)),
    "unknown-dtype": (("--to", "merged", "--dtype", "fp8"), ("--dtype fp8", "bf16")),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_exports(ran: Path, case: str) -> None:
    args, named = EXPORTS[case]
    refused(ran, "export", "out", *args, named=named)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("trian", "config.yaml"), "trian"),
        (("train", "config.yaml", "--sett", "steps=1"), "--sett"),
        (("train",), "config"),
        (("export", "out"), "--to"),
        (("chat", "out", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("chat", "out", "--temperature", "hot"), "--temperature"),
        (("data", "shwo", "config.yaml"), "shwo"),
    ],
)
def test_usage(place: Path, args: tuple[str, ...], named: str) -> None:
    """The command line's own mistakes are one line as well."""
    before = contents(place)
    assert_refused(here(*args), named)
    assert contents(place) == before


# --- the same in real processes ---------------------------------------------------------------------------------------


def cut_gguf(place: Path) -> dict[str, Any]:
    (place / "cut.gguf").write_bytes(b"GGUF" + bytes(60))
    return {"model": "cut.gguf"}


def used_folder(place: Path) -> dict[str, Any]:
    return {"output": "model"}


REAL: dict[str, tuple[Callable[[Path], dict[str, Any]], tuple[str, ...]]] = {
    "field": (lambda place: {"batchsize": 4}, ("config.yaml", "'batchsize'", "'batch_size'")),
    "hub-offline": (lambda place: {"model": "nobody/no-such-model"}, ("model", "nobody/no-such-model")),
    "truncated-gguf": (cut_gguf, ("model", "cut.gguf", "could not be read as GGUF")),
    "output": (used_folder, ("output", "model is not empty")),
}


@pytest.mark.parametrize("case", REAL)
def test_in_a_real_process(place: Path, case: str) -> None:
    """Exit code and streams as a shell sees them, with nothing of the libraries in between."""
    spoil, named = REAL[case]
    config(place, **spoil(place))
    before = contents(place)
    ran = command("train", "config.yaml", cwd=place)
    assert_refused(ran, *named)
    assert ran.out == ""
    assert contents(place) == before
