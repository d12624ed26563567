"""`octavo-bench matmul-error`: what storing a matrix in 8 bits costs, beside the study's table.

    octavo-bench matmul-error                                   the study's shapes, every granularity
    octavo-bench matmul-error --shapes 64x896 --seeds 20        any other
    octavo-bench matmul-error --json FILE --plot FILE.png       the figures, and a plot (needs matplotlib)

A shape RxC is a matrix of R rows and C columns of N(0, 1) numbers. Two definitions, both mean |error| / mean |true|:

    element   of the matrix after quantising and dequantising it, as the study's table appears to be: it fits this one,
              with one scale for the tensor, and not a product
    product   of X[R, C] @ W[C, C].T with W stored in 8 bits and X not (the first 256 rows of X, which is enough); and
              for the formats with 8-bit activations with both

All in fp32 with the definitions of `quant.quantize`; the seeds give the mean and the spread (standard deviation).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from engine.kernels import reference
from engine.quant.formats import FORMATS, GRANULARITIES, group_size
from engine.quant.quantize import dequantize, quantize

STUDY = {  # shape: INT8, FP8
    (16, 512): (0.009608, 0.022184),
    (100, 1024): (0.010707, 0.022522),
    (4096, 4096): (0.013310, 0.022538),
}
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_PRODUCT_ROWS = 256


@dataclass(frozen=True)
class Row:
    """One line of the table: each type's error, mean and standard deviation over the seeds; None: no such format."""

    shape: tuple[int, int]
    error: str  # "element", "product" or "product, 8-bit activations"
    granularity: str
    int8: tuple[float, float] | None
    fp8: tuple[float, float] | None

    @property
    def ratio(self) -> float | None:
        return self.fp8[0] / self.int8[0] if self.int8 and self.fp8 else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = ",".join(f"{r}x{c}" for r, c in STUDY)
    add = parser.add_argument
    add("--shapes", default=default, type=parse_shapes, help=f"comma-separated ROWSxCOLUMNS (default: {default})")
    add("--seeds", type=int, default=5, help="matrices drawn of each shape (default: 5)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--json", metavar="FILE", help="also write the figures here")
    add("--plot", metavar="FILE", help="also draw them here, as PNG (needs matplotlib)")


def parse_shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        rows, _, columns = part.strip().lower().partition("x")
        if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
            raise argparse.ArgumentTypeError(f"{part!r} is not ROWSxCOLUMNS, such as 16x512")
        shapes.append((int(rows), int(columns)))
    return shapes


def main(args: argparse.Namespace) -> None:
    if args.seeds < 1:
        raise SystemExit("--seeds must be at least 1")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install 'octavo[plot]'")
    rows = [row for shape in args.shapes for row in measure(shape, args.seeds, args.device)]
    print_table(rows, args.seeds)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump({"seeds": args.seeds, "rows": [asdict(r) for r in rows]}, f, indent=1)
    if args.plot:
        plot(rows, args.plot)


def measure(shape: tuple[int, int], seeds: int, device: str) -> Iterator[Row]:
    """Every line of one shape."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for seed in range(seeds):
        for error, granularity, stored, value in errors(shape, seed, device):
            found.setdefault((error, granularity), {}).setdefault(stored, []).append(value)
    for (error, granularity), by_type in found.items():
        spread = {s: (statistics.mean(v), statistics.pstdev(v)) for s, v in by_type.items()}
        yield Row(shape, error, granularity, spread.get("int8"), spread.get("fp8"))


def errors(shape: tuple[int, int], seed: int, device: str) -> Iterator[tuple[str, str, str, float]]:
    """(which error, granularity, "int8" or "fp8", its value) of one seed's matrices."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator).to(device)
    for granularity in (*GRANULARITIES, "block"):
        for stored, dtype in _DTYPES.items():
            if granularity != "block" or stored == "fp8":
                again = dequantize(*quantize(x, dtype, granularity), group_size(granularity), torch.float32)
                yield "element", granularity, stored, relative(again, x)
    w = torch.randn(columns, columns, generator=generator).to(device)
    x = x[:_PRODUCT_ROWS]
    true = x @ w.T
    for f in FORMATS.values():
        if f.weight is None or f.granularity is None or f.fake or f.smooth:  # smoothing needs outliers to act on
            continue
        dtype = getattr(torch, f.weight)
        qdata, scale = quantize(w, dtype, f.granularity)
        if f.activation:
            tokens = reference.quantize_tokens(x, dtype, f.group_size)
            got = reference.w8a8_matmul(*tokens, qdata, scale, None, torch.float32, f.group_size)
        else:
            got = reference.weight_only_matmul(x, qdata, scale, None, f.group_size)
        error = "product, 8-bit activations" if f.activation else "product"
        yield error, f.granularity, "int8" if dtype == torch.int8 else "fp8", relative(got, true)


def relative(got: Tensor, true: Tensor) -> float:
    return float((got - true).abs().mean() / true.abs().mean())


def print_table(rows: list[Row], seeds: int) -> None:
    print(f"mean |error| / mean |true| of N(0, 1) matrices, mean and spread over {seeds} seeds")
    head = f"{'error':28}{'granularity':13}{'INT8':>20}{'FP8':>20}{'FP8 / INT8':>12}"
    shape = None
    for row in rows:
        if row.shape != shape:
            shape = row.shape
            print(f"\n{shape[0]} x {shape[1]}\n{head}")
            if shape in STUDY:
                int8, fp8 = STUDY[shape]
                print(f"{'the study':28}{'':13}{int8:12.6f}{fp8:20.6f}{fp8 / int8:20.2f}")
        cells = "".join(f"{'':20}" if v is None else f"{v[0]:12.6f} {v[1]:7.6f}" for v in (row.int8, row.fp8))
        print(f"{row.error:28}{row.granularity:13}{cells}" + (f"{row.ratio:12.2f}" if row.ratio else ""))


def plot(rows: list[Row], path: str) -> None:
    """Element-wise errors by granularity, a panel for each shape, with the study's figures as lines."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(r.shape for r in rows))
    figure = Figure(figsize=(4.5 * len(shapes), 4), layout="tight")
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for panel, shape in zip(panels, shapes, strict=True):
        lines = [r for r in rows if r.shape == shape and r.error == "element"]
        for i, (stored, colour) in enumerate((("int8", "tab:blue"), ("fp8", "tab:orange"))):
            have = [(r.granularity, *getattr(r, stored)) for r in lines if getattr(r, stored)]
            names, means, spreads = zip(*have, strict=True)
            panel.errorbar(names, means, yerr=spreads, fmt="o-", color=colour, capsize=3, label=stored.upper())
            if shape in STUDY:
                panel.axhline(STUDY[shape][i], color=colour, linestyle=":", label=f"{stored.upper()}, the study")
        panel.set_title(f"{shape[0]} x {shape[1]}")
        panel.legend()
    panels[0].set_ylabel("mean |error| / mean |value|, element by element")
    figure.savefig(path, format="png", dpi=120)
