"""What ships must run: the demo as its first user sees it, and every example config."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from snugtune.config import read_config
from snugtune.run import train

ROOT = Path(__file__).parents[2]
CARD = re.compile(r"Topic: .+\nUrgency: (low|normal|high)\nSummary: .+\nReply: .+")

pytestmark = pytest.mark.real


@pytest.mark.slow
def test_demo_changes_the_answers(tmp_path: Path) -> None:
    """The demo ends well, its held-out loss falls by half, and held-out messages get cards only after training."""
    command = [sys.executable, "-m", "snugtune", "demo", "--output", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    shown = [line[9:] for line in done.stdout.splitlines()]
    text = "\n".join(shown)
    after = [m.start() for m in CARD.finditer(text)]
    assert len(after) >= 2, done.stdout
    before = done.stdout.split("after ")[0]
    assert "Topic:" not in before
    held = [
        m["eval_loss"]
        for m in map(json.loads, (tmp_path / "demo" / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in m
    ]
    assert held[-1] < held[0] / 2
    assert (tmp_path / "demo" / "adapters" / "default" / "adapter_model.safetensors").is_file()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0 and "this run is finished" in again.stderr


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_example_trains(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each shipped config, run from the repository's root as its first line says."""
    monkeypatch.chdir(ROOT)
    output = tmp_path / "run"
    result = train(read_config(example, ["steps=2", "epochs=null", f"output={output}"]))
    assert all(folder.is_dir() and any(folder.glob("*.safetensors")) for folder in result.artefacts.values())
    losses = [m["loss"] for m in result.metrics if "loss" in m]
    assert len(losses) == 2 * len(result.artefacts) and all(0 < loss < 8 for loss in losses)
