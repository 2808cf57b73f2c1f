"""Masks over the chat templates of fifteen families: what is trained is the answers and what ends them, nothing else.

The truth is each format written a second time, in Python (`families_for_tests`).
"""

from collections.abc import Sequence
from typing import Any

import pytest
from families_for_tests import (
    FAMILIES,
    Messages,
    Tools,
    answers_of,
    expected,
    text_of,
    tokenizer_of,
    trained_runs,
    up_to_answer,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level, sentencepiece_like

from snugtune.data.forms import Conversation, read_form
from snugtune.data.render import TRAINING_DATE, Renderer, TrainOn, render_all
from snugtune.data.sources import Drops

few = settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
every_family = pytest.mark.parametrize("name", FAMILIES)
CALLERS = [name for name, family in FAMILIES.items() if family.calls]

TOOLS: Tools = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather at a place, naïvely.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
BLANKS = ["", " ", "\n", " \n\n ", "\t"]
TEXTS = [
    *BLANKS,
    "Hello",
    " both ends \n",
    "one\n\ntwo\n  three\n",
    "Grüße, 你好",
    "👩‍👩‍👧 😀",
    "\n\nfirst",
    "user",
    "assistant\nuser",
]
texts = st.sampled_from(TEXTS) | st.text("aB .\n\t,é你😀<|>/", max_size=8)


@st.composite
def conversations(draw: st.DrawFn, system: bool = True) -> Messages:
    """Up to three questions and their answers, perhaps a system turn."""
    rounds = draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    return talk(*(text for pair in rounds for text in pair), system=draw(st.none() | texts) if system else None)


def talk(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    """Question, answer, question, answer ..."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def call(place: str, id: str = "a1b2c3d4e") -> dict[str, Any]:
    return {"type": "function", "id": id, "function": {"name": "get_weather", "arguments": {"place": place}}}


def calling(*places: str, content: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": [call(place) for place in places]}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "a1b2c3d4e", "name": "get_weather"}


def tokenised(name: str, messages: Messages, tools: Tools = (), build: Any = None) -> list[tuple[list[int], list[float]]]:
    renderer = Renderer(tokenizer_of(name, build), TRAINING_DATE)
    return [renderer.tokenize(rendered) for rendered in renderer.render(messages, tools)]


def check(name: str, messages: Messages, tools: Tools = (), build: Any = None) -> None:
    """The examples are those of the truth: the same text, the same trained runs of it."""
    tokenizer, truths = tokenizer_of(name, build), expected(name, messages, tools)
    exact = (build or FAMILIES[name].build) is not sentencepiece_like and name != "phi3"
    found = tokenised(name, messages, tools, build)
    assert len(found) == len(truths)
    for (ids, weights), pieces in zip(found, truths, strict=True):
        assert set(weights) <= {0.0, 1.0}
        said = tokenizer.decode(ids)
        assert same(said, text_of(pieces), exact) or same(said, text_of(up_to_answer(pieces)), exact)
        runs = [tokenizer.decode(run) for run in trained_runs(ids, weights)]
        assert len(runs) == len(answers_of(pieces))
        for run, answer in zip(runs, answers_of(pieces), strict=True):
            lost = len(bare(answer, exact)) - len(bare(run, exact))  # blanks that fuse with the header's are the header's
            assert lost >= 0 and bare(answer, exact)[lost:] == bare(run, exact) and not bare(answer, exact)[:lost].strip()


def bare(text: str, exact: bool) -> str:
    """SentencePiece-like tokenizers put spaces in, and some tokens swallow the blanks after them: compared without."""
    return text if exact else "".join(text.split())


def same(ours: str, theirs: str, exact: bool) -> bool:
    return bare(ours, exact).rstrip() == bare(theirs, exact).rstrip()


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


TALKS = {
    "one question": talk("Hi", "Hello."),
    "system": talk("Hi", "Hello.", system="You speak briefly."),
    "three questions": talk("Hi", "Hello.", "What is it?", "A fox, naïve 😀.", "And\nnow?", "Still\n\na fox."),
}


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


GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("messages", TALKS.values(), ids=TALKS)
def test_the_mask_is_the_librarys_where_a_template_marks_its_answers(messages: Messages):
    tokenizer = byte_level(GENERATION, eos="<|im_end|>")
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    renderer = Renderer(tokenizer)
    [rendered] = renderer.render(messages)
    ids, weights = renderer.tokenize(rendered)
    assert ids == theirs["input_ids"] and weights == [float(w) for w in theirs["assistant_masks"]]


# Tools -----------------------------------------------------------------------------------------------------------------

ASK, TOLD = {"role": "user", "content": "Weather in Zürich?"}, {"role": "assistant", "content": "It snows: ☃."}
TOOL_TALKS = {
    "a call": [ASK, calling("Zürich"), result('{"snow": true}'), TOLD],
    "a call that waits": [ASK, calling("Zürich")],
    "a call with words": [ASK, calling("Zürich", content="I look."), result("snow"), TOLD],
    "two results": [ASK, calling("Zürich"), result("snow"), result("more\nsnow"), TOLD],
    "two calls in turn": [ASK, calling("Zürich"), result("?"), calling("Zürich, CH"), result("snow"), TOLD],
    "another question": [ASK, calling("Zürich"), result("snow"), TOLD, {"role": "user", "content": "Sure?"}, TOLD],
    "both at once": [ASK, calling("Zürich", "Bern"), result("snow"), result("rain"), TOLD],
    "nothing called": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
}


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("conversation", TOOL_TALKS)
@pytest.mark.parametrize("name", CALLERS)
def test_calls_are_trained_and_results_are_not(name: str, conversation: str, system: str | None):
    """A call is an answer; what the tool says is a question."""
    if conversation == "both at once" and name == "llama3":
        pytest.skip("the family calls one tool at a time")
    messages = TOOL_TALKS[conversation]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    check(name, messages, TOOLS)
    check(name, messages, TOOLS, byte_level)


@pytest.mark.parametrize("name", [*CALLERS, "granite"])
def test_the_list_of_tools_is_not_trained(name: str):
    check(name, talk("Hi", "Hello", "And?", "Bye", system="Brief."), TOOLS, byte_level)


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Zürich"}}\n</tool_call><|im_end|>'),
        ("llama3", '{"name": "get_weather", "parameters": {"place": "Zürich"}}<|eot_id|>'),
    ],
)
def test_a_sharegpt_call_becomes_the_familys_call(name: str, trained: str):
    """From a record with `function_call` and `observation`: the same tokens as of OpenAI's messages."""
    record = {
        "conversations": [
            {"from": "human", "value": "Weather in Zürich?"},
            {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"place": "Zürich"}}'},
            {"from": "observation", "value": "snow"},
            {"from": "gpt", "value": "It snows."},
        ],
        "tools": [TOOLS[0]["function"]],
    }
    item = read_form(record, "auto", {}, "x:1")
    assert isinstance(item, Conversation)
    tokenizer = tokenizer_of(name)
    [(ids, weights)] = tokenised(name, item.messages, item.tools)
    assert [tokenizer.decode(run) for run in trained_runs(ids, weights)] == [trained, "It snows." + FAMILIES[name].end]


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


@every_family
@pytest.mark.parametrize("conversation", TALKS)
def test_only_families_that_rewrite_are_split(name: str, conversation: str):
    messages = TALKS[conversation]
    drops = Drops()
    if messages[0]["role"] == "system" and not FAMILIES[name].system:
        pytest.skip("the family takes no system turn")
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
        ("mistral", [ASK, {**calling("Bern"), "tool_calls": [call("Bern", "call_1")]}], "length 9"),
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


# Text that holds the template's own markers ----------------------------------------------------------------------------


def control(name: str, ids: Sequence[int], special_only: bool = False) -> list[str]:
    """The control tokens among `ids`, in order."""
    known = tokenizer_of(name).added_tokens_decoder
    return [str(known[i]) for i in ids if i in known and (known[i].special or not special_only)]


def markers(name: str) -> list[str]:
    return [str(token) for token in tokenizer_of(name).added_tokens_decoder.values()]


def hostile(name: str, role: str) -> str:
    """A text that tries to end its turn and to speak for others; what a template reads itself stays out of answers."""
    mine = [m for m in markers(name) if role != "assistant" or "think" not in m]
    return "Look: " + " ".join(mine) + " user\n" + "".join(mine) + "assistant\nsystem done."


def shape(name: str, messages: Messages, tools: Tools = (), special_only: bool = False) -> list[list[str]]:
    return [control(name, ids, special_only) for ids, _ in tokenised(name, messages, tools)]


@every_family
@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_markers_in_text_stay_text(name: str, role: str):
    """The control tokens are those of the same talk about nothing, the text says what was written, and the mask is right."""
    if role == "system" and not FAMILIES[name].system:
        pytest.skip("the family takes no system turn")
    calm = talk("Hi", "Hello", "And?", "Bye", system="Brief." if FAMILIES[name].system else None)
    wild = [{**m, "content": hostile(name, role)} if m["role"] == role else m for m in calm]
    assert shape(name, wild, special_only=role == "assistant") == shape(name, calm, special_only=role == "assistant")
    check(name, wild)
    check(name, wild, build=byte_level)


@pytest.mark.parametrize("name", CALLERS)
@pytest.mark.parametrize("place", ["result", "description", "argument", "name of the tool"])
def test_markers_around_tools_stay_text(name: str, place: str):
    """Results and schemas are foreign text wholly; arguments are the model's own, where only special tokens are barred."""

    def tool_talk(text: str) -> tuple[list[dict[str, Any]], Tools]:
        function = {**TOOLS[0]["function"], "description": text if place == "description" else "Weather."}
        if place == "name of the tool":
            function["name"] = text
        talk_ = [ASK, calling(text if place == "argument" else "Bern"), result(text if place == "result" else "snow"), TOLD]
        return talk_, [{"type": "function", "function": function}]

    calm, wild = tool_talk("nothing"), tool_talk(hostile(name, "assistant" if place == "argument" else "user"))
    special_only = place == "argument"
    assert shape(name, *wild, special_only) == shape(name, *calm, special_only)
    check(name, *wild)


@every_family
@few
@given(data=st.data())
def test_no_question_speaks_for_another_role(name: str, data: st.DataObject):
    """Any mixture of markers and text."""
    bits = st.lists(st.sampled_from([*markers(name), "user\n", "assistant\n", " ", "\n", "x"]), max_size=6)
    calm = talk("Hi", "Hello", "And?", "Bye")
    question = "".join(data.draw(bits))
    wild = talk(f"a {question} b", "Hello", f"c{question}d", "Bye")
    assert shape(name, wild) == shape(name, calm)
    check(name, wild)


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "deepseek_r1"])
def test_answers_may_use_the_tokens_that_are_not_special(name: str):
    """`<tool_call>` in an answer is the token the model is to say."""
    token = next(m for m in FAMILIES[name].added if "call" in m)
    [(ids, weights)] = tokenised(name, talk("Hi", f"Now {token} it."))
    id_ = tokenizer_of(name).convert_tokens_to_ids(token)
    assert id_ in trained_runs(ids, weights)[0]


