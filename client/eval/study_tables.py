"""The study's tables with our figures in them: accuracy and perplexity by granularity, throughput, matrix errors, and
what becomes of its reading of fake quantisation."""

from __future__ import annotations

from client.eval import study
from client.eval.blocks import Block, Bullets, Heading, Paragraph, Table
from client.eval.compare import Comparison
from client.eval.findings import Findings, difference
from client.eval.results import BASELINE

MISSING = "not measured"
NOISE = "~"  # behind a figure whose difference from bf16 is noise


def study_tables(findings: Findings) -> list[Block]:
    """All that there are figures for."""
    blocks: list[Block] = [Heading("The study's tables")]
    blocks.append(
        Paragraph(
            f"{NOISE}: no difference from {BASELINE} beyond noise; * beyond noise (Holm, over all of this "
            "report). The study's figures are those known of it: matrix errors, and the throughput of BF16."
        )
    )
    for task, method, key, scale, digits, name in (
        ("mmlu", "direct", "accuracy", 100, 2, "accuracy, direct, %"),
        ("mmlu", "generate", "accuracy", 100, 2, "accuracy, generated, %"),
        ("wikitext", "windows", "perplexity", 1, 3, "perplexity a token"),
        ("wikitext", "documents", "perplexity", 1, 3, "perplexity a word"),
    ):
        if findings.of(task, method):
            blocks.append(Heading(f"As in the study: {name}"))
            blocks.extend(_grid(findings, task, method, key, scale, digits))
    blocks += [*_throughput(findings), *_matmul(findings)]
    claims = _claims(findings)
    if claims:
        blocks += [Heading("Does fake quantisation read better?"), Bullets(claims)]
    return blocks


def _grid(findings: Findings, task: str, method: str, key: str, scale: int, digits: int) -> list[Table]:
    """Granularities down, types across; then the formats that have no granularity to choose."""

    def cell(variant: str) -> str:
        figures = findings.figure(variant, task, method)
        if figures is None:
            return MISSING
        found = findings.compared(variant, task, method)
        mark = {"noise": f" {NOISE}", "better": " *", "worse": " *"}.get(found[0].verdict, "") if found else ""
        return f"{figures[key] * scale:.{digits}f}{mark}"

    kinds = [(dtype, kind) for dtype in study.DTYPES for kind in ("", "-fake")]
    columns = [f"{dtype.upper()}{', fake' * bool(kind)}" for dtype, kind in kinds]
    rows: list[list[str]] = []
    for size in study.SIZES:
        rows.append([study.row_name(size), *(cell(f"{dtype}-{size}{kind}") for dtype, kind in kinds)])
    others = [BASELINE, *study.ACTIVATIONS]
    return [
        Table(["weights alone", *columns], rows),
        Table(["variant", "figure"], [[study.spelling(name), cell(name)] for name in others]),
    ]


def _throughput(findings: Findings) -> list[Block]:
    measured, offline = findings.of("throughput", "phases"), findings.bench.offline
    if not measured and not offline:
        return []
    columns = ["variant", "prefill, samples/s", "prefill, tokens/s", "decode, tokens/s", "how"]
    rows = [["the study, BF16", f"{study.PREFILL_SAMPLES_S:.2f}", "", f"{study.DECODE_TOK_S:.2f}", "its own"]]
    rows += [[f"the study, {name}", "", "", "", "not finished"] for name in ("INT8", "FP8")]
    for result in measured:
        f, s = result["figures"], result["settings"]
        load = f"served, {s['sequences']} x {s['prompt_tokens']} in, {s['output_tokens']} out"
        speeds = _speeds(f["prefill_samples_s"], f["prefill_tok_s"], f["decode_tok_s"])
        rows.append([study.spelling(result["variant"]), *speeds, load])
    for o in offline:
        speeds = _speeds(o.prefill_samples_s, o.prefill_tok_s, o.decode_tok_s)
        rows.append([study.spelling(o.variant), *speeds, f"offline, {o.load}"])
    text = (
        "Of device time, by the server's own counters; the study's hardware and load are not ours, so only the order "
    )
    text += "of its figures compares."
    return [Heading("As in the study: throughput"), Paragraph(text), Table(columns, rows)]


def _speeds(samples: float, prefill: float, decode: float) -> list[str]:
    return [f"{samples:,.2f}", f"{prefill:,.0f}", f"{decode:,.2f}"]


def _matmul(findings: Findings) -> list[Block]:
    bench = findings.bench
    if not bench.matmul:
        return []
    rows = []
    for shape in dict.fromkeys(line.shape for line in bench.matmul):
        if shape in study.MATMUL:
            int8, fp8 = study.MATMUL[shape]
            rows.append([f"{shape}, the study", "", f"{int8:.6f}", f"{fp8:.6f}", f"{fp8 / int8:.2f}"])
        for line in bench.matmul:
            if line.shape == shape:
                ratio = f"{line.fp8[0] / line.int8[0]:.2f}" if line.int8 and line.fp8 else ""
                cells = ["" if v is None else f"{v[0]:.6f} ± {v[1]:.6f}" for v in (line.int8, line.fp8)]
                rows.append([f"{shape}, {line.error}", line.granularity, *cells, ratio])
    text = (
        f"Mean |error| / mean |value| of N(0, 1) matrices over {bench.seeds} seeds. The study's figures fit the error "
    )
    text += "of the elements with one scale for the tensor."
    return [
        Heading("As in the study: matrix errors"),
        Paragraph(text),
        Table(["matrix", "scales", "INT8", "FP8", "FP8 / INT8"], rows),
    ]


def _claims(findings: Findings) -> list[str]:
    """What the paired comparisons say of fake formats' perplexity."""
    fakes = [c for c in findings.comparisons if c.second.endswith("-fake") and c.figure == "wikitext-windows"]
    if not fakes:
        return []
    claimed = f"{-100 * study.FAKE_PERPLEXITY:.0f} %"
    said = [f"The study reports that fake quantisation lowered perplexity by {claimed}, and calls it regularisation."]
    better = [c for c in fakes if c.verdict == "better"]
    if better:
        said += [f"Lower beyond noise: {c.second}, {difference(c)}, {_share(c)}." for c in better]
    else:
        said.append(f"Of {len(fakes)} fake formats none lowers perplexity beyond noise.")
    reach = [c for c in fakes if c.low is not None and c.low / c.base <= study.FAKE_PERPLEXITY]
    if reach:
        said.append(
            f"A fall by {claimed} lies inside the interval of {', '.join(c.second for c in reach)}: too little text."
        )
    elif all(c.low is not None for c in fakes):
        lowest = min(fakes, key=lambda c: (c.low or 0.0) / c.base)
        said.append(f"No interval reaches down to -{claimed}; the lowest is {lowest.second}'s, {_share(lowest)}.")
    apart = []
    for c in fakes:
        real = findings.compared(c.second.removesuffix("-fake"), "wikitext", "windows")
        if real:
            apart.append((abs(real[0].difference - c.difference) / c.base, c.second))
    if apart:
        widest, name = max(apart)
        said.append(
            "A fake format has the numbers of its real one and should read alike: "
            f"the two differ by {100 * widest:.2f} % of {BASELINE}'s perplexity at most ({name})."
        )
    return said


def _share(c: Comparison) -> str:
    """The difference as a share of the baseline, with its interval."""
    interval = (
        "" if c.low is None or c.high is None else f" [{100 * c.low / c.base:+.2f}, {100 * c.high / c.base:+.2f}]"
    )
    return f"{100 * c.difference / c.base:+.2f} %{interval}"
