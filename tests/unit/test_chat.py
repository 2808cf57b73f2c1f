"""The terminal chat, over models that say what the test wants: histories, commands, Ctrl-C, and how answers are laid out."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from rich.console import Console as RichConsole
from rich.text import Text

from snugtune.chat import Talk, answer_once, converse
from snugtune.console import Console
from snugtune.errors import InputError
from snugtune.model.generate import Sampling

PLAIN = Sampling()


class Parrot:
    """Streams `speak(messages)` in pieces; keeps what it was asked. A piece that is an exception is raised."""

    def __init__(self, speak: Callable[[list[dict[str, str]]], Sequence[Any]]):
        self.speak = speak
        self.asked: list[list[dict[str, str]]] = []

    def reply(self, conversation: list[dict[str, str]], sampling: Sampling, on_text: Callable[[str], None]) -> str:
        self.asked.append([dict(m) for m in conversation])
        said = ""
        for piece in self.speak(conversation):
            if isinstance(piece, BaseException):
                raise piece
            said += piece
            on_text(piece)
        return said.strip()


def counting(word: str) -> Parrot:
    """Says how many turns it was given."""
    return Parrot(lambda messages: [word, " ", str(len(messages)), "\n"])


def shown(width: int = 80, terminal: bool = False) -> Console:
    console = Console()
    console.out = RichConsole(file=io.StringIO(), width=width, height=50, force_terminal=terminal, highlight=False)
    console.err = RichConsole(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False)
    return console


def out(console: Console) -> str:
    return console.out.file.getvalue()  # type: ignore[attr-defined]


def err(console: Console) -> str:
    return Text.from_ansi(console.err.file.getvalue()).plain  # type: ignore[attr-defined]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets a person type lines at a terminal; an exception among them is what the keyboard does instead (Ctrl-C, Ctrl-D)."""

    def type_in(*lines: Any) -> None:
        pending: Iterator[Any] = iter([*lines, EOFError()])

        def read(prompt: str = "") -> str:
            assert prompt == "> "
            line = next(pending)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr(sys, "stdout", Terminal())

    return type_in


def turns(messages: list[dict[str, str]]) -> list[str]:
    return [m["content"] for m in messages]


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_each_side_keeps_its_own_history() -> None:
    base, tuned = counting("base"), counting("tuned")
    talk = Talk({"base": base, "tuned": tuned}, PLAIN, shown())
    talk.ask("one")
    talk.ask("two")
    assert turns(base.asked[1]) == ["one", "base 1", "two"]
    assert turns(tuned.asked[1]) == ["one", "tuned 1", "two"]
    assert [m["role"] for m in tuned.asked[1]] == ["user", "assistant", "user"]


def test_undo_and_new() -> None:
    model = counting("said")
    talk = Talk({"tuned": model}, PLAIN, shown())
    assert not talk.undo()
    for question in ("one", "two"):
        talk.ask(question)
    assert talk.undo()
    talk.ask("three")
    assert turns(model.asked[-1]) == ["one", "said 1", "three"]
    talk.forget()
    talk.ask("four")
    assert turns(model.asked[-1]) == ["four"]


def test_ctrl_c_stops_the_answer_alone(typing: Callable[..., None]) -> None:
    """What was said until then is the answer; the next question knows of it, and the program goes on."""
    endless = iter([["a long", " story", KeyboardInterrupt()], [KeyboardInterrupt()], ["fine"]])
    model, console = Parrot(lambda _: next(endless)), shown(terminal=True)
    typing("tell", KeyboardInterrupt(), "again", "shorter", "/exit", "unheard")
    converse({"tuned": model}, PLAIN, console)
    assert [turns(asked) for asked in model.asked] == [
        ["tell"],
        ["tell", "a long story", "again"],
        ["tell", "a long story", "shorter"],  # to "again" nothing was said: it is forgotten
    ]
    assert out(console) == "a long story\n\n\nfine\n"
    assert err(console).count("stopped") == 3


