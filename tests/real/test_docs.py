"""The tutorial, followed to the letter in a folder of its own."""

import re
import shutil
from pathlib import Path

import pytest

from real.pages import ROOT, Block, Reader, blocks, first_missing

TUTORIAL = blocks(ROOT / "docs" / "tutorial.md")
NOT_RUN = {"git clone", "cd snugtune", "make setup", ". .venv/bin/activate", "snugtune demo", "snugtune --install-completion"}
"""What this test leaves out: the set-up, which CI does before any test; the demo, which test_shipped.py runs; and what would
write into the home folder."""


@pytest.mark.real
@pytest.mark.slow
def test_the_tutorial_goes_as_it_says(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    reader = Reader(tmp_path)
    for block in TUTORIAL:
        reader.follow(block)


def test_everything_in_the_tutorial_is_run() -> None:
    left_out = [c for b in TUTORIAL if b.kind == "sh" and not b.runs for c in b.commands]
    assert {re.sub(r"git clone .*", "git clone", c) for c in left_out} <= NOT_RUN
    assert {b.kind for b in TUTORIAL} == {"sh", "yaml", "python", "text"}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        there = (ROOT / page).parent / file if file else ROOT / page
        assert there.exists(), f"{page}: no {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{page}: no heading {target}"


def test_what_a_page_shows_is_looked_for() -> None:
    shown = "  step 1/9  loss 2.5\nwritten: x\n\nerror: no file"
    assert first_missing("step 1/9 loss ...\n...\nerror: no file\n", shown) is None
    assert first_missing("step 1/9 loss ...\nwritten: y\n", shown) == "written: y"
    assert first_missing("error: no file\nwritten: x\n", shown) == "written: x"  # the order counts
    assert first_missing("loss 2.5", shown) == "loss 2.5"  # whole lines


def test_a_page_that_is_wrong_is_found(tmp_path: Path) -> None:
    """Of commands, files and output."""
    reader = Reader(tmp_path)
    reader.follow(Block("p", 1, "sh", "echo one\n"))
    reader.follow(Block("p", 2, "text", "one\n"))
    for wrong in (Block("p", 3, "text", "two\n"), Block("p", 4, "sh", "false\n"), Block("p", 5, "yaml", "model: demo\n")):
        with pytest.raises(AssertionError, match=f"p:{wrong.line}"):
            reader.follow(wrong)
