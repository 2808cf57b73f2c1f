"""Quantised bases for tests: tiny models on disk, loaded as a plan says."""

from pathlib import Path
from typing import Any

from conftest import tiny_model, tiny_tokenizer
from snugtune.model.base import Base, load_base
from snugtune.model.source import ModelSource
from snugtune.types import Plan

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"weights": "nf4"},
    "nf4-double": {"weights": "nf4", "double_quant": True},
    "int8": {"weights": "int8"},
    "int8-products": {"weights": "int8", "outlier_threshold": 2.0},
    "w8a8": {"weights": "w8a8"},
}
"""The formats that weights can be kept in, as fields of `Plan`."""


def plan_of(kind: str, compute: str = "fp32", **fields: Any) -> Plan:
    """A plan on the CPU; `kind` is one of `KINDS`, or a dense format."""
    how = KINDS.get(kind, {"weights": kind})
    return Plan(
        **{"device": "cpu", "micro_batch": 1, "recompute": "none", "head_rows": 512, "threads": 1, "compute": compute}
        | how
        | fields
    )


def saved(folder: Path, arch: str = "llama", **overrides: Any) -> Path:
    """The folder of a tiny model with its tokenizer; made once."""
    if not folder.exists():
        tiny_model(arch, **overrides).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path, kind: str = "nf4", compute: str = "fp32", trust: bool = False, **fields: Any) -> Base:
    """The base of a folder, as `plan_of` says."""
    return load_base(ModelSource(folder.name, str(folder)), plan_of(kind, compute, **fields), trust)
