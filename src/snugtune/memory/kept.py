"""Traces of steps, kept on disk: the same step of the same model is traced once on a machine."""

import functools
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from snugtune.errors import StorageError
from snugtune.files import code_of, forget_unused, make_folder, still_used, write_whole
from snugtune.memory.trace import Trace


@functools.cache
def _our_tools() -> tuple[str, ...]:
    """The code that is traced, which stays as it is while this process lives."""
    return code_of(Path(__file__).parents[1]), version("torch"), version("transformers")


class TraceCache:
    """JSON files in `folder`, each named by all that a trace of `model` follows from. A full disk stops nobody."""

    def __init__(self, folder: Path, model: PretrainedConfig):
        described = {k: v for k, v in model.to_dict().items() if k != "_name_or_path"}
        self.folder = folder
        self.model = json.dumps(described, sort_keys=True, default=str)

    def get(self, key: object) -> Trace | None:
        path = self._path(key)
        try:
            trace = _read(json.loads(path.read_bytes()))
        except (OSError, KeyError, TypeError, ValueError):
            return None  # it is made anew
        still_used(path)
        return trace

    def put(self, key: object, trace: Trace) -> None:
        try:
            make_folder(self.folder)
            write_whole(self._path(key), json.dumps(_plain(trace)))
            forget_unused(self.folder)
        except StorageError:  # the next run takes a second longer
            return

    def _path(self, key: object) -> Path:
        text = repr((*_our_tools(), self.model, key))
        return self.folder / f"{hashlib.blake2b(text.encode(), digest_size=20).hexdigest()}.json"


def _plain(trace: Trace) -> dict[str, Any]:
    """What JSON can say: a shape cannot be a key there."""
    return {**vars(trace), "matrices": [[list(shape), count] for shape, count in trace.matrices.items()]}


def _read(plain: dict[str, Any]) -> Trace:
    matrices: Any = {tuple(shape): count for shape, count in plain["matrices"]}
    return Trace(**{**plain, "matrices": matrices})
