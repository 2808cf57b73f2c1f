"""From a run's facts to one HTML page: what is shown, in which order, how much of it. The template only lays it out."""

import base64
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from snugtune.errors import InputError
from snugtune.files import write_whole
from snugtune.folder import RunFolder
from snugtune.report.charts import SIDE, Chart, Trace, bucketed, chart, line, number, running_mean, step_scale, value_scale
from snugtune.report.facts import JobFacts, RunFacts, Sample, Series, read_facts
from snugtune.report.memory import SHOWN, memory_of
from snugtune.report.words import about, incomparable, method, plan_in_words, size
from snugtune.training.metrics import mean_ends, steps_of_mean

POINTS = 2400
"""Points a chart may have, shared by the jobs of the page: with 20 jobs it stays below a megabyte."""
COLOURS = 8
OPEN_JOBS = 3
"""With more jobs than this, each job's part is folded."""
DOTTED_JOBS = 5
"""With more jobs than this, dots of one chart would hide each other."""
SAMPLE_CHARS = 40_000
"""Characters of an answer and of a prompt that are shown, shared by the jobs; more is cut, and that is said."""
REASON_CHARS = 400
PLACES = 10
_GENERATOR = '<meta name="generator" content="snugtune report">'


@dataclass(frozen=True)
class Row:
    """One job in the overview. `result`: where it lies in the run folder; `colour` and `dash`: how its line looks."""

    job: JobFacts
    method: str
    loss: str
    held_out: str
    best: str
    state: str
    result: str
    spark: str
    colour: int
    dash: int


@dataclass(frozen=True)
class Shown:
    """What the page shows of one job. `table`: the values behind the charts, `every`-th step."""

    row: Row
    charts: list[Chart]
    columns: list[str]
    table: list[list[str]]
    every: int
    prompts: list["Prompt"]
    more_prompts: int


@dataclass(frozen=True)
class Prompt:
    """One prompt and what the model made of it; `between`: answers along the way."""

    prompt: str
    before: Sample
    after: Sample | None
    between: list[Sample]


def write_report(folder: Path, output: Path | None = None, say: Callable[[str], None] = lambda text: None) -> Path:
    """Write the page of a run (to `report.html` in its folder). Raises `InputError`, `StorageError`.

    An `output` that exists is written over only where it is such a page. `say` is told which files are broken; the page says
    so too, and shows the rest.
    """
    target = output or RunFolder(folder).report
    if output is not None and target.exists() and not _is_report(target):
        raise InputError(f"--output {target}: it exists and is no report of snugtune; give another file")
    facts = read_facts(folder)
    write_whole(target, render(facts))
    for problem in (*facts.problems, *_troubles(facts.jobs)):
        say(problem)
    return target


def _troubles(jobs: Sequence[JobFacts]) -> list[str]:
    """The jobs that did not end well, and why; of many the first ones."""
    found = [f"{job.name}: {_row(job, 0).state}" for job in jobs if job.status and job.status.reason and not job.finished]
    return found[:PLACES] + ([f"and {len(found) - PLACES} more jobs; the page tells of all"] if len(found) > PLACES else [])


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _GENERATOR.encode() in file.read(4096)
    except OSError:
        return False  # a folder, or nothing that can be read


