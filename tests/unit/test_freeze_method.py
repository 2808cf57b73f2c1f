"""Partial training: what is chosen moves as in plain torch, the rest keeps its bits, in memory and on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import nll_packed, relative, sequences, tiny_base, tiny_model
from snugtune.methods import METHODS
from snugtune.methods.freeze import Freeze, FreezeConfig, trainable
from snugtune.methods.full import Full, FullConfig
from snugtune.methods.lora import LoraConfig

CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "last": ({"last_blocks": 1}, {"model.layers.1."}),
    "first": ({"first_blocks": 1}, {"model.layers.0."}),
    "all blocks": ({"first_blocks": 1, "last_blocks": 1}, {"model.layers.0.", "model.layers.1."}),
    "embeddings": ({"embeddings": True}, {"model.embed_tokens."}),
    "head": ({"head": True}, {"lm_head."}),
    "names": ({"names": ["*.mlp.up_proj.*", "*norm*"]}, {".mlp.up_proj.", "norm"}),
    "block and head": ({"last_blocks": 1, "head": True}, {"model.layers.1.", "lm_head."}),
}


def _step(base: Any, method: Any, config: Any, parts: list[torch.Tensor]) -> Any:
    """One plain SGD step through the attached method."""
    attached = method.attach(base, "j", config, 0)
    attached.zero_grad()
    nll_packed(base, parts).backward()
    with torch.no_grad():
        for parameter in attached.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=1e-2)
    attached.publish()
    return attached


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_chosen_moves_and_nothing_else(case: str, recompute: bool) -> None:
    """And as far as in full training: freezing others does not change a weight's own gradient."""
    fields, signs = CASES[case]
    base, full, parts = tiny_base(), tiny_base(), sequences(9, 14)
    for each in (base, full):
        each.configure(recompute=recompute, head_rows=16)
        each.model.train()
    before = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    chosen = {n for n in before if any(sign in n for sign in signs)}
    config = FreezeConfig(**fields)
    assert set(trainable(base, config)) == chosen
    _step(base, Freeze(), config, parts)
    _step(full, Full(), FullConfig(), parts)
    truth = dict(full.model.named_parameters())
    for name, now in base.model.named_parameters():
        assert torch.equal(now, before[name]) == (name not in chosen), name
        if name in chosen:
            assert relative(now.detach(), truth[name].detach()) <= 1e-6


@pytest.mark.parametrize("fields", [{"embeddings": True}, {"head": True}], ids=["embeddings", "head"])
def test_tied_ends_train_together(fields: dict[str, Any]) -> None:
    base = tiny_base("gemma2")
    assert trainable(base, FreezeConfig(**fields)) == ("model.embed_tokens.weight",)


def test_gpt2_counts_its_blocks_too() -> None:
    assert all(name.startswith("transformer.h.1.") for name in trainable(tiny_base("gpt2"), FreezeConfig(last_blocks=1)))


@pytest.mark.parametrize("config", [LoraConfig(r=3), FullConfig(), FreezeConfig(last_blocks=1, head=True)], ids=lambda c: c.type)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_how_many_numbers_would_train_is_known_before(arch: str, config: Any) -> None:
    base, method = tiny_base(arch), METHODS[type(config)]
    told = method.numbers(base, config)
    assert told == sum(p.numel() for p in method.attach(base, "j", config, 0).parameters()) > 0


def test_only_what_trains_has_masters() -> None:
    """In bf16 the fp32 copies, their gradients and the optimizer's moments are paid for the chosen weights alone."""
    base = tiny_base(dtype=torch.bfloat16)
    attached = Freeze().attach(base, "j", FreezeConfig(last_blocks=1), 0)
    chosen = sum(p.numel() for n, p in base.model.named_parameters() if ".layers.1." in n)
    assert sum(p.numel() for p in attached.parameters()) == chosen
    assert all(p.dtype == torch.float32 for p in attached.parameters())


def test_a_saved_model_holds_both(tmp_path: Path) -> None:
    base = tiny_base()
    _step(base, Freeze(), FreezeConfig(last_blocks=1), sequences(12)).save(tmp_path)
    loaded, native = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), tiny_model("llama").state_dict()
    for name, weight in loaded.items():
        assert torch.equal(weight, base.model.state_dict()[name])
        assert torch.equal(weight, native[name]) == (".layers.1." not in name), name
