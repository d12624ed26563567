"""`octavo-eval`: what a precision costs, measured over HTTP.

octavo-eval suite --preset pocket                   everything, for every variant the server has; a report
octavo-eval suite --preset study --admin-key KEY    the study's 29 variants, loaded and dropped as they fit
octavo-eval suite --preset study --limit 1000 --fail-if "mmlu<bf16-1.0"
octavo-eval mmlu --variants bf16,int8-row           accuracy alone
octavo-eval wikitext --window 2048 --stride 1024    perplexity alone
octavo-eval compare results/m/bf16/mmlu-direct.json results/m/int8-row/mmlu-direct.json

Data: the bundled exam and prose where the server has the bundled model, else MMLU and WikiText-2 from the hub.
Exit code 0: done; 1: a gate of --fail-if failed; 2: it could not be measured, and one line says why.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from client.api import BadAnswer, ConnectionFailed, NotFound, OctavoClient, OctavoError, Unauthorized
from client.eval import blocks, data, mmlu, page, report, results, wikitext
from client.eval.bench import Bench, load_bench
from client.eval.compare import Comparison, against_baseline, compare, correct, parse_gate
from client.eval.findings import Findings
from client.eval.loading import Served, VariantLoader, is_pocket, pick, served
from client.eval.plan import print_plan
from client.eval.study import STUDY
from client.eval.suite import Outcome, Task, make_tasks, run
from client.eval.throughput import Throughput, counts_phases, parse_load

JSON = dict[str, Any]
PRESETS: dict[str, tuple[str, ...]] = {"pocket": (), "study": STUDY}  # the variants that must be named in the report


class Parser(argparse.ArgumentParser):
    """One line for a wrong option, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    try:
        gates = [parse_gate(text) for text in getattr(args, "fail_if", [])]
        if args.command == "compare":
            comparisons = correct([compare(results.load(args.a), results.load(args.b))])
            print_table([_row(c) for c in comparisons])
        else:
            comparisons = asyncio.run(measure(args))
        planned = getattr(args, "dry_run", False)
        failures = [line for gate in gates if not planned for line in gate.failures(comparisons, args.strict)]
    except (OctavoError, data.EvalError) as e:
        after = "" if args.command == "compare" else _hint(e, args.url) + _kept(args.out)
        print(f"octavo-eval: {' '.join(str(e).split())}{after}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("octavo-eval: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    for line in failures:
        print(f"octavo-eval: failed: {line}", file=sys.stderr)
    return int(bool(failures))


def _hint(error: Exception, url: str) -> str:
    """The likely fix of an error of the client."""
    hints: dict[type[Exception], str] = {
        ConnectionFailed: f"; is octavo-serve running at {url}?",
        NotFound: f"; is {url} an OpenAI-style server, and the model one that it lists?",
        BadAnswer: f"; is {url} an OpenAI-style server?",
        Unauthorized: "; give --api-key or OCTAVO_API_KEY",
    }
    return next((hint for kind, hint in hints.items() if isinstance(error, kind)), "")


def _kept(out: Path) -> str:
    return (
        f" (what was done is kept in {out}; the same command goes on from there)" if any(out.rglob("*.jsonl")) else ""
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="octavo-eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name in ("suite", "mmlu", "wikitext"):
        sub = commands.add_parser(name)
        sub.add_argument("--url", default="http://127.0.0.1:8000")
        sub.add_argument("--api-key", default=os.environ.get("OCTAVO_API_KEY"), help="default: $OCTAVO_API_KEY")
        sub.add_argument(
            "--admin-key",
            default=os.environ.get("OCTAVO_ADMIN_KEY"),
            help="of the server, to load and drop variants (default: $OCTAVO_ADMIN_KEY)",
        )
        sub.add_argument("--variants", type=names, help="with commas between; default: the server's and the preset's")
        sub.add_argument("--out", type=Path, default=Path("results"), help="folder of the results (default: results)")
        sub.add_argument("--fresh", action="store_true", help="measure anew what is in --out already")
        sub.add_argument("--data", choices=("pocket", "hub"), help="default: pocket for the bundled model, else hub")
        sub.add_argument("--concurrency", type=positive, default=16, help="requests at once (default: 16)")
        if name == "suite":
            sub.add_argument("--preset", choices=sorted(PRESETS), default="pocket", help="default: pocket")
            sub.add_argument("--bench", type=Path, nargs="+", default=[], metavar="FILE", help=BENCH)
            sub.add_argument("--load", type=parse_load, default=Throughput(), metavar="SxIxO", help=LOAD)
            sub.add_argument("--dry-run", action="store_true", help="say what would be done and how long it would take")
        if name != "wikitext":
            add_mmlu_options(sub, with_method=name == "mmlu")
        if name != "mmlu":
            add_wikitext_options(sub, with_method=name == "wikitext")
        if name == "suite":
            add_gates(sub)
    sub = commands.add_parser("compare")
    sub.add_argument("a", type=Path, metavar="A", help="a result of octavo-eval, the baseline")
    sub.add_argument("b", type=Path, metavar="B")
    add_gates(sub)
    return parser.parse_args(argv)


def add_mmlu_options(sub: argparse.ArgumentParser, *, with_method: bool) -> None:
    sub.add_argument("--mmlu-dir", type=Path, metavar="DIR", help="dev and test as CSV, jsonl or parquet")
    sub.add_argument("--limit", type=positive, metavar="N", help="only so many questions, each subject with its share")
    sub.add_argument("--shots", type=int, choices=range(6), default=5, help="worked examples (default: 5)")
    sub.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    if with_method:
        sub.add_argument("--method", choices=mmlu.METHODS, default="direct", help="default: direct")


def add_wikitext_options(sub: argparse.ArgumentParser, *, with_method: bool) -> None:
    sub.add_argument("--wikitext-file", type=Path, metavar="FILE", help="raw text, or rows in jsonl, CSV or parquet")
    sub.add_argument("--text-limit", type=positive, metavar="N", help="only the first N windows or articles")
    sub.add_argument("--window", type=positive, default=2048, help="tokens read at once (default: 2048)")
    sub.add_argument("--stride", type=positive, help="tokens between windows; default: the window")
    sub.add_argument("--join", choices=wikitext.JOINS, default=wikitext.JOINS[0], help="default: blank-lines")
    sub.add_argument("--prefix", default="<|endoftext|>", help="token before each article (default: <|endoftext|>)")
    if with_method:
        sub.add_argument("--method", choices=wikitext.METHODS, default="windows", help="default: windows")


def add_gates(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--fail-if", action="append", default=[], metavar="GATE", help='as "mmlu<bf16-1.0"; may repeat')
    sub.add_argument("--strict", action="store_true", help="gates judge the difference, not its interval")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


async def measure(args: argparse.Namespace) -> list[Comparison]:
    """Run the tasks, print the tables, write the suite's report; the comparisons with bf16."""
    suite = args.command == "suite"
    bench = load_bench(args.bench) if suite else Bench()
    preset, can_load = PRESETS[args.preset] if suite else (), bool(args.admin_key)
    keys = {"api_key": args.api_key or args.admin_key, "admin_key": args.admin_key}  # an admin key opens all
    async with OctavoClient(args.url, **keys, concurrency=args.concurrency) as client:
        held = await served(client)
        wanted = pick(held, args.variants, preset, can_load)
        tasks = tasks_of(args, held)
        chosen = {s.variant for s in wanted}
        missing = {name: "not among --variants" for name in preset if name not in chosen}
        if suite and await counts_phases(client, held[0].id):
            tasks.append(args.load)
        elif suite:
            missing["throughput"] = "the server's /metrics does not count the device time of prefill and decode"
        if suite and args.dry_run:
            await print_plan(client, held, wanted, tasks, args.out, can_load)
            return []
        async with VariantLoader(client, held, args.out, can_load) as loader:
            outcome = await run(client, args.url, wanted, loader, tasks, args.out, args.fresh)
    found = outcome.results
    comparisons = against_baseline(found)
    print_table([figures(r) for r in found if r["task"] != Throughput.name])
    print_table([speeds(r) for r in found if r["task"] == Throughput.name])
    print_table([_row(c) for c in comparisons])
    if suite and found:
        write_report(args, held, Outcome(found, missing | outcome.missing), comparisons, bench)
    if args.variants is not None and outcome.missing:  # the user named it; a preset's are in the report
        said = "; ".join(f"{name} was not measured: {reason}" for name, reason in outcome.missing.items())
        raise data.EvalError(said)
    return comparisons


def tasks_of(args: argparse.Namespace, held: Sequence[Served]) -> list[Task]:
    """The tasks of the command line over the data that it names."""
    exam = load_exam(args, held) if args.command != "wikitext" else None
    text = load_text(args, held) if args.command != "mmlu" else None
    methods = [args.method] if args.command != "suite" else [*mmlu.METHODS, *wikitext.METHODS]
    return make_tasks(exam, text, methods, **{k: v for k, v in vars(args).items() if k in TASK_OPTIONS})


BENCH = "output of octavo-bench matmul-error --json or throughput --json, for the report"
LOAD = "sequences, prompt tokens and output tokens of the throughput load (default: 16x128x64)"
TASK_OPTIONS = ("limit", "shots", "seed", "text_limit", "window", "stride", "join", "prefix")


def load_exam(args: argparse.Namespace, variants: Sequence[Served]) -> data.Exam:
    if args.mmlu_dir is not None:
        return data.load_exam(args.mmlu_dir)
    pocket = args.data == "pocket" or (args.data is None and is_pocket(variants))
    return data.bundled_exam() if pocket else data.hub_exam()


def load_text(args: argparse.Namespace, variants: Sequence[Served]) -> data.Text:
    if args.wikitext_file is not None:
        return data.load_text(args.wikitext_file)
    pocket = args.data == "pocket" or (args.data is None and is_pocket(variants))
    return data.bundled_text() if pocket else data.hub_text()


def write_report(
    args: argparse.Namespace, held: Sequence[Served], outcome: Outcome, comparisons: list[Comparison], bench: Bench
) -> None:
    failed = [line for gate in map(parse_gate, args.fail_if) for line in gate.failures(comparisons, args.strict)]
    findings = Findings(outcome.results, comparisons, outcome.missing, failed, bench, args.preset == "study")
    title = f"What a precision costs: {', '.join(dict.fromkeys(s.model for s in held))}"
    parts = report.build(findings)
    results.write(args.out / "report.md", blocks.markdown(title, parts))
    results.write(args.out / "report.html", page.page(title, parts))
    print(f"{args.out / 'report.md'} and {args.out / 'report.html'} hold the report")


def figures(result: JSON) -> JSON:
    """A line of the table for one result."""
    found = result["figures"]
    value = "accuracy" if result["task"] == "mmlu" else "perplexity"
    line = {"variant": result["variant"], "figure": f"{result['task']}-{result['method']}", "n": found["n"]}
    line |= {"failed": found["failed"], "value": found[value]}
    line |= {key: found[key] for key in ("stderr", "low", "high")}
    return line | {"cached": found.get("hit_rate"), "byte_ppl": found.get("byte_perplexity")}


def speeds(result: JSON) -> JSON:
    """A line of the table of throughputs."""
    found = result["figures"]
    line = {"variant": result["variant"], "figure": "throughput", "rounds": found["n"]}
    return line | {key: found[key] for key in ("prefill_samples_s", "prefill_tok_s", "decode_tok_s")}


def _row(c: Comparison) -> JSON:
    flips = c.flips
    return {
        "against": f"{c.second} against {c.first}",
        "figure": c.figure,
        "pairs": c.pairs,
        "difference": c.difference,
        "low": c.low,
        "high": c.high,
        "lost": flips and flips.lost,
        "won": flips and flips.won,
        "KL": c.kl,
        "agreement": c.agreement,
        "p_holm": c.p_holm,
        "verdict": c.verdict,
    }


def print_table(rows: list[JSON]) -> None:
    """Print rows of equal keys, aligned: text to the left, numbers to the right."""
    if not rows:
        return
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    cells = [columns, *[[_cell(row[column]) for column in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    align: list[Callable[[str, int], str]] = [
        str.ljust if isinstance(rows[0][column], str) else str.rjust for column in columns
    ]
    for line in cells:
        print("  ".join(f(cell, width) for f, cell, width in zip(align, line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
