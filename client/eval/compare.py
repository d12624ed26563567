"""Two results of one task, question by question or document by document, and gates on the difference.

`compare` pairs the rows that both have; what either failed is left out, and the number of pairs says so. A difference
counts as real when Holm's p over all comparisons made together is below 0.05; everything else is called noise.

A gate is FIGURE < BASELINE - MARGIN (or >, +), as in "mmlu<bf16-1.0" or "wikitext>bf16+0.2": accuracy in percentage
points, perplexity in units of itself. FIGURE is a task (its first method) or TASK-METHOD. A variant fails a gate when
the whole 95 % interval of its paired difference lies beyond the margin; with `strict`, when the difference itself does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from client.eval.data import EvalError
from client.eval.results import BASELINE
from client.eval.stats import holm, kl_divergence, paired_perplexity, paired_proportions, ratio
from client.eval.wikitext import by_document, weight_index

JSON = dict[str, Any]
ALPHA = 0.05
FIRST_METHODS = {"mmlu": "direct", "wikitext": "windows"}


@dataclass(frozen=True)
class Flips:
    """Answers that differ. lost: the first had it right, the second wrong; won: the other way; moved: both wrong."""

    lost: int
    won: int
    moved: int
    by_subject: dict[str, tuple[int, int]]  # lost, won

    @property
    def total(self) -> int:
        return self.lost + self.won + self.moved


@dataclass(frozen=True)
class Comparison:
    """`second` against `first`. difference, low and high are of accuracies (0 to 1) or perplexities; `p` is before,
    `p_holm` after correction; None where there is too little data. kl and agreement are of the direct method."""

    task: str
    method: str
    first: str
    second: str
    pairs: int  # questions, or documents
    base: float  # the first's figure over the pairs
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None = None
    flips: Flips | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    agreement: float | None = None

    @property
    def figure(self) -> str:
        return f"{self.task}-{self.method}"

    @property
    def verdict(self) -> str:
        """ "noise", "better" or "worse"; "unknown" where there is too little data."""
        if self.p_holm is None:
            return "unknown"
        if self.p_holm >= ALPHA or not self.difference:
            return "noise"
        return "better" if (self.difference > 0) == (self.task == "mmlu") else "worse"


def compare(first: JSON, second: JSON) -> Comparison:
    """Pair two results. Raises EvalError where they are not of the same questions."""
    names = [f"{r['model']}:{r['variant']}" for r in (first, second)]
    if first["task"] not in FIRST_METHODS:
        raise EvalError(f"{first['task']} is not compared in pairs: its figures stand in the report")
    for key in ("task", "method", "settings"):
        if first[key] != second[key]:
            raise EvalError(f"{names[0]} and {names[1]} cannot be compared: their {key} differ")
    find = paired_answers if first["task"] == "mmlu" else paired_documents
    try:
        return find(first, second)
    except (KeyError, TypeError, IndexError, ValueError) as e:
        if isinstance(e, EvalError):
            raise
        raise EvalError(
            f"a row of {names[0]} or {names[1]} is not as it was written: {type(e).__name__}: {e}"
        ) from None


def paired_answers(first: JSON, second: JSON) -> Comparison:
    pairs = _pairs(first, second)
    right = [(a["picked"] == a["answer"], b["picked"] == b["answer"]) for a, b in pairs]
    lost, won = right.count((True, False)), right.count((False, True))
    moved = sum(a["picked"] != b["picked"] for a, b in pairs) - lost - won
    subjects: dict[str, list[int]] = {}
    for (a, _), (was, now) in zip(pairs, right, strict=True):
        counts = subjects.setdefault(a["subject"], [0, 0])
        counts[0] += was and not now
        counts[1] += now and not was
    found = paired_proportions(lost, won, len(pairs))
    comparison = Comparison(
        *_heading(first, second),
        len(pairs),
        sum(was for was, _ in right) / len(pairs),
        found.value,
        found.low,
        found.high,
        found.p,
        flips=Flips(lost, won, moved, {s: (c[0], c[1]) for s, c in sorted(subjects.items())}),
    )
    if first["method"] != "direct":
        return comparison
    divergence = ratio([kl_divergence(a["logprobs"], b["logprobs"]) for a, b in pairs], [1.0] * len(pairs))
    agreement = sum(a["picked"] == b["picked"] for a, b in pairs) / len(pairs)
    return replace(comparison, kl=divergence.value, kl_stderr=divergence.stderr, agreement=agreement)


def paired_documents(first: JSON, second: JSON) -> Comparison:
    a, b = ({r["id"]: r for r in result["rows"]} for result in (first, second))
    failed = {i for i in a.keys() | b.keys() if "error" in a.get(i, {"error": 0}) or "error" in b.get(i, {"error": 0})}
    method = first["method"]
    rows = [[{"id": i, "error": ""} if i in failed else r for i, r in side.items()] for side in (a, b)]
    before, after = (by_document(side, method) for side in rows)
    documents = sorted(before.keys() & after.keys())
    if not documents:
        raise EvalError(f"{first['variant']} and {second['variant']} have no document in common")
    weight = weight_index(method)
    losses, others = ([side[d][0] for d in documents] for side in (before, after))
    weights = [before[d][weight] for d in documents]
    found = paired_perplexity(losses, others, weights)
    total = math.fsum(weights)
    base = math.exp(math.fsum(losses) / total)
    value = math.exp(math.fsum(others) / total) - base
    low, high, p = (found.low, found.high, found.p) if found else (None, None, None)
    return Comparison(*_heading(first, second), len(documents), base, value, low, high, p)


def correct(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with Holm's p over all of them that have one."""
    tested = [c for c in comparisons if c.p is not None]
    adjusted = dict(zip(map(id, tested), holm([c.p for c in tested if c.p is not None]), strict=True))
    return [replace(c, p_holm=adjusted.get(id(c))) for c in comparisons]


