"""A run's settings in words: what was trained how on what, what the plan's knobs mean, what its losses can be compared with."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from snugtune.config import JobConfig
from snugtune.model.source import DEMO, DEMO_HUB_ID
from snugtune.report.facts import RunFacts
from snugtune.types import FULL_FORWARD

SOURCES = 4
"""Sources or methods that the head of the page names; more are counted."""

_KNOBS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "device": ("device", str),
    "weights": ("number format of the base", str),
    "micro_batch": ("most tokens in one forward", lambda n: f"{n} x max_seq_len" if n else f"{FULL_FORWARD}, or one sequence"),
    "recompute": (
        "activations",
        lambda how: {"none": "kept", "blocks": "computed again in backward"}.get(how, f"of one block in {how} computed again"),
    ),
    "head_rows": ("logits alive at once", lambda n: f"of {n} tokens"),
    "threads": ("CPU threads", str),
}
"""A knob of the plan -> what it is called, and its value with its unit."""


def about(run: RunFacts) -> list[tuple[str, str]]:
    """What a reader asks first: which base model, tuned how, on what. Nothing where the config cannot be read."""
    configs = [job.config for job in run.jobs if job.config is not None]
    if run.model is None or not configs:
        return []
    model = f"{DEMO} ({DEMO_HUB_ID})" if run.model == DEMO else run.model
    return [
        ("base model", model),
        ("method", _few([method(config) for config in configs])),
        ("data", _few([source.path for config in configs for source in config.data])),
    ]


def method(config: JobConfig) -> str:
    """`LoRA (r 8, lora_alpha 16) for sft`: the method with the settings that were chosen, and what was minimised."""
    settings = config.method.model_dump(mode="json", exclude={"type"}, exclude_defaults=config.method.type != "lora")
    if config.method.type == "lora":
        settings = {name: settings[name] for name in ("r", "lora_alpha")}
    name = {"lora": "LoRA"}.get(config.method.type, config.method.type)
    told = ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in settings.items())
    return f"{name} ({told}) for {config.objective.type}" if told else f"{name} for {config.objective.type}"


def incomparable(configs: Sequence[JobConfig]) -> str | None:
    """Why the training losses of some of these jobs are no match for their held-out losses; None where they all are."""
    reasons = {config.name: " and ".join(_training_only(config)) for config in configs}
    named = {name: reason for name, reason in reasons.items() if reason}
    if not named:
        return None
    whose = "The training loss" if len(configs) == 1 else f"The training loss of {_few(list(named))}"
    why = _few(list(named.values()))
    return f"{whose} is taken with {why}, the held-out loss without: compare each with its own course, not with the other."


def _training_only(config: JobConfig) -> Iterator[str]:
    if config.objective.label_smoothing:
        yield f"label smoothing of {config.objective.label_smoothing:g}"
    if config.neftune_noise_alpha:
        yield f"NEFTune noise of {config.neftune_noise_alpha:g}"


def _few(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - SOURCES} more" if len(names) > SOURCES else ""
    return ", ".join(names[:SOURCES]) + more


def changes_in_words(plan: Mapping[str, Any]) -> list[str]:
    """What was changed of the plan under way, each with where and why."""
    changes = plan.get("changes")
    told = [change for change in changes if isinstance(change, dict)] if isinstance(changes, list) else []
    return [f"{_plain(c.get('job'))}, step {c.get('step')}: {_knob(c)}" for c in told]


def plan_in_words(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`plan.json` as (name, value with its unit); what is not known here stands as it is."""
    rows: list[tuple[str, str]] = []
    knobs = plan.get("plan")
    for key, value in knobs.items() if isinstance(knobs, Mapping) else ():
        name, told = _KNOBS.get(key, (key, _plain))
        rows.append((name, told(value) if isinstance(value, (str, int)) else _plain(value)))
    for key, value in plan.items():
        if key == "measured_peak_bytes":
            rows.append(("measured peak memory", size(value) if value is not None else "known when the run is finished"))
        elif key == "reasons":
            rows.append(("why", "\n".join(map(_plain, value)) if isinstance(value, list) else _plain(value)))
        elif key == "changes" and isinstance(value, list):
            told = changes_in_words(plan)
            rows += [("changed under way", "\n".join(told))] if told else []
        elif key != "plan" or not isinstance(knobs, Mapping):
            rows += _flat(value, key)
    return rows


def _knob(change: Mapping[str, Any]) -> str:
    """What a change of the plan set to what, and why."""
    named = {"capacity": "most tokens in one forward", "fused_tokens": "tokens of a forward that jobs share (0: they take turns)"}
    key, value = str(change.get("knob")), change.get("value")
    name, told = _KNOBS.get(key, (named.get(key, key), _plain))
    return f"{name} {told(value)} ({_plain(change.get('cause'))})"


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Nested values as (dotted name, text)."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}")
    elif path.endswith("_bytes"):
        yield path.removesuffix("_bytes"), size(value)
    elif isinstance(value, list) and not all(isinstance(v, (int, float)) for v in value):
        yield path, "\n".join(map(_plain, value))
    else:
        yield path, _plain(value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def size(count: Any) -> str:
    """Bytes in a person's unit."""
    if not isinstance(count, (int, float)) or not abs(count) < math.inf:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
