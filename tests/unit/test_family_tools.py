"""Calls of tools and their results in the families' chat templates."""

import json
import re
from typing import Any

import pytest
from families_for_tests import FAMILIES, tokenizer_of, trained_runs
from family_talks_for_tests import ASK, CALLERS, GENERATION, TOLD, TOOLS, calling, check, result, talk, tokenised
from tokenizers_for_tests import byte_level

from snugtune.data.forms import Conversation, read_form
from snugtune.data.render import Renderer, render_all
from snugtune.data.sources import Drops

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


def shared_gpt(*calls: str) -> dict[str, Any]:
    turns = [("human", "Weather?"), ("function_call", f"[{', '.join(calls)}]"), ("observation", "1"), ("observation", "2")]
    return {"conversations": [{"from": who, "value": text} for who, text in [*turns, ("gpt", "Both.")]]}


def test_calls_without_ids_get_such_as_mistral_demands():
    """Nine letters or digits, the same in every run, and each result names its own call."""
    calls = [json.dumps({"name": "get_weather", "arguments": {"place": place}}) for place in ("Bern", "Rome")]
    item = read_form(shared_gpt(*calls), "auto", {}, "x:1")
    assert isinstance(item, Conversation) and not any("id" in c for c in item.messages[1]["tool_calls"])
    texts = {tokenizer_of("mistral").decode(tokenised("mistral", item.messages)[0][0]) for _ in range(2)}
    [text] = texts
    made = re.findall(r'"id": "([A-Za-z0-9]{9})"', text)
    assert len(set(made)) == 2 and re.findall(r'"call_id": "(\w+)"', text) == made


def test_ids_of_openais_kind_become_short_where_they_must():
    """`call_...` is refused by Mistral's template; ids that it takes stay as they are, and so do all where no template asks."""
    call = {"id": "call_MGwZUQwRZ6vJUxzF", "type": "function", "function": {"name": "f", "arguments": {}}}
    talk = [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, {**result("x"), "tool_call_id": call["id"]}, TOLD]
    text = tokenizer_of("mistral").decode(tokenised("mistral", talk)[0][0])
    [made], [named] = re.findall(r'"id": "(\w+)"', text), re.findall(r'"call_id": "(\w+)"', text)
    assert made == named and len(made) == 9 and made != call["id"]
    assert "a1b2c3d4e" in tokenizer_of("mistral").decode(tokenised("mistral", [ASK, calling("Bern"), result("x"), TOLD])[0][0])
    assert Renderer(tokenizer_of("qwen2_5")).calls.told(talk) == talk


@pytest.mark.parametrize("content", ["", "I look."])
@pytest.mark.parametrize("name", ["chatml", "deepseek_r1", "granite", "phi3", "phi4", "smollm2", "zephyr"])
def test_a_call_that_the_template_leaves_out_is_refused(name: str, content: str):
    """An empty answer must not be learned in its place; talks without calls go on as before."""
    drops = Drops()
    messages = [ASK, calling("Bern", content=content), result("rain"), TOLD]
    items = [Conversation(tuple(messages), "x:1"), Conversation(tuple(talk("Hi", "Hello")), "x:2")]
    assert [e.source for e in render_all(items, tokenizer_of(name), 500, drops)] == ["x:2"]
    assert drops.places == {"examples the chat template refuses (it leaves calls of tools out)": ["x:1"]}


@pytest.mark.parametrize(("name", "kept"), [("phi3", False), ("zephyr", False), ("granite", False), ("chatml", True)])
def test_a_result_that_the_template_leaves_out_is_refused(name: str, kept: bool):
    """Calls written as plain text, but results that the template does not show."""
    drops = Drops()
    messages = [ASK, {"role": "assistant", "content": "weather(Bern)"}, result("rain"), TOLD]
    examples = render_all([Conversation(tuple(messages), "x:1")], tokenizer_of(name), 500, drops)
    assert bool(examples) == kept and drops.places == (
        {} if kept else {"examples the chat template refuses (it leaves results of tools out)": ["x:1"]}
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_tools_that_the_template_leaves_out_are_counted(name: str):
    """The example is used: a model may know its tools by heart. What is counted is what the tokens lack, and only that."""
    drops = Drops()
    items = [Conversation(tuple(talk("Hi", "Hello")), "x:1", tools=tuple(TOOLS)), Conversation(tuple(talk("Hi", "Hello")), "x:2")]
    tokenizer = tokenizer_of(name)
    with_tools, _ = render_all(items, tokenizer, 2000, drops)
    shown = TOOLS[0]["function"]["name"] in tokenizer.decode(with_tools.tokens)
    left_out = "lists of tools left out by the chat template (the rest of the example is used)"
    assert drops.places == ({} if shown else {left_out: ["x:1"]})


CALLS_AS_TEXT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name + ARGUMENTS }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("arguments", ["call.function.arguments", "call.function.arguments | string"])
def test_arguments_become_text_where_the_template_joins_text(arguments: str):
    """As DeepSeek's later ones do: JSON, not a refusal and not Python's way of writing a mapping."""
    tokenizer = byte_level(CALLS_AS_TEXT.replace("ARGUMENTS", arguments), eos="<|im_end|>")
    renderer = Renderer(tokenizer)
    [rendered] = renderer.render([ASK, calling("Zürich"), result("snow"), TOLD])
    ids, weights = renderer.tokenize(rendered)
    runs = [tokenizer.decode(run) for run in trained_runs(ids, weights)]
    assert runs == ['get_weather{"place": "Zürich"}<|im_end|>', "It snows: ☃.<|im_end|>"]


def test_what_a_template_stumbles_over_is_refused():
    """A name that is not text makes this template add a number to a text: counted, not a traceback."""
    tokenizer = byte_level(GENERATION.replace("m['content'] + '<|im_end|>'", "m['content'] + (m.name or '') + '<|im_end|>'"))
    drops = Drops()
    odd = [{"role": "user", "content": "Hi", "name": 7}, {"role": "assistant", "content": "Hello"}]
    items = [Conversation(tuple(odd), "x:1"), Conversation(tuple(talk("Hi", "Hello")), "x:2")]
    assert [e.source for e in render_all(items, tokenizer, 100, drops)] == ["x:2"]
    [(reason, places)] = drops.places.items()
    assert "TypeError" in reason and places == ["x:1"]
