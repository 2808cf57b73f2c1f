# ruff: noqa: RUF001 - DeepSeek writes its tokens with full-width bars
"""Families of chat templates: the files in `templates/` with tokenizers like the families' own, and each format in Python.

A truth gives a conversation's text in order as (text, whether it is trained). The last answer is as generation sees it;
what a family does to earlier ones (thinking dropped, tools moved to the last question) is in the text before it.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers_for_tests import byte_level, sentencepiece_like, tiktoken_like
from transformers import PreTrainedTokenizerFast

from snugtune.data.render import TRAINING_DATE

Message = Mapping[str, Any]
Messages = Sequence[Message]
Tools = Sequence[Mapping[str, Any]]
Pieces = list[tuple[str, bool]]

TEMPLATES = Path(__file__).with_name("templates")


def turn(message: Message, head: str, text: str, end: str, after: str = "") -> Pieces:
    return [(head, False), (text + end, message["role"] == "assistant"), (after, False)]


def as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def without_system(messages: Messages) -> tuple[str | None, Messages]:
    if messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return None, messages


# The formats -----------------------------------------------------------------------------------------------------------


def im(messages: Messages, tools: Tools = (), separator: str = "\n", after: str = "\n") -> Pieces:
    """ChatML, and with other blanks Phi-4."""
    return [p for m in messages for p in turn(m, f"<|im_start|>{m['role']}{separator}", m["content"], "<|im_end|>", after)]


def phi4(messages: Messages, tools: Tools = ()) -> Pieces:
    return im(messages, separator="<|im_sep|>", after="")


def smollm2(messages: Messages, tools: Tools = ()) -> Pieces:
    own = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
    return im(messages if messages[0]["role"] == "system" else [own, *messages])


def phi3(messages: Messages, tools: Tools = ()) -> Pieces:
    said = [p for m in messages for p in turn(m, f"<|{m['role']}|>\n", m["content"], "<|end|>", "\n")]
    return [*said, ("<|endoftext|>", False)]


def zephyr(messages: Messages, tools: Tools = ()) -> Pieces:
    return [p for m in messages for p in turn(m, f"<|{m['role']}|>\n", m["content"], "</s>", "\n")]


def cohere(messages: Messages, tools: Tools = ()) -> Pieces:
    names = {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"}
    pieces: Pieces = [("<BOS_TOKEN>", False)]
    for m in messages:
        text = m["content"] if m["role"] == "system" else m["content"].strip()
        pieces += turn(m, f"<|START_OF_TURN_TOKEN|><|{names[m['role']]}_TOKEN|>", text, "<|END_OF_TURN_TOKEN|>")
    return pieces


def granite(messages: Messages, tools: Tools = ()) -> Pieces:
    listed = "\n\n".join(as_json(tool, 4) for tool in tools)
    before = f"<|start_of_role|>available_tools<|end_of_role|>\n{listed}<|end_of_text|>\n" if tools else ""
    turns = [
        p
        for m in messages
        for p in turn(m, f"<|start_of_role|>{m['role']}<|end_of_role|>", m["content"], "<|end_of_text|>", "\n")
    ]
    return [(before, False), *turns]


def gemma(messages: Messages, tools: Tools = ()) -> Pieces:
    """Gemma 2, and Gemma 3 with a system turn."""
    system, turns = without_system(messages)
    pieces: Pieces = [("<bos>", False)]
    for n, m in enumerate(turns):
        name = "model" if m["role"] == "assistant" else "user"
        before = f"{system}\n\n" if n == 0 and system is not None else ""
        pieces += turn(m, f"<start_of_turn>{name}\n{before}", m["content"].strip(), "<end_of_turn>", "\n")
    return pieces


def llama2(messages: Messages, tools: Tools = ()) -> Pieces:
    system, turns = without_system(messages)
    pieces: Pieces = []
    for n, m in enumerate(turns):
        before = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if n == 0 and system is not None else ""
        if m["role"] == "user":
            pieces.append((f"<s>[INST] {(before + m['content']).strip()} [/INST]", False))
        else:
            pieces.append((f" {m['content'].strip()} </s>", True))
    return pieces


def llama3(messages: Messages, tools: Tools = ()) -> Pieces:
    system, turns = without_system(messages)

    def head(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    day = TRAINING_DATE.strftime("%d %b %Y")
    pieces: Pieces = [
        (f"<|begin_of_text|>{head('system')}{'Environment: ipython' + chr(10) if tools else ''}", False),
        (f"Cutting Knowledge Date: December 2023\nToday Date: {day}\n\n{(system or '').strip()}<|eot_id|>", False),
    ]
    if tools:
        listed = "".join(as_json(tool, 4) + "\n\n" for tool in tools)
        question = turns[0]["content"].strip()
        intro = 'Functions, to be called as {"name": ..., "parameters": ...}:\n\n'
        pieces.append((f"{head('user')}{intro}{listed}{question}<|eot_id|>", False))
        turns = turns[1:]
    for m in turns:
        if m.get("tool_calls"):
            call = m["tool_calls"][0]["function"]
            text = f'{{"name": "{call["name"]}", "parameters": {as_json(call["arguments"])}}}'
            pieces += turn(m, head("assistant"), text, "<|eot_id|>")
        elif m["role"] == "tool":
            pieces += turn(m, head("ipython"), as_json(m["content"]), "<|eot_id|>")
        else:
            pieces += turn(m, head(m["role"]), m["content"].strip(), "<|eot_id|>")
    return pieces


def mistral(messages: Messages, tools: Tools = ()) -> Pieces:
    """The tools stand at the last question, the system turn at one that waits for its answer: there the model met them.

    The template's record of an answered question leaves the system turn out; the prompt that the answer followed had it.
    """
    system, turns = without_system(messages)
    last = max(i for i, m in enumerate(turns) if m["role"] == "user")
    pieces: Pieces = [("<s>", False)]
    for i, m in enumerate(turns):
        if m["role"] == "user":
            listed = f"[AVAILABLE_TOOLS] {as_json(list(tools))}[/AVAILABLE_TOOLS]" if tools and i == last else ""
            just_asked = i == last and i + 2 >= len(turns)
            before = f"{system}\n\n" if system is not None and just_asked else ""
            pieces.append((f"{listed}[INST] {before}{m['content']}[/INST]", False))
        elif m.get("tool_calls"):
            calls = ", ".join(f'{as_json(c["function"])[:-1]}, "id": "{c["id"]}"}}' for c in m["tool_calls"])
            pieces.append((f"[TOOL_CALLS] [{calls}]</s>", True))
        elif m["role"] == "tool":
            result = f'{{"content": {m["content"]}, "call_id": "{m["tool_call_id"]}"}}'
            pieces.append((f"[TOOL_RESULTS] {result}[/TOOL_RESULTS]", False))
        else:
            pieces.append((f" {m['content'].strip()}</s>", True))
    return pieces


def _qwen_tools(tools: Tools) -> str:
    listed = "".join("\n" + as_json(tool) for tool in tools)
    return (
        f"# Tools\n\n<tools>{listed}\n</tools>\n\n"
        'Calls:\n<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>'
    )  # fmt: skip


def _qwen_calls(message: Message) -> str:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return "\n".join(
        f'<tool_call>\n{{"name": "{c["name"]}", "arguments": {as_json(c["arguments"])}}}\n</tool_call>' for c in calls
    )


def _qwen_results(messages: Messages, i: int) -> Pieces:
    """Results that follow one another share one user turn."""
    first = messages[i - 1]["role"] != "tool"
    last = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
    text = f"\n<tool_response>\n{messages[i]['content']}\n</tool_response>"
    return [("<|im_start|>user" * first + text + "<|im_end|>\n" * last, False)]


def qwen2_5(messages: Messages, tools: Tools = ()) -> Pieces:
    system, turns = without_system(messages)
    if system is None:
        system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    pieces: Pieces = [(f"<|im_start|>system\n{system}{chr(10) * 2 + _qwen_tools(tools) if tools else ''}<|im_end|>\n", False)]
    for i, m in enumerate(turns):
        if m["role"] == "tool":
            pieces += _qwen_results(turns, i)
        else:
            text = "\n".join(part for part in (m["content"], _qwen_calls(m)) if part)
            pieces += turn(m, f"<|im_start|>{m['role']}\n", text, "<|im_end|>", "\n")
    return pieces


def qwen3(messages: Messages, tools: Tools = ()) -> Pieces:
    """Thinking is `reasoning_content` here; it stays in the answers after the last question."""
    system, turns = without_system(messages)
    told = "\n\n".join(part for part in (system, _qwen_tools(tools) if tools else None) if part is not None)
    pieces: Pieces = [(f"<|im_start|>system\n{told}<|im_end|>\n", False)] if system is not None or tools else []
    question = max(i for i, m in enumerate(turns) if m["role"] == "user")
    for i, m in enumerate(turns):
        if m["role"] == "tool":
            pieces += _qwen_results(turns, i)
            continue
        text = "\n".join(part for part in (m["content"], _qwen_calls(m)) if part)
        thought = m.get("reasoning_content", "")
        if m["role"] == "assistant" and i > question and (thought or i + 1 == len(turns)):
            text = f"<think>\n{thought.strip(chr(10))}\n</think>\n\n" + text.lstrip("\n")
        pieces += turn(m, f"<|im_start|>{m['role']}\n", text, "<|im_end|>", "\n")
    return pieces


def deepseek_r1(messages: Messages, tools: Tools = ()) -> Pieces:
    system, turns = without_system(messages)
    pieces: Pieces = [(f"<｜begin▁of▁sentence｜>{system or ''}", False)]
    for m in turns:
        if m["role"] == "user":
            pieces.append((f"<｜User｜>{m['content']}", False))
        else:
            pieces += turn(m, "<｜Assistant｜>", m["content"].split("</think>")[-1], "<｜end▁of▁sentence｜>")
    return pieces


# The families ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A format, the tokens of its tokenizer and what it takes.

    `end` closes an answer; `special` and `added` are control tokens, those in `added` not marked special. `opens`: the
    record of an answer begins as the prompt for one ends. `plain_names`: roles are named in plain text, not in tokens.
    """

    truth: Callable[[Messages, Tools], Pieces]
    bos: str
    eos: str
    end: str
    special: tuple[str | AddedToken, ...] = ()
    added: tuple[str, ...] = ()
    build: Callable[..., PreTrainedTokenizerFast] = byte_level
    system: bool = True
    calls: bool = False
    opens: bool = True
    rewrites: bool = False


