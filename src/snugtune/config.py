"""The run's config: aggregates the components' own configs, and reads a file of them, with what overrides it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from snugtune.config_errors import ConfigError, explain
from snugtune.config_overrides import apply, overlaid
from snugtune.config_yaml import read_yaml
from snugtune.data.forms import half_character
from snugtune.data.mix import ConcatConfig, InterleaveConfig
from snugtune.data.sources import SourceConfig, as_sources
from snugtune.errors import InputError
from snugtune.methods import METHODS, MethodConfig
from snugtune.methods.lora import LoraConfig
from snugtune.objectives import ObjectiveConfig
from snugtune.objectives.sft import SftConfig
from snugtune.optim import AdamWConfig, ConstantConfig, OptimizerConfig, ScheduleConfig
from snugtune.schema import Config
from snugtune.words import bytes_of

DEFAULT_JOB = "default"
_NAMES = "letters, digits, '.', '_' and '-', at most 64, the first a letter or a digit"

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


def _typed(default: str, **also: str) -> Any:
    """Let a union's `type` be left out where a default exists, and be the whole value (`schedule: cosine`).

    `also`: other names of a type -> its own.
    """

    def fill(value: Any) -> Any:
        fields = {"type": value} if isinstance(value, str) else value
        if not isinstance(fields, dict):
            return value
        kind = fields.get("type", default)
        return {**fields, "type": also.get(kind, kind) if isinstance(kind, str) else kind}

    return BeforeValidator(fill)


Validation = Annotated[
    Annotated[float | str, Tag("plain")] | Annotated[SourceConfig, Tag("source")],
    Discriminator(lambda value: "source" if isinstance(value, (Mapping, SourceConfig)) else "plain"),
]
"""What is held out: a fraction of the data, a path, or a source."""


class EarlyStoppingConfig(Config):
    """When to stop before the last step."""

    patience: int = Field(default=3, ge=1, description="evaluations in a row without a better held-out loss")
    min_delta: float = Field(default=0.0, ge=0, description="by how much the loss must fall to count as better")


class SamplesConfig(Config):
    """What the model is asked while it trains, to see what it has learned. Off unless `every` or `prompts` is given."""

    every: int | None = Field(
        default=None, ge=1, description="optimizer steps between; always before the first and after the last"
    )
    prompts: tuple[str, ...] = Field(default=(), description="what to ask (default: the first held-out, else training examples)")
    count: int = Field(default=3, ge=1, description="how many examples to ask where no prompts are given")
    max_new_tokens: int = Field(default=64, ge=1, description="longest answer, in tokens")

    @field_validator("prompts")
    @classmethod
    def _something_asked(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not prompt.strip() for prompt in value):
            raise ValueError("an empty prompt asks nothing")
        return value

    @property
    def wanted(self) -> bool:
        return self.every is not None or bool(self.prompts)


class JobFields(Config):
    """What one job trains on and how. At the top level of a run's config these are the defaults of every job."""

    elsewhere: ClassVar[dict[str, str]] = {
        "lr": "optimizer.lr",
        "learning_rate": "optimizer.lr",
        "weight_decay": "optimizer.weight_decay",
        "warmup": "schedule.warmup",
        "lr_scheduler_type": "schedule.type",
        "optim": "optimizer.type",
        "neftune_alpha": "neftune_noise_alpha",
        "label_smoothing": "objective.label_smoothing",
        "label_smoothing_factor": "objective.label_smoothing",
        "train_on_prompt": "objective.train_on",
        "load_best_model_at_end": "keep_best",
        "early_stopping_patience": "early_stopping",
        "warmup_ratio": "schedule.warmup",
        "lora": "method.type",
        "lora_r": "method.r",
        "rank": "method.r",
        "lora_alpha": "method.lora_alpha",
        "target_modules": "method.target_modules",
        "dtype": "plan.weights",
        "bf16": "plan.weights",
        "fp16": "plan.weights",
        "micro_batch": "plan.micro_batch",
        "per_device_train_batch_size": "batch_size",
        "gradient_accumulation_steps": "batch_size",
        "gradient_checkpointing": "plan.recompute",
        "num_train_epochs": "epochs",
        "max_steps": "steps",
        "output_dir": "output",
        "dataset": "data",
        "train": "data",
        "train_file": "data",
        "val": "validation",
        "val_split": "validation",
        "val_set_size": "validation",
        "eval_steps": "eval_every",
        "save_steps": "checkpoint_every",
        "save_total_limit": "keep_checkpoints",
        "report_to": "tracking",
        "model_name_or_path": "model",
    }

    data: Annotated[tuple[SourceConfig, ...], BeforeValidator(as_sources)] = Field(
        default=(), description="training data: a path, {path, format, ...}, or a list of these"
    )
    mixing: Annotated[ConcatConfig | InterleaveConfig, Field(discriminator="type"), _typed("concat")] = Field(
        default=ConcatConfig(), description="how several sources make one stream"
    )
    max_seq_len: int = Field(default=1024, ge=2, description="longest training sequence, in tokens; longer examples are cut")
    method: Annotated[MethodConfig, _typed("lora")] = Field(default=LoraConfig(), description="how the base is tuned")
    objective: Annotated[ObjectiveConfig, _typed("sft")] = Field(default=SftConfig(), description="what is minimised")
    batch_size: int = Field(default=16, ge=1, description="examples per optimizer step, whatever the micro-batch")
    epochs: float | None = Field(
        default=None, gt=0, le=1e6, description="passes over the data (default 1, unless steps is given)"
    )
    steps: int | None = Field(default=None, ge=1, le=10**9, description="optimizer steps, instead of epochs")
    validation: Validation | None = Field(
        default=None, description="fraction of the data to hold out, the path of a file, or {path, format, columns, split, ...}"
    )
    eval_every: int | None = Field(
        default=None, ge=1, description="optimizer steps between evaluations (default: only at start and end)"
    )
    early_stopping: EarlyStoppingConfig | None = Field(
        default=None, description="stop when the held-out loss stops falling; needs validation and eval_every"
    )
    keep_best: bool = Field(default=False, description="the result is the state of the lowest held-out loss, not the last")
    samples: SamplesConfig = Field(default=SamplesConfig(), description="what the model is asked while it trains")
    neftune_noise_alpha: float | None = Field(
        default=None, gt=0, description="noise on the embeddings in training (NEFTune); 5 is usual"
    )
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="clip the job's gradient to this norm; null: never")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seeds the order, the split, the initial adapter and dropout")
    optimizer: Annotated[OptimizerConfig, _typed("adamw")] = Field(default=AdamWConfig(), description="the optimizer")
    schedule: Annotated[ScheduleConfig, _typed("constant", constant_with_cooldown="wsd")] = Field(
        default=ConstantConfig(), description="the learning rate over time"
    )

    @field_validator("validation")
    @classmethod
    def _fraction(cls, value: float | str | SourceConfig | None) -> float | str | SourceConfig | None:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("a fraction must lie between 0 and 1 (or give the path of a file)")
        if isinstance(value, SourceConfig) and value.weight != 1.0:
            raise ValueError("weight: only counts where sources are interleaved")
        if value == "":
            raise ValueError("an empty path; give a fraction, the path of a file, or nothing")
        if isinstance(value, str) and value.endswith("%"):
            raise ValueError(f"'{value}' is no path; write 10% as 0.1")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> "JobFields":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both (set one to null)")
        return self


