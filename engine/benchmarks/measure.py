"""`octavo-bench limits`: how near each piece of work comes to what this machine allows, measured / limit.

    octavo-bench limits DIR                                          all works, bf16
    octavo-bench limits DIR --variants bf16,int8-row+kv8 --works decode_b1,decode_b32,linears
    octavo-bench limits models/pocket                                on a CPU: lengths divided by 8

The works: decode_bN (N sequences of 128 tokens in, 256 steps), sampled_bN (the same with temperature, top-p, logprobs
and end ids; only where it is named), prefill (32 x 2,048 tokens), mixed256 (256 requests of 100 to 1,024 tokens in and
out) and linears (the layers' matrix products alone, by rows). Limits are arithmetic from two rates measured here, of a
large copy and of large matrix products: the longer of bytes and FLOPs for each product, with the keys and values that
decode reads and the FLOPs of prefill's attention added. The best of the rounds counts; their spread is in the JSON.
Each variant is loaded alone, without the prefix cache.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from engine.benchmarks import machine, works
from engine.benchmarks.limits import Limits
from engine.benchmarks.works import Bench, Figure
from engine.config import ModelConfig, load_model_config
from engine.llm import LLM
from engine.quant.formats import parse_format
from engine.runner import pick_device, pick_dtype

MAX_MODEL_LEN = 4096
CPU_SCALE = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a local checkpoint folder")
    add("--variants", default="bf16", help="comma-separated; each is measured alone (default: bf16)")
    add("--works", default=",".join(works.DEFAULT_WORKS), help="comma-separated (default: %(default)s)")
    add("--rounds", type=int, default=3, help="measured rounds of each work (default: 3)")
    add("--scale", type=int, default=0, help="divide all lengths by this; 0: 1 on a GPU, 8 on a CPU (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")
    add("--load-format", default="auto", choices=["auto", "dummy"], help="dummy: random weights from the config")
    add("--threads", type=int, default=0, help="torch threads on a CPU; 0 is torch's own choice (default: 0)")
    add("--json", metavar="FILE", help="also write the figures here")
    add("--plot", metavar="FILE", help="also draw measured / limit here, as PNG (needs matplotlib)")


def main(args: argparse.Namespace) -> None:
    if args.rounds < 1 or args.scale < 0:
        raise SystemExit("--rounds must be at least 1 and --scale at least 0")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install 'octavo[plot]'")
    try:
        chosen = works.parse_works(args.works)
    except ValueError as e:
        raise SystemExit(f"--works: {e}") from None
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    config = load_model_config(args.model)
    scale = pick_scale(args.scale, device)
    check_lengths(chosen, scale, config)
    rates = machine.measure_rates(device, pick_dtype(args.dtype, config.dtype, device))
    print("\n".join(describe(device, rates)))
    found: dict[str, list[Figure]] = {}
    starts: dict[str, float] = {}
    for name in args.variants.split(","):
        variant = parse_format(name).name
        start = time.perf_counter()
        llm = load(args.model, [variant], chosen, device=args.device, dtype=args.dtype, load_format=args.load_format)
        starts[variant] = time.perf_counter() - start
        print(f"\n{variant}, loaded in {starts[variant]:.1f} s\n{HEAD}")
        found[variant] = []
        for figure in measure(llm, variant, chosen, scale, args.rounds, rates):
            print(line(figure), flush=True)
            found[variant].append(figure)
        del llm
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if args.json:
        written = {
            "settings": {k: v for k, v in vars(args).items() if k != "run"} | {"scale": scale},
            "machine": machine.facts(device),
            "rates": asdict(rates),
            "start_s": starts,
            "variants": {v: [asdict(f) | {"fraction": f.fraction} for f in found[v]] for v in found},
        }
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(written, f, indent=1)
    if args.plot:
        plot(found, args.plot)


def pick_scale(scale: int, device: torch.device) -> int:
    return scale or (1 if device.type == "cuda" else CPU_SCALE)


def check_lengths(chosen: list[str], scale: int, config: ModelConfig) -> None:
    longest = works.longest(chosen, scale)
    if longest > config.max_position_embeddings:
        raise SystemExit(
            f"the works need {longest} tokens a sequence, the checkpoint allows {config.max_position_embeddings}: "
            "name others with --works or divide the lengths with --scale"
        )


def load(model: str, variants: list[str], chosen: list[str], **options: Any) -> LLM:
    """An engine for the works: no prefix cache, a place for every sequence."""
    limit = min(MAX_MODEL_LEN, load_model_config(model).max_position_embeddings)
    sequences = works.most_sequences(chosen)
    return LLM(model, variants, max_model_len=limit, max_num_seqs=sequences, enable_prefix_caching=False, **options)


def measure(
    llm: LLM, variant: str, chosen: list[str], scale: int, rounds: int, rates: machine.Rates
) -> Iterator[Figure]:
    runner = llm.engine.runner
    limits = Limits.of(runner.variants[variant], runner.model_config, runner.dtype, rates)
    bench = Bench(llm, variant, limits, scale, rounds)
    for work in chosen:
        yield from bench.run(work)


def describe(device: torch.device, rates: machine.Rates) -> list[str]:
    """Lines on what the limits are made of."""
    products = ", ".join(f"{name} {rate / 1e12:,.2f} TFLOP/s" for name, rate in rates.products.items())
    return [
        f"{machine.device_name(device)}, torch {torch.__version__}",
        f"copy {rates.copy / 1e9:,.1f} GB/s; {products}",
    ]


HEAD = f"{'work':22}{'measured':>14}{'limit':>14}{'unit':>7}{'measured / limit':>19}"


def line(figure: Figure) -> str:
    """A time is compared the other way round, limit / measured: 1 is the limit for both."""
    digits = 3 if figure.unit == "ms" else 0
    numbers = f"{figure.measured:14,.{digits}f}{figure.limit:14,.{digits}f}"
    return f"{figure.work:22}{numbers}{figure.unit:>7}{figure.fraction:19.3f}"


def plot(found: dict[str, list[Figure]], path: str) -> None:
    """A bar for each work of each variant, from 0 to its limit at 1."""
    from matplotlib.figure import Figure as Drawing

    works_drawn = list(dict.fromkeys(f.work for figures in found.values() for f in figures))
    drawing = Drawing(figsize=(8, 1.5 + 0.3 * len(works_drawn) * len(found)), layout="tight")
    panel = drawing.subplots()
    height = 0.8 / len(found)
    for i, (variant, figures) in enumerate(found.items()):
        places = [works_drawn.index(f.work) + i * height for f in figures]
        panel.barh(places, [f.fraction for f in figures], height=height, label=variant)
    panel.set_yticks([n + 0.4 - height / 2 for n in range(len(works_drawn))], works_drawn)
    panel.axvline(1, color="black", linestyle=":")
    panel.set_xlabel("measured / limit")
    panel.invert_yaxis()
    panel.legend()
    drawing.savefig(path, format="png", dpi=120)
