"""Talks for the tests of the families, and the comparison of what is trained in them with the truth."""

from typing import Any

import pytest
from families_for_tests import FAMILIES, Messages, Tools, answers_of, expected, text_of, tokenizer_of, trained_runs, up_to_answer
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tokenizers_for_tests import sentencepiece_like

from snugtune.data.render import TRAINING_DATE, Renderer

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


ASK, TOLD = {"role": "user", "content": "Weather in Zürich?"}, {"role": "assistant", "content": "It snows: ☃."}
TALKS = {
    "one question": talk("Hi", "Hello."),
    "system": talk("Hi", "Hello.", system="You speak briefly."),
    "three questions": talk("Hi", "Hello.", "What is it?", "A fox, naïve 😀.", "And\nnow?", "Still\n\na fox."),
}
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
