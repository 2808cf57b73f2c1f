"""`snugtune plan`: what fits into a budget, before anything is loaded, on this machine or for another one."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from snugtune.config import RunConfig
from snugtune.console import Console
from snugtune.errors import DoesNotFitError, InputError
from snugtune.memory.choose import Model, budget_of, estimator_of, question_of
from snugtune.memory.estimate import MOMENTS, Estimate, Estimator, Work
from snugtune.memory.fit import Candidate, Fitted, Question, fit, gib_up, leanest, quickest
from snugtune.memory.plan import make_plan
from snugtune.methods import METHODS
from snugtune.methods.full import FullConfig
from snugtune.methods.lora import LoraConfig
from snugtune.model.load import load_config, load_tokenizer, stored_width
from snugtune.model.proofs import obstacle_to_sharing
from snugtune.model.source import find_model
from snugtune.training.examples import JobData, read_job, tokenize_job
from snugtune.types import HEAD_ROWS, Plan
from snugtune.words import counted, gib

BAR = 60
"""Columns of the bar."""
COLOURS = ("blue", "cyan", "magenta", "green", "yellow", "red", "bright_magenta", "bright_black")
LONGEST = 2**20
"""Tokens beyond which no context is claimed."""


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a method on a base in some format."""

    method: str
    weights: str
    needs: int  # bytes of a budget
    fits: bool
    how: str  # the knobs that are not as usual


@dataclass(frozen=True)
class Proposal:
    """What there is to say. `fitted`: None where nothing fits, and `refusal` says why."""

    model: str
    device: str
    budget: int
    fitted: Fitted | None
    refusal: str | None
    shown: Candidate  # the chosen one, or else the one that takes the least
    longest: int | None  # tokens of a sequence; None: the least does not fit, however short
    most: int | None  # such sequences of max_seq_len in a forward
    rows: tuple[Row, ...]

    def as_json(self) -> str:
        told: dict[str, Any] = {"model": self.model, "device": self.device, "fits": self.fitted is not None}
        told |= {"budget_bytes": self.budget, "needs_bytes": self.shown.needs, "refusal": self.refusal}
        told |= {"plan": asdict(self.shown.planned.plan), "reasons": list(self.shown.planned.reasons)}
        told |= {"estimate": self.shown.facts()}
        told |= {"longest_context": self.longest, "largest_micro_batch": self.most}
        return json.dumps(told | {"comparison": [asdict(row) for row in self.rows]}, indent=2)


def run_plan(config: RunConfig, with_data: bool, console: Console, as_json: bool) -> None:
    """Print what fits. Raises `DoesNotFitError` where nothing does, after what there is to say of it."""
    proposal = propose(config, with_data, console)
    if as_json:
        console.raw(proposal.as_json())
    else:
        _show(proposal, config, console)
    if proposal.refusal is not None:
        raise DoesNotFitError(proposal.refusal)


def propose(config: RunConfig, with_data: bool, console: Console) -> Proposal:
    """Plan a run. `with_data`: by the lengths of its data, else every sequence is taken to be as long as it may be."""
    device = make_plan(config, elsewhere=True).plan.device
    budget = budget_of(config, device)
    source = find_model(config.model, console.note)
    model_config = load_config(source, config.trust_remote_code)
    model = Model(source, model_config, stored_width(source, model_config), obstacle_to_sharing(model_config))
    data = _data(config, source, console) if with_data else None
    estimator = estimator_of(model, config.trust_remote_code)
    question = question_of(config, model, data, estimator, elsewhere=True)
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    with console.waiting("predicting peaks (what was traced is kept)"):
        fitted, refusal = _fitted(question, budget)
        least = leanest(question)
        shown = least if fitted is None else fitted.chosen
        return Proposal(
            model=config.model,
            device=device,
            budget=budget,
            fitted=fitted,
            refusal=refusal,
            shown=shown,
            longest=_longest(question, least, budget, context if isinstance(context, int) else LONGEST),
            most=_most(question, shown, budget),
            rows=tuple(_compared(config, model, data, estimator, budget)),
        )


def _data(config: RunConfig, source: Any, console: Console) -> Mapping[str, JobData]:
    tokenizer, _ = load_tokenizer(source, config.trust_remote_code)
    jobs = config.resolved_jobs()
    return {job.name: tokenize_job(job, read_job(job), tokenizer, console.track, console.note) for job in jobs}


def _fitted(question: Question, budget: int) -> tuple[Fitted | None, str | None]:
    try:
        return fit(question, budget), None
    except DoesNotFitError as error:
        return None, str(error)


