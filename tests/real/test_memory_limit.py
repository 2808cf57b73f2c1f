"""What streaming is for: a model trains in a process whose data the system holds below what its weights alone would take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.slow]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LAYERS = 24  # 173 MiB in nf4
LIMIT = 0.21  # GiB over the imports; streaming takes about 0.15


def _begun(folder: Path, *options: str) -> "subprocess.Popen[str]":
    script = [sys.executable, str(BENCHMARKS / "streamed_7b.py"), str(folder), "--rank", "1", "--steps", "1"]
    limit = ["--limit", str(LIMIT), "--over-imports"]
    # stacks of threads count as data, and there are as many as the machine has cores
    single = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "SNUGTUNE_CACHE": ""}
    return subprocess.Popen(
        [*script, *limit, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **single}
    )


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA holds on Linux alone")
def test_streamed_training_survives_a_limit_that_resident_training_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both at once, on the same model. Loading, self-test, evaluation, step and saving are all under the limit."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from synthetic import write_llama  # pyright: ignore[reportMissingImports]

    streamed, resident = tmp_path / "streamed", tmp_path / "resident"
    write_llama(streamed / "model", layers=LAYERS, width=1024, inner=2816, heads=16, vocab=512, nf4=True)
    resident.mkdir()
    (resident / "model").symlink_to(streamed / "model")
    report = tmp_path / "report.json"
    first, second = _begun(streamed, "--json", str(report)), _begun(resident, "--resident")
    shown, said = first.communicate(timeout=300)
    _, refused = second.communicate(timeout=300)
    assert first.returncode == 0, said
    assert second.returncode == 1 and "the training did not survive its limit" in refused
    assert "allocate memory" in refused, refused
    found = json.loads(report.read_text())
    phases = ["imports", "planning", "loading", "self-test", "evaluation", "step 1", "saving"]
    assert [phase["phase"] for phase in found["phases"]] == phases
    assert all(f"| {phase} |" in shown for phase in phases)
    peaks = {phase["phase"]: phase["peak"] for phase in found["phases"]}
    assert found["peak"] == max(peaks.values()) <= found["limit"]
    assert peaks["self-test"] <= peaks["step 1"] + (24 << 20), "the self-test takes no more than what it protects"
