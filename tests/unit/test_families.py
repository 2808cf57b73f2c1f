"""Masks over the chat templates of fifteen families: what is trained is the answers and what ends them, nothing else.

The truth is each format written a second time, in Python (`families_for_tests`).
"""

from collections.abc import Sequence
from typing import Any

import pytest
from families_for_tests import FAMILIES, Messages, Tools, expected, tokenizer_of, trained_runs
from family_talks_for_tests import (
    ASK,
    GENERATION,
    TALKS,
    TOOLS,
    calling,
    check,
    conversations,
    every_family,
    few,
    result,
    talk,
    tokenised,
)
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level

from snugtune.data.forms import Conversation, read_form
from snugtune.data.render import TRAINING_DATE, Renderer, TrainOn, render_all
from snugtune.data.sources import Drops

every_talk_taken = pytest.mark.parametrize(
    ("name", "conversation"),
    [(n, c) for n in FAMILIES for c, talk in TALKS.items() if FAMILIES[n].system or talk[0]["role"] != "system"],
)
"""Each family with the talks that it takes: some have no system turn."""

# What is trained -------------------------------------------------------------------------------------------------------


@every_family
@few
@given(data=st.data())
def test_exactly_the_answers_and_what_ends_them_are_trained(name: str, data: st.DataObject):
    """Several turns, with and without a system turn, empty, blank, long and foreign ones, in the family's kind of tokens."""
    check(name, data.draw(conversations(FAMILIES[name].system)))


@every_family
@few
@given(data=st.data())
def test_the_mask_is_right_to_the_last_byte(name: str, data: st.DataObject):
    """With byte tokens every character can be compared, blanks too."""
    check(name, data.draw(conversations(FAMILIES[name].system)), build=byte_level)


@every_family
def test_generation_stops_where_training_ends(name: str):
    family, renderer = FAMILIES[name], Renderer(tokenizer_of(name))
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.end_of_turn) == family.end
    assert set(renderer.tokenizer.convert_ids_to_tokens(list(renderer.stop_ids))) == {family.end, family.eos}
    for ids, weights in tokenised(name, talk("Hi", "Hello", "And?", "Bye")):
        assert all(run[-1] == renderer.end_of_turn for run in trained_runs(ids, weights))
        assert all(run.count(renderer.end_of_turn) == 1 for run in trained_runs(ids, weights))


@every_family
@pytest.mark.parametrize("conversation", TALKS)
def test_tokens_are_those_of_the_library(name: str, conversation: str):
    """Text without markers is coded as transformers codes the whole conversation at once, up to the last answer's end."""
    messages = TALKS[conversation]
    if messages[0]["role"] == "system" and name in ("gemma2", "mistral"):
        pytest.skip("gemma2 takes no system turn; mistral's record of an answered question leaves it out")
    tokenizer = tokenizer_of(name)
    renderer = Renderer(tokenizer, TRAINING_DATE)
    found, truths = tokenised(name, messages), expected(name, messages)
    whole = len(found) == 1
    for i, (ids, _) in enumerate(found):
        answers = [at for at, m in enumerate(messages) if m["role"] == "assistant"]
        shown = messages[: (answers[-1] if whole else answers[i]) + 1]
        theirs = tokenizer.apply_chat_template(shown, chat_template=renderer.chat_template, tokenize=True)["input_ids"]
        n = last_of(theirs, renderer.end_of_turn)
        assert ids[:n] == theirs[:n] and last_of(ids, renderer.end_of_turn) == n
    assert len(truths) == len(found)


def last_of(ids: Sequence[int], token: int) -> int:
    """How long `ids` are up to and with the last `token`."""
    return len(ids) - list(reversed(ids)).index(token)


@every_family
@pytest.mark.parametrize("conversation", TALKS)
def test_what_stands_before_an_answer_is_the_prompt_of_generation(name: str, conversation: str):
    """Token for token, and none of it trained: in use the model meets what it met in training."""
    messages, family = TALKS[conversation], FAMILIES[name]
    if messages[0]["role"] == "system" and not family.system:
        pytest.skip("the family takes no system turn")
    if not family.opens:
        pytest.skip("the family's prompt opens a thought that its record of an answer leaves out")
    renderer = Renderer(tokenizer_of(name), TRAINING_DATE)
    found = tokenised(name, messages)
    for n, i in enumerate(i for i, m in enumerate(messages) if m["role"] == "assistant"):
        prompt = renderer.prompt(messages[:i])
        ids, weights = found[n if len(found) > 1 else 0]
        assert ids[: len(prompt)] == prompt
        assert weights[len(prompt)] == 1.0 and (n > 0 or not any(weights[: len(prompt)]))


@pytest.mark.parametrize("messages", TALKS.values(), ids=TALKS)
def test_the_mask_is_the_librarys_where_a_template_marks_its_answers(messages: Messages):
    tokenizer = byte_level(GENERATION, eos="<|im_end|>")
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    renderer = Renderer(tokenizer)
    [rendered] = renderer.render(messages)
    ids, weights = renderer.tokenize(rendered)
    assert ids == theirs["input_ids"] and weights == [float(w) for w in theirs["assistant_masks"]]


# Templates that rewrite earlier turns ----------------------------------------------------------------------------------


def thinking(*rounds: tuple[str, str, str]) -> list[dict[str, Any]]:
    """(question, thought, answer) ..."""
    turns: list[dict[str, Any]] = []
    for question, thought, answer in rounds:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer, "reasoning_content": thought})
    return turns


