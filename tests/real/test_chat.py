"""Answers are those of transformers' own greedy generation on the merged model, and they end where they should."""

from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from real.common import CONVERSATIONS, END
from snugtune.export import export
from snugtune.model.generate import Sampling
from snugtune.model.source import mute
from snugtune.observer import RunResult
from snugtune.tuned import Tuned, load

pytestmark = pytest.mark.real

TOKENS = 16
LEARNED = CONVERSATIONS[1][:2]  # its answer is learned by heart: a few words, then the end
OPEN = [{"role": "user", "content": "List the numbers from one to forty, each on a line of its own."}]


@pytest.fixture(scope="module")
def merged(trained: RunResult, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    written = export(trained.folder, "merged", tmp_path_factory.mktemp("export") / "merged", None, "fp32", mute)
    model = AutoModelForCausalLM.from_pretrained(written, dtype="auto").eval()
    model.generation_config.eos_token_id = None  # see `greedy`
    return model


@pytest.fixture
def tuned(trained: RunResult, exact_answers: None) -> Tuned:
    return load(trained.folder)


def greedy(model: PreTrainedModel, tuned: Tuned, messages: Sequence[dict[str, str]]) -> str:
    """`TOKENS` tokens, whatever they are: nothing stops this one."""
    tokenizer = tuned.base.tokenizer
    ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    out = model.generate(**ids, generation_config=config)
    assert isinstance(out, torch.Tensor)
    assert out.shape[1] == ids["input_ids"].shape[1] + TOKENS
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def test_greedy_answers_equal_the_merged_models(tuned: Tuned, merged: PreTrainedModel) -> None:
    truth = {name: greedy(merged, tuned, asked) for name, asked in (("learned", LEARNED), ("open", OPEN))}
    answer, stop, rest = truth["learned"].partition(END)
    assert stop and rest and answer == CONVERSATIONS[1][2]["content"], "the run did not learn what this test is about"
    assert END not in truth["open"]

    pieces: list[str] = []
    assert tuned.reply(LEARNED, max_new_tokens=TOKENS, on_text=pieces.append) == answer
    assert "".join(pieces).strip() == answer
    assert tuned.reply(OPEN, max_new_tokens=TOKENS) == truth["open"].strip()
    together = tuned.replies([LEARNED, OPEN], Sampling(max_new_tokens=TOKENS))
    assert together == [answer, truth["open"].strip()], "answered together, the shorter question is padded"
