"""octavo-load: measure an OpenAI-style server under streaming load.

    octavo-load URL [options]            run, print a table, save with --out
    octavo-load compare A.json B.json    two saved results side by side, with intervals

One run for each --concurrency (closed loop) or --rate (open loop); --sweep looks for the highest rate that keeps an
SLO. `settings` holds what can be asked, `workload` makes the requests, `drive` sends them from processes of its own,
`summary` makes figures, `report` files. Exit codes: 0, 1 a request failed, 2 wrong words or no usable server, 130
interrupted (what was measured is saved first).
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from loadtest.compare import compare_files
from loadtest.drive import Progress, drive
from loadtest.report import save
from loadtest.settings import OPTIONS, LoadError, Settings, settings_from
from loadtest.summary import summarize
from loadtest.workload import Point, models_of

PROG = "octavo-load"
ASK_SECONDS = 10.0  # for the server to say what it serves
SWEEP_SECONDS = 20.0  # of one trial
SWEEP_PRECISION = 1.1  # a sweep ends when the lowest failing rate is within this factor of the highest that kept
EXAMPLES = """\
examples:
  octavo-load http://127.0.0.1:8000 --concurrency 1,16 --input-tokens 512 --output-tokens 128
  octavo-load http://127.0.0.1:8000 --mix bf16=1,int8-row=2 --arrivals poisson --rate 4 --duration 60 --out result
  octavo-load http://127.0.0.1:8000 --scenario loadtest/scenarios/chat.toml --sweep 1:64 --slo ttft_p99=500ms
  octavo-load http://127.0.0.1:8000 --arrivals trace --trace AzureLLMInferenceTrace_conv.csv --trace-speed 2
"""


def check_server(s: Settings, api_key: str | None) -> Settings:
    """Asks what the server serves; `model` filled in. Raises LoadError when it is dead, wrong or has no such model."""
    request = urllib.request.Request(f"{s.url}/v1/models")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=ASK_SECONDS) as response:
            names = [str(card["id"]) for card in json.load(response)["data"]]
    except urllib.error.HTTPError as e:
        with e:
            hint = "give its key by OCTAVO_API_KEY or --api-key" if e.code == 401 else "is this an OpenAI-style server?"
            raise LoadError(f"{s.url}/v1/models answered HTTP {e.code}: {hint}") from None
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as e:
        why = getattr(e, "reason", e) if isinstance(e, OSError) else "that is not an OpenAI-style answer"
        raise LoadError(f"{s.url}/v1/models: {why}") from None
    if not names:
        raise LoadError(f"{s.url} serves no model")
    s = replace(s, model=s.model or names[0])
    for name in models_of(s):
        if name not in names:
            raise LoadError(f"{s.url} does not serve {name}; it serves {', '.join(names)}")
    return s


def run(s: Settings, point: Point, seed: int, api_key: str | None, quiet: bool) -> dict[str, Any]:
    """One run's figures. Raises LoadError."""
    with Progressing(quiet) as tell:
        result = summarize(s, point, drive(s, point, seed, api_key, tell))
    for warning in [] if quiet else result["client"]["warnings"]:
        print(f"{PROG}: warning: {warning}", file=sys.stderr)
    return result


def points(s: Settings) -> list[Point]:
    if s.arrivals == "trace":
        return [Point()]
    return [Point(concurrency=n) for n in s.concurrency] if s.arrivals == "closed" else [Point(rate=r) for r in s.rate]


def sweep(s: Settings, api_key: str | None, quiet: bool) -> Iterator[dict[str, Any]]:
    """Runs at rates that close in on the highest that keeps the SLO: doubling until one fails, then halving between."""
    assert s.sweep is not None
    low, high = s.sweep
    if not (s.duration or s.requests):
        s = replace(s, duration=SWEEP_SECONDS)
    kept, failed, rate, number = 0.0, float("inf"), low, 0
    while True:
        result = run(s, Point(rate=rate), s.seed + number, api_key, quiet)
        yield result
        if result["interrupted"]:
            return
        number += 1
        s = replace(s, warmup=0)
        if result["slo"]["kept"]:
            kept = rate
        else:
            failed = rate
        if kept >= high or failed <= low or failed <= kept * SWEEP_PRECISION:
            return
        rate = min(high, 2 * kept) if failed == float("inf") else round((kept * failed) ** 0.5, 4)


