"""Terminal chat: answers stream as they are made, and the conversation so far is kept; with one model, or base against tuned."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.live import Live
from rich.table import Table
from rich.text import Text

from snugtune.console import Console, printable
from snugtune.errors import InputError
from snugtune.model.generate import Sampling
from snugtune.tuned import Tuned

SIDE_BY_SIDE = 80
"""Columns a terminal must have for two answers next to each other."""
COMMANDS = {
    "/help": "this list",
    "/new": "start over",
    "/undo": "take back the last question and its answer",
    "/exit": "leave (so does Ctrl-D); Ctrl-C stops an answer",
}
_COMMAND = re.compile(r"/\w+")

Show = Callable[[str, str], None]
"""Told the next piece of text of whom."""


class Talk:
    """The same questions to one or several models, by name; each remembers its own answers."""

    def __init__(self, models: Mapping[str, Tuned], sampling: Sampling, console: Console):
        self.models, self.sampling, self.console = models, sampling, console
        self.histories: dict[str, list[dict[str, str]]] = {name: [] for name in models}

    def ask(self, question: str) -> None:
        """Show the answers and remember them. Interrupted, what was said so far is remembered as the answer.

        Raises `InputError` for a conversation that has become too long, with the question forgotten.
        """
        answers = dict.fromkeys(self.models, "")
        try:
            with _display(self.console, tuple(self.models)) as show:
                for name, tuned in self.models.items():

                    def hear(text: str, name: str = name) -> None:
                        answers[name] += text
                        show(name, printable(text) if self.console.out.is_terminal else text)

                    asked = [*self.histories[name], {"role": "user", "content": question}]
                    answers[name] = tuned.reply(asked, self.sampling, hear)
        except KeyboardInterrupt:
            if any(answers.values()):
                self._remember(question, answers)
            raise
        self._remember(question, answers)

    def _remember(self, question: str, answers: Mapping[str, str]) -> None:
        for name, answer in answers.items():
            self.histories[name] += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]

    def undo(self) -> bool:
        """Forget the last question and its answers; False when there is none."""
        there = any(self.histories.values())
        self.histories = {name: messages[:-2] for name, messages in self.histories.items()}
        return there

    def forget(self) -> None:
        self.histories = {name: [] for name in self.models}


def check_prompt(prompt: str) -> None:
    """Refuse a question that asks nothing, before a model is loaded. Raises `InputError`."""
    if not prompt.strip():
        raise InputError("--prompt: the text is empty; give a question, or leave --prompt out to chat")


def answer_once(models: Mapping[str, Tuned], prompt: str, sampling: Sampling, console: Console) -> None:
    """Stream one answer of each model to stdout."""
    Talk(models, sampling, console).ask(prompt)


def converse(models: Mapping[str, Tuned], sampling: Sampling, console: Console) -> None:
    """Read questions until end of input or `/exit`. In a terminal Ctrl-C and mistakes end an answer, elsewhere the chat."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # not on every system
            import readline  # noqa: F401 (gives input() a line editor with history)
    console.note("ask away; /help lists commands, /exit (or Ctrl-D) leaves")
    talk = Talk(models, sampling, console)
    going = True
    while going:
        try:
            going = _turn(talk, console, "> " if interactive else "")
        except KeyboardInterrupt:
            if not interactive:
                raise
            console.say()
            console.note("stopped; /exit leaves")
        except InputError as error:
            if not interactive:
                raise
            console.error(str(error))


def _turn(talk: Talk, console: Console, prompt: str) -> bool:
    """Read one line and answer or obey it; False when the chat is over."""
    try:
        line = input(prompt).strip()
    except EOFError:
        if prompt:
            console.say()
        return False
    if line in ("/exit", "/quit"):
        return False
    if _COMMAND.fullmatch(line):
        _obey(line, talk, console)
    elif line:
        talk.ask(line)
    return True


def _obey(command: str, talk: Talk, console: Console) -> None:
    if command == "/new":
        talk.forget()
        console.note("a new conversation")
    elif command == "/undo":
        console.note("the last question and its answer are taken back" if talk.undo() else "there is nothing to take back")
    else:
        if command != "/help":
            console.note(f"there is no command {command}; these there are:")
        for name, what in COMMANDS.items():
            console.note(f"{name:<6} {what}")


@contextmanager
def _display(console: Console, names: Sequence[str]) -> Iterator[Show]:
    """Where answers go: one as it comes; several in columns where there is room, else one after the other."""
    if len(names) == 1:
        yield lambda name, text: console.raw(text)
        console.raw("\n")
    elif console.out.is_terminal and console.out.width >= SIDE_BY_SIDE:
        answers = {name: Text(overflow="fold") for name in names}
        with Live(_columns(answers), console=console.out, auto_refresh=False) as live:

            def show(name: str, text: str) -> None:
                answers[name].append(text)
                live.update(_columns(answers), refresh=True)

            yield show
    else:
        with _in_turns(console) as show_in_turns:
            yield show_in_turns


def _columns(answers: Mapping[str, Text]) -> Table:
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
    for name in answers:
        table.add_column(name, ratio=1, header_style="bold")
    table.add_row(*answers.values())
    return table


@contextmanager
def _in_turns(console: Console) -> Iterator[Show]:
    """Under a heading each."""
    speaking: list[str] = []

    def show(name: str, text: str) -> None:
        if speaking[-1:] != [name]:
            if speaking:
                console.raw("\n\n")
            console.say(f"{name}:", style="bold")
            speaking.append(name)
        console.raw(text)

    yield show
    console.raw("\n")
