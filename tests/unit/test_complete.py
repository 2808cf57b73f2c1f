"""Shell completion: the script, what is offered, and that it answers without loading torch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import shellingham
from typer.testing import CliRunner

from snugtune import complete
from snugtune.cli import app
from snugtune.config import PlanConfig, RunConfig
from snugtune.export import EXPORTS
from snugtune.export.merged import BASES
from snugtune.methods import METHODS
from snugtune.model.load import DTYPES
from snugtune.objectives import OBJECTIVES

SCHEMA = RunConfig.model_json_schema()


def offered(incomplete: str) -> list[str]:
    return [value for value, _ in complete.fields(SCHEMA, incomplete)]


def tab(*words: str) -> list[str]:
    """What bash is told at the end of a line, in a process that may not load torch."""
    script = "import sys; sys.modules['torch'] = None; from snugtune.cli import main; main()"
    environ = {"_SNUGTUNE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["snugtune", *words]), "COMP_CWORD": str(len(words))}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | environ, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split()


def test_offers_are_what_there_is() -> None:
    """Lists that are written out, so that nothing heavy is loaded for them, follow what they list."""
    assert set(complete.FORMS) == set(EXPORTS)
    assert set(complete.WIDTHS) == set(DTYPES)
    assert get_args(PlanConfig.model_fields["weights"].annotation) == complete.FORMATS
    assert set(complete.BASES) == set(BASES)
    assert set(complete.METHODS) == {kind.model_fields["type"].default for kind in METHODS}
    assert set(complete.OBJECTIVES) == {kind.model_fields["type"].default for kind in OBJECTIVES}


@pytest.mark.parametrize(
    ("incomplete", "offers"),
    [
        ("opt", ["optimizer."]),
        ("optimizer.l", ["optimizer.lr="]),
        ("batch", ["batch_size="]),
        ("method.last", ["method.last_blocks="]),  # of another type than the default
        ("plan.recompute=", ["plan.recompute=auto", "plan.recompute=none", "plan.recompute=blocks"]),
        ("plan.recompute=b", ["plan.recompute=blocks"]),
        ("schedule.type=co", ["schedule.type=constant", "schedule.type=cosine"]),
        ("schedule=co", ["schedule=constant", "schedule=cosine"]),
        ("trust_remote_code=", ["trust_remote_code=true", "trust_remote_code=false"]),
        ("seed=", []),
        ("none.such", []),
        ("seed.x", []),
    ],
)
def test_config_fields(incomplete: str, offers: list[str]) -> None:
    assert offered(incomplete) == offers


def test_every_field_is_offered() -> None:
    assert {value.rstrip(".=") for value in offered("")} == set(RunConfig.model_fields)
    methods = {name for kind in get_args(RunConfig.model_fields["method"].annotation) for name in kind.model_fields}
    assert {value.removeprefix("method.").rstrip("=") for value in offered("method.")} == methods
    help_of = dict(complete.fields(SCHEMA, "epo"))
    assert help_of["epochs="] == RunConfig.model_fields["epochs"].description


def test_the_shell_gets_answers_at_once() -> None:
    """Commands, options and their values, through Typer's own machinery, while torch cannot be imported at all."""
    assert {"train", "chat", "doctor", "init"} <= set(tab(""))
    assert tab("export", "run", "--to", "") == ["merged"]
    assert tab("export", "run", "--dtype", "b") == ["bf16"]
    assert tab("init", "--method", "f") == ["freeze", "full"]
    fields = tab("train", "config.yaml", "--set", "batch")
    assert fields == [value for value, _ in complete.overrides("batch")]


def test_fields_of_the_list_items_are_offered() -> None:
    """Any position is as good as the first."""
    assert [offer for offer in offered("data.") if offer.endswith(".") and "columns" not in offer] == ["data.0."]
    assert offered("data.1.form") == ["data.1.format="]
    assert complete.overrides("jobs.3.method.ra") == []
    assert [value for value, _ in complete.overrides("jobs.3.method.r")] == ["jobs.3.method.r="]
    assert offered("tracking=w") == ["tracking=wandb"]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("epochs", "epochs"),
        ("lr", "optimizer.lr"),
        ("recompute", "plan.recompute"),
        ("optimizer", "optimizer"),
        ("nothing", None),
    ],
)
def test_where_a_field_is(name: str, place: str | None) -> None:
    assert complete.place_of(name) == place


SCRIPTS = {
    "bash": "complete -o default -F _snugtune_completion snugtune",
    "zsh": "#compdef snugtune",
    "fish": "complete --command",
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_the_script_is_that_of_the_shell(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown is what is installed, in the home folder, and there is one line about it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(shellingham, "detect_shell", lambda: (kind, f"/bin/{kind}"))
    shown = CliRunner().invoke(app, ["--show-completion"])
    assert shown.exit_code == 0 and SCRIPTS[kind] in shown.output
    done = CliRunner().invoke(app, ["--install-completion"])
    assert done.exit_code == 0
    path = Path(done.output.removeprefix("written: ").partition(";")[0])
    assert path.is_relative_to(tmp_path) and path.read_text().strip() == shown.output.strip()


def test_a_shell_that_cannot_be_told_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise shellingham.ShellDetectionFailure

    monkeypatch.setattr(shellingham, "detect_shell", fail)
    monkeypatch.setenv("SHELL", "/usr/bin/bash")
    assert SCRIPTS["bash"] in CliRunner().invoke(app, ["--show-completion"]).output
    monkeypatch.setenv("SHELL", "/usr/bin/tcsh")
    refused = CliRunner().invoke(app, ["--show-completion"])
    assert (refused.exit_code, refused.stderr) == (
        2,
        "error: there is no completion for tcsh; it is for bash, zsh, fish, powershell\n",
    )
