"""The `snugtune` command: thin, no logic. Everything heavy is imported by the command that needs it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from snugtune import __version__
from snugtune.errors import Interrupted, SnugtuneError


class _Group(TyperGroup):
    """Ends a command that raised a `SnugtuneError` with its one line and its exit code; bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SnugtuneError as error:
            _console().error(str(error))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            _console().error("interrupted")
            raise typer.Exit(Interrupted.exit_code) from None


app = typer.Typer(
    cls=_Group, no_args_is_help=True, pretty_exceptions_enable=False, help="Fine-tune a language model in the memory you have."
)
data_app = typer.Typer(no_args_is_help=True, help="Look at training data as the model will see it.")
app.add_typer(data_app, name="data")

ConfigPath = Annotated[Path, typer.Argument(help="the run's YAML config")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=VALUE", help="override a config field; repeatable")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="run code that comes with the model; only for sources you trust")
]
Adapter = Annotated[str | None, typer.Option(help="which adapter, where a run trained several")]


def _console() -> Any:
    from snugtune.console import Console, quiet_libraries

    quiet_libraries()
    return Console()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"snugtune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    pass


@app.command()
def demo(output: Annotated[Path, typer.Option(help="folder of the run's results")] = Path("runs/demo")) -> None:
    """Fine-tune a small model on shipped data and show what it answered before and after. Minutes on a laptop."""
    console = _console()
    from snugtune.demo import run_demo

    run_demo(output, console)


@app.command()
def train(config: ConfigPath, set_: Overrides = None) -> None:
    """Train as CONFIG says. The same command goes on with an interrupted run."""
    console = _console()
    from snugtune.config import read_config
    from snugtune.run import train as run_train

    console.results(run_train(read_config(config, set_ or ()), console))


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(help="a run folder, or a PEFT adapter folder")],
    adapter: Adapter = None,
    prompt: Annotated[str | None, typer.Option(help="answer this once and leave")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="draw from the likeliest tokens up to this probability")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to what a run trained."""
    console = _console()
    from snugtune.chat import answer_once, converse
    from snugtune.model.generate import Sampling
    from snugtune.tuned import load

    tuned = load(run, adapter, console.note, trust_remote_code)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    answer_once(tuned, prompt, sampling) if prompt is not None else converse(tuned, sampling, console)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder, or a PEFT adapter folder")],
    to: Annotated[str, typer.Option(help="merged: a transformers model folder with the adapter worked in")],
    output: Annotated[Path | None, typer.Option(help="folder to write (default: RUN/merged)")] = None,
    adapter: Adapter = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 (default: the base's own)")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write what a run trained in another form."""
    console = _console()
    from snugtune.export import export as write

    written = write(run, to, output, adapter, dtype, console.note, trust_remote_code)
    console.say(f"written: {written}")


@data_app.command("show")
def data_show(
    config: ConfigPath,
    set_: Overrides = None,
    examples: Annotated[int, typer.Option("--examples", "-n", min=0, help="how many examples to print")] = 3,
) -> None:
    """Print the rendered examples with their loss mask, and counts and lengths of the whole."""
    console = _console()
    from snugtune.config import read_config
    from snugtune.show import show_data

    show_data(read_config(config, set_ or ()), examples, console)


@app.command()
def schema() -> None:
    """Print the config's JSON schema, for completion and checks in an editor."""
    from snugtune.config_schema import config_schema_text

    typer.echo(config_schema_text(), nl=False)


def main() -> None:
    """Entry point of the `snugtune` command and of `python -m snugtune`."""
    app(prog_name="snugtune")
