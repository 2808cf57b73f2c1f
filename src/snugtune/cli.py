"""The `snugtune` command: thin, no logic. Everything heavy is imported by the command that needs it."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from snugtune import __version__, allocator, complete, shell, usage
from snugtune.errors import InputError, Interrupted, SnugtuneError


class _Group(TyperGroup):
    """Ends a command that raised a `SnugtuneError` with its one line and its exit code; bugs keep their traceback.

    So ends a command line that cannot be understood.
    """

    def main(self, *args: Any, standalone_mode: bool = True, **how: Any) -> Any:
        shell.listen()
        try:
            ended = super().main(*args, standalone_mode=False, **how)
        except TyperException as error:
            if not usage.is_help(error):
                typer.echo(f"error: {usage.mistake(error)}", err=True)
            sys.exit(SnugtuneError.exit_code)
        except SnugtuneError as error:  # of an option that does its work at once
            typer.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        sys.exit(ended or 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SnugtuneError as error:
            _console().error(str(error))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            typer.echo("error: interrupted", err=True)  # nothing is imported for it: it may come in the middle of imports
            raise typer.Exit(Interrupted.exit_code) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model in the memory you have.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at training data as the model will see it.")
app.add_typer(data_app, name="data")

ConfigPath = Annotated[Path, typer.Argument(help="the run's YAML config")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=VALUE", help="override a config field; repeatable", autocompletion=complete.overrides),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="run code that comes with the model; only for sources you trust")
]
Adapter = Annotated[str | None, typer.Option(help="which adapter, where a run trained several", autocompletion=complete.adapters)]


def _console() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where it is installed: it warns when it is imported
    from snugtune.console import Console, quiet_libraries

    quiet_libraries()
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what is imported now can be interrupted and tidied up
    return Console()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"snugtune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
    install_completion: Annotated[
        bool,
        typer.Option(
            "--install-completion",
            callback=shell.install,
            is_eager=True,
            help="let your shell complete commands, options and fields on Tab",
        ),
    ] = False,
    show_completion: Annotated[
        bool, typer.Option("--show-completion", callback=shell.show, is_eager=True, help="print what that would install")
    ] = False,
) -> None:
    pass


@app.command()
def demo(output: Annotated[Path, typer.Option(help="folder of the run's results")] = Path("runs/demo")) -> None:
    """Fine-tune a small model on shipped data and show what it answered before and after. Minutes on a laptop."""
    console = _console()
    from snugtune.demo import run_demo

    run_demo(output, console)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="the config to write")] = Path("config.yaml"),
    model: Annotated[str | None, typer.Option(help="hub id, local folder, .gguf file, or 'demo'")] = None,
    data: Annotated[list[str] | None, typer.Option(help="file, folder, or dataset's id on the hub; repeatable")] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="what to learn: sft (answers) or clm (plain text)", autocompletion=complete.objectives),
    ] = None,
    method: Annotated[str | None, typer.Option(help="how: lora, freeze, full or rotate", autocompletion=complete.methods)] = None,
    epochs: Annotated[float | None, typer.Option(help="passes over the data")] = None,
    output: Annotated[str | None, typer.Option(help="folder of the run's results")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="ask nothing; defaults for what is not given")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace a file that is there")] = False,
) -> None:
    """Write a config with every field explained, by asking (in a terminal) or from these options."""
    console = _console()
    from snugtune.init import write_config

    fields = {"model": model, "data": data or None, "objective": objective, "method": method, "epochs": epochs, "output": output}
    write_config(path, fields, console.ask if sys.stdin.isatty() and not yes else None, force, console)


@app.command()
def train(config: ConfigPath, set_: Overrides = None) -> None:
    """Train as CONFIG says. The same command goes on with an interrupted run."""
    console = _console()
    from snugtune.config import read_config
    from snugtune.run import train as run_train

    console.results(run_train(read_config(config, set_ or ()), console))


@app.command()
def plan(
    config: Annotated[Path | None, typer.Argument(help="the run's YAML config; or give --model")] = None,
    set_: Overrides = None,
    model: Annotated[str | None, typer.Option(help="hub id, local folder, .gguf file, or 'demo'")] = None,
    memory: Annotated[str | None, typer.Option(help="the most memory to use, as 24GiB (default: what is free)")] = None,
    method: Annotated[str | None, typer.Option(help="how it is tuned (default: as the config says, or lora)")] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(min=2, help="longest training sequence, in tokens (default: as the config says, or 1024)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; none need be here (default: as the config says)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout, for scripts")] = False,
) -> None:
    """What fits into the memory, predicted before anything is loaded. Exit code 3: nothing does."""
    console = _console()
    from snugtune.config import read_config, to_config
    from snugtune.proposal import config_for, run_plan

    if (config is None) == (model is None):
        raise InputError("plan: give a config, or --model, and not both")
    given = [f"{name}={value}" for name, value in (("memory", memory), ("device", device)) if value is not None]
    if config is not None:
        given += [
            f"{name}={value}" for name, value in (("method.type", method), ("max_seq_len", max_seq_len)) if value is not None
        ]
        found = read_config(config, [*(set_ or ()), *given])
    else:
        if set_:
            raise InputError(
                "plan: --set changes a config; with --model there are --method, --max-seq-len, --memory and --device"
            )
        found = to_config(config_for(str(model), memory, method or "lora", max_seq_len or 1024, device or "auto"), "plan")
    run_plan(found, config is not None, console, as_json)


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(help="a run folder, a PEFT adapter folder, or a model folder (as export writes it)")],
    adapter: Adapter = None,
    prompt: Annotated[str | None, typer.Option(help="answer this once and leave")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="ask the untuned base too, and show both answers")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="draw from the likeliest tokens up to this probability")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="another seed draws another answer (where temperature is above 0)")] = 0,
    weights: Annotated[
        str,
        typer.Option(help="fp32, bf16, fp16, int8, w8a8, nf4, or auto: as the run was trained", autocompletion=complete.formats),
    ] = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Talk to what a run trained."""
    console = _console()
    from snugtune.chat import answer_once, check_prompt, converse
    from snugtune.model.generate import Sampling
    from snugtune.tuned import load, load_untuned

    if prompt is not None:
        check_prompt(prompt)
    models = {"tuned": load(run, adapter, console.note, trust_remote_code, weights)}
    if compare:
        models = {"base": load_untuned(models["tuned"], run, adapter, console.note, trust_remote_code, weights)} | models
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    converse(models, sampling, console) if prompt is None else answer_once(models, prompt, sampling, console)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder, or a PEFT adapter folder")],
    to: Annotated[
        str,
        typer.Option(help="merged: a transformers model folder with the adapter worked in", autocompletion=complete.forms),
    ],
    output: Annotated[Path | None, typer.Option(help="folder to write (default: RUN/merged)")] = None,
    adapter: Adapter = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16 (default: the base's own)", autocompletion=complete.widths)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="what to merge onto, where the run was trained on narrow weights: original (in full precision, the default) "
            "or dequantized",
            autocompletion=complete.bases,
        ),
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write what a run trained in another form."""
    console = _console()
    from snugtune.export import export as write

    written = write(run, to, output, adapter, dtype, console.note, trust_remote_code, base)
    console.say(f"written: {written}")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout, for scripts")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="leave out how fast matrix products are")] = False,
    precision: Annotated[
        Path | None, typer.Option(metavar="CONFIG", help="instead: which numbers of this run would be in which format")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Show what is installed, what this machine has, which number formats run on it and how fast."""
    console = _console()
    from snugtune.config import read_config
    from snugtune.doctor import run_doctor, run_precision

    if precision is not None:
        run_precision(read_config(precision, set_ or ()), console, as_json)
    elif set_:
        raise InputError("--set changes a config; give it with --precision CONFIG")
    else:
        run_doctor(console, as_json, quick)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    output: Annotated[Path | None, typer.Option(help="file to write (default: RUN/report.html)")] = None,
    open_: Annotated[bool, typer.Option("--open", help="show it in the browser")] = False,
) -> None:
    """Write a page of what a run did: losses, speed, memory, data, samples. A run that goes on can be reported too."""
    console = _console()
    from snugtune.report import write_report

    written = write_report(run, output, console.note)
    console.say(f"written: {written}")
    if open_:
        typer.launch(str(written.resolve()))


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


def _leave(number: int, frame: object) -> None:
    """Ctrl-C while libraries are still being imported: an exception inside their C code would crash Python."""
    os.write(2, b"error: interrupted\n")
    os._exit(Interrupted.exit_code)


def main() -> None:
    """Entry point of the `snugtune` command and of `python -m snugtune`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    if sys.argv[1:2] in (["train"], ["demo"]):
        allocator.start_anew(sys.argv, sys.orig_argv)
    app(prog_name="snugtune")
