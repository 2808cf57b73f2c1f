"""Charts as SVG paths: pure functions from numbers to coordinates. The page puts the labels around them as text.

A plot is a square of `SIDE` x `SIDE` units that the page stretches, with strokes that do not scale; so labels keep their size at
any width, and the script reads the values under the pointer back from the paths, exact to a `SIDE`-th of the axis.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

from snugtune.report.facts import Series

SIDE = 10_000
WIDE = 30.0
"""An axis is logarithmic when its highest value is this many times the middle one: a spike would flatten all the rest."""


@dataclass(frozen=True)
class Bucket:
    """Neighbouring steps drawn as one: where, the lowest, the highest and the mean value. None: no finite value."""

    x: float
    low: float | None
    high: float | None
    mean: float | None


@dataclass(frozen=True)
class Scale:
    """A value axis, from `low` to `high`."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> int:
        """Units from the axis's low end."""
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return round(SIDE * (value - low) / (high - low))

    def percent(self, value: float) -> float:
        return round(100 * self.place(value) / SIDE, 2)


@dataclass(frozen=True)
class Layer:
    """One drawn thing. `kind`: band, raw, line, dots or skips; `colour`: a number of the palette; `d`: the SVG path."""

    kind: str
    label: str
    colour: int
    d: str


@dataclass(frozen=True)
class Tick:
    percent: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A drawing with its axes, ready for the template. `summary` says in words what there is to see."""

    title: str
    unit: str
    summary: str
    x: Scale
    y: Scale
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    layers: tuple[Layer, ...]

    @property
    def legend(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind in ("line", "dots")]


@dataclass(frozen=True)
class Trace:
    """One series to draw. `detail`: also its single values (or their range) behind the running mean; `dots`: mark each point."""

    label: str
    series: Series
    colour: int = 0
    detail: bool = False
    dots: bool = False


def chart(
    title: str, traces: Sequence[Trace], buckets: int, unit: str = "", zero: bool = False, skips: Sequence[int] = ()
) -> Chart | None:
    """Draw `traces` over a common step axis, thinned to `buckets` points each; None where there is nothing to draw."""
    points = [p for t in traces for p in t.series.finite()]
    if not points:
        return None
    steps = [x for t in traces for x in (t.series.xs[:1] + t.series.xs[-1:])] + list(skips)
    x, y = step_scale(min(steps), max(steps)), value_scale([v for _, v in points], zero)
    layers = [layer for trace in traces if trace.series.finite() for layer in _layers(trace, x, y, buckets)]
    if skips:
        marks = sorted({x.place(step) for step in skips})
        layers.append(Layer("skips", "skipped steps", 0, "".join(f"M{at} {SIDE}v-400" for at in marks)))
    x_ticks = tuple(Tick(x.percent(v), _short(v)) for v in ticks(x, 5, whole=True))
    y_ticks = tuple(Tick(y.percent(v), number(v)) for v in ticks(y, 4))
    return Chart(title, unit, describe(traces, unit), x, y, x_ticks, y_ticks, tuple(layers))


def _layers(trace: Trace, x: Scale, y: Scale, buckets: int) -> list[Layer]:
    series = trace.series
    if trace.dots or len(series.finite()) == 1:
        thinned = [(b.x, b.mean) for b in bucketed(series.xs, series.ys, buckets // 2)]
        dots = "".join(f"M{x.place(at)} {SIDE - y.place(v)}h0" for at, v in thinned if v is not None)
        return [Layer("link", "", trace.colour, line(thinned, x, y)), Layer("dots", trace.label, trace.colour, dots)]
    detail: list[Layer] = []
    smooth = running_mean(series.ys, len(series.ys) // 30) if trace.detail else series.ys
    if trace.detail and len(series.xs) > buckets:
        detail = [Layer("band", f"{trace.label}, range", trace.colour, band(bucketed(series.xs, series.ys, buckets), x, y))]
    elif trace.detail and smooth != series.ys:
        detail = [
            Layer("raw", f"{trace.label}, each step", trace.colour, line(list(zip(series.xs, series.ys, strict=True)), x, y))
        ]
    if not trace.detail and len(series.xs) > buckets:  # nothing behind the line: it must reach the spikes itself
        return [Layer("line", trace.label, trace.colour, line(_extremes(series, buckets), x, y))]
    means = [(b.x, b.mean) for b in bucketed(series.xs, smooth, buckets)]
    return [*detail, Layer("line", f"{trace.label}, mean" if detail else trace.label, trace.colour, line(means, x, y))]


def bucketed(xs: Sequence[int], ys: Sequence[float | None], count: int) -> list[Bucket]:
    """At most `count` buckets of neighbouring points, the lowest and the highest value of each kept."""
    size = max(1, -(-len(xs) // max(1, count)))
    found = []
    for start in range(0, len(xs), size):
        at, values = xs[start : start + size], [y for y in ys[start : start + size] if y is not None]
        x = (at[0] + at[-1]) / 2
        found.append(Bucket(x, min(values), max(values), sum(values) / len(values)) if values else Bucket(x, None, None, None))
    return found


def _extremes(series: Series, count: int) -> list[tuple[float, float | None]]:
    """The lowest and the highest point of each bucket, in their order."""
    points: list[tuple[float, float | None]] = []
    size = max(2, 2 * -(-len(series.xs) // max(1, count)))
    for start in range(0, len(series.xs), size):
        values = [
            (y, x) for x, y in zip(series.xs[start : start + size], series.ys[start : start + size], strict=True) if y is not None
        ]
        ends = sorted({min(values), max(values)}, key=lambda end: end[1]) if values else []
        points += [(at, value) for value, at in ends] or [(series.xs[start], None)]
    return points


def running_mean(ys: Sequence[float | None], reach: int) -> list[float | None]:
    """The mean of the finite values up to `reach` places to either side; a gap stays one."""
    sums, counts = [0.0], [0]
    for y in ys:
        sums.append(sums[-1] + (y or 0.0))
        counts.append(counts[-1] + (y is not None))
    means: list[float | None] = []
    for i, y in enumerate(ys):
        low, high = max(0, i - reach), min(len(ys), i + reach + 1)
        means.append(None if y is None else (sums[high] - sums[low]) / (counts[high] - counts[low]) if reach else y)
    return means


def line(points: Sequence[tuple[float, float | None]], x: Scale, y: Scale) -> str:
    """A line that breaks where a value is missing. A point alone is a dot (strokes have round ends)."""
    parts = []
    for present, group in groupby(points, key=lambda p: p[1] is not None):
        at = [f"{x.place(px)} {SIDE - y.place(py)}" for px, py in group if py is not None]
        if present:
            parts.append(f"M{'L'.join(at)}" + ("h0" if len(at) == 1 else ""))
    return "".join(parts)


def band(buckets: Sequence[Bucket], x: Scale, y: Scale) -> str:
    """The area between the lowest and the highest values; broken where a whole bucket has none."""
    parts = []
    for present, group in groupby(buckets, key=lambda b: b.high is not None):
        run = list(group)
        if present:
            top = [f"{x.place(b.x)} {SIDE - y.place(b.high)}" for b in run if b.high is not None]
            bottom = [f"{x.place(b.x)} {SIDE - y.place(b.low)}" for b in reversed(run) if b.low is not None]
            parts.append(f"M{'L'.join(top + bottom)}Z")
    return "".join(parts)


def step_scale(first: int, last: int) -> Scale:
    """From the first to the last step; one step alone stands in the middle."""
    return Scale(first, last) if last > first else Scale(first - 1, last + 1)


def value_scale(values: Sequence[float], zero: bool = False) -> Scale:
    """Room for all values, from 0 where `zero`; logarithmic where one would dwarf the rest."""
    low, high = min(values), max(values)
    if low > 0 and high > WIDE * median(values):
        return Scale(low / 1.2, high * 1.2, log=True)
    low = min(0.0, low) if zero else low
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low if zero and low == 0 else low - room, high + room)


def ticks(scale: Scale, about: int, whole: bool = False) -> list[float]:
    """Round numbers on the axis, roughly `about` of them."""
    if scale.log:
        decades = [10.0**e for e in range(math.ceil(math.log10(scale.low)), math.floor(math.log10(scale.high)) + 1)]
        return decades[:: max(1, len(decades) // about)] or [scale.low, scale.high]
    rough = (scale.high - scale.low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(1.0, step) if whole else step
    first = math.ceil(scale.low / step - 1e-9)
    return [k * step for k in range(first, math.floor(scale.high / step + 1e-9) + 1)]


def number(value: float | None) -> str:
    """Four digits, plainly: `0.0002`, `1.487`, `20,000`."""
    if value is None:
        return "-"
    if value and (abs(value) < 1e-4 or abs(value) >= 1e15):
        return f"{value:.3g}"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _short(step: float) -> str:
    """A step on its axis: `200`, `2,500`, `20k`."""
    return f"{step / 1000:g}k" if step >= 10_000 else number(step)


def describe(traces: Sequence[Trace], unit: str) -> str:
    """The course of each trace in words, for those who do not see the drawing."""
    said = []
    for trace in traces:
        points = trace.series.finite()
        if not points:
            continue
        (first_x, first), (last_x, last) = points[0], points[-1]
        low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
        said.append(
            f"{trace.label}: {number(first)} at step {first_x}, {number(last)} at step {last_x}; "
            f"lowest {number(low[1])} at step {low[0]}, highest {number(high[1])} at step {high[0]}"
        )
    return ". ".join(said) + (f". Unit: {unit}." if unit else ".")
