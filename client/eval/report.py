"""What a run found, as blocks of headings, paragraphs, lists, tables and charts, and the blocks as Markdown.

`build` decides what is said; `page.py` draws the same blocks. A variant is called better or worse only where Holm's p
over all comparisons of the report is below 0.05. The recommendation is the smallest variant without a loss that is both
beyond noise and more than tolerable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from client.eval.compare import ALPHA, FIRST_METHODS, Comparison
from client.eval.results import BASELINE

JSON = dict[str, Any]

TOLERABLE = {"mmlu": 0.01, "wikitext": 0.01}  # a share of all questions; a share of bf16's perplexity
RULE = "beyond noise and more than 1 point of accuracy or 1 % of perplexity"


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


@dataclass(frozen=True)
class Findings:
    """All that a report is made of. speeds: tokens/s by variant; missing: variants of the preset not loaded."""

    results: list[JSON]
    comparisons: list[Comparison]
    speeds: dict[str, float]
    missing: list[str]
    gates: list[str]  # what failed, one line each

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
        """Of the weights: its own and the shared."""
        server = next(r["server"] for r in self.results if r["variant"] == variant)
        own, shared = server["own_bytes"], server["shared_bytes"]
        return None if own is None or shared is None else own + shared


def build(findings: Findings) -> list[Block]:
    """The report. The recommendation comes first."""
    blocks: list[Block] = [Heading("Recommendation"), Bullets(recommend(findings))]
    if findings.gates:
        blocks += [Heading("Gates that failed"), Bullets(findings.gates)]
    blocks += [Heading("What was measured"), *_measured(findings)]
    for method, title in (("direct", "Accuracy, direct"), ("generate", "Accuracy, generated answers")):
        if findings.of("mmlu", method):
            blocks += [Heading(title), _accuracy(findings, method)]
    for method, title in (("windows", "Perplexity a token"), ("documents", "Perplexity a word, by article")):
        if findings.of("wikitext", method):
            blocks += [Heading(title), _perplexity(findings, method)]
    blocks += _costs(findings)
    blocks += _subjects(findings)
    if findings.missing:
        blocks += [
            Heading("Not loaded"),
            Paragraph("Variants of this preset that the server does not have: " + ", ".join(findings.missing) + "."),
        ]
    blocks += [Heading("How to read this"), Bullets(_notes())]
    return blocks


def recommend(findings: Findings) -> list[str]:
    """Which variant to choose, in sentences, each with its reason."""
    if BASELINE not in findings.variants or not findings.comparisons:
        return [f"None: without {BASELINE} and another variant on this server there is nothing to compare."]
    judged = {BASELINE, *(c.second for c in findings.comparisons if c.verdict != "unknown")}
    fit = [v for v in findings.variants if v in judged and not any(map(_intolerable, findings.compared(v)))]
    sizes = {v: findings.bytes(v) for v in findings.variants}
    if any(size is None for size in sizes.values()):
        lines = ["None by size: the server does not tell the bytes of its variants."]
    else:
        lines = _smallest(findings, fit, {v: size for v, size in sizes.items() if size is not None})
    for variant in findings.variants:
        losses = "; ".join(_difference(c) for c in findings.compared(variant) if _intolerable(c))
        if losses:
            lines.append(f"Not {variant}: worse than {BASELINE} beyond noise and tolerance in {losses}.")
        gains = "; ".join(_difference(c) for c in findings.compared(variant) if c.verdict == "better")
        if gains:
            lines.append(f"{variant} is better than {BASELINE} beyond noise in {gains}.")
    return lines


def _intolerable(c: Comparison) -> bool:
    size = abs(c.difference) / (1 if c.task == "mmlu" else c.base)
    return c.verdict == "worse" and size > TOLERABLE[c.task]


def _smallest(findings: Findings, fit: list[str], sizes: dict[str, int]) -> list[str]:
    def rank(variant: str) -> tuple[int, float, float]:
        """Bytes; then speed; then how far the answers are from bf16's."""
        kl = next((c.kl for c in findings.compared(variant, "mmlu", "direct") if c.kl is not None), 0.0)
        return sizes[variant], -findings.speeds.get(variant, 0.0), kl

    best = min(fit, key=rank)
    if best == BASELINE:
        return [f"{BASELINE}: every smaller variant has a loss {RULE}."]
    share = 100 * sizes[best] / sizes[BASELINE]
    lines = [
        f"{best}: the smallest without a loss {RULE}. "
        f"Its weights take {_megabytes(sizes[best])}, {share:.0f} % of {BASELINE}'s {_megabytes(sizes[BASELINE])}."
    ]
    if best in findings.speeds and BASELINE in findings.speeds:
        ratio = findings.speeds[best] / findings.speeds[BASELINE]
        lines.append(f"It makes {findings.speeds[best]:.0f} tokens/s, {ratio:.2f} times as many as {BASELINE}.")
    for c in findings.compared(best):
        lines.append(f"Against {BASELINE}: {_difference(c)}: {c.verdict}{', but tolerable' * (c.verdict == 'worse')}.")
    direct = findings.compared(best, "mmlu", "direct")
    if direct and direct[0].low is not None and direct[0].low < 0:
        lines.append(f"A loss of up to {-100 * direct[0].low:.1f} points of accuracy would not have been seen here.")
    equal = [v for v in fit if v != best and sizes[v] == sizes[best]]
    if equal:
        reason = "it is slower" if best in findings.speeds else f"its answers are farther from {BASELINE}'s"
        lines += [f"{v} is as small; {reason}." for v in equal]
    return lines