class JobConfig(JobFields):
    """One job, complete."""

    needs_data: ClassVar[bool] = True

    name: str = Field(default=DEFAULT_JOB, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description=_NAMES)
    weight: float = Field(
        default=1.0, ge=1e-6, le=1e6, description="this job's share of the tokens, as long as others train; 2: twice those of a 1"
    )

    @model_validator(mode="after")
    def _weights_count(self) -> "JobConfig":
        weighted = next((i for i, source in enumerate(self.data) if source.weight != 1.0), None)
        if weighted is not None and not isinstance(self.mixing, InterleaveConfig):
            raise ValueError(f"data.{weighted}.weight: only counts where sources are interleaved; set mixing: interleave")
        return self

    @model_validator(mode="after")
    def _judged_by_something(self) -> "JobConfig":
        for field, given in (("early_stopping", self.early_stopping is not None), ("keep_best", self.keep_best)):
            if given and (self.validation is None or self.eval_every is None):
                missing = "validation" if self.validation is None else "eval_every"
                raise ValueError(f"{field}: needs {missing}, to know the held-out loss in between")
        return self

    @model_validator(mode="after")
    def _has_data(self) -> "JobConfig":
        if self.needs_data and not self.data:
            raise ValueError("data: nothing to train on; give a file, a folder, or the id of a dataset on the hub")
        return self