class Progressing:
    """Says on stderr how the run is going: on a terminal in place, else a line every ten seconds."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty()
        self.last = 0.0

    def __enter__(self) -> Progressing:
        return self

    def __call__(self, now: Progress) -> None:
        if self.quiet or now.seconds - self.last < (0.5 if self.terminal else 10):
            return
        self.last = now.seconds
        text = (
            f"{now.seconds:5.0f} s  sent {now.sent}  done {now.done}  failed {now.failed}  tokens {now.output_tokens}"
        )
        print(f"\r{text} " if self.terminal else text, end="" if self.terminal else "\n", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.terminal and self.last:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


HEADER = "    load  req/s  out tok/s  TTFT p50/p90/p99 ms     ITL p50/p90/p99 ms      e2e p50/p99 ms     errors  SLO"


def table_row(result: dict[str, Any]) -> str:
    def times(name: str, *keys: str) -> str:
        found = result[name]
        return " / ".join(f"{found[k]:.1f}" for k in keys) if found else "-"

    load = (
        f"{result['concurrency']} x"
        if result["concurrency"]
        else f"{result['rate']:g}/s"
        if result["rate"]
        else "trace"
    )
    slo = (
        ""
        if result["slo"] is None
        else "kept"
        if result["slo"]["kept"]
        else f"broken: {'; '.join(result['slo']['broken'])}"
    )
    return (
        f"{load:>8} {result['requests_per_second']:>6.2f} {result['output_tokens_per_second']:>10.1f}"
        f"  {times('ttft', 'p50', 'p90', 'p99'):<23} {times('itl', 'p50', 'p90', 'p99'):<23}"
        f" {times('e2e', 'p50', 'p99'):<18} {result['errors']:>6}  {slo}"
    )


def measure(s: Settings, api_key: str | None, as_json: bool) -> tuple[dict[str, Any], int]:
    """Every run of a load test, printed as it ends: the document that is saved, and the exit code. Raises LoadError."""
    document: dict[str, Any] = {"settings": describe(s), "runs": []}
    if not as_json:
        print(HEADER, flush=True)
    runs = (
        sweep(s, api_key, as_json)
        if s.sweep
        else (
            run(replace(s, warmup=0 if i else s.warmup), point, s.seed + i, api_key, as_json)
            for i, point in enumerate(points(s))
        )
    )
    for result in runs:
        document["runs"].append(result)
        figures = {k: v for k, v in result.items() if k not in ("rows", "histograms", "timeline")}
        print(json.dumps(describe(s) | figures) if as_json else table_row(result), flush=True)
        for kind, message in result["first_errors"].items():
            print(f"{PROG}: {result['errors_by_kind'][kind]} x {kind}: {message}", file=sys.stderr)
        if result["interrupted"]:
            return document, 130
    failed = any(r["errors"] for r in document["runs"])
    if s.sweep:
        best = max((r["rate"] for r in document["runs"] if r["slo"]["kept"]), default=None)
        document["highest_rate"] = best
        if not as_json:
            print(f"highest rate that kept the SLO: {best:g} requests/s" if best else "no rate kept the SLO")
        failed = best is None
    return document, int(failed)


def describe(s: Settings) -> dict[str, Any]:
    """The settings as they are saved."""
    return asdict(s) | {"slo": [str(x) for x in s.slo.limits], "models": models_of(s)}


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        print(f"{PROG}: {message}", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROG,
        description="Measure an OpenAI-style server under streaming load.",
        usage=f"{PROG} URL [options]\n       {PROG} compare A.json B.json",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("url", metavar="URL", help="the server, without /v1")
    parser.add_argument("--scenario", metavar="FILE", default="", help="TOML file of these options, such as rate = 4")
    for name, option in OPTIONS.items():
        if name != "url":
            default = option.default
            text = option.metadata["help"]
            if isinstance(default, int | float) and default and not isinstance(default, bool):
                text += f" (default: {default:g})"
            parser.add_argument(f"--{name.replace('_', '-')}", metavar=option.metadata["metavar"], help=text)
    parser.add_argument("--out", metavar="NAME", default="", help="save NAME.json, NAME.csv and NAME.html")
    parser.add_argument(
        "--png", action="store_true", default=False, help="with --out also NAME.png, its plots (needs matplotlib)"
    )
    parser.add_argument("--json", action="store_true", default=False, help="print one JSON object a run, no table")
    parser.add_argument("--api-key", metavar="KEY", help="key to send (default: OCTAVO_API_KEY of the environment)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The console script octavo-load; see the module's docstring for exit codes."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words[:1] == ["compare"]:
            if len(words) != 3:
                raise LoadError("compare needs two files: octavo-load compare A.json B.json")
            print(compare_files(words[1], words[2]))
            return 0
        args = vars(_parser().parse_args(words))
        scenario, out, as_json, png = (args.pop(name) for name in ("scenario", "out", "json", "png"))
        api_key = args.pop("api_key", None) or os.environ.get("OCTAVO_API_KEY")
        if out and not Path(out).absolute().parent.is_dir():
            raise LoadError(f"--out: there is no folder {Path(out).absolute().parent}")
        if png and not out:
            raise LoadError("--png needs --out NAME")
        if png and importlib.util.find_spec("matplotlib") is None:
            raise LoadError("--png needs matplotlib: pip install 'octavo[plot]'")
        args["url"] = args["url"].rstrip("/").removesuffix("/v1")
        s = check_server(settings_from(args, scenario), api_key)
        document, code = measure(s, api_key, as_json)
        if out:
            save(document, out, png)
    except LoadError as e:
        print(f"{PROG}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # before the first run: there is nothing to save
    return code


if __name__ == "__main__":
    sys.exit(main())