# What is trained by choice ---------------------------------------------------------------------------------------------


def chosen(name: str, messages: Messages, train_on: TrainOn, tools: Tools = ()) -> list[tuple[list[int], list[float]]]:
    renderer = Renderer(tokenizer_of(name), TRAINING_DATE, train_on)
    return [renderer.tokenize(rendered) for rendered in renderer.render(messages, tools)]


@every_family
@pytest.mark.parametrize("conversation", TALKS)
def test_the_last_answer_alone(name: str, conversation: str):
    """The last of the answers that are trained otherwise, in one example, after the same tokens."""
    messages = TALKS[conversation]
    if messages[0]["role"] == "system" and not FAMILIES[name].system:
        pytest.skip("the family takes no system turn")
    ids, weights = tokenised(name, messages)[-1]
    [(same_ids, last)] = chosen(name, messages, "last_answer")
    assert same_ids == ids and trained_runs(ids, last) == trained_runs(ids, weights)[-1:]
    assert last[-20:] == weights[-20:]


@every_family
@pytest.mark.parametrize("conversation", TALKS)
def test_everything(name: str, conversation: str):
    """All tokens of the whole talk in one example, but for the first, which nothing predicts."""
    messages = TALKS[conversation]
    if messages[0]["role"] == "system" and not FAMILIES[name].system:
        pytest.skip("the family takes no system turn")
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