class PlanConfig(Config):
    """Pins for the planner's knobs. `auto` leaves the choice to it."""

    weights: Literal["auto", "fp32", "bf16", "fp16", "int8", "w8a8", "nf4"] = Field(
        default="auto",
        description="number format of the base; in int8 and nf4 weights are only kept, w8a8 multiplies in int8 too, with "
        "activations and gradients rounded to it; all three must be frozen",
    )
    double_quant: bool = Field(
        default=False, description="nf4: keep the scales in 8 bits too (4.13 instead of 4.5 bits a weight)"
    )
    outlier_threshold: float = Field(
        default=0.0, ge=0, description="int8: multiply in int8 too, but for activations from this magnitude on (LLM.int8(): 6)"
    )
    micro_batch: int | Literal["auto"] = Field(
        default="auto", description="a forward holds at most micro_batch x max_seq_len tokens"
    )
    recompute: int | Literal["auto", "none", "blocks"] = Field(
        default="auto", description="blocks: recompute activations in backward; a number k: those of every k-th block"
    )
    optimizer_state: Literal["auto", "fp32", "8bit", "paged"] = Field(
        default="auto", description="what the optimizer remembers: in fp32, in 8 bits, or in 8 bits paged to the host (CUDA)"
    )
    gradients: Literal["auto", "kept", "released"] = Field(
        default="auto",
        description="released: each weight of the base makes its step in backward, and its gradient is gone (not lora)",
    )
    offload: Literal["auto", "none", "activations", "weights"] = Field(
        default="auto",
        description="weights: those of the blocks stay on disk; activations: the blocks' inputs do, with recompute",
    )
    head_rows: int | Literal["auto"] = Field(
        default="auto",
        description="of so many tokens the logits are in memory at a time; auto: 256, or fewer to spare memory",
    )
    exact: bool = Field(
        default=False, description="never choose a base in fewer bits, nor optimizer state, where that is left to the planner"
    )
    execution: Literal["auto", "fused", "interleaved"] = Field(
        default="auto",
        description="several jobs: fused: they share forwards; interleaved: they take turns; the results are equal",
    )
    resident_jobs: int | Literal["auto"] = Field(
        default="auto",
        description="of so many jobs at a time the state is in memory, that of the others rests on disk; auto: all",
    )

    @model_validator(mode="after")
    def _of_its_width(self) -> "PlanConfig":
        if self.double_quant and self.weights != "nf4":
            raise ValueError("double_quant: only for weights: nf4")
        if self.outlier_threshold and self.weights != "int8":
            raise ValueError("outlier_threshold: only for weights: int8")
        return self

    @field_validator("micro_batch", "recompute", "head_rows", "resident_jobs")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1")
        return value


