"""Tensors of a job's state, read from its file one by one."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


class Stored(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read into memory of its own when it is asked for.

    A mapped file's pages would count as memory, all of them as long as one of its tensors lives: to resume full training of
    SmolLM2 took 785 MiB more than to begin it. Raises `OSError` and `SafetensorError`.
    """

    def __init__(self, file: Path):
        self._opened = safe_open(file, framework="pt", backend="pread")
        self._names = frozenset(self._opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Below(Mapping[str, Tensor]):
    """Those of `tensors` whose names begin with `prefix`, under the rest of their names."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str):
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
