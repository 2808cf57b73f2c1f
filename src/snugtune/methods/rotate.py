"""Full fine-tuning by turns: some blocks of the base train at a time, the others are frozen meanwhile.

Only what trains has masters, gradients and optimizer state; they are made anew for each turn (BAdam, Luo et al. 2024, arXiv
2404.02827). With `ends` the embeddings, the head and what else is in no block train all the time (LISA, Pan et al. 2024, arXiv
2403.17919). Ours: the package badam keeps its turns from checkpoints, and draws them from the global generator.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from snugtune.data.pack import derive_seed
from snugtune.errors import InputError
from snugtune.methods.freeze import block_of
from snugtune.methods.full import FullAttached
from snugtune.model.base import Base
from snugtune.schema import Config


class RotateConfig(Config):
    """Train every block of the base, some at a time."""

    type: Literal["rotate"] = "rotate"
    blocks: int = Field(default=1, ge=1, description="how many blocks train at a time")
    every: int = Field(default=50, ge=1, description="optimizer steps until the next ones do")
    order: Literal["random", "ascending", "descending"] = Field(
        default="random", description="of a pass over all blocks; random: another in each pass"
    )
    ends: bool = Field(
        default=False, description="train what is in no block (embeddings, output head, last norm) all the time (LISA)"
    )


class RotateAttached(FullAttached):
    """The masters of the blocks whose turn it is, and the way from one turn to the next."""

    def __init__(self, base: Base, job: str, config: RotateConfig, seed: int):
        self.config, self.seed = config, seed
        self.blocks, self.ends = _parts(base, config)
        super().__init__(base, job, self._names(0))

    def turn_to(self, step: int) -> bool:
        names = self._names(step)
        changed = names != self.weights.keys()
        if changed:
            self.train_only(names)
        return changed

    def state(self) -> dict[str, Tensor]:
        """Masters of what trains, and of what has trained or will the weight itself: it has no more digits than that."""
        whole = set(self.ends).union(*self.blocks)
        weights = self.base.model.named_parameters()
        return {name: self.masters.get(name, weight).detach() for name, weight in weights if name in whole}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name in self.state():
                self.base.model.get_parameter(name).copy_(tensors[name])
        super().load_state(tensors)

    def _names(self, step: int) -> set[str]:
        turn = turn_at(self.config, len(self.blocks), self.seed, step)
        return set(self.ends).union(*(self.blocks[block] for block in turn))


class Rotate:
    """The method. One job per run: the base is that job's."""

    routable: ClassVar[bool] = False
    artefacts: ClassVar[str] = "models"

    def numbers(self, base: Base, config: RotateConfig) -> int:
        """Those that train at a time, at most."""
        blocks, ends = _parts(base, config)
        sizes = sorted((sum(base.model.get_parameter(name).numel() for name in names) for names in blocks), reverse=True)
        return sum(sizes[: config.blocks]) + sum(base.model.get_parameter(name).numel() for name in ends)

    def even(self, config: RotateConfig) -> bool:
        return False

    def attach(self, base: Base, job: str, config: RotateConfig, seed: int) -> RotateAttached:
        return RotateAttached(base, job, config, seed)


def turn_at(config: RotateConfig, count: int, seed: int, step: int) -> tuple[int, ...]:
    """Which of `count` blocks train in optimizer step `step`, ascending: a pure function.

    A pass takes each block once; its last turn takes what is left.
    """
    turns = -(-count // config.blocks)
    passed, turn = divmod(step // config.every, turns)
    order = list(range(count))
    if config.order == "random":
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, passed))).tolist()
    elif config.order == "descending":
        order.reverse()
    return tuple(sorted(order[turn * config.blocks : (turn + 1) * config.blocks]))


def _parts(base: Base, config: RotateConfig) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The names of each block's weights, and of those in none that train. Raises `InputError` for more blocks than there are."""
    places = {name: block_of(name) for name, _ in base.model.named_parameters()}
    count = max((block for block in places.values() if block is not None), default=-1) + 1
    if config.blocks > count:
        raise InputError(f"method.blocks: {config.blocks} asked for, but '{base.name}' has {count} blocks")
    blocks = tuple(tuple(name for name, block in places.items() if block == index) for index in range(count))
    return blocks, tuple(name for name, block in places.items() if block is None) if config.ends else ()