class RunConfig(JobFields):
    """One run: a base, its jobs, and where the results go."""

    parts: ClassVar[dict[str, type[JobFields]]] = {"jobs": JobConfig}  # lists of what has fields that do not stand here

    model: str = Field(min_length=1, description="hub id, local folder, .gguf file, or 'demo'")
    output: str = Field(min_length=1, description="folder of the run's results")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to train")
    memory: str | None = Field(
        default=None, description="the most memory that this process may use on the device, as 8GiB (default: what is free there)"
    )
    checkpoint_every: int | None = Field(default=None, ge=1, description="optimizer steps between checkpoints (default: a tenth)")
    keep_checkpoints: int = Field(default=2, ge=1, description="how many checkpoints to keep")
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model; only for sources you trust")
    tracking: tuple[Tracker, ...] = Field(default=(), description="experiment trackers that are given the metrics as well")
    plan: PlanConfig = Field(default=PlanConfig(), description="pins for the planner's knobs")
    jobs: tuple[dict[str, Any], ...] = Field(default=(), description="jobs sharing the base; each overrides the fields above")

    @field_validator("memory", mode="before")
    @classmethod
    def _a_size(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            raise ValueError(f"{value} has no unit; write 8GiB or 500MiB")
        if isinstance(value, str) and bytes_of(value) <= 0:
            raise ValueError("must be more than nothing")
        return value

    @field_validator("tracking", mode="before")
    @classmethod
    def _as_trackers(cls, value: Any) -> Any:
        """One name or several, each once."""
        names = [value] if isinstance(value, str) else value
        return (
            tuple(dict.fromkeys(names)) if isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names) else names
        )

    @model_validator(mode="after")
    def _jobs_are_sound(self) -> "RunConfig":
        jobs = self.resolved_jobs()
        repeated = sorted(name for name, count in Counter(job.name for job in jobs).items() if count > 1)
        if repeated:
            raise ValueError(f"jobs: the name '{repeated[0]}' is given twice")
        for job in jobs:
            if len(jobs) > 1 and not METHODS[type(job.method)].routable:
                raise ValueError(f"jobs: '{job.name}' uses method '{job.method.type}', which cannot share a base")
        return self

    def resolved_jobs(self) -> tuple[JobConfig, ...]:
        """The jobs of this run, complete: the top-level fields overlaid with each entry of `jobs`."""
        return self._resolved

    @cached_property
    def _resolved(self) -> tuple[JobConfig, ...]:
        """There may be a thousand, and they are asked for often."""
        shared = {name: getattr(self, name) for name in JobFields.model_fields}
        if not self.jobs:
            try:
                return (JobConfig(**shared),)
            except ValidationError as error:
                raise ValueError("; ".join(explain(error, JobConfig))) from error
        plain = {k: v for k, v in self.model_dump(mode="json").items() if k in JobFields.model_fields}
        resolved = []
        for index, own in enumerate(self.jobs):
            try:
                resolved.append(JobConfig.model_validate(overlaid(plain, own)))
            except ValidationError as error:
                problems = explain(error, JobConfig, RunConfig)
                raise ValueError("; ".join(f"jobs.{index}: {problem}" for problem in problems)) from error
        return tuple(resolved)

    def to_yaml(self) -> str:
        """The resolved config, as it is stored with the run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `a.b=value` overrides. Raises `InputError` naming file or override, field and fix."""
    path = Path(path)
    raw = read_yaml(path)
    stages = [(str(path), deepcopy(raw))]
    for override in overrides:
        apply(raw, override)
        stages.append((f"--set {override}", deepcopy(raw)))
    try:
        return to_config(raw, str(path))
    except ConfigError as error:
        raise InputError(_blamed(stages, error.problems)) from error


def _blamed(stages: Sequence[tuple[str, Mapping[str, Any]]], problems: Sequence[str]) -> str:
    """The problems, each with the file or the override that brought it: the first from which on it is there.

    `stages`: the file's fields, then the fields after each override.
    """
    said: dict[str, list[str]] = {}
    known = [(origin, _problems(raw)) for origin, raw in stages]
    for problem in problems:
        since = next(i for i in range(len(known)) if all(problem in found for _, found in known[i:]))
        said.setdefault(known[since][0], []).append(problem)
    return "; ".join(f"{origin}: {'; '.join(found)}" for origin, found in said.items())


def _problems(raw: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        to_config(raw)
    except ConfigError as error:
        return error.problems
    return ()


def to_config(raw: RunConfig | Mapping[str, Any], origin: str = "config") -> RunConfig:
    """Validate a mapping. Raises `InputError` that lists every bad field."""
    half = half_character(raw.model_dump() if isinstance(raw, RunConfig) else raw)
    if half is not None:
        where = ".".join(map(str, half)) or "a field's name"
        raise ConfigError(origin, [f"{where}: half a character (a lone surrogate) is no text; write it whole, in UTF-8"])
    if isinstance(raw, RunConfig):
        return raw
    try:
        return RunConfig.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigError(origin, explain(error, RunConfig)) from error
