"""From records to what can be trained on: alpaca, ShareGPT, OpenAI messages, prompt and completion, text, preferences.

A record that is sound but cannot be trained on raises `Unusable` with the reason in words that can be counted.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Form = Literal["alpaca", "sharegpt", "messages", "prompt", "preference", "text"]
Message = Mapping[str, Any]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
          "chatgpt": "assistant", "bing": "assistant", "system": "system", "developer": "system",
          "tool": "tool", "observation": "tool", "function_call": "assistant"}  # fmt: skip
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")
"""What OpenAI's messages may carry besides role and content; templates that know it use it."""
_HALF = re.compile("[\ud800-\udfff]")
_LEAST, _MOST = 1e-12, 1e12
"""Weights that count, and are no infinity, when those of a record and a turn are multiplied and summed in fp32."""


@dataclass(frozen=True)
class Conversation:
    """Messages: mappings with `role` (system | user | assistant | tool), `content`, and perhaps `weight`, `tool_calls`, ...

    `tools` are function schemas for the template; `weight` multiplies the loss of every token; `source` is file:line.
    """

    messages: tuple[Message, ...]
    source: str
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Document:
    """Plain text, all of which is learned."""

    text: str
    source: str
    weight: float = 1.0


@dataclass(frozen=True)
class Preference:
    """A conversation's beginning and two ways it may go on."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: str
    weight: float = 1.0


Item = Conversation | Document | Preference


class Unusable(Exception):
    """Why one record cannot be trained on."""


def read_form(record: Any, form: Form | Literal["auto"], columns: Mapping[str, str], source: str) -> Item:
    """The item in one record. `columns` maps our names to the record's own. Raises `Unusable`."""
    if not isinstance(record, Mapping):
        raise Unusable("records other than JSON objects")
    record = _renamed(record, columns)
    chosen = _detect(record) if form == "auto" else form
    item = _FORMS[chosen](record, source)
    if half_character({**vars(item), "source": None}) is not None:
        raise Unusable(_NO_TEXT)
    return replace(item, weight=_weight(record))


def read_messages(messages: Any) -> tuple[Message, ...]:
    """A conversation in OpenAI's form, as a person gives one to be answered. Raises `Unusable`."""
    turns = _turns(messages, "messages", "role", "content")
    if half_character(turns) is not None:
        raise Unusable(_NO_TEXT)
    return turns


_NO_TEXT = "records with half a character (a lone surrogate, which is no Unicode text)"


def half_character(value: Any) -> tuple[Any, ...] | None:
    """Where in `value` (keys and positions) the first text with a lone surrogate is, which UTF-8 cannot write; else None.

    What YAML's anchors put in many places is looked at once.
    """
    seen: set[int] = set()
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while waiting:  # no recursion: JSON may be nested more deeply than Python calls
        path, inner = waiting.pop()
        if isinstance(inner, str) and _HALF.search(inner):
            return path
        if isinstance(inner, (Mapping, list, tuple)):
            if id(inner) in seen:
                continue
            seen.add(id(inner))
        if isinstance(inner, Mapping):
            waiting += [entry for k, v in inner.items() for entry in (((*path, k), v), (path, k))][::-1]
        elif isinstance(inner, (list, tuple)):
            waiting += [((*path, i), v) for i, v in enumerate(inner)][::-1]
    return None


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    missing = [theirs for theirs in columns.values() if theirs not in record]
    if missing:
        raise Unusable(f"records without the column '{missing[0]}' (they have {_names(record)})")
    taken = set(columns.values())
    return {k: v for k, v in record.items() if k not in taken} | {ours: record[theirs] for ours, theirs in columns.items()}


def _detect(record: Mapping[str, Any]) -> Form:
    for form, keys in _SIGNS.items():
        if all(key in record for key in keys):
            return form
    raise Unusable(f"records of no known form (they have {_names(record)}; {_columns_to_write(record)})")


_MOST_NAMES = 8


def _names(record: Mapping[str, Any]) -> str:
    names = [str(name) if len(str(name)) <= 40 else f"{str(name)[:40]}…" for name in itertools.islice(record, _MOST_NAMES)]
    return f"{', '.join(names)}{', ...' if len(record) > _MOST_NAMES else ''}" if names else "no fields"


