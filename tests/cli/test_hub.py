"""Models and data of the hub, from a server of our own: it works, and it breaks in each of the ways that networks do."""

import os
import subprocess
from pathlib import Path

import pytest
from common import SNUGTUNE, Ran, assert_refused, write_lines
from hub import Hub, serving
from spoil import RECORDS, config

pytest_plugins = ("places",)


def online(place: Path, hub: Hub) -> Ran:
    """`snugtune train` in a process that takes `hub` for the hub, with an empty cache. (The address is read at import.)"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(place / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1",
           "HF_HUB_ETAG_TIMEOUT": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}  # fmt: skip
    done = subprocess.run(
        [*SNUGTUNE, "train", "config.yaml"], cwd=place, env=env | own, capture_output=True, text=True, timeout=120
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def hub(place: Path) -> Hub:
    (place / "rows").mkdir()
    write_lines(place / "rows/train.jsonl", RECORDS)
    return Hub({"models/org/tiny": place / "model", "datasets/org/talks": place / "rows"})


def test_model_and_data_of_the_hub(place: Path, hub: Hub) -> None:
    config(place, model="org/tiny", data="org/talks")
    with serving(hub):
        ran = online(place, hub)
    assert ran.code == 0, "\n".join([ran.err[-3000:], *hub.asked])
    assert "6 training examples" in ran.err
    assert (place / "out/adapters/default/adapter_model.safetensors").is_file()


TROUBLES: dict[str, tuple[str | int, str, tuple[str, ...]]] = {
    "gated": (403, "config.json", ("model", "org/tiny", "gated", "hf auth login")),
    "cut-off": ("cut", "model.safetensors", ("model", "org/tiny", "download broke off")),
    "hanging": ("hang", "model.safetensors", ("model", "org/tiny", "download broke off")),
    "server-error": (500, "model.safetensors", ("model", "org/tiny", "download broke off", "500")),
    "unknown": (404, "config.json", ("model", "org/tiny", "does not have it", "check the name")),
    "not-allowed": (401, "config.json", ("model", "org/tiny", "no access", "hf auth login")),
    "data-cut-off": ("cut", "train.jsonl", ("data", "org/talks", "download broke off")),
    "data-server-error": (500, "train.jsonl", ("data", "org/talks", "download broke off", "500")),
    "data-gated": (403, "train.jsonl", ("data", "org/talks", "no access", "hf auth login")),
}


BROKEN_OFF = ("cut-off", "hanging", "server-error", "data-cut-off", "data-server-error")
PATIENT = BROKEN_OFF  # huggingface_hub tries again, for up to half a minute


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in PATIENT else ()) for c in TROUBLES])
def test_downloads_that_fail(place: Path, hub: Hub, case: str) -> None:
    trouble, spoiled, named = TROUBLES[case]
    hub.trouble, hub.spoiled = trouble, spoiled
    config(place, model="org/tiny", data="org/talks" if named[0] == "data" else "data.jsonl")
    with serving(hub):
        ran = online(place, hub)
    said = assert_refused(ran, *named)
    assert ("broke off" in said) == (case in BROKEN_OFF)
    assert not (place / "out").exists()


MISSING: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "typo": ("org/tinny", None, ("org/tinny", "no such model on the hub", "check the name")),
    "no-config": ("org/tiny", "config.json", ("org/tiny", "config.json")),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_the_hub_does_not_have(place: Path, hub: Hub, case: str) -> None:
    """It is no trouble of the network: the same command again would not help."""
    model, gone, named = MISSING[case]
    if gone:
        (place / "model" / gone).unlink()
    config(place, model=model)
    with serving(hub):
        ran = online(place, hub)
    said = assert_refused(ran, "model", *named)
    assert "broke off" not in said and "again" not in said
    assert not (place / "out").exists()
