"""Answers from a base, with or without a job's adapter: transformers' own generation over our layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import TextStreamer

from snugtune.errors import InputError
from snugtune.model.base import Base


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Temperature 0 takes the likeliest token each time."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


# What is left out here is taken from the model's own generation_config, unasked.
_PLAIN: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "num_beams": 1,
}
_PLAIN_DRAWS: dict[str, Any] = {"top_k": 0, "min_p": 0.0, "typical_p": 1.0}


class _Forward(TextStreamer):
    """Hands finished pieces of text on as they come."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


def generate(
    base: Base,
    job: str | None,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Answer prompts, each a row of token ids, together; `on_text` streams that of a single one. `job` None: the bare base."""
    tokenizer = base.tokenizer
    longest = max(len(row) for row in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in prompts], device=base.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=base.device)
    new_tokens = _room(base, longest, sampling.max_new_tokens)
    drawn = sampling.temperature > 0
    draws = {"temperature": sampling.temperature, "top_p": sampling.top_p, **_PLAIN_DRAWS} if drawn else {}
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=drawn,
        **_PLAIN,
        **draws,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
    )
    streamer = None if on_text is None else _Forward(tokenizer, on_text)
    with base.answering(job), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sampling.seed)
        out = base.model.generate(ids, attention_mask=mask, generation_config=config, streamer=streamer)  # pyright: ignore
    return [tokenizer.decode(row[longest:], skip_special_tokens=True).strip() for row in out]  # pyright: ignore


def _room(base: Base, used: int, wanted: int) -> int:
    """New tokens that the model's table of positions has room for. Raises `InputError` when there is none."""
    if base.max_positions is None:
        return wanted
    if used >= base.max_positions:
        raise InputError(f"the conversation has {used} tokens, but '{base.name}' has {base.max_positions} positions; start anew")
    return min(wanted, base.max_positions - used)
