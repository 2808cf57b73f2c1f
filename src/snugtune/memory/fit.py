"""From a budget to a plan: every way to set the knobs that are left open, the quickest first, until one fits.

What is learned stays as it was: only what costs memory and time is chosen here. A base in fewer bits, and optimizer state in
fewer, change it by rounding; they come last, and never under `plan.exact`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from snugtune.config import JobConfig, PlanConfig
from snugtune.errors import DoesNotFitError, InputError
from snugtune.memory.estimate import Estimate, UntraceableError, Work
from snugtune.memory.plan import Planned
from snugtune.types import NARROW, Plan, Width
from snugtune.words import gib

CHOSEN = ("fits", "budget_bytes", "estimate", "rejected")
"""What `plan.json` says of how the plan was chosen."""
MARGIN = 0.03
"""Of a prediction, that a plan must leave free: predictions are to err by no more."""
VARIES = 8 * 2**20
"""Bytes by which processes of the same command differ before they load anything."""
KNOBS = (
    *("weights", "micro_batch", "recompute", "offload", "gradients", "optimizer_state", "head_rows"),
    *("execution", "resident_jobs"),  # of several jobs
)
"""What is planned, where a config leaves it open."""
FEW_ROWS = 64
"""Of logits at a time, where memory is short: a quarter of the usual."""
SHORTEST = 64
"""Tokens below which no `max_seq_len` is proposed."""

MakePlan = Callable[[PlanConfig], Planned]
Predict = Callable[[Plan, Sequence[Work]], Estimate]
Demand = Callable[[Plan], Sequence[Work]]
Price = Callable[[Plan], float]


@dataclass(frozen=True)
class Candidate:
    """A plan that was looked at, and its estimate."""

    planned: Planned
    estimate: Estimate
    tokens: int  # of the largest forward, which the estimate is of

    @property
    def needs(self) -> int:
        """Bytes of a budget that it fits into."""
        return round(self.estimate.total * (1 + MARGIN))

    def facts(self) -> dict[str, Any]:
        """The estimate, for files. Sizes in bytes."""
        estimate = self.estimate
        told = {"holes": estimate.holes, "when": estimate.when, "total_bytes": estimate.total, "tokens": self.tokens}
        return {**estimate.parts(), **told}


@dataclass(frozen=True)
class Fitted:
    """The plan that was chosen, what it will use, and the quicker ones that were rejected."""

    chosen: Candidate
    budget: int
    rejected: tuple[Candidate, ...] = ()

    def facts(self) -> dict[str, Any]:
        """For `plan.json`. Sizes in bytes."""
        return {
            "fits": self.chosen.needs <= self.budget,
            "budget_bytes": self.budget,
            "estimate": self.chosen.facts(),
            "rejected": self.told_of_rejected(),
        }

    def told_of_rejected(self) -> list[dict[str, Any]]:
        """What each would have had otherwise, and why it is not taken: it needs more than the budget. In bytes."""
        return [
            {
                "plan": _differing(c.planned.plan, self.chosen.planned.plan),
                "total_bytes": c.estimate.total,
                "needs_bytes": c.needs,
            }
            for c in self.rejected
        ]


def _differing(plan: Plan, other: Plan) -> dict[str, Any]:
    theirs = asdict(other)
    return {name: value for name, value in asdict(plan).items() if value != theirs[name]}


@dataclass(frozen=True)
class Question:
    """What is to be planned. `make` turns pins into a plan by the rules, `predict` says what it takes."""

    pins: PlanConfig
    jobs: Sequence[JobConfig]
    make: MakePlan
    predict: Predict
    demand: Demand
    price: Price  # seconds a token, to order plans by
    stored: Width | None = None  # the format that the checkpoint keeps its weights in
    otherwise: Mapping[str, Callable[[], "Question"]] = field(
        default_factory=dict
    )  # changes of the run itself, by what a config says


def fit(question: Question, budget: int) -> Fitted:
    """The quickest plan that stays within `budget` bytes. Raises `DoesNotFitError`, which says what would fit."""
    found = quickest(question, budget)
    if isinstance(found, Candidate):
        raise DoesNotFitError(_too_little(question, budget, found))
    return found


def quickest(question: Question, budget: int) -> Fitted | Candidate:
    """The same; where nothing fits, what takes the least."""
    plain, *others = _plans(question, _variants(question))
    candidate = looked_at(question, plain)
    if candidate.needs <= budget:
        return Fitted(_told(candidate, (), budget), budget)
    lean = _lean(question) if others else [candidate]
    least = min(lean, key=lambda c: c.needs)
    if least.needs > budget:
        return least
    rejected, fitting = [candidate], {c.planned.plan.weights for c in lean if c.needs <= budget}
    hopeful = (planned for planned in others if planned.plan.weights in fitting)
    for planned in sorted(hopeful, key=lambda p: (_rounds(p.plan), question.price(p.plan))):
        try:
            candidate = looked_at(question, planned)
        except UntraceableError:  # not every model can recompute some of its blocks
            continue
        if candidate.needs <= budget:
            return Fitted(_told(candidate, rejected, budget), budget, tuple(rejected))
        rejected.append(candidate)
    return Fitted(_told(least, rejected, budget), budget, tuple(rejected))


def leanest(question: Question) -> Candidate:
    """The plan that takes the least, of those that set each knob to spare."""
    return min(_lean(question), key=lambda c: c.needs)


def _lean(question: Question) -> list[Candidate]:
    """The plans that set each knob to spare, in each width that the base may have. Raises `UntraceableError`: none can be.

    Where a model recomputes all of its blocks or none, those that keep activations.
    """
    found = list(_traceable(question, _variants(question, lean=True)))
    if not found:
        kept = replace(question, pins=question.pins.model_copy(update={"recompute": "none"}))
        return [looked_at(kept, planned) for planned in _plans(kept, _variants(kept, lean=True))]
    return found


def _traceable(question: Question, variants: Iterable[PlanConfig]) -> Iterator[Candidate]:
    for planned in _plans(question, variants):
        with suppress(UntraceableError):  # not every model can recompute its blocks
            yield looked_at(question, planned)


def looked_at(question: Question, planned: Planned) -> Candidate:
    works = question.demand(planned.plan)
    return Candidate(planned, question.predict(planned.plan, works), max(sum(work.lengths) for work in works))


def _plans(question: Question, variants: Iterable[PlanConfig]) -> list[Planned]:
    """The plans that these pins give, each once."""
    found: dict[Plan, Planned] = {}
    refused: InputError | None = None
    for pins in variants:
        try:
            planned = question.make(pins)
        except InputError as error:  # this device or these methods cannot have it
            refused = refused or error
            continue
        found.setdefault(planned.plan, _unasked(planned, question.pins))
    if not found:
        assert refused is not None
        raise refused
    return list(found.values())


def _variants(question: Question, lean: bool = False) -> Iterator[PlanConfig]:
    """The pins, with what they leave open pinned in every way that is worth a try; `lean`: only so that memory is spared."""
    pins, exact = question.pins, question.pins.exact
    narrow: tuple[str, ...] = () if exact or question.stored is not None else ("int8", "nf4")
    usual = question.make(pins).plan.micro_batch
    sizes = [usual] if usual < 2 else [usual >> n for n in range(usual.bit_length())]
    choices: Mapping[str, Sequence[Any]] = {
        "weights": ("auto", *narrow),
        "micro_batch": [size or "auto" for size in sizes] if usual else ["auto", 1],
        "recompute": ("none", 4, 2, "blocks"),
        "offload": ("none", "activations", "weights"),
        "gradients": ("kept", "released"),
        "optimizer_state": ("fp32",) if exact else ("fp32", "8bit"),
        "head_rows": ("auto", FEW_ROWS),
    }
    if len(question.jobs) > 1:
        choices = {**choices, "execution": ("auto", "interleaved"), "resident_jobs": ("auto", 1)}
    spared = {"weights": 3, "offload": 2, "gradients": 2, "resident_jobs": 2}  # so many of the last are tried; of others one
    choices = {name: values[-spared.get(name, 1) :] if lean else values for name, values in choices.items()}
    open_ = {name: values for name, values in choices.items() if getattr(pins, name) == "auto"}
    for values in itertools.product(*open_.values()):
        chosen = dict(zip(open_, values, strict=True))
        if chosen.get("recompute", "blocks") != "blocks" and (
            chosen.get("offload") == "activations" or chosen.get("head_rows") == FEW_ROWS
        ):
            continue  # what is recomputed is kept elsewhere; and beside activations that are kept a few logits are little
        if chosen.get("resident_jobs") == 1 and chosen.get("execution", pins.execution) != "interleaved":
            continue  # they could not share a forward
        yield pins.model_copy(update=chosen)


def _rounds(plan: Plan) -> tuple[bool, bool]:
    """What changes learning by rounding: narrow weights, and before them state in 8 bits."""
    return plan.weights in NARROW, plan.optimizer_state != "fp32"


def _unasked(planned: Planned, pins: PlanConfig) -> Planned:
    """The plan without the word that what `pins` leave open was asked for."""

    def told(reason: str) -> str:
        open_ = pins.weights if reason.startswith("weights ") else pins.execution if " take turns (" in reason else None
        return reason.replace("(as asked", "(to spare memory") if open_ == "auto" else reason

    return Planned(planned.plan, tuple(told(reason) for reason in planned.reasons))


def _told(candidate: Candidate, rejected: Sequence[Candidate], budget: int) -> Candidate:
    """The candidate, with its reasons: what was chosen in the place of something quicker."""
    estimate = candidate.estimate
    why = f"predicted peak {gib(estimate.total)} of {gib(budget)}"
    if rejected:
        why += f"; quicker plans need {gib(min(c.needs for c in rejected))} and more"
    return replace(candidate, planned=Planned(candidate.planned.plan, (*candidate.planned.reasons, why)))


def _too_little(question: Question, budget: int, least: Candidate) -> str:
    """What to say where nothing fits."""
    short = least.needs - budget
    told = (
        f"memory: {gib(budget)} is {gib(short)} too little: the smallest budget that works here is {gib_up(least.needs + VARIES)}"
    )
    ways = list(_ways_out(question, budget))
    return f"{told}; what would fit: {', '.join(ways)}" if ways else f"{told}, and no knob changes that; take a smaller model"


def _ways_out(question: Question, budget: int) -> Iterator[str]:
    """Changes that the user may make, each with what it would take."""
    pins = question.pins
    freed = {name: "auto" for name in KNOBS if getattr(pins, name) != "auto"}
    looser: list[tuple[str, dict[str, Any]]] = [(f"plan.{name}: auto", {name: value}) for name, value in freed.items()]
    looser += [("plan.exact: false", {"exact": False})] if pins.exact else []
    changed = {said: partial(_repinned, question, change) for said, change in looser}
    if len(looser) > 1:
        changed["plan: {}"] = partial(_repinned, question, {**freed, "exact": False})  # all of them
    enough = False
    for said, other in {**changed, **question.otherwise}.items():
        if said == "plan: {}" and enough:
            continue
        with suppress(InputError):  # the change cannot be had
            found = leanest(other())
            if found.needs <= budget:
                enough = True
                yield f"{said} ({gib_up(found.needs)})"
    longest = max(job.max_seq_len for job in question.jobs)
    while (longest := longest // 2) >= SHORTEST:
        found = leanest(replace(question, demand=_shorter(question.demand, longest)))
        if found.needs <= budget:
            yield f"max_seq_len: {longest} ({gib_up(found.needs)})"
            return


def _repinned(question: Question, change: Mapping[str, Any]) -> Question:
    return replace(question, pins=question.pins.model_copy(update=change))


def _shorter(demand: Demand, longest: int) -> Demand:
    def cut(plan: Plan) -> Sequence[Work]:
        return [_cut(work, longest) for work in demand(plan)]

    return cut


def _cut(work: Work, longest: int) -> Work:
    lengths = tuple(min(length, longest) for length in work.lengths)
    share = sum(lengths) / max(1, sum(work.lengths))
    return replace(work, lengths=lengths, scored=round(work.scored * share))


def gib_up(count: int) -> str:
    """A size that is enough, for people: rounded up."""
    return f"{-(-count * 100 // 2**30) / 100:.2f} GiB"
