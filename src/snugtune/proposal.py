"""`snugtune plan`: what fits into a budget, before anything is loaded, on this machine or for another one."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rich.table import Table
from rich.text import Text

from snugtune.config import RunConfig, to_config
from snugtune.console import Console
from snugtune.errors import DoesNotFitError, InputError
from snugtune.memory.choose import Model, budget_of, estimator_of, process_of, question_of
from snugtune.memory.estimate import MOMENTS, Estimate, Estimator, Work
from snugtune.memory.fit import SHORTEST, Candidate, Fitted, Question, fit, gib_up, leanest, looked_at, quickest
from snugtune.memory.plan import make_plan
from snugtune.methods import METHODS
from snugtune.methods.full import FullConfig
from snugtune.methods.lora import LoraConfig
from snugtune.model.load import load_config, load_tokenizer, stored_width
from snugtune.model.proofs import obstacle_to_sharing
from snugtune.model.source import ModelSource, find_model
from snugtune.training.examples import JobData, read_job, tokenize_job
from snugtune.types import HEAD_ROWS, Plan
from snugtune.words import counted, gib

BAR = 60
"""Columns of the bar."""
COLOURS = ("blue", "cyan", "magenta", "green", "yellow", "red", "bright_magenta", "bright_black")
LONGEST = 2**20
"""Tokens beyond which no context is claimed."""
FAR = 8192
"""Tokens at which the plan is chosen that the longest sequence is asked of."""
CROWD = 64
"""Sequences beyond which no micro-batch is claimed."""


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
        told |= {"rejected": [] if self.fitted is None else self.fitted.told_of_rejected()}
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
    ask = partial(_asked, model, data, estimator_of(model, config.trust_remote_code), process_of(config.resolved_jobs()))
    question = ask(config)
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    with console.waiting("predicting peaks (what was traced is kept)"):
        fitted, refusal = _fitted(question, budget)
        shown = leanest(question) if fitted is None else fitted.chosen
        return Proposal(
            model=config.model,
            device=device,
            budget=budget,
            fitted=fitted,
            refusal=refusal,
            shown=shown,
            longest=_longest(question, shown, budget, min(LONGEST, context if isinstance(context, int) else LONGEST)),
            most=_most(question, shown, budget),
            rows=tuple(_compared(config, ask, budget)),
        )


def _data(config: RunConfig, source: ModelSource, console: Console) -> Mapping[str, JobData]:
    tokenizer, _ = load_tokenizer(source, config.trust_remote_code)
    jobs = config.resolved_jobs()
    return {job.name: tokenize_job(job, read_job(job), tokenizer, console.track, console.note) for job in jobs}


def _fitted(question: Question, budget: int) -> tuple[Fitted | None, str | None]:
    try:
        return fit(question, budget), None
    except DoesNotFitError as error:
        return None, str(error)


def _longest(question: Question, shown: Candidate, budget: int, context: int) -> int | None:
    """Tokens of the longest sequence that fits alone in a forward, with every means; None where not even the shortest does.

    The plan that takes the least with long sequences may not with short ones: then that which is shown is asked.
    """
    job = max(question.jobs, key=lambda job: job.max_seq_len)

    def alone(tokens: int) -> Question:
        return replace(question, demand=lambda _: [Work(job, (tokens,), tokens - 1)])

    for plan in (leanest(alone(min(context, FAR))).planned, shown.planned):
        found = _largest(lambda n, plan=plan: looked_at(alone(n), plan).needs, budget, SHORTEST, max(SHORTEST, context))
        if found is not None:
            return found
    return None


def _most(question: Question, shown: Candidate, budget: int) -> int | None:
    """Sequences of `max_seq_len` in a forward that fit, by the plan that is shown: up to `CROWD`."""
    job = max(question.jobs, key=lambda job: job.max_seq_len)
    length = job.max_seq_len

    def needs(count: int) -> int:
        crowd = replace(question, demand=lambda _: [Work(job, (length,) * count, count * (length - 1))])
        return looked_at(crowd, shown.planned).needs

    return _largest(needs, budget, 1, CROWD)


def _largest(needs: Callable[[int], int], budget: int, least: int, most: int) -> int | None:
    """The largest number from `least` to `most` whose need is within the budget, to a 64th; None: not even the least is.

    `needs` grows: slowly while something else is the fullest moment, then on a line. What is returned was asked for, and fits.
    """
    if (below := needs(least)) > budget:
        return None
    if (above := needs(most)) <= budget:
        return most
    while most - least > max(1, least // 64):
        line = least + (most - least) * (budget - below) // (above - below)
        guess = min(max(line, least + 1 + (most - least) // 64), most - 1 - (most - least) // 64)
        if (found := needs(guess)) <= budget:
            least, below = guess, found
        else:
            most, above = guess, found
    return least


def _asked(model: Model, data: Mapping[str, JobData] | None, estimator: Estimator, process: int, config: RunConfig) -> Question:
    """What is to be planned of `config`; a single job in the place of several has the data of the first."""
    names = [job.name for job in config.resolved_jobs()]
    if data is not None and not set(names) <= data.keys():
        data = {names[0]: next(iter(data.values()))}
    return question_of(config, model, data, estimator, elsewhere=True, process=process)


def _compared(config: RunConfig, ask: Callable[[RunConfig], Question], budget: int) -> Iterator[Row]:
    """Other ways to train on the same budget: methods, and formats of the base. Of several jobs the first."""
    first = config.resolved_jobs()[0]
    own = first.model_dump(include=set(RunConfig.model_fields))
    fields = {**config.model_dump(exclude={"jobs"}), **own}
    seen: set[tuple[str, Plan]] = set()
    for method in {kind.type: kind for kind in (FullConfig(), LoraConfig(), first.method)}.values():
        for weights in (None, "int8", "nf4") if METHODS[type(method)].routable else (None,):
            try:
                plain = to_config({**fields, "method": method.model_dump()}, "plan")
                pins = plain.plan.model_copy(update={"weights": weights or ask(plain).make(plain.plan).plan.weights})
                found = quickest(ask(plain.model_copy(update={"plan": pins})), budget)
            except InputError:  # these pins, or this checkpoint, and that method do not go together
                continue
            shown = found if isinstance(found, Candidate) else found.chosen
            plan = shown.planned.plan
            if (method.type, plan) not in seen:
                yield Row(method.type, plan.weights, shown.needs, found is not shown, ", ".join(_unusual(plan)))
            seen.add((method.type, plan))


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
