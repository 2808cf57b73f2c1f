"""What every way of tuning a base offers to the trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from snugtune.model.base import Base


class Attached(Protocol):
    """A method at work on a base for one job."""

    job: str

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps: fp32; backward accumulates into their `.grad` until `drop_grad`."""
        ...

    def matrices(self) -> list[Tensor]:
        """The same weights one by one, in their shapes, for optimizers that look at these."""
        ...

    def turn_to(self, step: int) -> bool:
        """Let those weights train that do in optimizer step `step`; returns whether these are others than before."""
        ...

    def zero_grad(self) -> None:
        """Begin a step: gradients of zeros."""
        ...

    def drop_grad(self) -> None:
        """Give back the memory of gradients that can be had again at no cost."""
        ...

    def publish(self) -> None:
        """After an optimizer step: bring the new values to where the base computes with them."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that trains, exact, by stable names: what a checkpoint holds."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, and of `release`."""
        ...

    def release(self) -> None:
        """Give back the memory of everything that trains; `parameters` stay the same objects. Only what shares a base can."""
        ...

    def save(self, folder: Path) -> None:
        """Write the finished artefact (an adapter or a model) into an existing folder."""
        ...

    def detach(self) -> None:
        """Leave the base as if the job had never been there."""
        ...


class Method(Protocol):
    """A way of tuning. `routable` methods share a base; `artefacts` is the folder of a run their results go to."""

    routable: ClassVar[bool]
    artefacts: ClassVar[str]

    def numbers(self, base: Base, config: Any) -> int:
        """How many numbers would train."""
        ...

    def even(self, config: Any) -> bool:
        """Whether it does the same to every block of a base: a few of them, then, tell what it does to all."""
        ...

    def attach(self, base: Base, job: str, config: Any, seed: int) -> Attached:
        """Start tuning `base` for `job`; initial values are a pure function of `seed`."""
        ...