def test_each_thought_is_trained_where_the_model_had_it():
    """Qwen3 drops thoughts of earlier turns: one example an answer, each after a history without thoughts, and counted."""
    messages = thinking(("Q1", "first", "A1"), ("Q2", "", "A2"), ("Q3", "third\n", "A3"))
    check("qwen3", messages)
    tokenizer, drops = tokenizer_of("qwen3"), Drops()
    examples = render_all([Conversation(tuple(messages), "x:7")], tokenizer, 500, drops)
    trained = [[tokenizer.decode(run) for run in trained_runs(e.tokens.tolist(), e.weights.tolist())] for e in examples]
    assert trained == [
        ["<think>\nfirst\n</think>\n\nA1<|im_end|>"],
        ["<think>\n\n</think>\n\nA2<|im_end|>"],
        ["<think>\nthird\n</think>\n\nA3<|im_end|>"],
    ]
    assert "first" not in tokenizer.decode(examples[1].tokens.tolist())
    [(reason, places)] = drops.places.items()
    assert "one example per answer" in reason and places == ["x:7"]


def test_a_thought_written_in_the_answer_is_the_same_thought():
    """Qwen3 takes it out of the text."""
    apart = thinking(("Q1", "first", "A1"), ("Q2", "second", "A2"))
    joined = [
        m
        if m["role"] == "user"
        else {"role": "assistant", "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}"}
        for m in apart
    ]
    assert tokenised("qwen3", joined) == tokenised("qwen3", apart)


def test_thoughts_between_calls_stay():
    """After the last question Qwen3 drops nothing: the call and the answer are one example."""
    call_turn = {**calling("Bern"), "reasoning_content": "I must look."}
    messages = [ASK, call_turn, result("rain"), {"role": "assistant", "content": "Rain.", "reasoning_content": "So rain."}]
    assert len(expected("qwen3", messages, TOOLS)) == 1
    check("qwen3", messages, TOOLS)


@every_talk_taken
def test_only_families_that_rewrite_are_split(name: str, conversation: str):
    messages = TALKS[conversation]
    drops = Drops()
    examples = render_all([Conversation(tuple(messages), "x:1")], tokenizer_of(name), 1000, drops)
    split = FAMILIES[name].rewrites and conversation == "three questions"
    assert len(examples) == (3 if split else 1) and bool(drops.counts) == split


# What the families refuse ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "messages", "words"),
    [
        ("gemma2", talk("Hi", "Hello", system="Brief."), "System role not supported"),
        ("gemma3", [*talk("Hi", "Hello"), *talk("", "Bye")[1:]], "roles must alternate"),
        ("llama2", [*talk("Hi")[:1], *talk("Hi", "Hello")], "roles must alternate"),
        ("mistral", [*talk("Hi")[:1], *talk("Hi", "Hello")], "roles must alternate"),
        ("llama3", [ASK, calling("Bern", "Zürich")], "single tool-calls"),
    ],
)
def test_a_refusal_is_counted_in_the_familys_words(name: str, messages: Messages, words: str):
    drops = Drops()
    kept = Conversation(tuple(talk("Hi", "Hello")), "x:2")
    examples = render_all([Conversation(tuple(messages), "x:1"), kept], tokenizer_of(name), 500, drops)
    assert [e.source for e in examples] == ["x:2"]
    [(reason, places)] = drops.places.items()
    assert words in reason and places == ["x:1"]


def test_content_in_parts_is_the_text_of_the_parts():
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]
    for name in ("gemma3", "chatml"):
        record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]}
        item = read_form(record, "auto", {}, "x:1")
        assert isinstance(item, Conversation)
        assert tokenised(name, item.messages) == tokenised(name, talk("Hello there", "Hello there"))


# What is trained by choice ---------------------------------------------------------------------------------------------


def chosen(name: str, messages: Messages, train_on: TrainOn, tools: Tools = ()) -> list[tuple[list[int], list[float]]]:
    renderer = Renderer(tokenizer_of(name), TRAINING_DATE, train_on)
    return [renderer.tokenize(rendered) for rendered in renderer.render(messages, tools)]


@every_talk_taken
def test_the_last_answer_alone(name: str, conversation: str):
    """The last of the answers that are trained otherwise, in one example, after the same tokens."""
    messages = TALKS[conversation]
    ids, weights = tokenised(name, messages)[-1]
    [(same_ids, last)] = chosen(name, messages, "last_answer")
    assert same_ids == ids and trained_runs(ids, last) == trained_runs(ids, weights)[-1:]
    first = next(place for place, weight in enumerate(last) if weight)
    assert last[first:] == weights[first:] and not any(last[:first])


@every_talk_taken
def test_everything(name: str, conversation: str):
    """All tokens of the whole talk in one example, but for the first, which nothing predicts."""
    messages = TALKS[conversation]
    tokenizer = tokenizer_of(name)
    [example] = render_all([Conversation(tuple(messages), "x:1")], tokenizer, 1000, Drops(), "everything")
    assert example.weights.tolist() == [0.0] + [1.0] * (len(example.tokens) - 1)
    assert example.tokens.tolist() == tokenised(name, messages)[-1][0]


def test_weights_of_turns_are_kept_by_every_choice():
    """An answer of weight 0 is not learned, one of weight 2 twice; what is not an answer has weight 1 where it is trained."""
    messages = talk("Hi", "No", "And?", "Yes")
    messages[1]["weight"], messages[3]["weight"] = 0.0, 2.0
    for train_on, others in (("answers", 0.0), ("last_answer", 0.0), ("everything", 1.0)):
        [(ids, weights)] = chosen("chatml", messages, train_on)
        by_token = dict(zip(tokenizer_of("chatml").convert_ids_to_tokens(ids), weights, strict=True))
        assert by_token["<|im_start|>"] == others
        answers = {w for t, w in zip(ids, weights, strict=True) if t == tokenizer_of("chatml").convert_tokens_to_ids("Y")}
        assert answers == {2.0}
