"""What a run found, as the blocks of a report. A variant is called better or worse only where Holm's p over all
comparisons of the report is below 0.05."""

from __future__ import annotations

from client.eval.blocks import Block, Bullets, Chart, Heading, Paragraph, Point, Table
from client.eval.compare import ALPHA, FIRST_METHODS, Comparison
from client.eval.findings import JSON, Findings, megabytes, p_value
from client.eval.recommend import recommend
from client.eval.results import BASELINE
from client.eval.study_tables import study_tables


def build(findings: Findings) -> list[Block]:
    """The report. The recommendation comes first."""
    blocks: list[Block] = [Heading("Recommendation"), Bullets(recommend(findings))]
    if findings.gates:
        blocks += [Heading("Gates that failed"), Bullets(findings.gates)]
    if findings.missing:
        reasons: dict[str, list[str]] = {}
        for name, reason in findings.missing.items():
            reasons.setdefault(reason, []).append(name)
        blocks += [Heading("Not measured"), Bullets([f"{', '.join(names)}: {why}" for why, names in reasons.items()])]
    blocks += [Heading("What was measured"), *_measured(findings)]
    blocks += _costs(findings)
    if findings.study:
        blocks += study_tables(findings)
    for method, title in (("direct", "Accuracy, direct"), ("generate", "Accuracy, generated answers")):
        if findings.of("mmlu", method):
            blocks += [Heading(f"{title}, against {BASELINE}"), _accuracy(findings, method)]
    for method, title in (("windows", "Perplexity a token"), ("documents", "Perplexity a word, by article")):
        if findings.of("wikitext", method):
            blocks += [Heading(f"{title}, against {BASELINE}"), _perplexity(findings, method)]
    blocks += _subjects(findings)
    return [*blocks, Heading("How to read this"), Bullets(_notes())]


def _measured(findings: Findings) -> list[Block]:
    rows = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in findings.results):
        result = findings.of(task, method)[0]
        settings = {k: v for k, v in result["settings"].items() if k != "data" and v is not None}
        data = result["settings"].get("data", {"source": "random ids", "sha256": ""})
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
            row += [*_paired(c, 100), f"{c.flips.lost}, {c.flips.won}, {c.flips.moved}", p_value(c.p_holm), c.verdict]
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
            row += [*_paired(c, 1), p_value(c.p_holm), c.verdict]
        row += [""] * (9 - len(row))
        rows.append([*row, f"{f['byte_perplexity']:.4f}"] if method == "documents" else row)
    return Table(columns, rows)


def _paired(c: Comparison, scale: float) -> list[str]:
    interval = "" if c.low is None or c.high is None else f"{c.low * scale:+.2f} to {c.high * scale:+.2f}"
    return [f"{c.difference * scale:+.3f}" if scale == 1 else f"{c.difference * scale:+.2f}", interval]


def _costs(findings: Findings) -> list[Block]:
    sizes = {v: size for v in findings.variants if (size := findings.bytes(v)) is not None}
    exams = {r["variant"]: r["figures"] for r in findings.of("mmlu", FIRST_METHODS["mmlu"])}
    speeds = findings.speeds
    rows = []
    for variant in findings.variants:
        size, phases = sizes.get(variant), findings.figure(variant, "throughput", "phases")
        share = f"{100 * size / sizes[BASELINE]:.0f}" if size is not None and BASELINE in sizes else ""
        rates = ["", "", ""]
        if phases:
            rates = [f"{phases['prefill_tok_s']:,.0f}", f"{phases['decode_tok_s']:,.0f}"]
            rates.append(f"{phases['low']:,.0f} to {phases['high']:,.0f}")
        rows.append([variant, "" if size is None else megabytes(size), share, *rates])
    blocks: list[Block] = [Heading("Accuracy against cost")]

    def points(xs: dict[str, float]) -> list[Point]:
        return [
            Point(v, xs[v], *(100 * f[key] for key in ("accuracy", "low", "high"))) for v, f in exams.items() if v in xs
        ]

    for title, label, right, xs in (
        ("Accuracy against bytes", "weights, MB", False, {v: size / 1e6 for v, size in sizes.items()}),
        ("Accuracy against speed", "decoded tokens/s", True, speeds),
    ):
        if points(xs):
            blocks.append(Chart(title, label, "right, %", right, points(xs)))
    columns = ["variant", "weights", f"of {BASELINE}'s, %", "prefill, tokens/s", "decode, tokens/s", "by round"]
    return [*blocks, Table(columns, rows)] if sizes or speeds else []


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
