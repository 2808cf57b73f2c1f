"""Text that holds a chat template's own markers stays text, whoever says it."""

from collections.abc import Sequence
from typing import Any

import pytest
from families_for_tests import FAMILIES, Messages, Tools, tokenizer_of, trained_runs
from family_talks_for_tests import (
    ASK,
    CALLERS,
    TOLD,
    TOOLS,
    calling,
    check,
    every_family,
    few,
    result,
    talk,
    tokenised,
)
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level


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
