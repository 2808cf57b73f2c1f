"""Others' published peaks on GPUs beside what snugtune would need for the same, predicted: `python benchmarks/published.py`.

Nothing is measured, and no GPU is needed: models are known by their config.json (`configs/`). `published_peaks.json` has for each
row what was published with its source, unchanged, and apart from it ours: the same task as fields of a run, the other recipe in
numbers where its source tells it, and why the two differ. The second table has the longest context for Llama 3.1 8B.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import table

from snugtune.config import RunConfig
from snugtune.memory.choose import Model, estimator_of, question_of
from snugtune.memory.estimate import Estimate, Estimator
from snugtune.memory.fit import Question, looked_at
from snugtune.model.load import load_config, stored_width
from snugtune.model.proofs import obstacle_to_sharing
from snugtune.model.source import find_model

HERE = Path(__file__).parent
GIB = 2**30
MODEL = "llama-3.1-8b"
TASK = {"method": {"type": "lora", "r": 32}, "plan": {"weights": "nf4", "double_quant": True, "micro_batch": 1}}
"""What the longest context is asked for; the other knobs are open."""
BUDGETS = (8, 12, 16, 24, 40, 48, 80)
"""GiB: what a GPU of so many "GB" has, less what its driver keeps."""
STEP, LONGEST = 64, 2**19
"""Lengths that are looked at are multiples of the one, and below the other."""
HEAD = ("", "model", "method", "published", "snugtune", "and runtime", "differs by", "their recipe, counted", "why")


@dataclass(frozen=True)
class Task:
    """A row's run on one GPU: what it is estimated to take, in bytes, and what the other recipe is counted with."""

    estimate: Estimate
    trained: float  # numbers that train
    tokens: int
    embedding: int  # numbers of one
    vocabulary: int
    checkpoints: int  # bytes of the blocks' inputs in 16 bits

    @property
    def tensors(self) -> int:
        """What an allocator would report: without context, workspaces and rounding."""
        return self.estimate.total - self.estimate.runtime


@functools.cache
def model_of(name: str) -> Model:
    source = find_model(str(HERE / "configs" / name))
    config = load_config(source, False)
    return Model(source, config, stored_width(source, config), obstacle_to_sharing(config))


@functools.cache
def estimators(name: str) -> Estimator:
    return estimator_of(model_of(name), False)


def question(name: str, fields: Mapping[str, Any]) -> tuple[Question, RunConfig]:
    """What is to be planned for a run of these fields on a GPU that is elsewhere."""
    common = {"model": str(HERE / "configs" / name), "data": "none.jsonl", "output": "none", "device": "cuda", "batch_size": 1}
    config = RunConfig.model_validate({**common, **fields})
    return question_of(config, model_of(name), None, estimators(name), elsewhere=True), config


def task_of(name: str, fields: Mapping[str, Any]) -> Task:
    """Of a run whose knobs are pinned: every sequence is as long as may be, a step is one forward."""
    asked, config = question(name, fields)
    plan = asked.make(asked.pins).plan
    works = asked.demand(plan)
    estimate = asked.predict(plan, works)
    sizes = model_of(name).config.get_text_config()
    tokens = sum(works[0].lengths)
    assert tokens == config.batch_size * config.max_seq_len
    return Task(
        estimate=estimate,
        trained=estimate.adapters / 4,  # adapters and masters are fp32
        tokens=tokens,
        embedding=sizes.vocab_size * sizes.hidden_size,
        vocabulary=sizes.vocab_size,
        checkpoints=2 * sizes.num_hidden_layers * tokens * sizes.hidden_size,
    )


def counted(task: Task, theirs: Mapping[str, float]) -> float:
    """Bytes that another recipe takes for the same task, from how many it has for each number.

    `kept` and `embedding_kept`: state and copies, for each number that trains, or that is in the embeddings; then the larger of
    all gradients (`gradient` each), and of what there is when backward begins: block inputs (`checkpoints`), a `logit` for each
    token and word, gradients of the head (`embedding_gradients`).
    """
    kept = theirs["kept"] * task.trained + theirs["embedding_kept"] * task.embedding
    logits = theirs["logit"] * task.tokens * task.vocabulary + theirs["embedding_gradients"] * task.embedding
    begins = logits + theirs["checkpoints"] * task.checkpoints
    return task.estimate.weights + kept + max(theirs["gradient"] * task.trained, begins)


def read_rows() -> list[dict[str, Any]]:
    return json.loads((HERE / "published_peaks.json").read_text(encoding="utf-8"))