@functools.cache  # compiling it takes longer than filling it in, and a run writes its report again and again
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("snugtune.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "size": size, "share": share, "clipped": clipped}
    return environment.get_template("page.html.jinja")


def render(run: RunFacts, written: datetime | None = None) -> str:
    """The page as text. Every value goes through the template's escaping."""
    style, script = (Markup(resources.files("snugtune.report").joinpath(name).read_text()) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rows = [_row(job, i) for i, job in enumerate(run.jobs)]
    points = max(60, min(240, POINTS // max(1, len(rows))))
    limit = max(1000, min(8000, SAMPLE_CHARS // max(1, len(rows))))
    memory = memory_of(run.plan)
    told = {key: value for key, value in run.plan.items() if memory is None or key not in SHOWN}
    return _template().render(
        run=run,
        name=run.folder.resolve().name,
        tiles=_tiles(run),
        rows=rows,
        charts=_charts_of_all(rows, max(60, points // 2)) if len(rows) > 1 else [],
        jobs=[_shown(row, run.plan, points) for row in rows],
        folded=len(rows) > OPEN_JOBS,
        memory=memory,
        plan=plan_in_words(told),
        about=about(run),
        notes=_notes(run, rows),
        side=SIDE,
        places=PLACES,
        limit=limit,
        style=style,
        script=script,
        digest=digest,
        written=(written or datetime.now()).strftime("%Y-%m-%d %H:%M"),
    )


def _row(job: JobFacts, index: int) -> Row:
    losses, held = (job.series[name].finite() for name in ("loss", "eval_loss"))
    trained = [point for point in held if point[0] > 0]
    best = min(trained, key=lambda p: p[1]) if trained else None
    best_text = f"{best[1]:.3f} (step {best[0]:,})" if best else "-"
    state = "not begun" if not job.step else f"at step {job.step:,} of {job.total:,}"
    if job.status is not None and job.status.status in ("failed", "parked") and not job.finished:
        state = f"{job.status.status}, {state}: {clipped(job.status.reason, REASON_CHARS)}"
    if job.finished:
        state = "finished" if job.step == job.total else f"stopped early, at step {job.step:,} of {job.total:,}"
    result = f"{job.artefact.parent.name}/{job.artefact.name}" if job.artefact and job.finished else "-"
    if job.finished and job.keep_best and best and best[0] != job.step:
        result += f" (the state of step {best[0]:,})"
        held = [point for point in held if point[0] <= best[0]]
    return Row(
        job,
        method(job.config) if job.config else "",
        _course(mean_ends([y for _, y in losses], steps_of_mean(len(losses)))),
        _course([y for _, y in held]),
        best_text,
        state,
        result,
        _spark(job.series["loss"]),
        index % COLOURS,
        index // COLOURS,
    )


def _course(values: Sequence[float]) -> str:
    """First and last of a series."""
    return " → ".join(f"{y:.3f}" for y in (values[:1] if len(values) < 2 else (values[0], values[-1]))) or "-"


def _notes(run: RunFacts, rows: Sequence[Row]) -> list[str]:
    """What must be known to read the losses."""
    counts = sorted({steps_of_mean(len(row.job.series["loss"].finite())) for row in rows if row.loss != "-"})
    span = f"{counts[0]} to {counts[-1]}" if counts[1:] else "".join(map(str, counts))
    means = f"Training losses are means of the first {span} and of the last {span} steps." if counts[-1:] > [1] else None
    held_out = [job.config for job in run.jobs if job.config and job.series["eval_loss"].finite()]
    return [note for note in (means, incomparable(held_out)) if note]


def _spark(series: Series) -> str:
    """A job's loss as a small line for the overview."""
    points = series.finite()
    if not points:
        return ""
    thinned = [(b.x, b.mean) for b in bucketed(series.xs, series.ys, 40)]
    return line(thinned, step_scale(series.xs[0], series.xs[-1]), value_scale([y for _, y in points]))


def _charts_of_all(rows: Sequence[Row], points: int) -> list[Chart]:
    """Each measure of all jobs over each other."""

    def traces(measure: str, smooth: bool, dots: bool) -> list[Trace]:
        series = [(row, row.job.series[measure]) for row in rows]
        means = [(row, Series(s.xs, running_mean(s.ys, len(s.ys) // 30)) if smooth else s) for row, s in series]
        return [Trace(row.job.name, s, row.colour + COLOURS * row.dash, dots=dots) for row, s in means]

    drawn = [
        chart("Held-out loss", traces("eval_loss", False, len(rows) <= DOTTED_JOBS), points),
        chart("Training loss, running mean", traces("loss", True, False), points),
    ]
    return [c for c in drawn if c]


def _shown(row: Row, plan: Mapping[str, Any], points: int) -> Shown:
    job = row.job
    scale, unit = _memory_unit(job.series["peak_memory"])
    memory = [Trace("peak so far", _scaled(job.series["peak_memory"], scale))]
    budget, steps = plan.get("budget_bytes"), job.series["peak_memory"].xs
    if isinstance(budget, (int, float)) and 0 < budget < 2**60 and steps:  # a broken plan may hold anything
        memory.append(Trace("budget", Series([steps[0], steps[-1]], [budget / scale] * 2), 6))
    s = job.series
    drawn = [
        chart("Loss", [Trace("training", s["loss"], 0, detail=True), Trace("held out", s["eval_loss"], 1, dots=True)], points,
              skips=job.skipped),
        chart("Learning rate", [Trace("learning rate", s["lr"])], points // 2, zero=True),
        chart("Gradient norm before clipping", [Trace("gradient norm", s["grad_norm"], detail=True)], points // 2, zero=True,
              skips=job.skipped),
        chart("Speed", [Trace("speed", s["tokens_per_second"], detail=True)], points // 2, "tokens/s", zero=True),
        chart("Memory", memory, points // 2, unit, zero=True),
    ]  # fmt: skip
    columns, table, every = _table(job, scale, unit, points // 3)
    prompts = _prompts(job.samples)
    most = max(4, points // 12)
    return Shown(row, [c for c in drawn if c], columns, table, every, prompts[:most], max(0, len(prompts) - most))


def _table(job: JobFacts, scale: float, unit: str, most: int) -> tuple[list[str], list[list[str]], int]:
    """Head, rows and how many steps there are to a row; evaluations are all there, while they are few."""
    values = {name: dict(zip(series.xs, series.ys, strict=True)) for name, series in job.series.items()}
    values["peak_memory"] = {x: None if y is None else y / scale for x, y in values["peak_memory"].items()}
    steps = sorted(set().union(*values.values()))
    every = max(1, -(-len(steps) // most))
    held = sorted(values["eval_loss"])
    chosen = sorted({*steps[::every], *steps[-1:], *held[:: max(1, -(-len(held) // most))]})
    columns = ["step", "loss", "held-out loss", "learning rate", "gradient norm", "tokens/s", f"memory, {unit}"]
    rows = [[f"{x:,}", *(number(column.get(x)) if x in column else "" for column in values.values())] for x in chosen]
    return columns, rows, every


def _prompts(samples: Sequence[Sample]) -> list[Prompt]:
    """Samples by prompt: the first answer, the last one, and up to five between them."""
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.index, []).append(sample)
    prompts = []
    for index in sorted(found):
        answers = sorted(found[index], key=lambda s: s.step)
        between = answers[1:-1]
        after = answers[-1] if len(answers) > 1 else None
        prompts.append(Prompt(_prompt_text(answers[0].prompt), answers[0], after, between[:: max(1, -(-len(between) // 5))]))
    return prompts


def _prompt_text(prompt: Any) -> str:
    """A prompt is a text, or the messages of a chat."""
    if isinstance(prompt, list) and all(isinstance(m, dict) and "content" in m for m in prompt):
        return "\n".join(f"{m.get('role', '')}: {m['content']}" for m in prompt)
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _tiles(run: RunFacts) -> list[tuple[str, str]]:
    """The few numbers to read first."""
    peaks = [y for job in run.jobs for _, y in job.series["peak_memory"].finite()]
    peak = run.plan.get("measured_peak_bytes") or max(peaks, default=None)
    tokens, labels = (sum(getattr(job, name) for job in run.jobs) for name in ("tokens", "label_tokens"))
    if len(run.jobs) == 1:
        row = _row(run.jobs[0], 0)
        steps = f"{row.job.step:,}" + (f" of {row.job.total:,}" if row.job.step < row.job.total else "")
        tiles = [("steps", steps), ("training loss", row.loss), ("held-out loss", row.held_out)]
    else:
        tiles = [("jobs finished", f"{sum(job.finished for job in run.jobs)} of {len(run.jobs)}")]
    tiles += [("tokens processed", f"{tokens:,}"), ("of these learned", share(labels, tokens))]
    return [*tiles, ("peak memory", size(peak))]


def _memory_unit(series: Series) -> tuple[float, str]:
    high = max((y for _, y in series.finite()), default=0.0)
    return (2.0**30, "GiB") if high >= 2**30 else (2.0**20, "MiB")


def _scaled(series: Series, scale: float) -> Series:
    return Series(series.xs, [None if y is None else y / scale for y in series.ys])


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def clipped(text: str, limit: int) -> str:
    """A text cut to `limit` characters, saying so."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} characters more)"
