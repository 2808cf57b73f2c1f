"""The functions that `import snugtune` offers, used as its own documentation uses them."""

from pathlib import Path

import pytest

import snugtune
from conftest import tiny_model, tiny_tokenizer
from real.common import write_data

pytestmark = pytest.mark.real


def test_train_load_and_train_again(tmp_path: Path) -> None:
    """Training imports much of the package; the names it exports must survive that."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = {
        "model": str(tmp_path / "model"),
        "data": str(write_data(tmp_path / "data.jsonl")),
        "output": str(tmp_path / "run"),
        "max_seq_len": 96,
        "steps": 1,
    }
    run = snugtune.train(config)
    assert run.folder == tmp_path / "run" and not run.already_finished
    assert isinstance(snugtune.load(run.folder).reply("Hello!", max_new_tokens=4), str)
    assert snugtune.train(config).already_finished