def _swallows(*names: str) -> tuple[AddedToken, ...]:
    return tuple(AddedToken(name, rstrip=True, special=True) for name in names)


_IM = ("<|im_start|>", "<|im_end|>")
_CALL = ("<tool_call>", "</tool_call>")
_DEEPSEEK = (
    "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip
_MISTRAL = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_COHERE = tuple(f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "SYSTEM", "USER", "CHATBOT"))
_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
_TURN = ("<start_of_turn>", "<end_of_turn>")

FAMILIES = {
    "chatml": Family(im, "<s>", "<|im_end|>", "<|im_end|>", _IM),
    "cohere": Family(cohere, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", _COHERE),
    "deepseek_r1": Family(
        deepseek_r1, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", added=_DEEPSEEK, opens=False
    ),
    "gemma2": Family(gemma, "<bos>", "<eos>", "<end_of_turn>", _TURN, build=sentencepiece_like, system=False),
    "gemma3": Family(gemma, "<bos>", "<eos>", "<end_of_turn>", _TURN, build=sentencepiece_like),
    "granite": Family(
        granite,
        "<|end_of_text|>",
        "<|end_of_text|>",
        "<|end_of_text|>",
        ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
    ),
    "llama2": Family(llama2, "<s>", "</s>", "</s>", build=sentencepiece_like),
    "llama3": Family(llama3, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", _LLAMA3, build=tiktoken_like, calls=True),
    "mistral": Family(mistral, "<s>", "</s>", "</s>", _MISTRAL, build=sentencepiece_like, calls=True),
    "phi3": Family(
        phi3,
        "<s>",
        "<|endoftext|>",
        "<|end|>",
        _swallows("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        build=sentencepiece_like,
    ),
    "phi4": Family(phi4, "<|endoftext|>", "<|im_end|>", "<|im_end|>", (*_IM, "<|im_sep|>"), build=tiktoken_like),
    "qwen2_5": Family(qwen2_5, "<|endoftext|>", "<|im_end|>", "<|im_end|>", _IM, _CALL, tiktoken_like, calls=True),
    "qwen3": Family(
        qwen3,
        "<|endoftext|>",
        "<|im_end|>",
        "<|im_end|>",
        _IM,
        (*_CALL, "<tool_response>", "</tool_response>", "<think>", "</think>"),
        tiktoken_like,
        calls=True,
        rewrites=True,
    ),
    "smollm2": Family(smollm2, "<|im_start|>", "<|im_end|>", "<|im_end|>", _IM),
    "zephyr": Family(zephyr, "<s>", "</s>", "</s>", build=sentencepiece_like),
}


@functools.cache
def tokenizer_of(name: str, build: Callable[..., PreTrainedTokenizerFast] | None = None) -> PreTrainedTokenizerFast:
    """The family's tokenizer, in its own kind or another. Shared: do not change it."""
    family = FAMILIES[name]
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return (build or family.build)(template, eos=family.eos, bos=family.bos, special=family.special, added=family.added)


# What is expected, what is found ---------------------------------------------------------------------------------------


def expected(name: str, messages: Messages, tools: Tools = ()) -> list[Pieces]:
    """The examples of a conversation: one if every answer stands in it as it was given, else one for each answer."""
    truth = FAMILIES[name].truth
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    parts = [up_to_answer(truth(messages[: i + 1], tools)) for i in answers]
    whole = truth(messages[: answers[-1] + 1], tools)
    if all(text_of(whole).startswith(text_of(part)) for part in parts):
        return [whole]
    return [[(text, trained and i == len(part) - 1) for i, (text, trained) in enumerate(part)] for part in parts]


def up_to_answer(pieces: Pieces) -> Pieces:
    """Without what follows the last answer."""
    last = max(i for i, (_, trained) in enumerate(pieces) if trained)
    return pieces[: last + 1]


def text_of(pieces: Pieces) -> str:
    return "".join(text for text, _ in pieces)


def answers_of(pieces: Pieces) -> list[str]:
    return [text for text, trained in pieces if trained]


def trained_runs(ids: Sequence[int], weights: Sequence[float]) -> list[list[int]]:
    """Each unbroken run of tokens with a weight."""
    runs: list[list[int]] = []
    before = 0.0
    for token, weight in zip(ids, weights, strict=True):
        if weight and not before:
            runs.append([])
        if weight:
            runs[-1].append(token)
        before = weight
    return runs
