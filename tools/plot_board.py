"""The Grafana board without Grafana: each panel's queries, asked of a Prometheus and plotted into one picture.

    python tools/plot_board.py http://127.0.0.1:9090 board.png [--seconds 1800] [--step 5]

Needs matplotlib (the extra `plot`). It made docs/board.png.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from loadtest.plot import Line, Plot, save_png

BOARD = Path(__file__).resolve().parents[1] / "docker" / "grafana" / "boards" / "octavo.json"
MOST_LINES = 9  # of one panel
UNITS = {"s": "s", "percentunit": "share", "bytes": "bytes", "bool_on_off": "1: up"}


def ask(url: str, query: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
    words = urllib.parse.urlencode({"query": query, "start": start, "end": end, "step": step})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{words}", timeout=30) as response:
        found: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return found


def panel_lines(url: str, panel: dict[str, Any], start: float, end: float, step: float) -> list[Line]:
    """One line for each series of each query; what is 0 all the time only if nothing else is there."""
    lines = []
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", f"{4 * step:g}s")
        for series in ask(url, query, start, end, step):
            name = re.sub(r"\{\{(\w+)\}\}", lambda m, s=series: s["metric"].get(m[1], ""), target["legendFormat"])
            points = [(float(t) - start, float(v)) for t, v in series["values"] if v != "NaN"]
            lines.append(Line(name, points))
    moving = [line for line in lines if any(y for _, y in line.points)]
    return (moving or lines)[:MOST_LINES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="Prometheus")
    parser.add_argument("out", help="PNG to write")
    parser.add_argument("--seconds", type=float, default=1800.0, help="how far back (default: 1800)")
    parser.add_argument("--step", type=float, default=5.0, help="seconds between two points (default: 5)")
    args = parser.parse_args()
    end = time.time()
    start, section, plots = end - args.seconds, "", []
    for panel in json.loads(BOARD.read_text(encoding="utf-8"))["panels"]:
        if panel["type"] == "row":
            section = f"{panel['title']}: "
            continue
        unit = UNITS.get(panel["fieldConfig"]["defaults"]["unit"], "")
        lines = panel_lines(args.url, panel, start, end, args.step)
        plots.append(Plot(section + panel["title"], "seconds", unit, lines))
    save_png("", plots, args.out, columns=4)


if __name__ == "__main__":
    main()
