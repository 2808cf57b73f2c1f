"""The base class of every config: frozen, closed to strangers, helpful about typing errors."""

import difflib
from typing import Any, ClassVar, LiteralString

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Config(BaseModel):
    """A frozen config. An unknown field is refused by name, with a valid one that is near."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    elsewhere: ClassVar[dict[str, str]] = {}  # names people look for here -> the field they mean

    @model_validator(mode="before")
    @classmethod
    def _name_misfits(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key, value in values.items():
            if key not in cls.model_fields:
                raise PydanticCustomError("unknown_field", *_unknown(str(key), {n: n for n in cls.model_fields} | cls.elsewhere))
            if isinstance(value, bool) and cls.model_fields[key].annotation is not bool:  # it would pass for a number
                given = {"key": key, "value": str(value)}
                raise PydanticCustomError("no_switch", "'{key}' is no switch (got {value}); give a value", given)
        return values


def _unknown(key: str, known: dict[str, str]) -> tuple[LiteralString, dict[str, str | None]]:
    """What is said of a field that does not exist, and what that is made of. `known`: a name -> the field that it means."""
    close = difflib.get_close_matches(key, known, n=1)
    found = {"key": key, "near": known[close[0]] if close else None}
    return "unknown field '{key}'; did you mean '{near}'?" if close else "unknown field '{key}'", found
