"""Terminal chat: answers stream as they are made, and the conversation so far is kept."""

import sys

from snugtune.console import Console
from snugtune.model.generate import Sampling
from snugtune.tuned import Tuned


def answer_once(tuned: Tuned, prompt: str, sampling: Sampling) -> None:
    """Stream one answer to stdout."""
    tuned.reply(prompt, sampling, _write)
    _write("\n")


def converse(tuned: Tuned, sampling: Sampling, console: Console) -> None:
    """Read questions until end of input, `/exit`, or Ctrl-C; `/new` starts over."""
    console.note("ask away; /new starts over, /exit (or Ctrl-D) leaves")
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if question in ("/exit", "/quit"):
            return
        if question == "/new":
            messages = []
        elif question:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": tuned.reply(messages, sampling, _write)})
            _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
