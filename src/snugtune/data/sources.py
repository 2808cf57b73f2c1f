"""Reading conversations from files: `.json` and `.jsonl` in alpaca, ShareGPT and OpenAI-messages form, detected.

Syntax errors are refused with file and line. A record that is sound but cannot be trained on is dropped, and the drop is
counted under its reason with the place of its first occurrences: nothing is lost silently.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from snugtune.errors import InputError
from snugtune.files import user_path
from snugtune.schema import Config

Form = Literal["alpaca", "sharegpt", "messages"]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
          "chatgpt": "assistant", "bing": "assistant", "system": "system"}  # fmt: skip


class SourceConfig(Config):
    """One data file."""

    path: str = Field(description="a .json or .jsonl file, relative to the working directory")
    format: Literal["auto", "alpaca", "sharegpt", "messages"] = Field(
        default="auto", description="the records' form; auto detects it"
    )


@dataclass(frozen=True)
class Conversation:
    """Messages of one record: dicts with `role` (system | user | assistant) and `content`; `source` is file:line."""

    messages: tuple[Mapping[str, str], ...]
    source: str


@dataclass
class Drops:
    """What was not used or not used whole, and why: counts by reason, and where the first of each kind stand."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, source: str) -> None:
        self.counts[reason] += 1
        where = self.places.setdefault(reason, [])
        if len(where) < 3:
            where.append(source)

    def lines(self) -> list[str]:
        """One sentence a reason, for people."""
        return [
            f"{count} {reason} ({', '.join(self.places[reason])}{', ...' if count > len(self.places[reason]) else ''})"
            for reason, count in self.counts.items()
        ]


def read_conversations(sources: tuple[SourceConfig, ...], drops: Drops) -> list[Conversation]:
    """All usable conversations of the files, in order. Raises `InputError` for files that cannot be read at all."""
    conversations: list[Conversation] = []
    for source in sources:
        found = list(_read_file(source, drops))
        if not found:
            reasons = "; ".join(drops.lines()) or "the file holds no records"
            raise InputError(f"data: {source.path}: no usable example: {reasons}")
        conversations += found
    return conversations


def _read_file(source: SourceConfig, drops: Drops) -> Iterator[Conversation]:
    path = user_path(source.path, "data")
    if path.is_dir():
        raise InputError(f"data: {path} is a folder; give a .json or .jsonl file")
    if not path.is_file():
        raise InputError(f"data: no file {path} (looked from {Path.cwd()})")
    if path.suffix not in _READERS:
        raise InputError(f"data: {path}: unknown ending '{path.suffix}'; snugtune reads {', '.join(sorted(_READERS))}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"data: {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"data: {path} cannot be read: {error.strerror}") from error
    for line, record in _READERS[path.suffix](text, path):
        where = f"{path}:{line}"
        try:
            yield Conversation(_to_messages(record, source.format), where)
        except _UnusableError as reason:
            drops.add(str(reason), where)


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _decode(line, path, number)


def _decode(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"data: {path}:{number}: not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"data: {path}:{number}: {_odd_json(error)}") from error


def _odd_json(error: Exception) -> str:
    """What is wrong with JSON that is well-formed but that nothing sensible would write."""
    return "JSON nested too deeply" if isinstance(error, RecursionError) else f"not usable JSON: {error}"


def _json_array(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a JSON array with the line each starts on; a file of JSON lines named .json is read as such."""
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "{":
        yield from _json_lines(text, path)
        return
    if text[start : start + 1] != "[":
        raise InputError(f"data: {path}:1: expected a JSON array of records ('[')")
    decoder, at, line, counted = json.JSONDecoder(), start + 1, 1, 0
    while True:
        at = _skip(text, at, " \t\r\n")
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            rest = _skip(text, at + 1, " \t\r\n")
            if rest < len(text):
                raise InputError(f"data: {path}:{text.count(chr(10), 0, rest) + 1}: something follows the array's end")
            return
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise InputError(f"data: {path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"data: {path}:{line}: {_odd_json(error)}") from error
        yield line, record
        at = _skip(text, at, " \t\r\n")
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            raise InputError(f"data: {path}:{text.count(chr(10), 0, at) + 1}: the array breaks off here (expected ',' or ']')")


def _skip(text: str, at: int, blanks: str) -> int:
    while at < len(text) and text[at] in blanks:
        at += 1
    return at


_READERS: dict[str, Callable[[str, Path], Iterator[tuple[int, Any]]]] = {".json": _json_array, ".jsonl": _json_lines}


class _UnusableError(Exception):
    """Why one record cannot be trained on."""


def _to_messages(record: Any, form: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(record, dict):
        raise _UnusableError("records that are not JSON objects")
    chosen = _detect(record) if form == "auto" else form
    if record.get("tools"):
        raise _UnusableError("records with 'tools', which are not read yet")
    messages = _FORMS[chosen](record)
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise _UnusableError("records without an answer to learn")
    if any(_has_lone_surrogate(m["content"]) for m in messages):
        raise _UnusableError("records with half a character (a lone surrogate, which is no Unicode text)")
    if messages[0]["role"] == "assistant":
        raise _UnusableError("records that begin with an answer")
    return messages


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _detect(record: dict[str, Any]) -> Form:
    if "messages" in record:
        return "messages"
    if "conversations" in record:
        return "sharegpt"
    if "instruction" in record and "output" in record:
        return "alpaca"
    raise _UnusableError("records of no known form (alpaca, ShareGPT or messages)")


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _UnusableError(f"records whose '{key}' is not text")
    return value


def _alpaca(record: dict[str, Any]) -> tuple[Mapping[str, str], ...]:
    system, history = _text(record, "system"), record.get("history") or []
    messages = [_message("system", system)] if system else []
    if not isinstance(history, list):
        raise _UnusableError("records whose 'history' is not a list of [question, answer]")
    for turn in history:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise _UnusableError("records whose 'history' is not a list of [question, answer]")
        messages += [_message("user", turn[0]), _message("assistant", turn[1])]
    question = "\n".join(part for part in (_text(record, "instruction"), _text(record, "input")) if part)
    return (*messages, _message("user", question), _message("assistant", _text(record, "output")))


def _turns(record: dict[str, Any], key: str, role_key: str, text_key: str) -> tuple[Mapping[str, str], ...]:
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise _UnusableError(f"records whose '{key}' is not a list of turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise _UnusableError(f"records with a turn without '{role_key}' and '{text_key}'")
        role = _ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise _UnusableError("records with a turn of an unknown role")
        unread = next((key for key in ("tool_calls", "weight") if turn.get(key) is not None), None)
        if unread is not None:
            raise _UnusableError(f"records with a turn that has '{unread}', which is not read yet")
        messages.append(_message(role, _text(turn, text_key)))
    return tuple(messages)


def _sharegpt(record: dict[str, Any]) -> tuple[Mapping[str, str], ...]:
    messages = _turns(record, "conversations", "from", "value")
    system = _text(record, "system")
    return (_message("system", system), *messages) if system and messages[0]["role"] != "system" else messages


def _openai(record: dict[str, Any]) -> tuple[Mapping[str, str], ...]:
    return _turns(record, "messages", "role", "content")


def _message(role: str, content: str) -> Mapping[str, str]:
    return {"role": role, "content": content}


_FORMS: dict[str, Callable[[dict[str, Any]], tuple[Mapping[str, str], ...]]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _openai,
}
