"""The base class of every config: frozen, closed to strangers, helpful about typing errors."""

import difflib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Config(BaseModel):
    """A frozen config. An unknown field is refused by name, with the nearest valid one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    elsewhere: ClassVar[dict[str, str]] = {}  # names people look for here -> the field they mean

    @model_validator(mode="before")
    @classmethod
    def _name_misfits(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key, value in values.items():
            if key not in cls.model_fields:
                known = {name: name for name in cls.model_fields} | cls.elsewhere
                near = known[difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]]
                raise PydanticCustomError(
                    "unknown_field", "unknown field '{key}'; did you mean '{near}'?", {"key": key, "near": near}
                )
            if isinstance(value, bool) and cls.model_fields[key].annotation is not bool:  # it would pass for a number
                given = {"key": key, "value": str(value)}
                raise PydanticCustomError("no_switch", "'{key}' is no switch (got {value}); give a value", given)
        return values
