"""What a report is made of: headings, paragraphs, lists, tables and charts. Here as Markdown; `page.py` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: list[str]


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column is a name, the others numbers."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Point:
    """One variant in a chart; `low` and `high` are its interval in y."""

    name: str
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Chart:
    """y against x. better_right: a larger x is better, else a smaller one; a larger y always is."""

    title: str
    x_label: str
    y_label: str
    better_right: bool
    points: list[Point]


Block = Heading | Paragraph | Bullets | Table | Chart


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as Markdown; a chart is left to the HTML."""
    parts = [f"# {title}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Paragraph(text):
                parts.append(text)
            case Bullets(items):
                parts.append("\n".join(f"- {item}" for item in items))
            case Table(columns, rows):
                lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
                parts.append(
                    "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
                )
            case Chart(title, _, _, _, _):
                parts.append(f"*{title}: drawn in report.html.*")
    return "\n\n".join(parts) + "\n"
