"""Pages of documentation as tests: their commands are run, their files written, and what they show is looked for.

The fenced blocks of a page, in order: `sh` is run, `python` too; `yaml` whose first line is `# NAME.yaml` is written to that
file; `text` is what the block before it shows, of which `...` stands for anything, and a line of its own for any lines.
A comment `<!-- test: ... -->` right above a block says what a test cannot see from the block itself: `not run, REASON`;
`exit CODE`; `types "A", "B"` (lines of input); `interrupted after N lines of FILE` (Ctrl-C).
"""

import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^(?:<!-- test: (?P<note>.*?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_SECONDS = 300

# Processes are forked from one that has imported everything: a command costs what it computes, not its start.
_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["torch", "snugtune.console", "snugtune.run", "transformers.models.llama.modeling_llama"])


@dataclass(frozen=True)
class Block:
    """One fenced block: `line` is that of its fence in the page, `note` what its comment says."""

    page: str
    line: int
    kind: str
    text: str
    note: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.kind in ("sh", "python") and not self.note.startswith("not run")

    @property
    def commands(self) -> list[str]:
        """The commands of an `sh` block; one with a here-document is a single one."""
        whole = self.text.replace("\\\n", " ")
        lines = [whole] if "<<" in whole else whole.splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0, f"{page}: a fence is not closed"
    return [
        Block(page.name, text.count("\n", 0, m.start("kind")) + 1, m["kind"], m["text"], m["note"] or "")
        for m in _BLOCK.finditer(text)
    ]


@dataclass
class Reader:
    """Somebody who follows a page in a folder of their own."""

    folder: Path
    shown: str = ""  # by the last block that was run

    def follow(self, block: Block) -> None:
        """Do what the block says; `AssertionError` where it does not go as the page has it."""
        if block.kind == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", block.text)
            assert name is not None, f"{block.place}: the first line must name the file"
            (self.folder / name[1]).write_text(block.text, encoding="utf-8")
        elif block.kind == "text":
            missing = first_missing(block.text, self.shown)
            assert missing is None, f"{block.place}: not shown: {missing!r}\n--- but ---\n{self.shown}"
        elif block.runs:
            self.shown = ""
            for command in block.commands if block.kind == "sh" else [block.text]:
                self._run(command, block)

    def _run(self, command: str, block: Block) -> None:
        expected = int(found[1]) if (found := re.search(r"exit (\d+)", block.note)) else 0
        if block.kind == "python":
            code = self._apart(_python, command, block)
        elif command.startswith("snugtune ") and not re.search(r"[|<>]", command):
            code = self._apart(_snugtune, command, block)
        else:
            code = self._in_shell(command)
        assert code == expected, f"{block.place}: exit code {code}, not {expected}: {command}\n{self.shown}"

    def _in_shell(self, command: str) -> int:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
        self.shown += done.stdout
        return done.returncode

    def _apart(self, work: Callable[[str], None], command: str, block: Block) -> int:
        """In a process of its own, which is given the input and the Ctrl-C that the block's note speaks of."""
        output, typed = self.folder / ".shown", self.folder / ".typed"
        typed.write_text("".join(f"{line}\n" for line in re.findall(r'"(.*?)"', block.note)), encoding="utf-8")
        stop = re.search(r"interrupted after (\d+) lines of ([\w./-]+)", block.note)
        when = None if stop is None else (self.folder / stop[2], int(stop[1]))
        child = _forkserver.Process(target=_begin, args=(work, command, self.folder, output, typed, when))
        child.start()
        child.join(_SECONDS)
        if child.exitcode is None:
            child.kill()
            raise AssertionError(f"{block.place}: still running after {_SECONDS} s: {command}")
        self.shown += output.read_text(encoding="utf-8")
        return child.exitcode


def first_missing(expected: str, shown: str) -> str | None:
    """The first line of `expected` that `shown` does not have after those before it; blanks count as one."""
    at = 0
    for line in expected.splitlines():
        if line.strip() in ("", "..."):
            continue
        pattern = r"\s+".join(".*?".join(map(re.escape, word.split("..."))) for word in line.split())
        found = re.compile(rf"^\s*{pattern}\s*?$", re.MULTILINE).search(shown, at)
        if found is None:
            return line
        at = found.end()
    return None


# --- in the other process ---------------------------------------------------------------------------------------------


def _begin(
    work: Callable[[str], None], command: str, folder: Path, output: Path, typed: Path, stop: tuple[Path, int] | None
) -> None:
    os.chdir(folder)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(typed, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (multiprocessing has closed the one before)
    os.dup2(written, 1)
    os.dup2(written, 2)
    if stop is not None:
        threading.Thread(target=_interrupt, args=stop, daemon=True).start()
    work(command)


def _snugtune(command: str) -> None:
    sys.argv = shlex.split(command, comments=True)
    from snugtune.cli import main

    main()


def _python(code: str) -> None:
    exec(compile(code, "<page>", "exec"), {"__name__": "__main__"})


def _interrupt(file: Path, lines: int) -> None:
    while not file.exists() or file.read_bytes().count(b"\n") < lines:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
