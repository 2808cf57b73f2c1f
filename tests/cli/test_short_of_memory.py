"""A run that really runs out of memory: under a limit that the system holds, reached in its first step."""

import json
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from common import in_a_process, metrics_of, write_config, write_lines
from safetensors.torch import load_file

from conftest import wide_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA holds on Linux alone")

SHORT = [{"text": f"{i} " + "and so it goes on " * 12} for i in range(16)]
LONG = [{"text": f"{i} " + "and so it goes on " * 60} for i in range(16)]
STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_folder(tmp_path_factory.mktemp("wide"))


def _data() -> int:
    """Bytes of this process that count under RLIMIT_DATA."""
    (size,) = re.findall(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(size) * 1024


def _train(place: Path, room: int | None) -> None:
    """Train as `place` says; once the base is loaded, with so many more MiB alone. Exits as the command does."""
    from snugtune.config import read_config
    from snugtune.errors import SnugtuneError
    from snugtune.observer import Silent
    from snugtune.run import train

    said = list[str]()

    class Limiting(Silent):
        def note(self, text: str) -> None:
            said.append(text)

        def begin(self, jobs: Sequence[Any]) -> None:
            if room is not None:
                limit = _data() + (room << 20)
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    torch.set_num_threads(1)
    try:
        train(read_config(place / "config.yaml"), Limiting())
    except SnugtuneError as error:
        said.append(f"error: {error}")
        sys.exit(error.exit_code)
    finally:
        (place / "said").write_text("\n".join(said))


def _run(place: Path, model: Path, room: int | None, lines: Sequence[Any] = SHORT, length: int = 96) -> tuple[int, str]:
    place.mkdir(exist_ok=True)
    data = write_lines(place / "data.jsonl", lines)
    plan = {"weights": "fp32", "micro_batch": 16}
    write_config(
        place / "config.yaml",
        **{"model": model, "data": data, "objective": "clm", "max_seq_len": length, "batch_size": 12, "steps": STEPS},
        **{"method": {"type": "lora", "r": 4}, "optimizer": {"lr": 5e-3}, "plan": plan, "output": place / "run"},
    )
    code = in_a_process(_train, place, room)
    return code, (place / "said").read_text()


def _adapter(place: Path) -> torch.Tensor:
    return torch.cat([t.flatten() for t in load_file(place / "run/adapters/default/adapter_model.safetensors").values()])


def test_it_ends_well_on_smaller_chunks(tmp_path: Path, model: Path) -> None:
    """The first step needs more than there is; what is learned is what is learned with enough of it, to rounding."""
    assert _run(tmp_path / "enough", model, None)[0] == 0
    code, said = _run(tmp_path / "short", model, 48)
    assert code == 0, said
    changes = json.loads((tmp_path / "short/run/plan.json").read_text())["changes"]
    assert changes and {c["step"] for c in changes} == {1} and {c["cause"] for c in changes} == {"memory ran out"}
    for change in changes:
        assert change["knob"] == "capacity" and f"chunks of at most {change['value']} tokens from here on" in said
    truth, found = _adapter(tmp_path / "enough"), _adapter(tmp_path / "short")
    assert (found - truth).norm() <= 1e-5 * truth.norm()
    assert [m["tokens"] for m in metrics_of(tmp_path / "short/run")] == [m["tokens"] for m in metrics_of(tmp_path / "enough/run")]


def test_where_nothing_is_small_enough_it_says_so(tmp_path: Path, model: Path) -> None:
    """Exit code 3, the knobs that were turned on the way, and with memory again the run goes on and ends as it should."""
    how = {"lines": LONG, "length": 500}
    code, said = _run(tmp_path / "short", model, 8, **how)
    assert code == 3, said
    error = said.splitlines()[-1]
    assert error.startswith(
        "error: memory ran out at step 1 of job 'default', and nothing is left to be cut: it had one sequence"
    )
    assert "max_seq_len" in error and "plan.weights: nf4" in error
    knobs = [c["knob"] for c in json.loads((tmp_path / "short/run/plan.json").read_text())["changes"]]
    assert knobs[0] == "capacity" and knobs[-1] == "recompute"
    assert "the same command goes on from" in error  # there, where there is room to save it
    assert _run(tmp_path / "short", model, None, **how)[0] == 0
    assert _run(tmp_path / "enough", model, None, **how)[0] == 0
    truth, found = _adapter(tmp_path / "enough"), _adapter(tmp_path / "short")
    assert (found - truth).norm() <= 1e-5 * truth.norm()
