"""What is minimised. A new objective is a file here and a line in `OBJECTIVES`."""

from typing import Annotated

from pydantic import Field

from snugtune.objectives.clm import Clm, ClmConfig
from snugtune.objectives.sft import Sft, SftConfig

OBJECTIVES: dict[type, Sft] = {SftConfig: Sft(), ClmConfig: Clm()}
ObjectiveConfig = Annotated[SftConfig | ClmConfig, Field(discriminator="type")]

__all__ = ["OBJECTIVES", "ObjectiveConfig"]
