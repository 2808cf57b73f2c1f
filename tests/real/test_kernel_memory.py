"""What a run leaves in its process: products compiled for shapes that never come again must not gather."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from snugtune import machine

pytestmark = pytest.mark.real

SHAPES = 400
MOST = 128 << 20
"""Half of what they keep where nothing bounds them (259 MiB seen, on AVX-512 with bf16; on others nothing grows)."""

SCRIPT = f"""
import sys, torch
from pathlib import Path
from snugtune.config import to_config
from snugtune.run import train
model, data, output = sys.argv[1:]
train(to_config(dict(model=model, data=data, output=output, steps=1, batch_size=2, max_seq_len=64, plan=dict(weights="bf16"))))
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
weight = torch.randn(256, 256).bfloat16()
def multiply(rows):
    torch.randn(rows, 256).bfloat16() @ weight
multiply(1024)
before = resident()
for rows in range(200, 200 + {SHAPES}):
    multiply(rows)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_compiled_products_do_not_gather(tmp_path: Path, model_folder: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a question", "completion": "an answer"}\n' * 4)
    env = {name: value for name, value in os.environ.items() if name not in machine.KERNEL_CACHES}
    command = [sys.executable, "-c", SCRIPT, str(model_folder), str(data), str(tmp_path / "run")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=env)
    assert int(done.stdout.splitlines()[-1]) < MOST