def _longest(question: Question, least: Candidate, budget: int, context: int) -> int | None:
    """Tokens of the longest sequence that fits alone in a forward, by the plan that takes the least.

    What a step takes grows linearly with them, from two lengths on.
    """
    plan, job = least.planned.plan, max(question.jobs, key=lambda job: job.max_seq_len)
    near, far = (_needs(question, plan, [Work(job, (n,), n - 1)]) for n in (1024, 2048))
    room = budget - near
    fitting = 1024 + (1024 * room // max(1, far - near))
    return min(context, LONGEST, fitting) if fitting > 0 else None


def _most(question: Question, shown: Candidate, budget: int) -> int | None:
    """Sequences of `max_seq_len` in a forward that fit, by the plan that is shown."""
    plan, job = shown.planned.plan, max(question.jobs, key=lambda job: job.max_seq_len)
    length = job.max_seq_len
    one, two = (_needs(question, plan, [Work(job, (length,) * n, n * (length - 1))]) for n in (1, 2))
    return 1 + (budget - one) // max(1, two - one) if one <= budget else None


def _needs(question: Question, plan: Plan, works: list[Work]) -> int:
    return Candidate(question.make(question.pins), question.predict(plan, works), max(sum(w.lengths) for w in works)).needs


def _compared(
    config: RunConfig, model: Model, data: Mapping[str, JobData] | None, estimator: Estimator, budget: int
) -> Iterator[Row]:
    """Other ways to train on the same budget: methods, and formats of the base."""
    own = config.resolved_jobs()[0].method
    methods = [FullConfig(), own if isinstance(own, LoraConfig) else LoraConfig()]
    for method in methods:
        widths = ("auto",) if not METHODS[type(method)].routable else ("auto", "int8", "nf4")
        for weights in widths:
            pins = config.plan.model_copy(update={"weights": weights, "exact": True})
            changed = config.model_copy(update={"method": method, "plan": pins, "jobs": ()})
            jobs = {"default": next(iter(data.values()))} if data else None
            try:
                question = question_of(RunConfig.model_validate(changed.model_dump()), model, jobs, estimator, elsewhere=True)
                found = quickest(question, budget)
            except InputError:  # these pins, or this checkpoint, and that method do not go together
                continue
            shown = found if isinstance(found, Candidate) else found.chosen
            plan = shown.planned.plan
            yield Row(method.type, plan.weights, shown.needs, found is not shown, ", ".join(_unusual(plan)))


def _unusual(plan: Plan) -> Iterator[str]:
    if plan.recompute != "none":
        yield "recompute" if plan.recompute == "blocks" else f"recompute every {plan.recompute}."
    if plan.offload != "none":
        yield f"{plan.offload} kept elsewhere"
    if plan.optimizer_state != "fp32":
        yield f"{plan.optimizer_state} state"
    if plan.gradients != "kept":
        yield "gradients released"
    if plan.head_rows != HEAD_ROWS:
        yield f"logits of {plan.head_rows} tokens at a time"


def _show(proposal: Proposal, config: RunConfig, console: Console) -> None:
    estimate, what = proposal.shown.estimate, "fits" if proposal.fitted else "does not fit"
    console.say(f"{proposal.model} on {proposal.device}: {what} into {gib(proposal.budget)}", style="bold")
    for reason in proposal.shown.planned.reasons:
        console.say(f"  {reason}")
    console.say()
    console.say(f"predicted peak {gib(estimate.total)} ({MOMENTS[estimate.when]})", style="bold")
    console.out.print(_bar(estimate, max(proposal.budget, estimate.total)))
    console.table(_parts(estimate))
    console.say()
    if proposal.longest is not None:
        console.say(f"longest sequence that fits, with every means: {counted(proposal.longest, 'tokens')}")
    length = max(job.max_seq_len for job in config.resolved_jobs())
    if proposal.most is not None:
        console.say(f"largest micro-batch that fits, as planned: {counted(proposal.most, 'sequences')} of {length:,} tokens")
    console.say()
    console.table(_comparison(proposal.rows))


def _bar(estimate: Estimate, whole: int) -> Text:
    """The peak by category, as a share of the budget."""
    bar, used = Text(), 0
    for colour, size in zip(COLOURS, estimate.parts().values(), strict=True):
        end = round(BAR * (used + size) / whole)
        bar.append("█" * (end - round(BAR * used / whole)), style=colour)
        used += size
    return bar.append("░" * (BAR - len(bar)), style="dim")


def _parts(estimate: Estimate) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for colour, (name, size) in zip(COLOURS, estimate.parts().items(), strict=True):
        if size:
            table.add_row(Text("█ ", style=colour).append(name, style="default"), gib(size))
    return table


def _comparison(rows: tuple[Row, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("method", "weights"):
        table.add_column(name, no_wrap=True)
    table.add_column("needs", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("with", overflow="fold")
    for row in rows:
        table.add_row(row.method, row.weights, gib_up(row.needs), "fits" if row.fits else "does not fit", row.how)
    return table


def config_for(model: str, memory: str | None, method: str, max_seq_len: int, device: str) -> dict[str, Any]:
    """The fields of a run whose data is not known: `data` names no file, and none is read."""
    fields = {"model": model, "method": {"type": method}, "max_seq_len": max_seq_len, "device": device}
    return fields | {"data": "none.jsonl", "output": "none"} | ({} if memory is None else {"memory": memory})