_MEANINGS: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "question", "query", "prompt", "input", "user", "human", "problem", "request", "q"),
    "output": ("output", "answer", "response", "reply", "completion", "assistant", "target", "solution", "label", "a"),
    "messages": ("messages", "conversation", "conversations", "dialogue", "dialog", "turns", "chat"),
    "text": ("text", "content", "body", "document", "article", "passage"),
}
"""Our names, and those that other people's records have for the same, likeliest first."""


def _columns_to_write(record: Mapping[str, Any]) -> str:
    """The line of the config that says what the columns are, as far as their names tell."""
    by_name = {str(name).lower(): str(name) for name in record}
    meant = {ours: next((by_name[n] for n in names if n in by_name), None) for ours, names in _MEANINGS.items()}
    if meant["instruction"] and meant["output"]:
        told = {"instruction": meant["instruction"], "output": meant["output"]}
    else:
        one = next((ours for ours in ("messages", "text") if meant[ours]), None)
        told = {one: meant[one]} if one else {"instruction": "NAME", "output": "NAME"}
    said = ", ".join(f"{ours}: {theirs}" for ours, theirs in told.items())
    return f"say which is which with columns: {{{said}}}"


_SIGNS: dict[Form, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}


def _weight(record: Mapping[str, Any]) -> float:
    """The loss weight of a record or message; tables may give it as text."""
    value = record.get("weight", 1.0)
    try:
        weight = float(1.0 if value is None or value == "" else value)
    except (TypeError, ValueError, OverflowError):  # the last: an integer beyond any float
        weight = math.nan
    if isinstance(value, bool) or not (math.isfinite(weight) and weight >= 0):
        raise Unusable("records whose 'weight' is not a number of at least 0")
    if weight and not _LEAST <= weight <= _MOST:
        raise Unusable(f"records whose 'weight' is beyond what fp32 counts with (0, or {_LEAST:g} to {_MOST:g})")
    return weight


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unusable(f"records whose '{key}' is not text")
    return value


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _conversation(messages: Sequence[Message], source: str, tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    if not any(m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls")) for m in messages):
        raise Unusable("records without an answer to learn")
    if messages[0]["role"] == "assistant":
        raise Unusable("records beginning with an answer")
    return Conversation(tuple(messages), source, tuple(tools))


def _alpaca(record: Mapping[str, Any], source: str) -> Conversation:
    system, history = _text(record, "system"), record.get("history") or []
    messages = [_message("system", system)] if system else []
    if not isinstance(history, list):
        raise Unusable("records whose 'history' is not a list of [question, answer]")
    for turn in history:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise Unusable("records whose 'history' is not a list of [question, answer]")
        pair = {"question": turn[0], "answer": turn[1]}
        messages += [_message("user", _text(pair, "question")), _message("assistant", _text(pair, "answer"))]
    question = "\n".join(part for part in (_text(record, "instruction"), _text(record, "input")) if part)
    return _conversation([*messages, _message("user", question), _message("assistant", _text(record, "output"))], source)


def _turns(turns: Any, key: str, role_key: str, text_key: str) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise Unusable(f"records whose '{key}' is not a list of turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping) or role_key not in turn or (text_key not in turn and not turn.get("tool_calls")):
            raise Unusable(f"records with a turn without '{role_key}' and '{text_key}'")
        role = _ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise Unusable(f"records with a turn of an unknown role ({str(turn[role_key])[:40]!r}; known: {', '.join(_ROLES)})")
        extra = {k: turn[k] for k in _KEPT if turn.get(k) is not None}
        if "tool_calls" in extra:
            extra["tool_calls"] = _tool_calls(extra["tool_calls"])
        content = _said_text(turn, text_key)
        if turn[role_key] == "function_call" and (calls := _written_calls(content)):
            content, extra["tool_calls"] = "", calls
        own_weight = {"weight": _weight(turn)} if turn.get("weight") is not None else {}
        messages.append({**_message(role, content), **extra, **own_weight})
    return tuple(messages)


def _written_calls(text: str) -> list[Mapping[str, Any]]:
    """The calls that a `function_call` turn of ShareGPT writes as JSON, one or a list; none where it is other text."""
    try:
        written = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = written if isinstance(written, list) else [written]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        return []
    return _tool_calls([{"type": "function", "function": dict(call)} for call in calls])


def _tool_calls(calls: Any) -> list[Mapping[str, Any]]:
    """Calls of functions as templates expect them: OpenAI gives the arguments as JSON text, templates want the object."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise Unusable("records whose 'tool_calls' is not a list of calls")
    return [_call(call) for call in calls]


def _call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable("records with a call of a tool without its name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise Unusable("records with a call of a tool whose 'arguments' are not JSON") from error
    if function is call:
        return {**call, "arguments": arguments}
    return {**call, "function": {**function, "arguments": arguments}}


def _said_text(turn: Mapping[str, Any], key: str) -> str:
    """The text of a turn, which OpenAI also writes as a list of parts."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return _text(turn, key)
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise Unusable(f"records with parts of '{key}' that are not text")
    return "".join(_text(part, "text") for part in parts)


def _with_system(record: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    system = _text(record, "system")
    return (_message("system", system), *messages) if system and messages[0]["role"] != "system" else messages


def _tools(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Function schemas: a list, or (ShareGPT) the JSON text of one."""
    tools = record.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except (ValueError, RecursionError) as error:
            raise Unusable("records whose 'tools' is not JSON") from error
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise Unusable("records whose 'tools' is not a list of functions")
    return tuple(tools)


def _sharegpt(record: Mapping[str, Any], source: str) -> Conversation:
    turns = record.get("conversations")
    openais = isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and {"role", "content"} <= turns[0].keys()
    messages = _turns(turns, "conversations", *(("role", "content") if openais else ("from", "value")))
    return _conversation(_with_system(record, messages), source, _tools(record))


def _openai(record: Mapping[str, Any], source: str) -> Conversation:
    messages = _turns(record.get("messages"), "messages", "role", "content")
    return _conversation(_with_system(record, messages), source, _tools(record))


def _prompt(record: Mapping[str, Any], source: str) -> Conversation:
    """Prompt and completion: texts, or lists of messages."""
    before, after = (_said(record, key, role) for key, role in (("prompt", "user"), ("completion", "assistant")))
    return _conversation(_with_system(record, (*before, *after)), source, _tools(record))


def _said(record: Mapping[str, Any], key: str, role: str) -> tuple[Message, ...]:
    """A text as one turn of `role`; one turn or a list of turns, in OpenAI's or ShareGPT's words, as they are."""
    value = record.get(key)
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list):
        return (_message(role, _text(record, key)),)
    of_sharegpt = bool(turns) and isinstance(turns[0], Mapping) and "from" in turns[0]
    return _turns(turns, key, *(("from", "value") if of_sharegpt else ("role", "content")))


def _preference(record: Mapping[str, Any], source: str) -> Preference:
    """`chosen` and `rejected` after `prompt`, `conversations`, `messages` or `instruction`, or both with what went before."""
    chosen, rejected = _said(record, "chosen", "assistant"), _said(record, "rejected", "assistant")
    key = next((k for k in ("prompt", "conversations", "messages", "instruction") if record.get(k)), None)
    if key == "instruction":
        question = "\n".join(part for part in (_text(record, "instruction"), _text(record, "input")) if part)
        prompt = (_message("user", question),)
    elif key is not None:
        prompt = _said(record, key, "user")
    else:
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise Unusable("records of preferences without a prompt")
    if not all(side and side[-1]["role"] == "assistant" and side[-1]["content"].strip() for side in (chosen, rejected)):
        raise Unusable("records of preferences without two answers")
    return Preference(_with_system(record, prompt), chosen, rejected, source)


def _document(record: Mapping[str, Any], source: str) -> Document:
    text = _text(record, "text")
    if not text.strip():
        raise Unusable("records without text")
    return Document(text, source)


_FORMS: dict[Form, Callable[[Mapping[str, Any], str], Item]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _openai,
    "prompt": _prompt,
    "preference": _preference,
    "text": _document,
}
