"""What scripts and configs of users depend on: changing any of it is a decision, and shows here."""

import importlib
import pkgutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from common import messages, metrics_of, write_config, write_lines

import snugtune
from snugtune import errors

CONFIG_FIELDS = {
    "RunConfig": ["data", "mixing", "max_seq_len", "method", "objective", "batch_size", "epochs", "steps", "validation",
                  "eval_every", "early_stopping", "keep_best", "samples", "neftune_noise_alpha",
                  "max_grad_norm", "seed", "optimizer", "schedule", "model", "output", "device", "memory",
                  "checkpoint_every", "keep_checkpoints", "trust_remote_code", "tracking", "plan", "jobs"],
    "JobConfig": ["data", "mixing", "max_seq_len", "method", "objective", "batch_size", "epochs", "steps", "validation",
                  "eval_every", "early_stopping", "keep_best", "samples", "neftune_noise_alpha",
                  "max_grad_norm", "seed", "optimizer", "schedule", "name", "weight"],
    "SourceConfig": ["path", "format", "columns", "weight", "max_examples", "split", "subset", "streaming"],
    "ConcatConfig": ["type"],
    "InterleaveConfig": ["type", "until"],
    "LoraConfig": ["type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights"],
    "FullConfig": ["type"],
    "FreezeConfig": ["type", "last_blocks", "first_blocks", "embeddings", "head", "names"],
    "RotateConfig": ["type", "blocks", "every", "order", "ends"],
    "SftConfig": ["label_smoothing", "type", "train_on"],
    "ClmConfig": ["label_smoothing", "type"],
    "AdamWConfig": ["weight_decay", "type", "lr", "betas", "eps"],
    "SgdConfig": ["weight_decay", "type", "lr", "momentum", "nesterov"],
    "LionConfig": ["weight_decay", "type", "lr", "betas"],
    "AdafactorConfig": ["weight_decay", "type", "lr", "clip_threshold", "decay_rate"],
    "GaloreConfig": ["weight_decay", "lr", "rank", "update_every", "scale", "betas", "eps", "type"],
    "ApolloConfig": ["weight_decay", "lr", "rank", "update_every", "scale", "betas", "eps", "type", "scaling"],
    "EarlyStoppingConfig": ["patience", "min_delta"],
    "SamplesConfig": ["every", "prompts", "count", "max_new_tokens"],
    "ConstantConfig": ["warmup", "type"],
    "LinearConfig": ["warmup", "type"],
    "CosineConfig": ["warmup", "type"],
    "WsdConfig": ["warmup", "type", "cooldown", "shape"],
    "PlanConfig": ["weights", "double_quant", "outlier_threshold", "micro_batch", "recompute", "optimizer_state",
                   "gradients", "offload", "head_rows", "exact", "execution", "resident_jobs"],
}  # fmt: skip

RESOLVED = """\
data:
- path: data.jsonl
  format: auto
  columns: {}
  weight: 1.0
  max_examples: null
  split: train
  subset: null
  streaming: false
mixing:
  type: concat
max_seq_len: 1024
method:
  type: lora
  r: 8
  lora_alpha: 16.0
  lora_dropout: 0.0
  target_modules: all-linear
  use_rslora: false
  init_lora_weights: default
objective:
  label_smoothing: 0.0
  type: sft
  train_on: answers
batch_size: 16
epochs: null
steps: null
validation: null
eval_every: null
early_stopping: null
keep_best: false
samples:
  every: null
  prompts: []
  count: 3
  max_new_tokens: 64
neftune_noise_alpha: null
max_grad_norm: 1.0
seed: 0
optimizer:
  weight_decay: 0.0
  type: adamw
  lr: 0.0002
  betas:
  - 0.9
  - 0.999
  eps: 1.0e-08
schedule:
  warmup: 0.0
  type: constant
model: demo
output: run
device: auto
memory: null
checkpoint_every: null
keep_checkpoints: 2
trust_remote_code: false
tracking: []
plan:
  weights: auto
  double_quant: false
  outlier_threshold: 0.0
  micro_batch: auto
  recompute: auto
  optimizer_state: auto
  gradients: auto
  offload: auto
  head_rows: auto
  exact: false
  execution: auto
  resident_jobs: auto
jobs: []
"""