def against_baseline(results: Sequence[JSON]) -> list[Comparison]:
    """Every variant against `bf16` of the same model, task and method, corrected together."""
    paired = [r for r in results if r["task"] in FIRST_METHODS]
    base = {(r["model"], r["task"], r["method"]): r for r in paired if r["variant"] == BASELINE}
    pairs = [(base.get((r["model"], r["task"], r["method"])), r) for r in paired if r["variant"] != BASELINE]
    return correct([compare(b, r) for b, r in pairs if b is not None])


def _heading(first: JSON, second: JSON) -> tuple[str, str, str, str]:
    return first["task"], first["method"], first["variant"], second["variant"]


def _pairs(first: JSON, second: JSON) -> list[tuple[JSON, JSON]]:
    others = {r["id"]: r for r in second["rows"] if "error" not in r}
    pairs = [(r, others[r["id"]]) for r in first["rows"] if "error" not in r and r["id"] in others]
    if not pairs:
        raise EvalError(f"{first['variant']} and {second['variant']} have no answered question in common")
    return pairs


@dataclass(frozen=True)
class Gate:
    """A figure of every variant, below (or above) the baseline's by more than a margin, fails."""

    text: str
    task: str
    method: str
    below: bool
    baseline: str
    margin: float  # signed, added to the baseline; accuracy as a share, perplexity as it is

    def failures(self, comparisons: Sequence[Comparison], strict: bool) -> list[str]:
        """A line for each variant that fails. Raises EvalError where there is nothing to judge."""
        found = [c for c in comparisons if (c.task, c.method, c.first) == (self.task, self.method, self.baseline)]
        if not found:
            raise EvalError(f"--fail-if {self.text!r}: no {self.task}-{self.method} was compared with {self.baseline}")
        unknown = [c.second for c in found if c.low is None]
        if unknown and not strict:
            raise EvalError(f"--fail-if {self.text!r}: too few documents to judge {', '.join(unknown)}; --strict does")
        return [self._line(c) for c in found if self._fails(c, strict)]

    def _fails(self, c: Comparison, strict: bool) -> bool:
        """An interval lies wholly below the margin when its upper end does."""
        end = c.difference if strict else c.high if self.below else c.low
        assert end is not None
        return end < self.margin if self.below else end > self.margin

    def _line(self, c: Comparison) -> str:
        scale, unit = (100, " points") if self.task == "mmlu" else (1, "")
        interval = "" if c.low is None or c.high is None else f" [{c.low * scale:+.2f}, {c.high * scale:+.2f}]"
        return f"{c.second}: {c.figure} {c.difference * scale:+.2f}{unit}{interval} against {c.first}: {self.text}"


def parse_gate(text: str) -> Gate:
    """Raises EvalError with the grammar."""
    found = re.fullmatch(
        r"\s*(mmlu|wikitext)(?:-(\w+))?\s*([<>])\s*([A-Za-z][\w.+-]*?)(?<![+-])\s*(?:([+-])\s*(\d+(?:\.\d+)?))?\s*",
        text,
    )
    if found is None:
        raise EvalError(f"--fail-if {text!r} is not like 'mmlu<bf16-1.0' or 'wikitext>bf16+0.2'")
    task, method, sign, baseline, direction, size = found.groups()
    allowed = {"mmlu": ("direct", "generate"), "wikitext": ("windows", "documents")}[task]
    if method is not None and method not in allowed:
        raise EvalError(f"--fail-if {text!r}: {task} has the methods {' and '.join(allowed)}")
    margin = float(size or 0) * (-1 if direction == "-" else 1) / (100 if task == "mmlu" else 1)
    return Gate(text, task, method or FIRST_METHODS[task], sign == "<", baseline, margin)
