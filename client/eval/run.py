"""`octavo-eval`: accuracy and perplexity of the variants of a running server.

octavo-eval exam                                    the bundled exam, every variant the server has
octavo-eval mmlu --data FOLDER --model bf16,int8-row
octavo-eval prose                                   the bundled prose
octavo-eval wikitext --data wiki.test.raw --window 2048 --stride 1024 --json out.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.api import OctavoClient, OctavoError
from client.eval import mmlu, wikitext
from client.eval.data import BUNDLED, EvalError, load_exam, load_text

EXAMS = {"exam": BUNDLED / "exam", "mmlu": None}  # subcommand to default data
TEXTS = {"prose": BUNDLED / "prose.txt", "wikitext": None}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    try:
        results = asyncio.run(run(args))
        if args.json is not None:
            record = {"command": args.command, "url": args.url, "date": datetime.now(UTC).isoformat(timespec="seconds")}
            args.json.write_text(json.dumps(record | {"results": results}, indent=1) + "\n", encoding="utf-8")
    except (OctavoError, EvalError, OSError) as e:
        print(f"octavo-eval: {e}", file=sys.stderr)
        return 1
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="octavo-eval", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, default in {**EXAMS, **TEXTS}.items():
        sub = commands.add_parser(name)
        sub.add_argument("--url", default="http://127.0.0.1:8000")
        sub.add_argument("--api-key", default=os.environ.get("OCTAVO_API_KEY"))
        sub.add_argument("--model", help="names, with commas between; default: all that the server lists")
        kind = "folder of an exam" if name in EXAMS else "text file"
        sub.add_argument("--data", type=Path, default=default, required=default is None, help=kind)
        what = "questions, sampled over all subjects" if name in EXAMS else "windows, from the start"
        sub.add_argument("--limit", type=positive, help=f"only so many {what}")
        sub.add_argument("--concurrency", type=positive, default=16)
        sub.add_argument("--json", type=Path, metavar="OUT", help="also write the results here")
        if name in EXAMS:
            sub.add_argument("--shots", type=int, default=5)
        else:
            sub.add_argument("--window", type=positive, default=2048, help="tokens read at once")
            sub.add_argument("--stride", type=positive, help="tokens between windows; default: the window")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


async def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate the models one after another, print the table, and return its rows."""
    async with OctavoClient(args.url, args.api_key, concurrency=args.concurrency) as client:
        names = args.model.split(",") if args.model else [str(entry["id"]) for entry in await client.models()]
        rows = await (run_exam if args.command in EXAMS else run_text)(client, names, args)
    return rows


async def run_exam(client: OctavoClient, names: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    exam = load_exam(args.data)
    rows = []
    for name in names:
        with Progress(name, len(mmlu.choose(exam.test, args.limit))) as progress:
            result = await mmlu.evaluate(
                client, name, exam, limit=args.limit, num_shots=args.shots, on_done=progress.step
            )
        scores = {**result.by_subject, "total": result.total}
        rows += [
            {
                "model": name,
                "subject": subject,
                "n": s.n,
                "correct": s.correct,
                "accuracy": s.accuracy,
                "stderr": s.stderr,
            }
            for subject, s in scores.items()
        ]
    print_table(rows, ["model", "subject", "n", "accuracy", "stderr"])
    return rows


async def run_text(client: OctavoClient, names: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    text = load_text(args.data)
    rows = []
    for name in names:
        with Progress(name) as progress:
            result = await wikitext.evaluate(
                client, name, text, window=args.window, stride=args.stride, limit=args.limit, on_done=progress.step
            )
        rows.append(
            {
                "model": name,
                "n": result.num_scored,
                "nll": result.nll,
                "token_ppl": result.token_perplexity,
                "word_ppl": result.word_perplexity,
                "byte_ppl": result.byte_perplexity,
                "window": result.window,
                "stride": result.stride,
                "num_tokens": result.num_tokens,
                "num_words": result.num_words,
                "num_bytes": result.num_bytes,
            }
        )
    print_table(rows, ["model", "n", "nll", "token_ppl", "word_ppl", "byte_ppl", "window", "stride"])
    return rows


class Progress:
    """A line on a terminal's standard error that counts what is done; silent elsewhere."""

    def __init__(self, name: str, total: int | None = None) -> None:
        self._name = name
        self._total = "" if total is None else f"/{total}"
        self._done = 0
        self._shown = sys.stderr.isatty()

    def step(self) -> None:
        self._done += 1
        if self._shown:
            print(f"\r{self._name}: {self._done}{self._total}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print(file=sys.stderr)


def print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print `columns` of `rows`, aligned: text to the left, numbers to the right."""
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