def _difference(c: Comparison) -> str:
    scale, unit = (100, " points") if c.task == "mmlu" else (1, "")
    interval = "" if c.low is None or c.high is None else f" [{c.low * scale:+.2f}, {c.high * scale:+.2f}]"
    p = "" if c.p_holm is None else f", p {_p(c.p_holm)}"
    return f"{c.figure} {c.difference * scale:+.2f}{unit}{interval}{p}"


def _measured(findings: Findings) -> list[Block]:
    rows = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in findings.results):
        result = findings.of(task, method)[0]
        settings = {k: v for k, v in result["settings"].items() if k != "data" and v is not None}
        data = result["settings"]["data"]
        said = ", ".join(f"{k} {v}" for k, v in settings.items())
        rows.append([f"{task}-{method}", data["source"], data["sha256"][:16], said, result["date"]])
    model = ", ".join(dict.fromkeys(r["model"] for r in findings.results))
    return [
        Paragraph(f"Model: {model}, at {findings.results[0]['url']}."),
        Table(["task", "data", "sha256 of the rows", "settings", "date"], rows),
    ]


def _accuracy(findings: Findings, method: str) -> Table:
    columns = [
        "variant",
        "n",
        "right, %",
        "95 %",
        "difference, points",
        "95 %",
        "lost, won, moved",
        "p (Holm)",
        "verdict",
    ]
    columns += ["KL, nats", "agreement, %"] if method == "direct" else ["unparsed"]
    rows = []
    for result in findings.of("mmlu", method):
        f = result["figures"]
        right = f"{100 * f['accuracy']:.2f} ± {_percent(f['stderr'])}"
        row = [result["variant"], _n(f), right, f"{100 * f['low']:.1f} to {100 * f['high']:.1f}"]
        found = findings.compared(result["variant"], "mmlu", method)
        for c in found:
            assert c.flips is not None
            row += [*_paired(c, 100), f"{c.flips.lost}, {c.flips.won}, {c.flips.moved}", _p(c.p_holm), c.verdict]
        row += [""] * (9 - len(row))
        if method == "generate":
            row.append(str(f["unparsed"]))
        else:
            row += [text for c in found for text in (f"{c.kl:.2g}", f"{100 * (c.agreement or 0):.2f}")] or ["", ""]
        rows.append(row)
    return Table(columns, rows)


def _perplexity(findings: Findings, method: str) -> Table:
    columns = ["variant", "documents", "tokens" if method == "windows" else "words", "perplexity", "95 %"]
    columns += ["difference", "95 %", "p (Holm)", "verdict", *(["a byte"] if method == "documents" else [])]
    rows = []
    for result in findings.of("wikitext", method):
        f = result["figures"]
        row = [result["variant"], str(f["documents"]), _n(f), f"{f['perplexity']:.3f}"]
        row.append("" if f["low"] is None else f"{f['low']:.2f} to {f['high']:.2f}")
        for c in findings.compared(result["variant"], "wikitext", method):
            row += [*_paired(c, 1), _p(c.p_holm), c.verdict]
        row += [""] * (9 - len(row))
        rows.append([*row, f"{f['byte_perplexity']:.4f}"] if method == "documents" else row)
    return Table(columns, rows)