def test_ctrl_c_keeps_the_sides_in_step() -> None:
    """Interrupted while the second answers: both remember the question."""
    base, tuned = counting("base"), Parrot(lambda m: ["hm", KeyboardInterrupt()] if len(m) == 1 else ["fine"])
    talk = Talk({"base": base, "tuned": tuned}, PLAIN, shown())
    with pytest.raises(KeyboardInterrupt):
        talk.ask("one")
    talk.ask("two")
    assert turns(base.asked[-1]) == ["one", "base 1", "two"]
    assert turns(tuned.asked[-1]) == ["one", "hm", "two"]


def test_a_conversation_too_long_can_go_on_anew(typing: Callable[..., None]) -> None:
    model = Parrot(lambda m: [InputError("too many tokens; start anew")] if len(m) > 1 else ["fine"])
    console = shown(terminal=True)
    typing("one", "two", "/undo", "three")
    converse({"tuned": model}, PLAIN, console)
    assert [turns(asked) for asked in model.asked] == [["one"], ["one", "fine", "two"], ["three"]]
    assert "error: too many tokens" in err(console)


def test_without_a_person_everything_ends_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    for trouble in (KeyboardInterrupt(), InputError("too long")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
        model = Parrot(lambda _, trouble=trouble: [trouble])
        with pytest.raises(type(trouble)):
            converse({"tuned": model}, PLAIN, shown())
        assert len(model.asked) == 1


def test_commands(typing: Callable[..., None]) -> None:
    model, console = counting("said"), shown(terminal=True)
    typing("/help", "/undo", "/wat", "/etc/hosts has what?", "  ", "/new", "hello", "/quit", "unheard")
    converse({"tuned": model}, PLAIN, console)
    assert [turns(asked) for asked in model.asked] == [["/etc/hosts has what?"], ["hello"]]
    said = err(console)
    assert all(said.count(f"  {command}") >= 2 for command in ("/help ", "/new ", "/undo ", "/exit "))
    assert "no command /wat" in said
    assert "nothing to take back" in said


# --- how it looks -----------------------------------------------------------------------------------------------------


def test_a_pipe_gets_the_exact_answer() -> None:
    console = shown()
    answer_once({"tuned": Parrot(lambda _: ["[red]a", "\x1b[31m", "b" * 200, "\n"])}, "?", PLAIN, console)
    assert out(console) == "[red]a\x1b[31m" + "b" * 200 + "\n\n"


@pytest.mark.parametrize("names", [("tuned",), ("base", "tuned")])
def test_an_answer_cannot_steer_the_terminal(names: tuple[str, ...]) -> None:
    console = shown(width=70, terminal=True)
    answer_once(dict.fromkeys(names, Parrot(lambda _: ["a\x1b[2Jb\x07", "\r\x9bc\td"])), "?", PLAIN, console)  # type: ignore[arg-type]
    assert "a[2Jbc\td" in out(console)
    assert not {"\x07", "\r", "\x9b"} & set(out(console))


def test_one_after_the_other_in_a_narrow_terminal_and_in_pipes() -> None:
    for console in (shown(width=79, terminal=True), shown(width=200)):
        models = {name: Parrot(lambda _, name=name: [name[:2], name[2:]]) for name in ("base", "tuned")}
        answer_once(models, "?", PLAIN, console)  # type: ignore[arg-type]
        assert Text.from_ansi(out(console)).plain == "base:\nbase\n\ntuned:\ntuned\n"


def test_side_by_side_in_a_wide_terminal() -> None:
    console = shown(width=80, terminal=True)
    left, right = Parrot(lambda _: ["left " * 20]), Parrot(lambda _: ["right " * 3, "[bold]x"])
    answer_once({"base": left, "tuned": right}, "?", PLAIN, console)  # type: ignore[dict-item]
    last = out(console).rpartition("\x1b[2K")[2]  # the frame that stays
    lines = [line.rstrip() for line in Text.from_ansi(last).plain.splitlines()]
    assert lines[0].split() == ["base", "tuned"]
    assert lines[1].split() == ["left"] * 7 + ["right"] * 3 + ["[bold]x"]
    assert sum(line.count("left") for line in lines) == 20
    assert lines[0].index("tuned") == lines[1].index("right")
    assert max(map(len, lines)) <= 80
