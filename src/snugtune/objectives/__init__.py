"""What is minimised. A new objective is a file here and a line in `OBJECTIVES`."""

from snugtune.objectives.sft import Sft, SftConfig

OBJECTIVES: dict[type, Sft] = {SftConfig: Sft()}
ObjectiveConfig = SftConfig

__all__ = ["OBJECTIVES", "ObjectiveConfig"]
