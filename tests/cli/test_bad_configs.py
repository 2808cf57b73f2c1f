"""Config files and overrides that only an accident, a generator or a joker writes."""

from pathlib import Path
from typing import Any

import pytest
from spoil import config, refused

pytest_plugins = ("places",)

GOOD = b"model: ./model\ndata: data.jsonl\noutput: out\n"
LAUGHS = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n".encode() for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = b"a: &a {x1: 1, x2: 2, x3: 3}\n" + b"".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n".encode() for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)

FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "a-field-twice": (GOOD + b"seed: 1\nbatch_size: 2\nseed: 2\n", ("config.yaml:6", "'seed' is given twice", "line 4")),
    "a-field-twice-in-a-group": (GOOD + b"optimizer: {lr: 1, lr: 2}\n", ("config.yaml:4", "'lr' is given twice")),
    "a-field-twice-in-a-job": (GOOD + b"jobs:\n- name: a\n  seed: 1\n  name: b\n", ("config.yaml:7", "'name' is given twice")),
    "laughs": (LAUGHS + GOOD, ("config.yaml", "unknown field 'a'")),
    "laughs-for-data": (GOOD.replace(b"data.jsonl", b"*j").join((LAUGHS, b"")), ("config.yaml",)),
    "merges": (MERGES + GOOD, ("config.yaml:", "too many fields merged")),
    "holds-itself": (GOOD.replace(b"data.jsonl", b"&d [*d]"), ("data.0",)),
    "job-that-holds-itself": (GOOD + b"jobs: &j [{name: a, data: *j}]\n", ("Circular",)),
    "unknown-anchor": (GOOD + b"seed: *one\n", ("config.yaml:4", "'one'")),
    "deep": (b"model: " + b"[" * 2000, ("config.yaml", "not valid YAML")),
    "deep-mapping": (b"{a: " * 5000, ("config.yaml", "not valid YAML")),
    "digits-without-end": (GOOD + b"seed: " + b"9" * 5000 + b"\n", ("config.yaml", "not valid YAML")),
    "number-that-is-none": (GOOD + b"seed: !!int many\n", ("config.yaml", "not valid YAML")),
    "date-that-is-none": (GOOD + b"seed: !!timestamp someday\n", ("config.yaml", "not valid YAML")),
    "bytes-that-are-none": (GOOD + b"model: !!binary \xc3\xa4\n", ("config.yaml", "not valid YAML")),
    "a-set": (b"!!set {model, data, output}\n", ("config.yaml", "expected fields", "set")),
    "list-as-a-field": (GOOD + b"? [a, b]\n: c\n", ("config.yaml:4", "not valid YAML")),
    "nothing-as-a-field": (GOOD + b"~: 1\n", ("unknown field 'None'",)),
    "two-documents": (GOOD + b"---\n" + GOOD, ("config.yaml:4", "not valid YAML")),
    "json-cut-off": (b'{"model": "./model", "data": ', ("config.yaml:1", "not valid YAML")),
    "utf-16-without-a-mark": ("model: d\xe9mo\n".encode("utf-16-le"), ("config.yaml",)),
    "half-a-character": (GOOD.replace(b": out", b': "out\\udce9"'), ("config.yaml", "output")),
    "half-a-character-in-a-job": (GOOD + b'jobs: [{name: a, data: "\\ud83d.jsonl"}]\n', ("jobs.0", "data")),
    "a-nul-in-a-path": (GOOD.replace(b"data.jsonl", b'"a\\0b"'), ("data", "NUL")),
    "colon-without-a-blank": (b"model:./model\ndata:data.jsonl\n", ("config.yaml", "expected fields", "text")),
    "windows-path-in-quotes": (b'model: "C:\\models\\new"\n', ("config.yaml:1", "not valid YAML")),
    "equals": (b"model = demo\n", ("config.yaml", "expected fields")),
    "a-page": (b"<!DOCTYPE html>\n<html></html>\n", ("config.yaml", "expected fields")),
    "half-yes": (GOOD + b"trust_remote_code: perhaps\n", ("trust_remote_code", "'perhaps'")),
    "norway": (GOOD + b"seed: no\n", ("seed", "got false")),
    "huge": (GOOD + b"steps: 1e400\n", ("steps",)),
    "beyond-64-bits": (GOOD + b"steps: 99999999999999999999\n", ("steps",)),
    "epochs-without-end": (GOOD + b"epochs: .inf\n", ("epochs", "finite")),
    "epochs-beyond-reason": (GOOD + b"epochs: 1e300\n", ("epochs",)),
    "warmup-not-a-number": (GOOD + b"schedule: {warmup: .nan}\n", ("schedule.warmup", "nan")),
    "rank-beyond-memory": (GOOD + b"method: {r: 100000000000}\n", ("method.r",)),
    "null-for-a-group": (GOOD + b"optimizer:\n", ("optimizer",)),
    "list-for-a-group": (GOOD + b"plan: [fp32]\n", ("plan",)),
    "text-for-the-plan": (GOOD + b"plan: fp32\n", ("plan", "'fp32'")),
    "mapping-for-jobs": (GOOD + b"jobs: {a: {seed: 1}}\n", ("jobs",)),
    "null-job": (GOOD + b"jobs: [~]\n", ("jobs.0",)),
    "three-betas": (GOOD + b"optimizer: {betas: [0.9, 0.9, 0.9]}\n", ("optimizer.betas",)),
    "number-for-a-type": (GOOD + b"method: {type: 5}\n", ("method", "'5'", "'lora'")),
    "list-for-a-type": (GOOD + b"schedule: {type: [cosine]}\n", ("schedule",)),
    "empty-type": (GOOD + b'schedule: ""\n', ("schedule", "''")),
    "targets-of-numbers": (GOOD + b"method: {target_modules: [1, 2]}\n", ("method.target_modules",)),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files(place: Path, case: str) -> None:
    raw, named = FILES[case]
    (place / "config.yaml").write_bytes(raw)
    assert len(refused(place, "train", "config.yaml", named=named)) < 2000


SETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "deep-value": ("seed=" + "[" * 2000, ("--set seed=", "not valid YAML")),
    "digits-without-end": ("seed=" + "9" * 5000, ("--set seed=", "not valid YAML")),
    "twice": ("optimizer={lr: 1, lr: 2}", ("not valid YAML",)),
    "odd-digit": ("jobs.\u00b2.seed=1", ("--set jobs.\u00b2.seed=1", "positions")),
    "dots-alone": ("..=1", ("--set ..=1", "a name is empty")),
    "dot-at-the-end": ("optimizer.=1", ("--set optimizer.=1", "a name is empty")),
    "below-a-list": ("data.0.path.x=1", ("data",)),
    "job-as-text": ("jobs.0=a", ("jobs.0",)),
    "two-in-one": ("seed=1 steps=2", ("seed", "'1 steps=2'")),
    "colon-for-equals": ("seed: 1", ("--set seed: 1", "field=value")),
    "half-a-character": ('output="\\ud83d"', ("output",)),
    "empty-value": ("model=", ("model",)),
    "nothing-for-all": ("jobs=null", ("jobs",)),
}


@pytest.mark.parametrize("case", SETS)
def test_overrides(place: Path, case: str) -> None:
    override, named = SETS[case]
    config(place, jobs=[{"name": "a"}, {"name": "b"}])
    refused(place, "train", "config.yaml", "--set", override, named=named)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("train", "model/model.safetensors"), ("model.safetensors", "a model, not a config")),
        (("train", "data.jsonl"), ("data.jsonl", "data, not a config", "snugtune init --data data.jsonl")),
        (("train", "config.yaml/more"), ("config.yaml/more",)),
        (("train", "x" * 300), ("too long",)),
        (("data", "show", "nowhere/config.yaml"), ("no config file nowhere/config.yaml",)),
        (("data", "show", "tmp"), ("tmp", "a folder, not a config")),
        (("train", ""), ("a folder, not a config",)),
    ],
)
def test_paths(place: Path, args: tuple[str, ...], named: tuple[str, ...]) -> None:
    refused(place, *args, named=named)


def test_merged_defaults_are_no_mistake(place: Path) -> None:
    """A field merged in and given again is YAML's way to override it."""
    from snugtune.config import read_config

    text = "defaults: &d {lr: 1.0, eps: 1.0e-6}\n"
    (place / "config.yaml").write_text(GOOD.decode() + "optimizer: {<<: &d {lr: 1.0, eps: 1.0e-6}, lr: 2.0}\n")
    found: Any = read_config(place / "config.yaml")
    assert (found.optimizer.lr, found.optimizer.eps) == (2.0, 1e-6), text