def _paired(c: Comparison, scale: float) -> list[str]:
    interval = "" if c.low is None or c.high is None else f"{c.low * scale:+.2f} to {c.high * scale:+.2f}"
    return [f"{c.difference * scale:+.3f}" if scale == 1 else f"{c.difference * scale:+.2f}", interval]


def _costs(findings: Findings) -> list[Block]:
    sizes = {v: findings.bytes(v) for v in findings.variants}
    known = {v: size for v, size in sizes.items() if size is not None}
    if not known:
        return []
    columns = ["variant", "weights", "of bf16's, %", *(["tokens/s"] if findings.speeds else [])]
    rows = []
    for variant, size in known.items():
        share = f"{100 * size / known[BASELINE]:.0f}" if BASELINE in known else ""
        speed = f"{findings.speeds[variant]:.0f}" if variant in findings.speeds else ""
        rows.append([variant, _megabytes(size), share, *([speed] if findings.speeds else [])])
    blocks: list[Block] = [Heading("Accuracy against cost"), Table(columns, rows)]
    exams = {r["variant"]: r["figures"] for r in findings.of("mmlu", FIRST_METHODS["mmlu"])}

    def points(xs: dict[str, float]) -> list[Point]:
        return [
            Point(v, xs[v], *(100 * f[key] for key in ("accuracy", "low", "high"))) for v, f in exams.items() if v in xs
        ]

    megabytes = {v: size / 1e6 for v, size in known.items()}
    for title, label, right, xs in (
        ("Accuracy against bytes", "weights, MB", False, megabytes),
        ("Accuracy against speed", "tokens/s", True, findings.speeds),
    ):
        if points(xs):
            blocks.append(Chart(title, label, "right, %", right, points(xs)))
    return blocks


def _subjects(findings: Findings) -> list[Block]:
    blocks: list[Block] = []
    exams = findings.of("mmlu", "direct")
    if exams and exams[0]["figures"]["by_category"]:
        names = list(exams[0]["figures"]["by_category"])
        rows = [[r["variant"], *(_score(r["figures"]["by_category"].get(n)) for n in names)] for r in exams]
        blocks += [Heading("Accuracy by category, direct, %"), Table(["variant", *names], rows)]
    compared = [c for c in findings.comparisons if (c.task, c.method) == ("mmlu", "direct") and c.flips is not None]
    if not compared or BASELINE not in [r["variant"] for r in exams]:
        return blocks
    base = next(r for r in exams if r["variant"] == BASELINE)["figures"]["by_subject"]
    rows = [[s, str(score["n"]), _score(score), *(_flips(c, s) for c in compared)] for s, score in base.items()]
    return [
        *blocks,
        Heading("Flips by subject, direct"),
        Paragraph(f"Answers that {BASELINE} had right and the variant has wrong (-), and the other way (+)."),
        Table(["subject", "n", f"{BASELINE}, %", *(c.second for c in compared)], rows),
    ]


def _flips(c: Comparison, subject: str) -> str:
    lost, won = c.flips.by_subject.get(subject, (0, 0)) if c.flips else (0, 0)
    return " ".join([*([f"-{lost}"] if lost else []), *([f"+{won}"] if won else [])]) or "·"


def _notes() -> list[str]:
    return [
        "± is one standard error. The 95 % interval of an accuracy is Wilson's; of a perplexity, over documents with "
        "Student's t.",
        "Variants answered the same questions, so a difference is judged in pairs and is known better than the two "
        "figures: McNemar's exact test for accuracy, a paired bootstrap over documents for perplexity.",
        f"p is corrected by Holm over all comparisons of this report. From {ALPHA} on a difference is noise: it is no "
        "evidence that a precision is better, and none that it is equal; the interval says what is still possible.",
        "lost: bf16 has it right, the variant wrong; won: the other way; moved: two different wrong answers.",
        "KL is the mean divergence from bf16's distribution over the four letters; agreement is the share of questions "
        "with the same answer, right or wrong.",
        "Failed requests are in no figure; n counts what was answered. Unparsed answers count as wrong.",
    ]


def _n(figures: JSON) -> str:
    return f"{figures['n']:,}" + (f" ({figures['failed']} requests failed)" if figures["failed"] else "")


def _score(score: JSON | None) -> str:
    return "" if score is None else f"{100 * score['accuracy']:.1f}"


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.2f}"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


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
