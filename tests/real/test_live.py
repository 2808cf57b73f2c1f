"""Verbs on the real model: steps by hand are those of a run, bit for bit; answers are those of the saved adapter; the page."""

from pathlib import Path

import pytest

import snugtune
from real.common import CONVERSATIONS, RUN
from real.pages import ROOT, Reader, blocks
from snugtune.data.mix import step_indices
from snugtune.observer import RunResult

PAGE = blocks(ROOT / "docs" / "live.md")


@pytest.mark.real
def test_steps_by_hand_are_those_of_a_run(trained: RunResult, tmp_path: Path) -> None:
    fields = {name: value for name, value in RUN.items() if name not in ("model", "plan", "batch_size")}
    with snugtune.open("demo", plan=RUN["plan"]) as trainer:
        job = trainer.add(fields)
        examples = job.examples([{"messages": list(talk)} for talk in CONVERSATIONS])
        for step, truth in enumerate(trained.metrics[:6]):
            chosen = step_indices(step, len(examples), RUN["batch_size"], None, RUN["steps"], RUN["seed"])
            loss, done = job.forward_backward([examples[i] for i in chosen]), job.optim_step()
            assert (loss.loss, done.grad_norm, done.lr) == (truth["loss"], truth["grad_norm"], truth["lr"])
        answers = job.sample(["Capital of Peru?", list(CONVERSATIONS[0][:2])], max_new_tokens=8)
        drawn = job.sample(["Hi!"], max_new_tokens=8, temperature=0.8, seed=5)
        folder = job.save(tmp_path / "adapter")
    reloaded = snugtune.load(folder, weights="fp32")
    assert answers[0] == reloaded.reply("Capital of Peru?", max_new_tokens=8)
    assert drawn == [reloaded.reply("Hi!", max_new_tokens=8, temperature=0.8, seed=5)]


@pytest.mark.real
def test_the_page_goes_as_it_says(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    for block in PAGE:
        reader.follow(block)
    assert (tmp_path / "adapters/shop/adapter_config.json").is_file() and (tmp_path / "states/dpo/state.json").is_file()
    assert [b.kind for b in PAGE if not b.runs] == ["python", "text"]  # the fragment, and what is shown
