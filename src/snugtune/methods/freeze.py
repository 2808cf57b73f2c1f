"""Partial fine-tuning: chosen weights of the base train, the rest stays frozen.

The lower the first weight that trains, the further backward has to go: the last blocks cost the least.
"""

import re
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from snugtune.errors import InputError
from snugtune.methods.full import FullAttached
from snugtune.model.base import Base
from snugtune.schema import Config

_BLOCK = re.compile(r"\.(\d+)\.")  # model.layers.3.mlp..., transformer.h.3...


class FreezeConfig(Config):
    """Train some weights of the base and freeze the others. What is asked for adds up."""

    type: Literal["freeze"] = "freeze"
    last_blocks: int = Field(default=0, ge=0, description="train the last so many blocks")
    first_blocks: int = Field(default=0, ge=0, description="train the first so many blocks")
    embeddings: bool = Field(default=False, description="train the input embeddings (and a head tied to them)")
    head: bool = Field(default=False, description="train the output head (and embeddings tied to it)")
    names: tuple[str, ...] = Field(default=(), description='train weights by name, with wildcards: ["*.mlp.*", "*norm*"]')

    @model_validator(mode="after")
    def _something_trains(self) -> "FreezeConfig":
        if not (self.last_blocks or self.first_blocks or self.embeddings or self.head or self.names):
            raise ValueError("everything would be frozen; give last_blocks, first_blocks, embeddings, head or names")
        return self


class Freeze:
    """The method. One job per run: the base is that job's."""

    routable: ClassVar[bool] = False
    artefacts: ClassVar[str] = "models"

    def numbers(self, base: Base, config: FreezeConfig) -> int:
        return sum(base.model.get_parameter(name).numel() for name in trainable(base, config))

    def even(self, config: FreezeConfig) -> bool:
        return False

    def attach(self, base: Base, job: str, config: FreezeConfig, seed: int) -> FullAttached:
        return FullAttached(base, job, trainable(base, config))


def block_of(name: str) -> int | None:
    """The number of the block that a weight of this name is in."""
    found = _BLOCK.search(name)
    return None if found is None else int(found.group(1))


def trainable(base: Base, config: FreezeConfig) -> tuple[str, ...]:
    """The names of the weights that train, in the model's order. Raises `InputError` for what the model does not have."""
    names = tuple(name for name, _ in base.model.named_parameters())
    blocks = {name: block for name in names if (block := block_of(name)) is not None}
    count = max(blocks.values(), default=-1) + 1
    for field in ("last_blocks", "first_blocks"):
        if getattr(config, field) > count:
            raise InputError(f"method.{field}: {getattr(config, field)} asked for, but '{base.name}' has {count} blocks")
    chosen = {n for n, block in blocks.items() if block < config.first_blocks or block >= count - config.last_blocks}
    ends = [base.model.get_input_embeddings()] if config.embeddings else []
    ends += [base.model.get_output_embeddings()] if config.head else []
    weights = {id(p) for module in ends if module is not None for p in module.parameters()}
    chosen |= {name for name, p in base.model.named_parameters() if id(p) in weights}
    for pattern in config.names:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise InputError(f"method.names: '{pattern}' matches no weight of '{base.name}'; it has names like {names[-1]}")
        chosen |= found
    return tuple(name for name in names if name in chosen)
