"""How a chat template takes calls of tools and their results: found by giving it a small talk with marks in it.

Most templates want a call's arguments as an object, some as JSON text. Mistral's refuse calls
whose ids are not 9 letters long: they get such. Templates that know no tools leave calls out without a word: an empty answer
would be learned in their place.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from snugtune.data.forms import Message

_ASKED: Message = {"role": "user", "content": "Hi"}
_ARGUMENTS = {"snugtune_key": "snugtune_value"}
_CALL = {"type": "function", "id": "snugtune1", "function": {"name": "snugtune_call", "arguments": _ARGUMENTS}}
_RESULT = "snugtune_result"
_ANSWERED: tuple[Message, ...] = (
    {"role": "tool", "content": _RESULT, "tool_call_id": "snugtune1", "name": "snugtune_call"},
    {"role": "assistant", "content": "Bye"},
)
_TOOL = {
    "type": "function",
    "function": {
        "name": "snugtune_tool",
        "description": "Tells.",
        "parameters": {"type": "object", "properties": {"of": {"type": "string", "description": "What."}}, "required": ["of"]},
    },
}
_TALKS: tuple[tuple[Message, ...], ...] = (  # some templates list tools in the system turn, some before the last question
    ({"role": "system", "content": "Be."}, _ASKED, {"role": "assistant", "content": "Bye"}),
    (_ASKED, {"role": "assistant", "content": "Bye"}),
    (_ASKED,),
)
_SHOWN = ("snugtune_call", "snugtune_key", "snugtune_value", _RESULT)


def _as_it_is(call: Mapping[str, Any]) -> Mapping[str, Any]:
    return call


def _as_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The call with its arguments as JSON text."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        return call
    told = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return told if function is call else {**call, "function": told}


_FORMS = (_as_it_is, _as_text)


_ID_LENGTH = 9
_SHORT_ID = re.compile(rf"[A-Za-z0-9]{{{_ID_LENGTH}}}")


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages with ids of 9 letters and digits for calls that have none, or another kind, and for their results.

    An id follows from the one that was there, else from the call's place: every run makes the same.
    """
    told, waiting = [], list[str]()
    for index, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            ids = [_short_id(call.get("id") or f"{index}.{n}") for n, call in enumerate(calls)]
            message = {**message, "tool_calls": [{**call, "id": id_} for call, id_ in zip(calls, ids, strict=True)]}
            waiting = ids
        elif message["role"] == "tool":
            own = message.get("tool_call_id")
            id_ = _short_id(own) if own else waiting[0] if waiting else _short_id(f"{index}")
            waiting = [other for other in waiting if other != id_]
            message = {**message, "tool_call_id": id_}
        told.append(message)
    return told


def _short_id(given: Any) -> str:
    if _SHORT_ID.fullmatch(str(given)):
        return str(given)
    return hashlib.blake2b(str(given).encode("utf-8", "surrogatepass")).hexdigest()[:_ID_LENGTH]


class Calls:
    """Brings messages into the form that a template takes calls in.

    `render(messages, tools)` gives the template's text. It and `told` raise `TemplateError`.
    """

    def __init__(self, render: Callable[..., str]):
        self._render = render
        self._forms: dict[bool, Callable[[Mapping[str, Any]], Mapping[str, Any]] | None] = {}
        self._shows_results: bool | None = None

    def told(self, messages: Sequence[Message]) -> list[Message]:
        """The messages for the template. Raises where it would leave a call or a result out."""
        if not any(m.get("tool_calls") for m in messages) and any(m["role"] == "tool" for m in messages):
            self._check_results()
        told = [self._told(m) if m.get("tool_calls") else m for m in messages]
        return with_short_ids(told) if any(m.get("tool_calls") for m in messages) and self._wants_short_ids else told

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template says which tools there are."""
        return any(self._shows_tool(talk) for talk in _TALKS)

    @cached_property
    def _wants_short_ids(self) -> bool:
        """Whether the template refuses calls without an id of `_ID_LENGTH` letters (Mistral's do)."""
        calls = [{**_CALL, "id": "snugtune-call-1"}], [{k: v for k, v in _CALL.items() if k != "id"}]
        return self._shows_calls([_CALL]) and not any(self._shows_calls(odd) for odd in calls)

    def _shows_calls(self, calls: Sequence[Mapping[str, Any]]) -> bool:
        told = self._told({"role": "assistant", "content": "", "tool_calls": calls})
        try:
            return _RESULT in self._render([_ASKED, told, *_ANSWERED])
        except TemplateError:
            return False

    def _shows_tool(self, talk: Sequence[Message]) -> bool:
        try:
            return _TOOL["function"]["name"] in self._render(talk, [_TOOL])
        except TemplateError:
            return False

    def _told(self, message: Message) -> Message:
        with_words = bool(message["content"])
        if with_words not in self._forms:
            self._forms[with_words] = self._find("Well." if with_words else "")
        form = self._forms[with_words]
        if form is None:
            raise TemplateError("it leaves calls of tools out")
        return {**message, "tool_calls": [form(call) for call in message["tool_calls"]]}

    def _find(self, words: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]] | None:
        """The first form that shows whole; as it is where the template refuses even that, for its own words to be heard."""
        refused = []
        for form in _FORMS:
            calling = {"role": "assistant", "content": words, "tool_calls": [form(_CALL)]}
            try:
                text = self._render([_ASKED, calling, *_ANSWERED])
            except TemplateError:
                refused.append(form)
                continue
            if all(mark in text for mark in _SHOWN) and repr(_ARGUMENTS) not in text:  # Python's repr is not JSON
                return form
        return _as_it_is if _as_it_is in refused else None

    def _check_results(self) -> None:
        if self._shows_results is None:
            try:
                text = self._render([_ASKED, {"role": "assistant", "content": "Hi"}, *_ANSWERED])
                self._shows_results = _RESULT in text
            except TemplateError:
                self._shows_results = True  # refused: the record will be, too, in the template's own words
        if not self._shows_results:
            raise TemplateError("it leaves results of tools out")
