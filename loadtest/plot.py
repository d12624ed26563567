"""Line plots: as inline SVG, for a report that is one file and needs a browser and nothing else, and as PNG.

Only `save_png` needs a library, matplotlib (the extra `plot`).
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 46
NOTHING = "nothing was measured"
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")


class Line(NamedTuple):
    """One curve. `dashed` is for limits."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


class Plot(NamedTuple):
    """`lines` over common axes; y begins at 0."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False


def svg(plot: Plot) -> str:
    """The plot as <svg>. A plot without points says so."""
    points = [p for line in plot.lines for p in line.points]
    body = [f'<text x="{LEFT}" y="18" class="title">{html.escape(plot.title)}</text>']
    if not points:
        body.append(f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">{NOTHING}</text>')
    else:
        xs = [x for x, _ in points]
        axis = Axes(min(xs), max(xs), max(y for _, y in points), plot.log_x)
        body += axis.frame(plot.x_label, plot.y_label)
        for i, line in enumerate(plot.lines):
            body += _curve(line, axis, COLOURS[i % len(COLOURS)])
        body += _legend(plot.lines)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(body)}</svg>'


def save_png(title: str, plots: Sequence[Plot], path: str, columns: int = 3) -> None:
    """All plots in one picture, row by row. Raises OSError when it cannot be written."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    num_rows = math.ceil(len(plots) / columns)
    figure = Figure(figsize=(5.6 * columns, 3.1 * num_rows + 0.5), dpi=90, layout="constrained")
    figure.suptitle(title)
    places = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for place, plot in zip(places, plots, strict=False):
        place.set_title(plot.title, fontsize=10, loc="left")
        place.set_xlabel(plot.x_label, fontsize=8)
        place.set_ylabel(plot.y_label, fontsize=8)
        place.tick_params(labelsize=8)
        place.grid(alpha=0.3)
        drawn = [line for line in plot.lines if line.points]
        for i, line in enumerate(plot.lines):
            if line.points:
                style = "--" if line.dashed else ".-" if len(line.points) <= 20 and not plot.log_x else "-"
                place.plot(
                    *zip(*line.points, strict=True), style, lw=1.2, color=COLOURS[i % len(COLOURS)], label=line.name
                )
        if not drawn:
            place.text(0.5, 0.5, NOTHING, ha="center", transform=place.transAxes)
        elif plot.log_x:
            place.set_xscale("log")
            place.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            place.xaxis.set_major_formatter("{x:g}")
            place.xaxis.set_minor_formatter(NullFormatter())
        place.set_ylim(bottom=0)
        if len(plot.lines) > 1 and drawn:
            place.legend(fontsize=7, loc="upper left")
    for place in places[len(plots) :]:
        place.axis("off")
    figure.savefig(path, format="png")


class Axes:
    """Where values lie on the picture."""

    def __init__(self, low: float, high: float, top: float, log_x: bool) -> None:
        self.log_x = log_x
        if log_x:
            low = max(low, 1e-3)
            high = max(high, low)
        if high <= low:
            low, high = (low / 1.5, low * 1.5) if log_x else (low - 0.5, low + 0.5)
        self.low, self.high, self.top = low, high, top if top > 0 else 1.0

    def x(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log_x:
            value, low, high = (math.log10(max(v, self.low)) for v in (value, low, high))
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.top * (HEIGHT - TOP - BOTTOM)

    def frame(self, x_label: str, y_label: str) -> list[str]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        out = [f'<path d="M{LEFT} {TOP}V{bottom}H{right}" class="axis"/>']
        for tick in _ticks(0.0, self.top):
            y = self.y(tick)
            out.append(f'<path d="M{LEFT} {y:.1f}H{right}" class="grid"/>')
            out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for tick in _decades(self.low, self.high) if self.log_x else _ticks(self.low, self.high):
            x = self.x(tick)
            out.append(f'<path d="M{x:.1f} {TOP}V{bottom}" class="grid"/>')
            out.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
        middle = (LEFT + right) / 2
        out.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>')
        up = (TOP + bottom) / 2
        out.append(
            f'<text transform="translate(14 {up}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
        )
        return out


def _curve(line: Line, axis: Axes, colour: str) -> list[str]:
    if not line.points:
        return []
    coords = [(axis.x(x), axis.y(y)) for x, y in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in coords)
    dashes = ' stroke-dasharray="6 4"' if line.dashed else ""
    out = [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dashes}/>']
    if len(coords) <= 20 and not line.dashed and not axis.log_x:
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in coords]
    return out


def _legend(lines: Sequence[Line]) -> list[str]:
    if len(lines) < 2:
        return []
    width = 40 + 6.2 * max(len(line.name) for line in lines)
    out = [f'<rect x="{LEFT + 6}" y="{TOP}" width="{width:.0f}" height="{15 * len(lines) + 6}" class="box"/>']
    for i, line in enumerate(lines):
        y = TOP + 8 + 15 * i
        out.append(f'<rect x="{LEFT + 12}" y="{y}" width="14" height="3" fill="{COLOURS[i % len(COLOURS)]}"/>')
        out.append(f'<text x="{LEFT + 32}" y="{y + 5}" class="legend">{html.escape(line.name)}</text>')
    return out


def _ticks(low: float, high: float) -> list[float]:
    """About five round values."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 where there is room."""
    steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**e for e in exponents for m in steps]
    return [v for v in found if low <= v <= high]