COMMANDS = {
    "": ["--help", "--version"],
    "demo": ["--help", "--output"],
    "init": ["--data", "--epochs", "--force", "--help", "--method", "--model", "--objective", "--output", "--yes", "-y", "path"],
    "train": ["--help", "--set", "config"],
    "chat": [
        "--adapter",
        "--compare",
        "--help",
        "--max-new-tokens",
        "--prompt",
        "--seed",
        "--temperature",
        "--top-p",
        "--trust-remote-code",
        "--weights",
        "run",
    ],
    "export": ["--adapter", "--base", "--dtype", "--help", "--output", "--to", "--trust-remote-code", "run"],
    "doctor": ["--help", "--json", "--precision", "--quick", "--set"],
    "plan": ["--device", "--help", "--json", "--max-seq-len", "--memory", "--method", "--model", "--set", "config"],
    "report": ["--help", "--open", "--output", "run"],
    "schema": ["--help"],
    "data show": ["--examples", "--help", "--set", "-n", "config"],
}
"""Each command with its options and, without dashes, its arguments. Typer adds its own completion options to the root."""

EXIT_CODES = {
    "GradientError": 2,
    "InputError": 2,
    "StorageError": 2,
    "JobFailedError": 2,
    "DoesNotFitError": 3,
    "OutOfMemoryError": 3,
    "Interrupted": 130,
}


def tiny_run(model: Path, place: Path, **fields: Any) -> dict[str, Any]:
    """A config in Python's own types, of one step."""
    write_lines(place / "data.jsonl", [messages("Hi?", "Hello!")] * 3)
    good = {"model": str(model), "data": str(place / "data.jsonl"), "output": str(place / "run"), "batch_size": 2, "steps": 1}
    return good | {"max_seq_len": 32, "plan": {"weights": "fp32"}} | fields


# --- names ------------------------------------------------------------------------------------------------------------


def test_exported_names() -> None:
    assert sorted(snugtune.__all__) == ["__version__", "load", "open", "train"]
    assert all(hasattr(snugtune, name) for name in snugtune.__all__)


def test_import_is_light() -> None:
    script = "import snugtune, sys; print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


WATCHED = """
import sys, importlib.abc
from pathlib import Path
model, data, output = sys.argv[1:]
metrics = Path(output) / "metrics.jsonl"
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("peft", "bitsandbytes"):
            print(name, len(metrics.read_text().splitlines()) if metrics.exists() else 0)
import snugtune, torch, transformers.utils.import_utils
transformers.utils.import_utils.is_peft_available()  # these look whether it is there, and no more
transformers.utils.import_utils.is_bitsandbytes_available()
sys.meta_path.insert(0, Finder())
snugtune.train(dict(model=model, data=data, output=output, steps=3, batch_size=2, max_seq_len=64))
"""


def test_a_fresh_adapter_trains_without_peft(tmp_path: Path, model_folder: Path) -> None:
    """It would be 60 MiB and seconds (with bitsandbytes, which it imports) before the first step. Writing needs it."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a question", "completion": "an answer"}\n' * 4)
    command = [sys.executable, "-c", WATCHED, str(model_folder), str(data), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "peft 3" in done.stdout
    assert {line.split()[1] for line in done.stdout.splitlines()} == {"3"}, done.stdout


def test_names_stay_functions_whatever_is_imported() -> None:
    """Importing a subpackage binds its name in the package: none may hide an exported one."""
    for module in pkgutil.walk_packages(snugtune.__path__, "snugtune."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert callable(snugtune.train)
    assert callable(snugtune.load)
    assert callable(snugtune.open)


def test_config_fields() -> None:
    """Every field of every config that can stand in a run's YAML, in the order it is written."""
    from snugtune import config
    from snugtune.data.mix import ConcatConfig, InterleaveConfig
    from snugtune.data.sources import SourceConfig
    from snugtune.methods.freeze import FreezeConfig
    from snugtune.methods.full import FullConfig
    from snugtune.methods.lora import LoraConfig
    from snugtune.methods.rotate import RotateConfig
    from snugtune.objectives.clm import ClmConfig
    from snugtune.objectives.sft import SftConfig
    from snugtune.optim import (
        AdafactorConfig,
        AdamWConfig,
        ApolloConfig,
        ConstantConfig,
        CosineConfig,
        GaloreConfig,
        LinearConfig,
        LionConfig,
        SgdConfig,
        WsdConfig,
    )

    kinds = (config.RunConfig, config.JobConfig, config.PlanConfig, SourceConfig, LoraConfig, FullConfig, SftConfig, ClmConfig,
             ConcatConfig, InterleaveConfig, AdamWConfig, ConstantConfig, LinearConfig, CosineConfig,
             WsdConfig, FreezeConfig, RotateConfig, SgdConfig, LionConfig, AdafactorConfig, GaloreConfig, ApolloConfig,
             config.EarlyStoppingConfig, config.SamplesConfig)  # fmt: skip
    assert {kind.__name__: list(kind.model_fields) for kind in kinds} == CONFIG_FIELDS
    in_schema = set(config.RunConfig.model_json_schema()["$defs"])
    assert in_schema <= CONFIG_FIELDS.keys(), "a config that this test does not know of"