def published(row: Mapping[str, Any]) -> float | None:
    """GiB; what is printed as GB is taken for that, which is what hand counts come to."""
    said = row["published"]
    return said.get("peak_gib", said.get("peak_gb"))


def line(at: int, row: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the first table."""
    said, peak = row["published"], published(row)
    shown = said.get("note") or "" if peak is None else f"{peak:g}"
    first = (str(at), said["model"], said["method"], shown)
    if row["run"] is None:
        return (*first, "", "", "", "", row["why"])
    task = task_of(row["config"], row["run"])
    ours = task.tensors / GIB
    theirs = f"{counted(task, row['theirs']) / GIB:.1f}" if row["theirs"] else ""
    differs = "" if peak is None else f"{ours - peak:+.1f}"
    return (*first, f"{ours:.1f}", f"{task.estimate.total / GIB:.1f}", differs, theirs, row["why"])


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """How the other recipes, counted, compare with what was published of them."""
    peaks = [(published(row), row) for row in rows if row["theirs"]]
    errors = [counted(task_of(r["config"], r["run"]), r["theirs"]) / GIB / peak - 1 for peak, r in peaks if peak is not None]
    median = statistics.median(abs(e) for e in errors)
    ends = f"from {100 * min(errors):+.1f} % to {100 * max(errors):+.1f} %"
    return f"{len(errors)} recipes counted against their published peaks: median error {100 * median:.1f} %, {ends}"


def by_source(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table for each source of peaks."""
    numbered = [(at, row) for at, row in enumerate(rows, 1) if "vram_gb" not in row["published"]]
    for source in dict.fromkeys(row["published"]["source"] for _, row in numbered):
        lines = [line(at, row) for at, row in numbered if row["published"]["source"] == source]
        yield f"**{source}**\n\n{table(HEAD, lines)}"


def plans_for(length: int) -> Iterator[tuple[Question, str]]:
    """Ways to train on one sequence of so many tokens, sparing memory."""
    for offload in ("activations", "weights"):
        knobs = {"recompute": "blocks", "offload": offload, "optimizer_state": "8bit"}
        yield question(MODEL, {**TASK, "max_seq_len": length, "plan": {**TASK["plan"], **knobs}})[0], offload


@functools.cache
def least(length: int) -> tuple[int, str]:
    """Bytes of the smallest budget for one sequence of so many tokens, traced at that length; and what is kept elsewhere."""
    found = []
    for asked, offload in plans_for(length):
        planned = asked.make(asked.pins)
        found.append((looked_at(asked, planned).needs, offload))
    return min(found)


def longest(budget: int) -> tuple[int, int, str] | None:
    """Tokens, the bytes needed for them, and what is kept elsewhere; None where not even `STEP` fit.

    Each length that is looked at is traced: the one that is found, which fits, and the next, which does not, as well.
    """
    fits, too_long = STEP, LONGEST
    if least(fits)[0] > budget:
        return None
    while too_long - fits > STEP:
        below, above = least(fits)[0], least(too_long)[0]
        line = fits + (too_long - fits) * (budget - below) / (above - below)
        guess = min(max(round(line / STEP) * STEP, fits + STEP), too_long - STEP)
        for length in (guess, guess + STEP if least(guess)[0] <= budget else guess - STEP):
            if least(length)[0] <= budget:
                fits = max(fits, length)
            else:
                too_long = min(too_long, length)
    return fits, *least(fits)


def contexts(rows: Sequence[Mapping[str, Any]]) -> str:
    """The second table."""
    said = {row["published"]["vram_gb"]: row["published"] for row in rows if "vram_gb" in row["published"]}
    most = model_of(MODEL).config.get_text_config().max_position_embeddings
    lines = []
    for budget in BUDGETS:
        found = longest(budget * GIB)
        other = said[budget]
        theirs = [f"{n:,}" if n else "-" for n in (other["max_context_unsloth"], other["max_context_hf_flash2"])]
        if found is None:
            lines.append((str(budget), "none", "", "", *theirs))
        else:
            length, needs, offload = found
            shown = f"{length:,}" if length <= most else f"{most:,} (memory: {length:,})"
            lines.append((str(budget), shown, f"{needs / GIB:.2f}", offload, *theirs))
    return table(
        ("GiB", "snugtune, predicted", "needs", "kept in host memory", "Unsloth, published", "HF and flash attention"), lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("peaks", "contexts"), help="one of the tables")
    told = parser.parse_args()
    rows = read_rows()
    if told.only != "contexts":
        print("\n\n".join((*by_source(rows), summary(rows))))
    if told.only != "peaks":
        print(f"\n{contexts(rows)}")


if __name__ == "__main__":
    main()
