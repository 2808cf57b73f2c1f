"""docs/how-it-works.md names the test that shows each promise, CONTRIBUTING.md the layers: they exist, and are all."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.findall(r"`(tests/\S+\.py)::(\w+)`", (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_named_test_exists(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_promises_are_named() -> None:
    assert len(NAMED) >= 20


def test_the_map_of_layers_is_the_one_that_is_enforced() -> None:
    """Line by line: import-linter's contract in pyproject.toml, and the first column of the map."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"][0]
    enforced = [set(re.findall(r"snugtune\.(\w+)", layer)) for layer in contract["layers"]]
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(cli .*?)^```$", page, re.MULTILINE | re.DOTALL)
    shown = [set(re.split(r"\s{3,}", line)[0].split()) for line in block.splitlines() if not line.startswith(" ")]
    assert shown == enforced
