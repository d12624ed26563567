"""A report's blocks as one HTML page with everything inside it: style, and charts as SVG. Nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from client.eval.blocks import Block, Bullets, Chart, Heading, Paragraph, Point, Table
from client.eval.results import BASELINE

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 82rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .2rem .55rem; text-align: right; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; } th:first-child, td:first-child { text-align: left; }
td.worse { background: #fbdada; } td.better { background: #daf3da; } td.noise { color: #777; }
.chart { display: inline-block; max-width: 100%; margin-right: .5rem; }
svg { max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: #333; paint-order: stroke; stroke: #fff; stroke-width: 3px; }
"""
WIDTH, HEIGHT = 620, 360
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 30, 45  # margins
MOST_NAMES = 8  # points in a chart that all have their names; of more, only bf16 and those on the line


At = Callable[[float, float], tuple[float, float]]  # data to picture


def page(title: str, blocks: Sequence[Block]) -> str:
    """The whole document."""
    body = "\n".join(_block(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
        case Table(columns, rows):
            head = "".join(f"<th>{escape(column)}</th>" for column in columns)
            lines = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
            return f'<div class="wide"><table>\n<tr>{head}</tr>\n{lines}\n</table></div>'
        case Chart():
            return f'<div class="chart">{chart(block)}</div>'


def _cell(text: str) -> str:
    kind = f' class="{text}"' if text in ("worse", "better", "noise") else ""
    return f"<td{kind}>{escape(text)}</td>"


def chart(c: Chart) -> str:
    """Points with their intervals; the line joins those that no other beats in both. A name shows under the pointer."""
    xs, ys = [p.x for p in c.points], [v for p in c.points for v in (p.low, p.high)]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x0, x1 = min(x_ticks[0], *xs), max(x_ticks[-1], *xs)
    y0, y1 = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{escape(c.title)}">']
    out.append(f'<text x="{LEFT}" y="18" font-weight="bold">{escape(c.title)}</text>')
    for tick in x_ticks:
        x, y = at(tick, y0)
        out.append(
            _line(x, y, x, TOP, "#eee") + f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in y_ticks:
        x, y = at(x0, tick)
        out.append(_line(x, y, WIDTH - RIGHT, y, "#eee"))
        out.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    out.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(c.x_label)}</text>')
    out.append(
        f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(c.y_label)}</text>'
    )
    best = pareto(c.points, c.better_right)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(p.x, p.y) for p in best))
    out.append(f'<polyline points="{path}" fill="none" stroke="#4a78c4" stroke-dasharray="4 3"/>')
    taken: list[tuple[float, float]] = []
    marks = []
    for point in sorted(c.points, key=lambda p: -p.y):
        shown = len(c.points) <= MOST_NAMES or point in best or point.name == BASELINE
        marks += _point(point, at, taken, shown)
    lines_first = sorted(marks, key=lambda mark: not mark.startswith("<line"))
    return "\n".join([*out, *lines_first, "</svg>"])


def _point(point: Point, at: At, taken: list[tuple[float, float]], named: bool) -> list[str]:
    """A dot, its interval, and its name: lower where another name stands already, to the left near the right edge."""
    (x, y), (_, low), (_, high) = at(point.x, point.y), at(point.x, point.low), at(point.x, point.high)
    dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#235"><title>{escape(point.name)}</title></circle>'
    if not named:
        return [_line(x, low, x, high, "#dde"), dot]
    label = y - 8
    while any(abs(label - other_y) < 13 and abs(x - other_x) < 130 for other_x, other_y in taken):
        label += 13
    taken.append((x, label))
    anchor, shift = ("end", -8) if x > WIDTH - 150 else ("start", 8)
    text = f'<text x="{x + shift:.1f}" y="{label:.1f}" text-anchor="{anchor}">{escape(point.name)}</text>'
    return [_line(x, low, x, high, "#9ab"), dot, text]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def pareto(points: Sequence[Point], better_right: bool) -> list[Point]:
    """The points that no other equals or beats in both ways, from the best x on."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.x if better_right else p.x, -p.y)):
        if not kept or point.y > kept[-1].y:
            kept.append(point)
    return kept


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that reach from `low` or below to `high` or above."""
    span = high - low or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(span / 4))
    step = next(size * k for k in (1, 2, 5, 10) if span / (size * k) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]
