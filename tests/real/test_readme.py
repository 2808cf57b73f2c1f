"""Every command, config and piece of Python in README.md is run, in a folder with copies of what they read.

Configs are shortened to two steps, so that the page may speak of real trainings.
"""

import re
import shutil
from pathlib import Path

import pytest

from real.pages import ROOT, Block, Reader, blocks

PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks(ROOT / "README.md")
COMMANDS = re.findall(r"^\| `(snugtune [^`]+)` \|", PAGE, re.MULTILINE)
ELSEWHERE = {"snugtune demo": "real/test_shipped.py::test_demo_changes_the_answers"}
"""What takes minutes, and the test that runs it."""


def shortened(config: str) -> str:
    return re.sub(r"^(epochs|steps|batch_size): .*\n", "", config, flags=re.MULTILINE) + "steps: 2\nbatch_size: 4\n"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(ROOT / "src" / "snugtune" / "demo_data", folder / "src" / "snugtune" / "demo_data")
    for example in (folder / "examples").glob("*.yaml"):
        example.write_text(shortened(example.read_text(encoding="utf-8")), encoding="utf-8")
    return Reader(folder)


@pytest.fixture(scope="module")
def followed(reader: Reader) -> Reader:
    """Somebody who has done all that the page says, but for its set-up."""
    for block in BLOCKS:
        if block.kind == "yaml":
            text = shortened(block.text)
            reader.follow(Block(block.page, block.line, "yaml", text))
            reader.follow(Block(block.page, block.line, "sh", f"snugtune train {text.split()[1]}"))
        elif not block.text.startswith("git clone"):
            reader.follow(block) if block.kind != "text" else None
    return reader


@pytest.mark.real
@pytest.mark.slow
def test_configs_commands_and_python_run(followed: Reader) -> None:
    runs = followed.folder / "runs"
    assert {p.name for p in runs.iterdir()} == {"support", "words", "shops", "shop-a", "small"}
    (tree,) = (b.text for b in BLOCKS if b.kind == "text")
    for name in re.findall(r"^  (\S+)", tree, re.MULTILINE):
        assert (runs / "words" / name).exists(), f"no {name} in the run's folder"


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ELSEWHERE])
def test_commands_of_the_table_run(command: str, followed: Reader, tmp_path: Path) -> None:
    config = tmp_path / "new.yaml" if " init " in command else "words.yaml"
    extra = {"init": "--yes --data examples/data/shop_a.jsonl", "chat": "--compare --prompt Hi --max-new-tokens 4"}
    line = command.replace("CONFIG", str(config)).replace("RUN", "runs/words")
    followed.follow(Block("README.md", 0, "sh", f"{line} {extra.get(command.split()[1], '')}"))
    assert followed.shown


def test_what_is_run_elsewhere_is_run() -> None:
    for command, test in ELSEWHERE.items():
        file, _, name = test.partition("::")
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert command in COMMANDS
        assert f"def {name}(" in source and f'"{command.split()[1]}"' in source


def test_the_table_has_every_command() -> None:
    from snugtune.cli import app

    known = {f"snugtune {c.name or (c.callback and c.callback.__name__)}" for c in app.registered_commands}
    assert {" ".join(c.split()[:2]) for c in COMMANDS} - {"snugtune data"} == known


def test_make_targets_exist_and_ci_runs_them() -> None:
    """`make demo` and `make test` are the same set-up and a command that other tests run."""
    makefile, ci = (ROOT / "Makefile").read_text(encoding="utf-8"), (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for page in ("README.md", "CONTRIBUTING.md", "docs/tutorial.md"):
        for target in re.findall(r"(?:`|^)make (\w[\w-]*)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: no target {target}"
    assert re.search(r"^demo: setup\n\t\$\(BIN\)/snugtune demo$", makefile, re.MULTILINE)
    assert re.search(r"^make test$", ci, re.MULTILINE)


def test_the_readme_is_a_page_or_two() -> None:
    assert len(PAGE.splitlines()) <= 150
