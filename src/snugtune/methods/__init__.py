"""Ways of tuning a base. A new one is a file here and a line in `METHODS`."""

from typing import Annotated

from pydantic import Field

from snugtune.methods.freeze import Freeze, FreezeConfig
from snugtune.methods.full import Full, FullConfig
from snugtune.methods.lora import Lora, LoraConfig
from snugtune.methods.method import Attached, Method
from snugtune.methods.rotate import Rotate, RotateConfig

METHODS: dict[type, Method] = {LoraConfig: Lora(), FullConfig: Full(), FreezeConfig: Freeze(), RotateConfig: Rotate()}
MethodConfig = Annotated[LoraConfig | FullConfig | FreezeConfig | RotateConfig, Field(discriminator="type")]

__all__ = ["METHODS", "Attached", "Method", "MethodConfig"]
