"""What a session measured: kept line by line, so that it can go on, and told as a table."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common import spread, table
from .measure import Run
from .rows import ROWS

GEMM = "gemm"
"""The row of the ceilings."""


@dataclass
class Results:
    """`facts`: what all runs have in common; `file`: where they are kept, a line of JSON each after that of the facts."""

    facts: Mapping[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)
    file: Path | None = None

    @classmethod
    def begun(cls, file: Path | None, facts: Mapping[str, Any], resume: bool) -> "Results":
        """A new session, or one that goes on: then it must be the same work, and what failed is tried again."""
        if file is None or not file.exists():
            results = cls(dict(facts), [], file)
            results._append(results.facts)
            return results
        if not resume:
            raise SystemExit(f"{file} is there; --resume goes on with it, --show shows it")
        results = cls.kept(file)
        other = [name for name in facts if results.facts.get(name) != facts[name]]
        if other:
            raise SystemExit(f"{file}: is of other work: {', '.join(other)}; give another file")
        return results

    @classmethod
    def kept(cls, file: Path) -> "Results":
        """What a file holds; a last line that broke off does not count."""
        text = file.read_text(encoding="utf-8")
        facts, *lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if not text.endswith("\n"):
            file.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        return cls(facts, lines, file)

    def has(self, row: str, index: int) -> bool:
        return any(line["row"] == row and line["round"] == index and "failed" not in line for line in self.lines)

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._append(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")

    def runs(self, row: str) -> dict[int, Run]:
        """Those that did not fail, by round."""
        found = [line for line in self.lines if line["row"] == row and "failed" not in line]
        return {line["round"]: Run.of(line) for line in found}

    def ceilings(self, labelled: float) -> dict[int, float]:
        """Tokens a second at most, by round."""
        return {line["round"]: _ceiling(line, labelled) for line in self.lines if line["row"] == GEMM}


def _ceiling(line: Mapping[str, Any], labelled: float) -> float:
    return 1e9 * line["gflops"] / (line["flop_per_token"] + labelled * line["flop_per_label"])


def report(results: Results, against: str = "snugtune") -> str:
    """The table, and what all of its rows have in common. `against`: the row that the others are compared with, by its key."""
    rows = []
    for row in ROWS:
        if results.runs(row.key):
            rows.append([row.title, *_cells(results, row.key, against)])
        elif any(line["row"] == row.key for line in results.lines):
            rows.append([row.title, "failed", *[""] * 6])
    title = next(row.title for row in ROWS if row.key == against)
    head = ["", "tokens/s", "of the ceiling", "peak, GiB", "first step after, s", "loss at the end", "its speed", "its peak"]
    return f"{_common(results)} In the last columns: {title}, over the row.\n\n{table(head, rows)}"


def _cells(results: Results, key: str, against: str) -> list[str]:
    runs, ours = results.runs(key), results.runs(against)
    told, both = list(runs.values()), [(ours[index], run) for index, run in runs.items() if index in ours]
    shares = [100 * run.speed / results.ceilings(run.labelled)[index] for index, run in runs.items()]
    faster, leaner = [a.speed / b.speed for a, b in both], [a.peak_bytes / b.peak_bytes for a, b in both]
    return [
        spread([run.speed for run in told]),
        spread(shares) + " %",
        spread([run.peak_bytes / 2**30 for run in told], 2),
        spread([run.steps[0].at for run in told], 1),
        spread([run.loss for run in told], 3),
        *(spread(values, 2) if values else "" for values in (faster, leaner)),
    ]


def _common(results: Results) -> str:
    facts, labelled = results.facts, results.facts["label_tokens"] / results.facts["tokens"]
    gflops = [line["gflops"] for line in results.lines if line["row"] == GEMM]
    tops = list(results.ceilings(labelled).values())
    mean = facts["tokens"] / facts["examples"]
    said = (
        f"{facts['examples']} conversations of {mean:.0f} tokens on average, {labelled:.0%} learned; {facts['batch']} a step, "
        f"{facts['steps']} steps. {facts['machine']}."
    )
    return f"{said} bf16 products: {spread(gflops)} GFLOP/s, at most {spread(tops)} tokens/s." if gflops else said
