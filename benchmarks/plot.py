"""A chart of the report's, with its labels, as an SVG file that stands by itself and suits light and dark pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from snugtune.report.charts import SIDE, Chart, Trace, chart
from snugtune.report.facts import Series

COLOURS = ("#3f76d6", "#cf6a1d", "#259a6c", "#b04f98", "#94751a", "#1592a1", "#c8453f", "#7464c0")
LEFT, TOP, WIDTH, HEIGHT = 60, 40, 560, 260
LINE = 18
"""Height of a line of the legend."""


@dataclass(frozen=True)
class Line:
    """One series: whole numbers, and a value at each."""

    label: str
    xs: Sequence[int]
    ys: Sequence[float]


def write_plot(file: Path, title: str, lines: Sequence[Line]) -> None:
    """Draw `lines` over a common axis. There must be at least one."""
    traces = [Trace(line.label, Series(list(line.xs), list(line.ys)), at, dots=True) for at, line in enumerate(lines)]
    drawn = chart(title, traces, buckets=1000, zero=True)
    assert drawn is not None
    file.write_text(svg(drawn), encoding="utf-8")


def svg(drawn: Chart) -> str:
    """The chart as a document. Pure."""
    high = TOP + HEIGHT + 30 + LINE * len(drawn.legend)
    grid = "".join(f"M0 {SIDE - round(tick.percent * SIDE / 100)}H{SIDE}" for tick in drawn.y_ticks)
    paths = [f'<path d="{grid}" stroke="#8884"/>']
    for layer in drawn.layers:
        width = 6 if layer.kind == "dots" else 2
        paths.append(f'<path d="{layer.d}" stroke="{COLOURS[layer.colour % len(COLOURS)]}" stroke-width="{width}"/>')
    texts = [_text(0, 18, drawn.title, "start", bold=True)]
    texts += [_text(LEFT - 8, TOP + HEIGHT * (1 - t.percent / 100) + 4, t.text, "end") for t in drawn.y_ticks]
    texts += [_text(LEFT + WIDTH * t.percent / 100, TOP + HEIGHT + 18, t.text, "middle") for t in drawn.x_ticks]
    for at, layer in enumerate(drawn.legend):
        y = TOP + HEIGHT + 42 + LINE * at
        colour = COLOURS[layer.colour % len(COLOURS)]
        texts.append(f'<circle cx="{LEFT + 4}" cy="{y - 4}" r="4" fill="{colour}"/>{_text(LEFT + 16, y, layer.label, "start")}')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {high}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="#808590">',
        f"<title>{escape(drawn.title)}. {escape(drawn.summary)}</title>",
        f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" '
        'overflow="visible"><g fill="none" stroke-linecap="round" style="vector-effect: non-scaling-stroke">',
        *(path.replace("<path ", '<path vector-effect="non-scaling-stroke" ') for path in paths),
        "</g></svg>",
        *texts,
        "</svg>\n",
    ])  # fmt: skip


def _text(x: float, y: float, words: str, anchor: str, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
