"""A command line that cannot be understood: what is wrong with it in one line, and what to write instead."""

import difflib
import re
from typing import Any

from pydantic import BaseModel, ValidationError
from typer.exceptions import TyperException

from snugtune import complete
from snugtune.config_errors import explain


def is_help(error: TyperException) -> bool:
    """Whether nothing is wrong: a group of commands was called without one, and its help has been shown."""
    return type(error).__name__ == "NoArgsIsHelpError"


def mistake(error: TyperException) -> str:
    """`error` in a person's words, with the fix."""
    context: Any = getattr(error, "ctx", None)
    text, fix = _told(error, context)
    if fix is None:
        fix = f"see {'snugtune' if context is None else context.command_path} --help"
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", f"{text}; {fix}" if fix else text)


def _told(error: Any, context: Any) -> tuple[str, str | None]:
    """What is wrong, and the fix where it is more than to look at the help."""
    cause, param = error.__cause__, getattr(error, "param", None)
    if isinstance(cause, ValidationError):
        return f"{_name(error)}: {explain(cause, BaseModel)[0]}", None
    message = error.format_message().rstrip(".")
    if message.startswith("Missing") and param is not None:
        return f"missing {_name(error)}" + (f" ({param.help})" if param.help else ""), None
    if message.startswith("No such option"):
        return f"no option {error.option_name}", _instead(error.option_name, error.possibilities or (), context)
    if found := re.fullmatch(r"Got unexpected extra argument\(?s?\)? \((.*)\)", message):
        word = found[1].split()[0]
        as_field = "=" in word and _takes_fields(context)
        return f"unexpected argument '{found[1]}'", f"to override a field: --set {word}" if as_field else None
    if isinstance(getattr(error, "option_name", None), str):
        return f"{error.option_name} {'needs a value' if 'requires' in message else 'takes no value'}", None
    if found := re.fullmatch(r"No such command '(.+\.ya?ml)'", message):
        return f"'{found[1]}' is no command", f"did you mean snugtune train {found[1]}?"
    text, _, meant = message.partition(". Did you mean ")
    return f"{text[:1].lower()}{text[1:]}", f"did you mean {meant}" if meant else None


def _name(error: Any) -> str:
    """The option or argument that the error is about."""
    param = error.param
    return max(param.opts, key=len) if param.param_type_name == "option" else f"the {param.name}"


def _instead(option: str, near: Any, context: Any) -> str | None:
    """What to write for an option that does not exist: another, or `--set` where a config has such a field."""
    name = option.lstrip("-").replace("-", "_")
    if _takes_fields(context) and name != "set":
        field = complete.place_of(name)
        if field is not None:
            return f"a field of the config is set by --set {field}=VALUE"
    known = [o for p in context.command.params for o in p.opts if o.startswith("--")] if context is not None else []
    close = [*near, *difflib.get_close_matches(option, known, n=1, cutoff=0.7)]
    return f"did you mean {close[0]}?" if close else None


def _takes_fields(context: Any) -> bool:
    return context is not None and any("--set" in p.opts for p in context.command.params)
