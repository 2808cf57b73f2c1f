"""The comparison with other programs: what its numbers mean. The programs themselves do not run here."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_the_ceiling_counts_a_frozen_base_twice_and_its_head_for_labels_alone():
    """SmolLM2-135M by hand: 30 x (576 x (2 x 576 + 2 x 192) + 3 x 576 x 1536) weights in blocks, 49152 x 576 in the head."""
    from benchmarks.peers.ceiling import linears_of

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    linears = linears_of(LlamaConfig(**sizes, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True))
    assert round(linears.flop_per_token / 1e6) == 425
    assert round(linears.flop_per_label / 1e6) == 113
    assert linears.ceiling(425 + 113 / 2, 0.5) == pytest.approx(1000, rel=2e-3)


def test_real_tokens_are_counted_under_every_kind_of_mask():
    """Five tokens, of two sequences and then padding: 2 + 2 + 1."""
    from benchmarks.peers.watch import labels, real_tokens

    sequence = torch.tensor([1, 1, 2, 2, 0])
    allowed = ((sequence == sequence[:, None]) & (sequence != 0) & torch.ones(5, 5).tril().bool())[None, None]
    added = torch.where(allowed, 0.0, torch.finfo(torch.bfloat16).min).bfloat16()
    inputs: dict[str, Any] = {"input_ids": torch.arange(5)[None], "labels": torch.tensor([[7, -100, 8, 9, -100]])}
    masks = {"none": None, "rows": sequence[None], "allowed": allowed, "added": added}
    found = {name: real_tokens(inputs | {"attention_mask": mask}) for name, mask in masks.items()}
    assert found == {"none": 5, "rows": 4, "allowed": 4, "added": 4}
    assert labels(inputs) == 2


def test_the_speed_leaves_out_the_first_steps_and_the_loss_weighs_labels():
    from benchmarks.peers.measure import Run, Step

    run = Run((Step(9, 50, 10, 4.0), Step(10, 50, 10, 3.0), Step(12, 60, 10, 2.0), Step(15, 40, 30, 1.0)), 1)
    assert run.speed == 100 / 5
    assert run.loss == (2.0 * 10 + 1.0 * 30) / 40
    assert run.labelled == 60 / 200
    assert Run.of(json.loads(json.dumps(run.as_dict()))) == run


def test_steps_are_timed_as_a_program_writes_them(tmp_path: Path):
    from benchmarks.peers.measure import FailedError, watched

    lines = tmp_path / "lines"
    script = (
        "import json, sys, time\n"
        "kept = bytearray(200 << 20)\n"
        "for step in range(3):\n"
        "    time.sleep(0.3 if step else 0)\n"
        "    with open(sys.argv[1], 'a') as out:\n"
        "        out.write(json.dumps({'step': step, 'tokens': 5, 'label_tokens': 2, 'loss': 1.5}) + '\\n')\n"
        "time.sleep(0.3)\n"
    )
    run = watched([sys.executable, "-c", script, str(lines)], lines, 2, {}, tmp_path / "log")
    assert [step.tokens for step in run.steps] == [5, 5]  # its step 0 is none
    first, second = (step.at for step in run.steps)
    assert 0.3 < first < second and second > 0.6
    assert 200 << 20 < run.peak_bytes < 300 << 20
    with pytest.raises(FailedError, match=r"exit code 1, 0 of 2 steps; .*no such program"):
        watched([sys.executable, "-c", "raise SystemExit('no such program')"], tmp_path / "none", 2, {}, tmp_path / "log")


def test_a_session_that_broke_off_goes_on_and_is_told(tmp_path: Path):
    from benchmarks.peers.results import GEMM, Results, report

    file, facts = (
        tmp_path / "kept.jsonl",
        {"examples": 2, "tokens": 100, "label_tokens": 50, "batch": 8, "steps": 4, "machine": "M"},
    )

    def run(seconds: float, peak: int) -> dict[str, Any]:
        steps = [[seconds * (n + 1), 100, 50, 2.0] for n in range(4)]
        return {"steps": steps, "peak_bytes": peak * 2**30}

    first = Results.begun(file, facts, resume=False)
    first.add({"row": GEMM, "round": 0, "gflops": 0.5, "flop_per_token": 10**6, "flop_per_label": 0})
    first.add({"row": "snugtune", "round": 0} | run(0.5, 1))
    first.add({"row": "trl", "round": 0, "failed": "no memory"})
    with file.open("a") as out:
        out.write('{"row": "lf", "rou')
    with pytest.raises(SystemExit, match="--resume"):
        Results.begun(file, facts, resume=False)
    with pytest.raises(SystemExit, match="other work: steps"):
        Results.begun(file, facts | {"steps": 5}, resume=True)
    again = Results.begun(file, facts, resume=True)
    assert [again.has(row, 0) for row in (GEMM, "snugtune", "trl", "lf")] == [True, True, False, False]
    again.add({"row": "trl", "round": 0} | run(2.0, 2))
    table = report(Results.kept(file)).splitlines()
    assert any(line.startswith("| snugtune, as it comes | 200 | 40 % | 1.00 | 0.5 | 2.000 | 1.00 | 1.00 |") for line in table)
    assert any(line.startswith("| TRL, as it comes | 50 | 10 % | 2.00 | 2.0 | 2.000 | 4.00 | 0.50 |") for line in table)


def test_a_step_is_as_many_sequences_or_as_many_packed_tokens(tmp_path: Path):
    from benchmarks.peers.rows import ROWS, Row
    from benchmarks.peers.task import Work, arguments

    assert len({row.key for row in ROWS}) == len(ROWS)
    work = Work("m", tmp_path, 10, 10 * 190, 5, batch=8, max_length=512, steps=4)
    packed, found = Row("", "llamafactory", "", packed=True), []
    for row in (Row("", "trl", ""), Row("", "trl", "", micro=1), packed, Row("", "llamafactory", "", micro=1, packed=True)):
        task = json.loads(arguments(row, work, 0, tmp_path)[0][1])
        found.append((task["micro"], task["accumulate"]))
    assert found == [(8, 1), (1, 8), (3, 1), (1, 3)]  # 8 x 190 tokens are three rows of 512
