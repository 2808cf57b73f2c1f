"""Whoever watches a run, and what they are handed when it is over."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from snugtune.training.job import Job
from snugtune.training.metrics import StepMetrics


@dataclass(frozen=True)
class RunResult:
    """What a run left behind. `artefacts`: job name -> adapter or model folder, where there is one; `seconds` of this
    session's training; `statuses`: job name -> how it stands, as in `jobs.json`.

    `metrics` and `samples` are the lines of `metrics.jsonl` and `samples.jsonl`; `held_out`: each job's held-out losses,
    from before training to that of its result.
    """

    folder: Path
    artefacts: Mapping[str, Path]
    metrics: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    held_out: Mapping[str, Sequence[float]]
    peak_bytes: int | None
    seconds: float = 0.0
    already_finished: bool = False
    statuses: Mapping[str, str] = field(default_factory=dict)


class Observer(Protocol):
    """Whoever watches a run: the console, a notebook, a test."""

    def note(self, text: str) -> None: ...
    def track(self, items: Sequence[Any], what: str) -> Iterable[Any]: ...
    def begin(self, jobs: Sequence[Job]) -> None: ...
    def step(self, metrics: StepMetrics) -> None: ...
    def status(self, job: str, status: str) -> None:
        """A job's status, as `jobs.json` has it, is another one now."""
        ...

    def end(self) -> None: ...
    def results(self, result: RunResult) -> None:
        """What the jobs left, where `train` does not return it: some of them did not end well."""
        ...


class Silent:
    """An observer that shows nothing."""

    def note(self, text: str) -> None: ...
    def track(self, items: Sequence[Any], what: str) -> Iterable[Any]:
        return items

    def begin(self, jobs: Sequence[Job]) -> None: ...
    def step(self, metrics: StepMetrics) -> None: ...
    def status(self, job: str, status: str) -> None: ...
    def end(self) -> None: ...
    def results(self, result: RunResult) -> None: ...
