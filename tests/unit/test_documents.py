"""Plain text as training examples: every token of a document but its first is learned exactly once."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from tokenizers.processors import TemplateProcessing
from tokenizers_for_tests import byte_level
from transformers import PreTrainedTokenizerFast

from conftest import tiny_tokenizer
from snugtune.data.documents import tokenise_documents
from snugtune.data.forms import Conversation, Document
from snugtune.data.mix import interleave
from snugtune.data.sources import Drops
from snugtune.objectives.clm import BEGINNING, Clm, ClmConfig

TOKENIZER = tiny_tokenizer()


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), st.integers(2, 20))
def test_every_token_is_learned_once(text: str, length: int) -> None:
    ids = [*TOKENIZER(text, split_special_tokens=True)["input_ids"], TOKENIZER.eos_token_id]
    examples = tokenise_documents([Document(text, "d:1")], TOKENIZER, length, Drops())
    assert all(2 <= len(e.tokens) <= length for e in examples)
    learned = [int(t) for e in examples for t, w in zip(e.tokens, e.weights, strict=True) if w]
    assert learned == ids[1:]
    for before, after in pairwise(examples):
        assert before.tokens[-1] == after.tokens[0], "each piece goes on from the last token of the one before"


def test_control_tokens_in_a_text_stay_text() -> None:
    (example,) = tokenise_documents([Document("a <|im_end|> b", "d:1")], TOKENIZER, 100, Drops())
    assert example.tokens.tolist().count(TOKENIZER.eos_token_id) == 1
    assert int(example.tokens[-1]) == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(example.tokens[:-1]) == "a <|im_end|> b"


def unigram(normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """XLNet's and T5's kind: control tokens are words of the vocabulary, too."""
    words = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "ab<>/s ")]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=0, byte_fallback=False))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (byte_level("<think>", added=("<|Assistant|>", "<think>")), "a <|Assistant|> b <think> </s>"),
        (byte_level("", added=("<think>",)), "a <think> b"),
        (unigram(), "a </s> b<s>"),
        (unigram(normalizers.NFKC()), "a \uff1c/s\uff1e b"),
    ],
    ids=["not special", "not in the template", "words of the vocabulary", "normalised"],
)
def test_no_control_token_comes_of_a_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """However the tokenizer holds it; nor of the beginning that the model is asked to go on with."""
    (example,) = tokenise_documents([Document(text, "d:1")], tokenizer, 100, Drops())
    control = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    assert not control & set(example.tokens[:-1].tolist())
    prompt = Clm(ClmConfig()).ask_as(Document(text, "d:1"), tokenizer)
    assert prompt is not None and prompt.text == text
    assert list(prompt.tokens) == example.tokens[:-1].tolist()


def test_the_beginning_that_is_shown_is_the_beginning_of_the_example() -> None:
    text = "<|im_end|>" * 20
    (example,) = tokenise_documents([Document(text, "d:1")], TOKENIZER, 1000, Drops())
    prompt = Clm(ClmConfig()).ask_as(Document(text, "d:1"), TOKENIZER)
    assert prompt is not None and len(prompt.tokens) == BEGINNING
    assert list(prompt.tokens) == example.tokens[:BEGINNING].tolist()


def test_a_tokenizer_that_begins_its_texts_does_so_here() -> None:
    """And one that has such a token but does not put it there is left alone."""
    for begins in (True, False):
        tokenizer = tiny_tokenizer()
        tokenizer.bos_token = "<|endoftext|>"
        if begins:
            begin = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)])
            tokenizer.backend_tokenizer.post_processor = begin
        (example,) = tokenise_documents([Document("ab", "d:1")], tokenizer, 100, Drops())
        assert (int(example.tokens[0]) == tokenizer.bos_token_id) is begins


def test_a_document_of_no_weight_is_dropped_and_counted() -> None:
    """A step of nothing but such would be divided by zero."""
    drops = Drops()
    tokenise_documents([Document("ab", "d:1", 0.0), Document("cd", "d:2")], TOKENIZER, 100, drops)
    assert drops.lines() == ["1 document dropped: nothing to learn in them (d:1)"]


def test_weights_and_cuts_are_kept_and_counted() -> None:
    drops = Drops()
    examples = tokenise_documents([Document("abcdefgh" * 4, "d:1", 0.5), Document("a", "d:2")], TOKENIZER, 6, drops)
    assert {float(w) for e in examples[:-1] for w in e.weights} == {0.0, 0.5}
    assert drops.lines() == ["1 document cut into pieces of max_seq_len=6 tokens (nothing is lost) (d:1)"]


def test_conversations_are_not_documents() -> None:
    drops = Drops()
    assert tokenise_documents([Conversation(({"role": "user", "content": "a"},), "d:1")], TOKENIZER, 9, drops) == []
    assert drops.lines() == ["1 conversation, which objective clm does not learn (set objective: sft) (d:1)"]


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 5.0)), min_size=1, max_size=4), st.sampled_from(["first", "last"]))
def test_interleaving_keeps_the_shares(sources: list[tuple[int, float]], until) -> None:
    """To within one turn at every moment; `first` ends when a source is used up, `last` when all are."""
    sizes, weights = [n for n, _ in sources], [w for _, w in sources]
    order = interleave(sizes, weights, until)
    taken = [0] * len(sizes)
    for turns, (source, index) in enumerate(order, 1):
        assert index == taken[source] % sizes[source], "each source in its own order, again and again"
        taken[source] += 1
        for count, weight in zip(taken, weights, strict=True):
            assert abs(count - turns * weight / sum(weights)) < 1 + 1e-6
    if until == "first":
        assert all(t <= n for t, n in zip(taken, sizes, strict=True)) and any(t == n for t, n in zip(taken, sizes, strict=True))
    else:
        assert all(t >= n for t, n in zip(taken, sizes, strict=True))
        assert taken[order[-1][0]] == sizes[order[-1][0]], "the last turn is what the last source still lacked"
