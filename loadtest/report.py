"""What a load test leaves behind: NAME.json with everything, NAME.csv with a row a request, NAME.html to look at.

The plots of the page also go into one picture, NAME.png, when asked for.
"""

from __future__ import annotations

import csv
import html
import json
from pathlib import Path
from typing import Any

from loadtest.plot import Line, Plot, save_png, svg
from loadtest.settings import LoadError
from loadtest.stream import Record

COLUMNS = Record._fields[:-1]
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1em auto; max-width: 1600px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px } th, td { padding: 3px 9px; text-align: right; white-space: nowrap }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 14px; margin: 1em 0 }
svg { border: 1px solid #ddd; background: #fff } svg text { font: 11px system-ui, sans-serif; fill: #333 }
svg .title { font-size: 13px; font-weight: 600 } .axis { fill: none; stroke: #444 } .grid { stroke: #eee }
svg .box { fill: #fff; fill-opacity: 0.8 }
.warn { color: #a40000 } .scroll { overflow-x: auto } details { margin: 1em 0 }
"""


def save(document: dict[str, Any], name: str, png: bool = False) -> None:
    """Write the three files, and with `png` the picture. Raises LoadError when that fails."""
    try:
        Path(f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
        with Path(f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["run", "load", *COLUMNS])
            for number, run in enumerate(document["runs"]):
                names = document["settings"]["models"]
                for row in run["rows"]:
                    writer.writerow([number, load_name(run), names[row[0]], *row[1:]])
        Path(f"{name}.html").write_text(page(document), encoding="utf-8")
        if png:
            words = f"{_title(document)}\n{_headline(document)}"
            save_png(words, _plots(document["settings"], document["runs"]), f"{name}.png")
    except OSError as e:
        raise LoadError(f"--out: cannot write {name}: {e.strerror}") from None


def load_name(run: dict[str, Any]) -> str:
    if run["concurrency"]:
        return f"{run['concurrency']} streams"
    return f"{run['rate']:g} requests/s" if run["rate"] else "trace"


def page(document: dict[str, Any]) -> str:
    """The whole report as one HTML document."""
    settings, runs = document["settings"], document["runs"]
    title = _title(document)
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(_headline(document))}</p>"]
    for run in runs:
        parts += [f'<p class="warn">{load_name(run)}: {html.escape(w)}</p>' for w in _warnings(run)]
    parts.append(f'<div class="scroll">{_table(runs)}</div>')
    if any(run["models"] for run in runs):
        parts.append(f'<h2>By variant</h2><div class="scroll">{_models_table(runs)}</div>')
    parts.append(f'<div class="plots">{"".join(map(svg, _plots(settings, runs)))}</div>')
    given = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in settings.items())
    parts.append(f"<details><summary>Settings</summary><table>{given}</table></details>")
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en>{head}<body>{''.join(parts)}</body></html>"


def _title(document: dict[str, Any]) -> str:
    return f"Load test of {', '.join(document['settings']['models'])}"


def _headline(document: dict[str, Any]) -> str:
    s = document["settings"]
    text = f"{s['url']}, {s['arrivals']} arrivals, {s['api']}."
    if "highest_rate" in document:
        best = document["highest_rate"]
        found = f"{best:g} requests/s" if best else "none"
        text += f" Highest rate that kept {', '.join(s['slo'])}: {found}."
    return text


def _warnings(run: dict[str, Any]) -> list[str]:
    out = list(run["client"]["warnings"])
    out += [f"{count} x {kind}: {run['first_errors'][kind]}" for kind, count in run["errors_by_kind"].items()]
    return [*out, "interrupted"] if run["interrupted"] else out


TIMES = (("ttft", "TTFT"), ("itl", "ITL"), ("tpot", "time a token"), ("e2e", "end to end"))


def _cells(figures: dict[str, Any]) -> str:
    cells = [f"{figures['done']}", f"{figures['errors']}", f"{figures['requests_per_second']:.2f}"]
    cells += [f"{figures['output_tokens_per_second']:.1f}", f"{figures['prompt_tokens_per_second']:.1f}"]
    for name, _ in TIMES:
        found = figures[name]
        cells.append(" / ".join(f"{found[k]:.1f}" for k in ("p50", "p90", "p99", "max")) if found else "-")
    cells.append(f"{figures['speed']['p50']:.1f}" if figures["speed"] else "-")
    return "".join(f"<td>{cell}</td>" for cell in cells)


HEAD = "<th>done</th><th>errors</th><th>req/s</th><th>out tok/s</th><th>in tok/s</th>" + "".join(
    f"<th>{text} ms p50/p90/p99/max</th>" for _, text in TIMES
) + "<th>tok/s a request, p50</th>"  # fmt: skip


def _table(runs: list[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        slo = (
            "" if run["slo"] is None else "kept" if run["slo"]["kept"] else html.escape("; ".join(run["slo"]["broken"]))
        )
        queue, client = run["queue"], run["client"]
        late = f"{queue['p99']:.1f}" if queue else "-"
        own = f"<td>{late}</td><td>{client['cpu']:.0%} of {client['processes']}</td><td>{slo}</td>"
        rows.append(f"<tr><td>{load_name(run)}</td>{_cells(run)}{own}</tr>")
    more = "<th>client queue ms p99</th><th>client CPU</th><th>SLO</th>"
    return f"<table><tr><th>load</th>{HEAD}{more}</tr>{''.join(rows)}</table>"


def _models_table(runs: list[dict[str, Any]]) -> str:
    rows = [
        f"<tr><td>{html.escape(name)}, {load_name(run)}</td>{_cells(figures)}</tr>"
        for run in runs
        for name, figures in run["models"].items()
    ]
    return f"<table><tr><th>variant</th>{HEAD}</tr>{''.join(rows)}</table>"


def _plots(settings: dict[str, Any], runs: list[dict[str, Any]]) -> list[Plot]:
    plots = []
    runs = sorted(runs, key=lambda r: r["concurrency"] or r["rate"] or 0)
    if len(runs) > 1 and all(run["concurrency"] or run["rate"] for run in runs):
        plots += _by_load(settings, runs)
    for name, text in (*TIMES, ("speed", "speed")):
        unit = "tokens/s of one request" if name == "speed" else "ms"
        lines = [Line(load_name(run), _distribution(run["histograms"][name])) for run in runs]
        plots.append(Plot(f"{text}: share of values up to", unit, "%", lines, log_x=True))
    for key, text in (("tokens", "output tokens/s"), ("in_flight", "requests in flight")):
        lines = [Line(load_name(run), list(enumerate(run["timeline"][key]))) for run in runs]
        plots.append(Plot(f"{text} over time", "seconds", text, lines))
    return plots


def _by_load(settings: dict[str, Any], runs: list[dict[str, Any]]) -> list[Plot]:
    x_label = "streams at once" if runs[0]["concurrency"] else "requests/s"
    xs = [run["concurrency"] or run["rate"] for run in runs]
    tokens = Line("out", [(x, run["output_tokens_per_second"]) for x, run in zip(xs, runs, strict=True)])
    plots = [Plot("Output tokens/s by load", x_label, "tokens/s", [tokens])]
    for name, text in (("ttft", "TTFT"), ("itl", "ITL")):
        lines = [
            Line(q, [(x, run[name][q]) for x, run in zip(xs, runs, strict=True) if run[name]])
            for q in ("p50", "p90", "p99")
        ]
        for limit in settings["slo"]:
            if limit.startswith(name):
                value = float(limit.partition("=")[2].removesuffix("ms"))
                lines.append(Line(limit, [(min(xs), value), (max(xs), value)], dashed=True))
        plots.append(Plot(f"{text} by load", x_label, "ms", lines))
    return plots


def _distribution(histogram: list[list[float]]) -> list[tuple[float, float]]:
    """Running share in percent at each bucket's upper bound."""
    total, seen, out = sum(count for _, count in histogram), 0.0, []
    for bound, count in histogram:
        seen += count
        out.append((bound, 100 * seen / total))
    return out
