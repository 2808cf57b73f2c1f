"""Loading and answering at their edges: the plain template's first token, and conversations longer than the positions."""

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from conftest import sequences, tiny_base, tiny_model, tiny_tokenizer
from snugtune.errors import InputError
from snugtune.model import gguf
from snugtune.model.base import load_base
from snugtune.model.generate import Sampling, generate
from snugtune.model.load import load_tokenizer
from snugtune.model.source import ModelSource
from snugtune.types import Plan


@pytest.mark.parametrize("begins", [True, False])
def test_the_plain_template_begins_as_the_tokenizer_does(begins: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.bos_token = "<|endoftext|>"
    if begins:
        begin = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded, notes = load_tokenizer(ModelSource("x", str(tmp_path)), trust_remote_code=False)
    text = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == ("<|endoftext|>" if begins else "") + "### User:\nHi\n\n"
    assert any("no chat template" in note for note in notes)


@pytest.mark.parametrize("arch", ["gpt2", "mixtral", "phimoe"])
def test_a_loaded_base_is_the_model_of_its_folder(arch: str, tmp_path: Path) -> None:
    """What is switched off at load is noise of training. PhiMoE's `router_jitter_noise` only sounds like it."""
    noise = {"gpt2": {"attn_pdrop": 0.1}, "mixtral": {"router_jitter_noise": 0.1}, "phimoe": {"input_jitter_noise": 0.1}}[arch]
    model, (part,) = tiny_model(arch), sequences(12)
    model.config.update(noise)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = load_base(ModelSource("x", str(tmp_path)), Plan("cpu", "fp32", 1, "none", 512, 1, "fp32"))
    assert any(note == f"the base's own dropouts are off ({next(iter(noise))})" for note in base.notes)
    with torch.no_grad(), base.answering(None):
        assert torch.equal(base.model(input_ids=part[None]).logits, model(input_ids=part[None]).logits)


@pytest.mark.parametrize("arch", ["gpt2", "gptj"])
def test_a_conversation_beyond_the_positions_is_refused(arch: str) -> None:
    """Where the positions are a table (learned in GPT-2, sines in GPT-J); short of its end, the answer is cut to what fits."""
    base = tiny_base(arch)
    assert base.max_positions is not None
    ids = base.tokenizer("a " * 400)["input_ids"]
    with pytest.raises(InputError, match=rf"but 'tiny-{arch}' has {base.max_positions} positions"):
        generate(base, None, [ids], [], Sampling())
    nearly_full = [ids[: base.max_positions - 3]]
    cut, three = (generate(base, None, nearly_full, [], Sampling(max_new_tokens=n)) for n in (50, 3))
    assert cut == three


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is killed, and cannot clean up after itself."""

    def killed(file: Path, target: Path) -> None:
        (target.parent / f".part-{target.name}-x").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "check_gguf", lambda file: None)
    monkeypatch.setattr(gguf, "_convert_apart", killed)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(KeyboardInterrupt):
        gguf.converted(tmp_path / "model.gguf", print)
    assert not list((tmp_path / "cache" / "gguf").iterdir())
