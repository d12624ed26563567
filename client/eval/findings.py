"""All that a suite found, and how single figures of it are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from client.eval.bench import Bench
from client.eval.compare import Comparison

JSON = dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """All that a report is made of. missing: why something could not be measured, by its name."""

    results: list[JSON]
    comparisons: list[Comparison]
    missing: dict[str, str] = field(default_factory=dict)
    gates: list[str] = field(default_factory=list)  # what failed, one line each
    bench: Bench = field(default_factory=Bench)
    study: bool = False  # whether the study's tables are wanted

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(r["variant"] for r in self.results))

    def of(self, task: str, method: str) -> list[JSON]:
        return [r for r in self.results if (r["task"], r["method"]) == (task, method)]

    def compared(self, variant: str, task: str | None = None, method: str | None = None) -> list[Comparison]:
        return [
            c for c in self.comparisons if c.second == variant and task in (None, c.task) and method in (None, c.method)
        ]

    def bytes(self, variant: str) -> int | None:
        """Of all its weights, shared ones too; None where the server does not tell."""
        size: int | None = next(r["server"]["bytes"] for r in self.results if r["variant"] == variant)
        return size

    def figure(self, variant: str, task: str, method: str) -> JSON | None:
        """The figures of one result; None where it was not measured."""
        return next((r["figures"] for r in self.of(task, method) if r["variant"] == variant), None)

    @property
    def speeds(self) -> dict[str, float]:
        """Decoded tokens/s by variant, by the server's clock."""
        return {r["variant"]: r["figures"]["decode_tok_s"] for r in self.of("throughput", "phases")}


def difference(c: Comparison) -> str:
    scale, unit = (100, " points") if c.task == "mmlu" else (1, "")
    interval = "" if c.low is None or c.high is None else f" [{c.low * scale:+.2f}, {c.high * scale:+.2f}]"
    p = "" if c.p_holm is None else f", p {p_value(c.p_holm)}"
    return f"{c.figure} {c.difference * scale:+.2f}{unit}{interval}{p}"


def p_value(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
