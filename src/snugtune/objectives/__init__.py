"""What is minimised. A new objective is a file here and a line in `OBJECTIVES`."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from snugtune.objectives.clm import Clm, ClmConfig
from snugtune.objectives.sft import Sft, SftConfig

Objective = Sft | Clm
OBJECTIVES: dict[type, Callable[[Any], Objective]] = {SftConfig: Sft, ClmConfig: Clm}
ObjectiveConfig = Annotated[SftConfig | ClmConfig, Field(discriminator="type")]


def objective_of(config: ObjectiveConfig) -> Objective:
    """The objective that `config` describes."""
    return OBJECTIVES[type(config)](config)


__all__ = ["OBJECTIVES", "Objective", "ObjectiveConfig", "objective_of"]
