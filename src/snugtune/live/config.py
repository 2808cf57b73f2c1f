"""What a base is opened with, and the configs of jobs that are driven from Python."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from snugtune.config import JobConfig, PlanConfig
from snugtune.config_errors import ConfigError, explain
from snugtune.errors import InputError
from snugtune.objectives import Objective, objective_of
from snugtune.optim import ConstantConfig
from snugtune.schema import Config

C = TypeVar("C", bound=BaseModel)
_OF_DATA = ("mixing", "batch_size", "epochs", "validation", "eval_every", "early_stopping", "keep_best", "samples", "weight")
"""Fields of a job that say something of its data."""


class LiveJobConfig(JobConfig):
    """A job that may have no data: then it is driven by hand."""

    needs_data: ClassVar[bool] = False

    @model_validator(mode="after")
    def _says_nothing_of_no_data(self) -> "LiveJobConfig":
        idle = next((name for name in _OF_DATA if name in self.model_fields_set), None)
        if not self.data and idle is not None:
            raise ValueError(f"{idle}: is for jobs with data, and this one has none; leave it out, or give data")
        relative = 0 < self.schedule.warmup < 1 or not isinstance(self.schedule, ConstantConfig)
        if not self.data and self.steps is None and relative:
            raise ValueError("schedule: needs steps in a job without data, to know how long it is")
        return self

    @model_validator(mode="after")
    def _leaves_nothing_by_itself(self) -> "LiveJobConfig":
        if self.keep_best:
            raise ValueError("keep_best: only in runs, which have a folder for it; save() where eval_loss is lowest")
        if self.samples.wanted:
            raise ValueError("samples: only in runs; ask by sample()")
        return self


class Opening(Config):
    """What a base is opened with."""

    model: str = Field(min_length=1, description="hub id, local folder, .gguf file, or 'demo'")
    plan: PlanConfig = Field(default=PlanConfig(), description="pins for the planner's knobs")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to train")
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model; only for sources you trust")


def job_config(job: JobConfig | Mapping[str, Any]) -> JobConfig:
    """The config of a job that comes. Raises `InputError` that lists every bad field."""
    return job if isinstance(job, LiveJobConfig) else validated(LiveJobConfig, job, "job")


def validated(kind: type[C], given: Any, origin: str) -> C:
    """A config from a mapping, or from one of its base class. Raises `InputError` that lists every bad field."""
    fields = given.model_dump() if isinstance(given, JobConfig) else given
    if not isinstance(fields, Mapping):
        raise InputError(f"{origin}: expected a mapping of fields, found {type(given).__name__}")
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        raise ConfigError(origin, explain(error, kind)) from error


def objective_from(given: str | Mapping[str, Any]) -> Objective:
    """The objective that is meant, in the form that a config has it. Raises `InputError`."""
    return objective_of(validated(LiveJobConfig, {"objective": given}, "forward_backward").objective)
