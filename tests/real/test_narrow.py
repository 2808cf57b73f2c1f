"""LoRA on the real model with its base in int8 and nf4, and what loading so takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from snugtune.config import to_config
from snugtune.model.base import load_base
from snugtune.model.frozen import FrozenLinear
from snugtune.model.load import format_of
from snugtune.model.source import find_model
from snugtune.run import train
from snugtune.types import Plan

from .common import RUN, write_data

pytestmark = pytest.mark.real

SYNTHETIC = Path(__file__).parents[2] / "benchmarks" / "synthetic.py"
LOADING = """
import json, sys
from pathlib import Path
import bitsandbytes, peft, transformers.models.llama.modeling_llama
from snugtune.memory.budget import Watch
from snugtune.model.load import load_config, load_frozen, load_tokenizer
from snugtune.model.source import find_model
from snugtune.types import Plan

def resident():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS"))
    return int(line.split()[1]) * 1024

source = find_model(sys.argv[1])
config = load_config(source, False)
tokenizer, _ = load_tokenizer(source, False)
floor, watch = resident(), Watch("cpu")
model, _, _ = load_frozen(source, config, Plan("cpu", "nf4", 1, "none", 512, 2, "bf16"), False)
size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
print(json.dumps({"floor": floor, "peak": watch.peak(), "size": size}))
"""


@pytest.mark.parametrize(
    "pins",
    [
        {"weights": "int8"},
        {"weights": "int8", "outlier_threshold": 6.0},
        {"weights": "w8a8"},
        {"weights": "nf4"},
        {"weights": "nf4", "double_quant": True},
    ],
    ids=["int8", "int8-outliers", "w8a8", "nf4", "nf4-double"],
)
def test_lora_learns_on_a_narrow_base(pins: dict[str, Any], tmp_path: Path) -> None:
    """With evaluations before and between the steps: the held-out loss falls after each of them."""
    data = write_data(tmp_path / "d.jsonl")
    fields = {**RUN, "steps": 6, "eval_every": 3, "validation": str(data), "data": str(data)}
    result = train(to_config({**fields, "output": str(tmp_path / "r"), "plan": {"micro_batch": 1, **pins}}))
    before, middle, after = result.held_out["default"]
    assert before > middle + 0.3 > after + 0.3
    lines = [m for m in result.metrics if m.get("grad_norm") is not None]
    assert len(lines) == 6 and all(0 < m["grad_norm"] < 100 for m in lines)


@pytest.mark.parametrize("width", ["int8", "nf4"])
def test_base_bytes_are_as_computed(width: Any) -> None:
    plan = Plan("cpu", width, 1, "none", 512, torch.get_num_threads(), "bf16")
    base = load_base(find_model("demo"), plan)
    linears = [m for m in base.model.modules() if isinstance(m, FrozenLinear)]
    assert len(linears) == 210  # 30 blocks of 7; the head is tied to the embeddings and stays as it is
    for linear in linears:
        layout = format_of(plan).layout(*linear.shape)
        assert linear.nbytes == sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    rows = sum(linear.out_features for linear in linears)
    bits = 4.5 if width == "nf4" else 8 + 32 * rows / weights  # a scale for each row
    assert 8 * sum(linear.nbytes for linear in linears) == pytest.approx(bits * weights)


def _loaded(model: str) -> tuple[float, dict[str, int]]:
    done = subprocess.run([sys.executable, "-c", LOADING, model], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return (found["peak"] - found["floor"]) / found["size"], found


def test_loading_in_nf4_peaks_near_the_final_size() -> None:
    ratio, found = _loaded("demo")
    assert ratio <= 1.3, found


@pytest.mark.slow
def test_loading_a_billion_weights_in_nf4_peaks_near_the_final_size(tmp_path: Path) -> None:
    """1.2 billion random weights in 17 shards: no shard is ever in memory as a whole."""
    sizes = ["--layers", "16", "--width", "2048", "--inner", "8192", "--heads", "32", "--vocab", "32000"]
    subprocess.run([sys.executable, str(SYNTHETIC), str(tmp_path / "1b"), *sizes], check=True, timeout=600)
    ratio, found = _loaded(str(tmp_path / "1b"))
    assert found["size"] > 700e6
    assert ratio <= 1.3, found