def test_config_defaults() -> None:
    """The resolved form of the shortest config: a changed default would refuse the runs that people have."""
    from snugtune.config import to_config

    assert to_config({"model": "demo", "data": "data.jsonl", "output": "run"}).to_yaml() == RESOLVED
    assert to_config(yaml.safe_load(RESOLVED)).to_yaml() == RESOLVED


def test_config_fields_are_described() -> None:
    from snugtune.config import JobConfig, RunConfig

    for kind in (RunConfig, JobConfig):
        assert [name for name, field in kind.model_fields.items() if not field.description] == []


def test_commands_and_options() -> None:
    from snugtune.cli import app

    found: dict[str, list[str]] = {}

    def walk(command: Any, path: str) -> None:
        names = [o for p in command.params for o in (p.opts if p.param_type_name == "option" else [p.name])]
        own = [n for n in names if "completion" not in n]
        if path == "" or not hasattr(command, "commands"):
            found[path] = sorted({*own, "--help"})
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{path} {name}".strip())

    walk(typer.main.get_command(app), "")
    assert found == COMMANDS


def test_exit_codes() -> None:
    kinds = errors.SnugtuneError.__subclasses__()
    assert {kind.__name__: kind.exit_code for kind in kinds} == EXIT_CODES


# --- train and load ---------------------------------------------------------------------------------------------------


ODD_CONVERSATIONS: list[tuple[Any, str]] = [
    ("\ud800", "half a character"),
    ([{"role": "user", "content": "\ud800"}], "half a character"),
    ([{"content": "x"}], "without 'role'"),
    ([{"role": "user"}], "without 'role' and 'content'"),
    ([{"role": "user", "content": 5}], "not text"),
    ([{"role": "oracle", "content": "x"}], "unknown role"),
    (["x"], "without 'role'"),
    ([], "not a list of turns"),
    (5, "not a list of turns"),
]


def test_train_and_load(model_folder: Path, tmp_path: Path) -> None:
    """What the package's docstring shows; and a second time, and a third, in the same process."""
    config = tiny_run(model_folder, tmp_path)
    result = snugtune.train(config)
    assert result.folder == tmp_path / "run"
    assert dict(result.artefacts) == {"default": tmp_path / "run/adapters/default"}
    assert list(result.metrics) == metrics_of(tmp_path / "run")
    assert result.peak_bytes is not None and result.peak_bytes > 2**26
    assert result.seconds > 0
    assert not result.already_finished
    tuned = snugtune.load(result.folder)
    reply = tuned.reply("Hi?", max_new_tokens=4)
    assert isinstance(reply, str)
    assert tuned.reply([{"role": "user", "content": "Hi?"}], max_new_tokens=4) == reply
    for odd, words in ODD_CONVERSATIONS:
        with pytest.raises(errors.InputError, match=words):
            tuned.reply(odd)
    again = snugtune.train(config)
    assert again.already_finished
    other = snugtune.train(config | {"output": str(tmp_path / "other"), "seed": 1})
    assert [m["step"] for m in other.metrics] == [1]
    assert snugtune.load(str(other.folder), adapter="default").reply("Hi?", max_new_tokens=1) is not None


def test_train_takes_a_file_or_a_config(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snugtune.config import RunConfig

    train = snugtune.train
    config = tiny_run(model_folder, tmp_path)
    file = write_config(tmp_path / "config.yaml", **config)
    assert not train(file).already_finished
    assert train(str(file)).already_finished
    assert train(RunConfig.model_validate(config)).already_finished


def test_mistakes_raise_one_kind_of_error(model_folder: Path, tmp_path: Path) -> None:
    """What the command prints as one line, Python code can catch."""
    train = snugtune.train
    config = tiny_run(model_folder, tmp_path)
    with pytest.raises(errors.InputError, match="'batchsize'; did you mean 'batch_size'"):
        train(config | {"batchsize": 1})
    with pytest.raises(errors.InputError, match="no config file"):
        train(tmp_path / "none.yaml")
    with pytest.raises(errors.InputError, match="there is no"):
        snugtune.load(tmp_path / "none")
    assert not (tmp_path / "run").exists()


def test_train_in_a_thread(model_folder: Path, tmp_path: Path) -> None:
    """Only a main thread can catch signals; a notebook's or a server's worker trains without."""
    train = snugtune.train
    results: list[Any] = []
    worker = threading.Thread(target=lambda: results.append(train(tiny_run(model_folder, tmp_path))))
    worker.start()
    worker.join()
    assert [r.folder for r in results] == [tmp_path / "run"]
