"""`octavo-bench selfcheck`: one report on whether and how well Octavo runs on this machine, to paste into an issue.

    octavo-bench selfcheck DIR                     eight formats; some minutes
    octavo-bench selfcheck DIR --variants bf16,int8-row --works decode_b1,prefill

What the machine is; every kernel against its plain twin at the model's shapes, with the bounds; where the memory goes;
measured / limit of each work; and which Triton kernels were compiled after the engine was ready (none should be). Runs
on a CPU too, on the plain path alone. The report is Markdown, on stdout; progress goes to stderr. Exit code 1 where a
comparison is out of bounds.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from engine.benchmarks import machine, measure, twins, works
from engine.benchmarks.twins import Check
from engine.config import load_model_config
from engine.dry_run import plan_text
from engine.kernels import chip
from engine.llm import LLM
from engine.quant.formats import parse_format
from engine.runner import pick_device

VARIANTS = "bf16,int8-row,fp8-row,int8-g128,w8a8-int8-row,w8a8-fp8-row,bf16+kv8,int8-row+kvint8"
WORKS = "decode_b1,decode_b32,decode_b256,prefill,linears"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a local checkpoint folder")
    add("--variants", default=VARIANTS, help="comma-separated, loaded together (default: %(default)s)")
    add("--works", default=WORKS, help="comma-separated, as of octavo-bench limits (default: %(default)s)")
    add("--scale", type=int, default=0, help="divide all lengths by this; 0: 1 on a GPU, 8 on a CPU (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--load-format", default="auto", choices=["auto", "dummy"], help="dummy: random weights from the config")


def main(args: argparse.Namespace) -> None:
    try:
        chosen = works.parse_works(args.works)
    except ValueError as e:
        raise SystemExit(f"--works: {e}") from None
    device = pick_device(args.device)
    names, left_out = supported(args.variants.split(","), device)
    scale = measure.pick_scale(args.scale, device)
    measure.check_lengths(chosen, scale, load_model_config(args.model))
    say(f"loading {', '.join(names)}")
    start = time.perf_counter()
    llm = measure.load(args.model, names, chosen, device=str(device), load_format=args.load_format)
    started, num_compiled = time.perf_counter() - start, llm.engine.compiles_before_ready
    runner = llm.engine.runner
    say("kernels against their twins")
    checks = list(twins.check_all(runner.variants, runner.model_config, llm.engine.num_ids, runner.dtype))
    llm.engine.note_compiles(before_ready=True)  # no request asked for these
    lines = ["## Octavo selfcheck", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in machine.facts(device).items()]
    lines += [f"| model | {args.model}, {', '.join(names)}, ready in {started:.1f} s |"]
    lines += [f"| left out | {', '.join(left_out)}: this GPU lacks FP8 products |"] if left_out else []
    if device.type != "cuda":
        lines += ["| path | plain PyTorch: no kernel of a GPU was run |"]
    lines += ["", *checked(checks), "", "### Memory", "", "```"]
    lines += [plan_text(llm.engine.config, runner.plan, machine.device_name(device), runner.dtype), "```", ""]
    lines += speeds(llm, names, chosen, scale)
    late = llm.engine.compiled_after_ready
    compiled = f"{num_compiled} kernels compiled before ready, {len(late)} after"
    lines += ["", f"{compiled}{': ' + ', '.join(late) if late else ''}."]
    print("\n".join(lines))
    if not all(c.passed for c in checks):
        sys.exit(1)


def supported(names: list[str], device: torch.device) -> tuple[list[str], list[str]]:
    """Canonical names: of what this device can multiply, and of the rest."""
    formats = [parse_format(name) for name in names]
    fp8 = device.type != "cuda" or chip.capability(device) >= (8, 9)
    lacking = [f.name for f in formats if f.activation == "float8_e4m3fn" and not fp8]
    return [f.name for f in formats if f.name not in lacking], lacking


def checked(checks: list[Check]) -> list[str]:
    """A line for each operation's worst shape, and one for each comparison that is out of bounds."""
    failed = [c for c in checks if not c.passed]
    lines = [
        f"### Kernels: {len(checks) - len(failed)} of {len(checks)} comparisons within bounds",
        "",
        "| worst comparison of each kind | mean error | bound | largest error | bound |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    kinds: dict[str, Check] = {}
    for c in checks:
        kind = c.what.partition(" [")[0].partition(", ")[0]
        if kind not in kinds or c.mean > kinds[kind].mean:
            kinds[kind] = c
    for c in [*(c for c in kinds.values() if c.passed), *failed]:
        numbers = f"{c.mean:.1e} | {c.bounds[0]:.1e} | {c.worst:.1e} | {c.bounds[1]:.1e}"
        lines.append(f"| {'' if c.passed else 'FAILED: '}{c.what} | {numbers} |")
    return lines


def speeds(llm: LLM, names: list[str], chosen: list[str], scale: int) -> list[str]:
    say("rates of this machine")
    runner = llm.engine.runner
    rates = machine.measure_rates(runner.device, runner.dtype)
    lines = ["### Speed", "", f"Rates: {measure.describe(runner.device, rates)[1]}."]
    lines += [f"All lengths are divided by {scale}."] if scale > 1 else []
    lines += [
        "",
        "| variant | work | measured | limit | unit | measured / limit |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    multiplied: set[tuple[object, ...]] = set()
    for name in names:
        say(f"works of {name}")
        fmt = parse_format(name)
        way = (*fmt.stored, fmt.activation)  # variants that differ in their KV multiply alike: once is enough
        own = [w for w in chosen if w != "linears" or way not in multiplied]
        multiplied.add(way)
        for f in measure.measure(llm, name, own, scale, 1, rates):
            digits = 3 if f.unit == "ms" else 0
            numbers = f"{f.measured:,.{digits}f} | {f.limit:,.{digits}f} | {f.unit} | {f.fraction:.3f}"
            lines.append(f"| {name} | {f.work} | {numbers} |")
    return lines


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
