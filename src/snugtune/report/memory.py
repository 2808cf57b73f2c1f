"""What a run was predicted to take, and what it took: `plan.json` as a table and two bars."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snugtune.memory.estimate import MOMENTS
from snugtune.report.words import changes_in_words, size

KEPT = {"weights": "weights", "adapters": "adapters, or masters", "gradients": "gradients", "optimizer": "optimizer state"}
"""What stays from step to step, which can be counted -> what it is called."""
REST = {"activations": "activations", "logits": "logits", "transients": "transients", "runtime": "the process, what lies unused"}
"""What a prediction tells apart of the rest of the peak."""
SHOWN = frozenset({"estimate", "measured", "changes"})
"""What of `plan.json` stands here."""


@dataclass(frozen=True)
class Line:
    """One line of the table, its sizes in words; `part`: of the line above it."""

    name: str
    predicted: str
    measured: str
    part: bool = False


@dataclass(frozen=True)
class Piece:
    """One piece of a bar, in percent of the whole width."""

    name: str
    colour: int
    left: float
    width: float
    size: str


@dataclass(frozen=True)
class Bar:
    """Pieces that stand one after the other, `total` in words."""

    name: str
    total: str
    pieces: tuple[Piece, ...]

    @property
    def summary(self) -> str:
        return f"{self.name} {self.total}: " + ", ".join(f"{piece.name} {piece.size}" for piece in self.pieces)


@dataclass(frozen=True)
class Memory:
    """The section. `budget`: where its line is, in percent, and how much it is."""

    lines: tuple[Line, ...]
    bars: tuple[Bar, ...]
    budget: tuple[float, str] | None
    notes: tuple[str, ...]
    changes: tuple[str, ...]


def memory_of(plan: Mapping[str, Any]) -> Memory | None:
    """What there is to show of `plan.json`; None where it holds neither a prediction nor a measurement."""
    predicted, measured = _sizes(plan.get("estimate")), _sizes(plan.get("measured"))
    if not predicted and not measured:
        return None
    budget = _sizes({"budget": plan.get("budget_bytes")}).get("budget")
    named = [("predicted", _pieces(predicted, REST)), ("measured", _pieces(measured, _MEASURED))]
    whole = max(budget or 0, *(sum(count for _, _, count in pieces) for _, pieces in named)) or 1
    bars = tuple(_bar(name, pieces, whole) for name, pieces in named if pieces)
    line = None if budget is None else (round(100 * budget / whole, 2), size(budget))
    notes, changes = tuple(_notes(plan, predicted, measured)), tuple(changes_in_words(plan))
    return Memory(tuple(_lines(predicted, measured)), bars, line, notes, changes)


_MEASURED = {"rest": "activations, logits, transients, growth", "process": "the process before"}
_COLOURS = {name: place for place, name in enumerate((*KEPT, *REST))} | {"rest": 4, "process": 7}


def _sizes(told: object) -> dict[str, float]:
    """Its finite numbers; what else stands there is left out."""
    found = told if isinstance(told, Mapping) else {}
    return {str(k): v for k, v in found.items() if isinstance(v, (int, float)) and abs(v) < math.inf and v == v}


def _pieces(sizes: Mapping[str, float], rest: Mapping[str, str]) -> list[tuple[str, str, float]]:
    """(key, name, bytes) of what takes any."""
    return [(key, name, sizes[key]) for key, name in (KEPT | dict(rest)).items() if sizes.get(key, 0) > 0]


def _bar(name: str, pieces: Sequence[tuple[str, str, float]], whole: float) -> Bar:
    made, at = list[Piece](), 0.0
    for key, said, count in pieces:
        made.append(Piece(said, _COLOURS[key], round(100 * at / whole, 2), round(100 * count / whole, 2), size(count)))
        at += count
    return Bar(name, size(at), tuple(made))


def _lines(predicted: Mapping[str, float], measured: Mapping[str, float]) -> list[Line]:
    found = [Line(name, _size(predicted.get(key)), _size(measured.get(key))) for key, name in KEPT.items()]
    foreseen, taken = ([sizes[key] for key in keys if key in sizes] for sizes, keys in ((predicted, REST), (measured, _MEASURED)))
    together = [_size(sum(sizes) if sizes else None) for sizes in (foreseen, taken)]
    found.append(Line("activations, logits, transients and the process", together[0], together[1]))
    found += [Line(name, _size(predicted.get(key)), "", True) for key, name in REST.items() if predicted]
    found += [Line("the process before the base was loaded", "", _size(measured.get("process")), True)] if measured else []
    return [*found, Line("peak", _size(predicted.get("total_bytes")), _size(measured.get("total_bytes")))]


def _size(count: float | None) -> str:
    return "-" if count is None else f"-{size(-count)}" if count < 0 else size(count)


def _notes(plan: Mapping[str, Any], predicted: Mapping[str, float], measured: Mapping[str, float]) -> Iterator[str]:
    estimate = plan.get("estimate")
    when = dict[Any, str](MOMENTS).get(str(estimate.get("when"))) if isinstance(estimate, Mapping) else None
    if when is not None:
        tokens = f", with forwards of up to {predicted['tokens']:,.0f} tokens" if "tokens" in predicted else ""
        yield f"The fullest moment was predicted {when}{tokens}; of what is not there at that moment it has nothing."
    if measured:
        yield f"What stays from step to step was counted after step {measured.get('step', 0):,.0f} of all jobs."
        yield "The rest is what the measured peak had besides: from outside it cannot be told apart."
