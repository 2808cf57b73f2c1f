"""From a budget to a plan, with a prediction that is made up: the quickest that fits, and what is said where none does."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from snugtune.config import RunConfig, to_config
from snugtune.data.mix import step_indices, total_steps
from snugtune.data.pack import cut_step
from snugtune.errors import DoesNotFitError, InputError
from snugtune.memory.demand import LOOKED_AT, full_chunk, largest_chunk
from snugtune.memory.estimate import Estimate, UntraceableError, Work
from snugtune.memory.fit import CHOSEN, Question, fit, leanest
from snugtune.memory.plan import make_plan
from snugtune.memory.speed import ASSUMED, Size, seconds_a_token
from snugtune.training.examples import JobData
from snugtune.training.job import capacity_of
from snugtune.types import NARROW, Example, Plan
from snugtune.words import bytes_of

GIB = 1 << 30


def config_of(plan: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    return to_config({"model": "m", "output": "o", "data": "d.jsonl", "device": "cpu", "plan": plan or {}, **more})


def predict(plan: Plan, works: Sequence[Work]) -> Estimate:
    weights = {"fp32": 8, "bf16": 8, "int8": 4, "nf4": 2}[plan.weights] * GIB // (4 if plan.offload == "weights" else 1)
    tokens = max(sum(work.lengths) for work in works)
    share = {"none": 0.0, "blocks": 1.0}[plan.recompute] if isinstance(plan.recompute, str) else 1 / plan.recompute
    kept = int(tokens * GIB // 256 * (1 - 0.75 * share)) // (2 if plan.offload == "activations" else 1)
    state = (2 if plan.optimizer_state == "fp32" else 1) * GIB
    return Estimate(weights, GIB, GIB, state, kept, 0, 0, 0, "backward")


def question(plan: dict[str, Any] | None = None, **more: Any) -> Question:
    config = config_of(plan, **more)
    jobs = config.resolved_jobs()
    return Question(
        config.plan,
        jobs,
        lambda pins: make_plan(config.model_copy(update={"plan": pins})),
        predict,
        lambda plan: [full_chunk(job, plan) for job in jobs],
        lambda plan: seconds_a_token(plan, ASSUMED["cpu"], Size(1e9, 1024, 1e5, config.resolved_jobs()[0].method.type == "full")),
    )


def test_with_room_the_plain_plan_is_chosen() -> None:
    fitted = fit(question(), 1000 * GIB)
    assert not fitted.rejected
    assert (fitted.chosen.planned.plan.recompute, fitted.chosen.planned.plan.offload) == ("none", "none")


def test_a_plain_plan_that_fits_asks_nobody_how_quick_it_is() -> None:
    def refuse(plan: Plan) -> float:
        raise AssertionError("priced")

    assert fit(replace(question(), price=refuse), 1000 * GIB).chosen.planned.plan.recompute == "none"


def test_a_slow_disk_changes_the_order() -> None:
    """Streaming is quick where the disk is; else activations are computed again first."""
    quick, slow = (replace(ASSUMED["cpu"], read=speed, read_cached=speed) for speed in (1e12, 1e6))
    size = Size(1e9, 1024, 1e5, False)
    chosen = [
        fit(replace(question(), price=lambda plan, s=speed: seconds_a_token(plan, s, size)), 13 * GIB).chosen.planned.plan
        for speed in (quick, slow)
    ]
    assert chosen[0].offload == "weights"
    assert chosen[1].offload != "weights" and chosen[1].recompute == "blocks"


@pytest.mark.parametrize("budget", [15, 13, 10, 7, 5])
def test_the_quickest_that_fits_is_chosen_and_quicker_ones_are_told_of(budget: int) -> None:
    fitted = fit(question(), budget * GIB)
    assert fitted.chosen.needs <= budget * GIB
    assert fitted.rejected and all(candidate.needs > budget * GIB for candidate in fitted.rejected)
    facts = fitted.facts()
    assert set(facts) == set(CHOSEN)
    assert facts["fits"] and facts["budget_bytes"] == budget * GIB
    assert facts["estimate"]["total_bytes"] == fitted.chosen.estimate.total
    assert len(facts["rejected"]) == len(fitted.rejected)


def test_some_blocks_are_recomputed_where_that_is_enough() -> None:
    pins = {"offload": "none", "micro_batch": 4, "weights": "fp32", "optimizer_state": "fp32"}
    chosen = [fit(question(pins), round(budget * GIB)).chosen.planned.plan.recompute for budget in (29, 26, 23, 17)]
    assert chosen == ["none", 4, 2, "blocks"]


def test_a_width_whose_leanest_plan_does_not_fit_is_not_gone_through() -> None:
    fitted = fit(question(), 5 * GIB)
    assert fitted.chosen.planned.plan.weights in NARROW
    assert [c.planned.plan.weights for c in fitted.rejected[1:]] == [fitted.chosen.planned.plan.weights] * len(
        fitted.rejected[1:]
    )


def test_a_model_that_recomputes_all_blocks_or_none_has_the_other_plans() -> None:
    def some(plan: Plan, works: Sequence[Work]) -> Estimate:
        if isinstance(plan.recompute, int):
            raise UntraceableError("all or none")
        return predict(plan, works)

    assert fit(replace(question({"offload": "none"}), predict=some), 13 * GIB).chosen.planned.plan.recompute == "blocks"


def test_a_few_logits_at_a_time_come_after_recompute() -> None:
    """They save what `head_rows` of them take, and nothing that a plan with room would want."""

    def scoring(plan: Plan, works: Sequence[Work]) -> Estimate:
        return replace(predict(plan, works), logits=plan.head_rows * GIB // 128, when="head")

    asked = replace(
        question({"weights": "fp32", "offload": "none", "micro_batch": 4, "optimizer_state": "fp32"}), predict=scoring
    )
    chosen = [fit(asked, round(budget * GIB)).chosen.planned for budget in (31, 19, 17)]
    assert [(p.plan.recompute, p.plan.head_rows) for p in chosen] == [("none", 256), ("blocks", 256), ("blocks", 64)]
    assert "logits of at most 64 tokens at a time" in chosen[2].reasons
    with pytest.raises(DoesNotFitError, match=r"plan\.head_rows: auto"):
        fit(replace(asked, pins=asked.pins.model_copy(update={"head_rows": 256, "recompute": "blocks"})), 17 * GIB)


@pytest.mark.parametrize(
    ("budget", "execution", "fused", "resident"),
    [(30, "auto", True, 0), (16, "auto", False, 0), (13, "auto", False, 1), (60, "interleaved", False, 0)],
)
def test_jobs_share_forwards_take_turns_or_rest(budget: int, execution: str, fused: bool, resident: int) -> None:
    """Of four: all have gradients at once where they share, and state where none rests."""

    def held(plan: Plan, works: Sequence[Work]) -> Estimate:
        there, at_once = plan.resident_jobs or 4, 4 if plan.fused_tokens else 1
        return Estimate(8 * GIB, there * GIB, at_once * GIB, 0, 0, 0, 0, 0, "backward")

    pins = {"weights": "fp32", "offload": "none", "recompute": "none", "execution": execution}
    asked = replace(question(pins, jobs=[{"name": name} for name in "abcd"]), predict=held)
    chosen = fit(asked, budget * GIB).chosen.planned
    assert (bool(chosen.plan.fused_tokens), chosen.plan.resident_jobs) == (fused, resident)
    asked_for = execution == "interleaved"
    assert fused or f"4 jobs take turns ({'as asked' if asked_for else 'to spare memory'})" in chosen.reasons


def test_a_model_that_recomputes_nothing_has_a_leanest_plan_all_the_same() -> None:
    def never(plan: Plan, works: Sequence[Work]) -> Estimate:
        if plan.recompute != "none":
            raise UntraceableError("no blocks")
        return predict(plan, works)

    asked = replace(question({"exact": True}), predict=never)
    least = leanest(asked)
    assert least.planned.plan.recompute == "none" and least.planned.plan.offload == "weights"
    assert fit(asked, least.needs).chosen.needs == least.needs
    with pytest.raises(DoesNotFitError, match="the smallest budget"):
        fit(asked, least.needs - 1)


def test_other_runs_are_offered_where_no_plan_fits() -> None:
    full = question(method="full")
    with pytest.raises(DoesNotFitError, match=r"what would fit: .*method: lora \("):
        fit(replace(full, otherwise={"method: lora": question, "method: none": lambda: question({"weights": "fp16"})}), 5 * GIB)


def test_pins_stay() -> None:
    pins = {"recompute": "none", "weights": "fp32", "optimizer_state": "fp32"}
    plan = fit(question(pins), 11 * GIB).chosen.planned.plan
    assert (plan.recompute, plan.weights, plan.optimizer_state, plan.offload) == ("none", "fp32", "fp32", "weights")


def test_exact_plans_round_nothing() -> None:
    fitted = fit(question({"exact": True}), 8 * GIB)
    plans = [c.planned.plan for c in (fitted.chosen, *fitted.rejected)]
    assert all(plan.weights not in NARROW and plan.optimizer_state == "fp32" for plan in plans)
    assert fit(question({"offload": "none"}), 7 * GIB).chosen.planned.plan.weights in NARROW


@pytest.mark.parametrize("pins", [{}, {"exact": True}, {"weights": "fp32", "offload": "none"}])
def test_what_does_not_fit_says_what_would(pins: dict[str, Any]) -> None:
    asked = question(pins)
    with pytest.raises(DoesNotFitError, match=r"^memory: 2\.00 GiB is .* too little: the smallest budget") as caught:
        fit(asked, 2 * GIB)
    assert caught.value.exit_code == 3
    found = re.search(r"smallest budget that works here is (\S+ GiB)", str(caught.value))
    assert found is not None
    smallest = bytes_of(found[1])
    assert fit(asked, smallest).chosen.needs <= smallest
    with pytest.raises(DoesNotFitError):
        fit(asked, smallest - (GIB // 50))


def test_ways_out_fit() -> None:
    with pytest.raises(DoesNotFitError, match=r"what would fit: plan\.weights: auto") as caught:
        fit(question({"weights": "fp32", "offload": "none"}), 9 * GIB)
    assert "plan.offload: auto" in str(caught.value)
    assert fit(question({"offload": "none"}), 9 * GIB) and fit(question({"weights": "fp32"}), 9 * GIB)


def test_knobs_that_a_method_cannot_have_are_skipped() -> None:
    plan = leanest(question(method="full", max_grad_norm=None, batch_size=1)).planned.plan
    assert plan.weights not in NARROW and plan.offload != "weights"


def data_of(count: int) -> JobData:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(2, 65, (count,), generator=generator).tolist()
    scored = [torch.ones(n).index_fill(0, torch.tensor([0]), 0) for n in lengths]
    return JobData(tuple(Example(torch.zeros(len(w), dtype=torch.long), w, "x") for w in scored))


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_the_largest_chunk_is_the_largest_that_is_cut(batch_size: int, micro_batch: int) -> None:
    config = config_of({"micro_batch": micro_batch}, batch_size=batch_size, max_seq_len=64, epochs=2)
    (job,), plan, data = config.resolved_jobs(), make_plan(config).plan, data_of(40)
    chunks = []
    for step in range(total_steps(40, batch_size, 2, None)):
        chosen = [data.train[i] for i in step_indices(step, 40, batch_size, 2, None, job.seed)]
        chunks += cut_step(chosen, capacity_of(job, plan), "a", step, 0)
    work = largest_chunk(job, data, plan)
    largest = max(chunks, key=lambda c: (len(c.tokens), max(c.lengths)))
    assert (sum(work.lengths), max(work.lengths)) == (len(largest.tokens), max(largest.lengths))
    assert work.scored == sum(work.lengths) - len(work.lengths)
    assert sum(full_chunk(job, plan).lengths) == min(batch_size, micro_batch) * 64


def test_steps_that_are_not_looked_at_may_be_as_large_as_can_be() -> None:
    config = config_of({"micro_batch": 3}, batch_size=2, max_seq_len=64, steps=LOOKED_AT + 1)
    data = data_of(40)
    longest = sorted((len(e.tokens) for e in data.train), reverse=True)[:2]
    assert largest_chunk(config.resolved_jobs()[0], data, make_plan(config).plan).lengths == tuple(longest)


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 << 30), ("8GB", 8 * 10**9), ("500 MB", 5 * 10**8), ("1.5G", 3 << 29), ("9mib", 9 << 20)],
)
def test_sizes(text: str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "8 apples", "-1GiB", "1e3", "8PiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        bytes_of(text)


@pytest.mark.parametrize("value", [8, 1.5, "plenty", "0GiB", True])
def test_a_budget_that_is_none_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InputError, match="memory: "):
        config_of(memory=value)
