"""The order of plans: what a step takes beside another's, and what the machine is asked once."""

import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from quantised import plan_of
from snugtune.errors import StorageError
from snugtune.memory import probe
from snugtune.memory.probe import measure, speed_of
from snugtune.memory.speed import ASSUMED, Size, Speed, seconds_a_token

SPEED = Speed(1e12, {"int8": 1e10, "nf4": 5e9}, 1e9, 1e10, 1e9, 1e9)
SIZE = Size(weights=1e9, tokens=1024, inputs=1e5, full=False)


def takes(size: Size = SIZE, speed: Speed = SPEED, kind: str = "fp32", **knobs: Any) -> float:
    return seconds_a_token(plan_of(kind, **knobs), speed, size)


def test_recompute_costs_a_forward() -> None:
    plain = takes()
    assert takes(recompute="blocks") == pytest.approx(1.5 * plain)
    assert takes(recompute=4) == pytest.approx(1.125 * plain)
    whole = replace(SIZE, full=True)
    assert takes(whole, recompute="blocks") == pytest.approx(4 / 3 * takes(whole))


def test_narrow_weights_cost_the_more_the_fewer_tokens_share_them() -> None:
    few, many = (takes(replace(SIZE, tokens=n), kind="nf4") / takes(replace(SIZE, tokens=n)) for n in (64, 4096))
    assert few > many > 1
    assert takes(kind="nf4") > takes(kind="int8") > takes()


def test_streamed_weights_hide_behind_products_where_there_are_enough() -> None:
    assert takes(replace(SIZE, tokens=10**6), offload="weights") == takes(replace(SIZE, tokens=10**6))
    assert takes(replace(SIZE, tokens=64), offload="weights") == pytest.approx(2 * 4e9 / 64 / 1e9)
    cached = replace(SPEED, cache=1e10)
    assert takes(replace(SIZE, tokens=64), cached, offload="weights") == pytest.approx(2 * 4e9 / 64 / 1e10)


def test_inputs_that_are_kept_elsewhere_are_written_and_read() -> None:
    assert takes(recompute="blocks", offload="activations") - takes(recompute="blocks") == pytest.approx(2e5 / 1e9)


def test_jobs_that_rest_are_written_and_read_for_each_step() -> None:
    size = replace(SIZE, state=SIZE.tokens * SPEED.written)  # a second a token for either way
    assert takes(size, resident_jobs=1) == pytest.approx(takes(size) + 2)
    assert takes(size, resident_jobs=1, offload="weights") == pytest.approx(takes(size, offload="weights") + 2)


def test_fewer_tokens_a_forward_are_slower() -> None:
    assert 1.1 <= takes(replace(SIZE, tokens=512)) / takes() <= 1 / 0.86  # as it was measured


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path))
    return tmp_path


def test_a_machine_is_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps(asdict(SPEED)), "")

    monkeypatch.setattr(subprocess, "run", run)
    assert speed_of("cpu", "fp32", 1) == speed_of("cpu", "fp32", 1) == SPEED
    assert speed_of("cpu", "fp32", 4).flops == 4 * SPEED.flops
    assert len(ran) == 1
    (file,) = (cache / "speed").iterdir()
    file.write_text("{}")
    assert speed_of("cpu", "fp32", 1) == SPEED and len(ran) == 2


def test_what_cannot_be_kept_was_measured_all_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, json.dumps(asdict(SPEED)), "")

    def refuse(*_: object) -> None:
        raise StorageError("full")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(probe, "write_whole", refuse)
    assert speed_of("cpu", "fp32", 1) == SPEED


def test_one_that_cannot_be_measured_stops_nobody(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", run)
    assert speed_of("cpu", "fp32", 1) == ASSUMED["cpu"]
    assert speed_of("cuda", "bf16", 1, here=False) == ASSUMED["cuda"]


def test_what_is_measured_is_what_a_machine_may_do(tmp_path: Path) -> None:
    found = measure("cpu", "fp32", tmp_path)
    numbers = (found.flops, *found.decoded.values(), found.read, found.read_cached, found.written, found.cache)
    assert all(1e5 < number < 1e16 for number in numbers) and set(found.decoded) == {"int8", "nf4"}
    assert not list(tmp_path.iterdir())
    assert probe.Speed(**json.loads(json.dumps(asdict(found)))) == found
