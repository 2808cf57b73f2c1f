"""docs/reference.md is what the code says of itself; what has no words of its own cannot get in."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import Field

from snugtune.schema import Config

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_reference_is_up_to_date(maker: ModuleType) -> None:
    committed = (DOCS / "reference.md").read_text(encoding="utf-8")
    if maker.reference() != committed:
        pytest.fail("docs/reference.md does not say what the code says now; run `make docs` and commit it")


def test_every_config_that_can_stand_in_a_file_has_a_section(maker: ModuleType) -> None:
    """By pydantic's own schema, which walks the configs in its way."""
    from snugtune.config import RunConfig

    described = {member.__name__ for members in maker.groups().values() for member in members}
    assert described == set(RunConfig.model_json_schema()["$defs"])


def test_a_field_without_a_description_is_refused(maker: ModuleType) -> None:
    class Wordless(Config):
        told: int = Field(default=1, description="a number")
        untold: int = 1

    with pytest.raises(SystemExit, match="'untold' has no description"):
        "".join(maker.section(Wordless, "title", "about"))
