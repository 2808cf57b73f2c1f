"""What can happen to a user's configs, models and runs: the bad-input tests are made of these."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import assert_refused, contents, here, messages, write_config

RECORDS = [messages(f"Question {i}?", f"Answer {i}.") for i in range(6)]
TWO = [{"name": "a"}, {"name": "b"}]


def config(place: Path, **fields: Any) -> Path:
    """The good config with `fields` over it."""
    good = {
        "model": "./model",
        "data": "data.jsonl",
        "output": "out",
        "max_seq_len": 64,
        "batch_size": 2,
        "steps": 3,
        "checkpoint_every": 1,
        "plan": {"weights": "fp32"},
    }
    return write_config(place / "config.yaml", **good | fields)


def refused(place: Path, *args: str, named: tuple[str, ...]) -> str:
    """Run the command, see it refused by name, with nothing on stdout and nothing changed on disk."""
    before = contents(place)
    ran = here(*args)
    message = assert_refused(ran, *named)
    assert ran.out == ""
    assert contents(place) == before
    return message


# --- what befalls files ---


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file; None takes one out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def truncate(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:-2000])


def replace(name: str, raw: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(raw)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / name, **changes)


def remove(*patterns: str) -> Callable[[Path], None]:
    def act(model: Path) -> None:
        for pattern in patterns:
            for path in model.glob(pattern):
                path.unlink()

    return act


def unfinish(run: Path) -> None:
    for result in run.glob("adapters/*"):
        shutil.rmtree(result)
