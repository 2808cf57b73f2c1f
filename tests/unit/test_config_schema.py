"""The shipped JSON schema: up to date, it takes what the config takes, and refuses what editors should underline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import snugtune
from snugtune.config import to_config
from snugtune.config_schema import config_schema_text
from snugtune.errors import InputError

SHIPPED = Path(snugtune.__file__).parent / "config.schema.json"
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
Mistakes = Callable[[Any], list[str]]


@pytest.fixture(scope="module")
def mistakes() -> Mistakes:
    """What the shipped schema has to say about a value."""
    from jsonschema import Draft202012Validator

    schema = json.loads(SHIPPED.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    return lambda value: [error.message for error in validator.iter_errors(value)]


def test_the_shipped_schema_is_up_to_date() -> None:
    current = SHIPPED.read_text(encoding="utf-8") == config_schema_text()
    assert current, "the config has changed; refresh it: snugtune schema > src/snugtune/config.schema.json"


def test_every_field_is_described() -> None:
    schema = json.loads(SHIPPED.read_text(encoding="utf-8"))
    assert {name for name, field in schema["properties"].items() if not field.get("description")} == set()
    assert {name for name, field in schema["$defs"]["JobConfig"]["properties"].items() if not field.get("description")} == set()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path: Path, mistakes: Mistakes) -> None:
    assert mistakes(yaml.safe_load(path.read_text(encoding="utf-8"))) == []


GOOD: dict[str, Any] = {"model": "demo", "data": "d.jsonl", "output": "out"}
ACCEPTED: dict[str, dict[str, Any]] = {
    "shortest": {},
    "a-source": {"data": {"path": "d.jsonl", "format": "alpaca", "columns": {"instruction": "q"}}},
    "sources": {"data": ["a.jsonl", {"path": "b.jsonl", "max_examples": 5}]},
    "type-alone": {"schedule": "cosine", "method": "full", "objective": "clm", "optimizer": "adamw", "mixing": "interleave"},
    "type-left-out": {"method": {"r": 4}, "optimizer": {"lr": 1e-3}, "schedule": {"warmup": 0.1}},
    "types-with-fields": {"method": {"type": "freeze", "last_blocks": 2}, "schedule": {"type": "wsd", "cooldown": 0.2}},
    "nulls": {"epochs": None, "steps": 5, "validation": None, "max_grad_norm": None},
    "fraction": {"validation": 0.5},
    "path": {"validation": "held.jsonl"},
    "validation-source": {"validation": {"path": "held.csv", "columns": {"text": "words"}}},
    "targets": {"method": {"target_modules": ["q_proj"]}},
    "pattern": {"method": {"target_modules": ".*q_proj"}},
    "pins": {"plan": {"micro_batch": 2, "weights": "bf16"}},
    "jobs": {"jobs": [{"name": "a", "data": "a.jsonl"}, {"name": "b", "method": {"r": 2}, "schedule": "linear"}]},
    "a-job-goes-on-with-the-shared-type": {"schedule": "wsd", "jobs": [{"name": "a", "schedule": {"cooldown": 0.5}}]},
}
REFUSED: dict[str, dict[str, Any]] = {
    "typo": {"batchsize": 4},
    "typo-in-a-group": {"method": {"type": "lora", "lora_alhpa": 4}},
    "typo-in-a-group-without-type": {"method": {"lora_alhpa": 4}},
    "field-of-another-type": {"schedule": {"type": "cosine", "cooldown": 0.1}},
    "field-of-another-than-the-default": {"schedule": {"cooldown": 0.1}},
    "unknown-type": {"method": "lore"},
    "unknown-type-in-a-group": {"schedule": {"type": "cosin"}},
    "number-as-text": {"batch_size": "many"},
    "zero": {"batch_size": 0},
    "fraction-of-a-count": {"steps": 1.5},
    "switch": {"eval_every": True},
    "no-model": {"model": None},
    "empty-output": {"output": ""},
    "unknown-choice": {"plan": {"weights": "fp4"}},
    "number-for-data": {"data": 5},
    "typo-in-data": {"data": [{"path": "a", "fromat": "alpaca"}]},
    "unknown-column": {"data": {"path": "a", "columns": {"question": "q"}}},
    "source-without-a-path": {"data": {"format": "alpaca"}},
    "typo-in-a-job": {"jobs": [{"name": "a", "sed": 1}]},
    "run-field-in-a-job": {"jobs": [{"name": "a", "model": "demo"}]},
    "name-that-is-a-path": {"jobs": [{"name": "../a"}]},
    "job-as-text": {"jobs": ["a"]},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_the_config_takes_is_valid(case: str, mistakes: Mistakes) -> None:
    to_config(GOOD | ACCEPTED[case])
    assert mistakes(GOOD | ACCEPTED[case]) == []


@pytest.mark.parametrize("case", REFUSED)
def test_typical_mistakes_are_not(case: str, mistakes: Mistakes) -> None:
    with pytest.raises(InputError):
        to_config(GOOD | REFUSED[case])
    assert mistakes(GOOD | REFUSED[case]) != []
