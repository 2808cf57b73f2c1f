"""Completion in a real bash: what stands on the line after Tab."""

import os
import pty
import select
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snugtune.shell import BASH

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")


class Bash:
    """An interactive bash in which `snugtune` is this one, and completes."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        command = folder / "bin/snugtune"
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m snugtune "$@"\n')
        command.chmod(0o755)
        (folder / "completion.sh").write_text(BASH)
        environ = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "TERM": "dumb", "PS1": "", "HISTFILE": ""}
        pid, self.terminal = pty.fork()
        if pid == 0:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environ)
        self.pid = pid
        self._run(". ./completion.sh; bind 'set enable-bracketed-paste off'; bind 'set bell-style none'")

    def tab(self, line: str) -> list[str]:
        """The words of the line after Tab; a blank after the last shows as an empty word."""
        mark = f"done-{time.monotonic_ns()}"
        (self.folder / "words").unlink(missing_ok=True)
        # The line is looked at by a key, so that nothing of it is run.
        self._run(f"""look() {{ printf '%s' "$READLINE_LINE" > words; READLINE_LINE="echo {mark[:4]}''{mark[4:]}"; }}""")
        self._run("""bind -x '"\\C-g": look'""")
        os.write(self.terminal, line.encode() + b"\t\x07\n")
        self._await(mark)
        left = (self.folder / "words").read_text()
        return [*shlex.split(left), ""] if left.endswith(" ") else shlex.split(left)

    def close(self) -> None:
        os.write(self.terminal, b"exit\n")
        os.close(self.terminal)
        os.waitpid(self.pid, 0)

    def _run(self, command: str) -> None:
        mark = f"done-{time.monotonic_ns()}"
        os.write(self.terminal, f"{command}\necho {mark[:4]}''{mark[4:]}\n".encode())
        self._await(mark)

    def _await(self, mark: str) -> None:
        said, until = b"", time.monotonic() + 60
        while mark.encode() not in said:
            assert time.monotonic() < until, said
            if select.select([self.terminal], [], [], 0.1)[0]:
                said += os.read(self.terminal, 4096)


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bash]:
    folder = tmp_path_factory.mktemp("shell")
    for job in ("shop-a", "tiny"):
        (folder / "runs/x/adapters" / job).mkdir(parents=True)
    (folder / "held.jsonl").touch()
    shell = Bash(folder)
    yield shell
    shell.close()


@pytest.mark.parametrize(
    ("line", "ending"),
    [
        ("snugtune tra", ["train", ""]),
        ("snugtune train c.yaml --set opti", ["--set", "optimizer."]),  # the field's name goes on: no blank
        ("snugtune train c.yaml --set optimizer.we", ["--set", "optimizer.weight_decay="]),
        ("snugtune train c.yaml --set optimizer.type=sg", ["--set", "optimizer.type=sgd", ""]),
        ("snugtune train c.yaml --set schedule.shape=", ["--set", "schedule.shape="]),  # several: nothing to add
        ("snugtune train c.yaml --set 'optimizer.type=sg", ["--set", "optimizer.type=sgd", ""]),
        ("snugtune train c.yaml --set seed=1 --set tracking=tr", ["--set", "tracking=trackio", ""]),
        ("snugtune train c.yaml --set data.0.fo", ["--set", "data.0.format="]),
        ("snugtune train c.yaml --set data.0.format=al", ["--set", "data.0.format=alpaca", ""]),
        ("snugtune train c.yaml --set validation=he", ["--set", "validation=held.jsonl", ""]),  # a file, by bash itself
        ("snugtune chat runs/x --adapter sh", ["--adapter", "shop-a", ""]),
        ("snugtune export runs/x --to merged --adapter t", ["--adapter", "tiny", ""]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tab(bash: Bash, line: str, ending: list[str]) -> None:
    assert bash.tab(line)[-len(ending) :] == ending
