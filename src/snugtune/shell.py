"""What a shell is given so that Tab asks `snugtune` what there is.

Typer's scripts serve the other shells. In bash, words break at = and : and each answer is followed by a blank: Typer's
script for it completes neither `optimizer.type=a` nor what follows `optimizer.`, and Typer has no way to bring another.
"""

import os
from pathlib import Path

import shellingham
import typer
from typer.completion import get_completion_inspect_parameters
from typer.completion import get_completion_script as typers_script  # pyright: ignore[reportPrivateImportUsage]
from typer.completion import install as typers_install  # pyright: ignore[reportPrivateImportUsage]

from snugtune.errors import InputError

COMMAND = "snugtune"
SHELLS = ("bash", "zsh", "fish", "powershell")
_ASKS = "_SNUGTUNE_COMPLETE"
BASH = r"""
_snugtune_completion() {
    # The line goes as it stands, as fish gives it: a line of the answer is a word, a tab, and what it means.
    local line=${COMP_LINE:0:COMP_POINT} breaks=${COMP_WORDBREAKS//[^=:]} begun= answer
    local word=${line##*[[:space:]]}
    # Words break at = and :, so that only what follows the last of them is replaced.
    if [[ -n $breaks && $word == *[$breaks]* && $word != [\"\']* ]]; then
        begun=${word%"${word##*[$breaks]}"}
    fi
    COMPREPLY=()
    while IFS=$'\t' read -r answer _; do
        [[ -n $answer ]] && COMPREPLY+=("${answer#"$begun"}")
    done < <(env _SNUGTUNE_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args \
        _TYPER_COMPLETE_ARGS="$line" "$1" 2>/dev/null)
    # A field goes on after its dot or its =.
    if [[ ${COMPREPLY[0]} == *[.=] ]]; then
        compopt -o nospace
    fi
}

complete -o default -F _snugtune_completion snugtune
""".lstrip()


def show(wanted: bool) -> None:
    """Print the script for the shell that is used, and end."""
    if wanted:
        typer.echo(_script(_shell()), nl=False)
        raise typer.Exit


def install(wanted: bool) -> None:
    """Put the script where the shell that is used finds it, and end."""
    if wanted:
        shell = _shell()
        _, path = typers_install(shell, COMMAND, _ASKS)
        if shell == "bash":
            path.write_text(BASH, encoding="utf-8")
        typer.echo(f"written: {path}; it works in the next shell that you open")
        raise typer.Exit


def listen() -> None:
    """Let Typer answer the shells' questions."""
    if _ASKS in os.environ:
        get_completion_inspect_parameters()  # registers what answers each shell


def _script(shell: str) -> str:
    if shell == "bash":
        return BASH
    return typers_script(prog_name=COMMAND, complete_var=_ASKS, shell=shell) + "\n"


def _shell() -> str:
    """The name of the shell that is used: the one that started this, else the user's own. Raises `InputError`."""
    try:
        name = shellingham.detect_shell()[0]
    except shellingham.ShellDetectionFailure:
        name = Path(os.environ.get("SHELL") or "bash").name
    if name not in SHELLS:
        raise InputError(f"there is no completion for {name}; it is for {', '.join(SHELLS)}")
    return name
