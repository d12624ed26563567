"""`octavo-bench tune`: measure which tiles and splits suit this GPU for a model's matrices, and write its table.

    octavo-bench tune DIR                 the table that engines on this GPU read at their start
    octavo-bench tune DIR --out FILE      elsewhere: OCTAVO_TUNED=FILE names it to an engine
    octavo-bench tune DIR --only gemv     the products of one row alone

For each shape of matrix, and each range of rows that the engine's kernels take: every tile that the kernels know for
any chip and that fits this one, with one and more parts of the inputs. Random weights of a few hundred MB in turn, so
that none stays in the cache; a CUDA graph of all of them, timed. A choice is written where it beats the kernels' own
rules by more than 2 %. Some minutes, most of them compilation. See `engine/kernels/tuned.py`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.benchmarks import machine
from engine.benchmarks.works import captured
from engine.config import ModelConfig, load_model_config
from engine.kernels import chip, tuned
from engine.kernels.tuned import Choices
from engine.runner import pick_device

STREAMED = 256 << 20  # bytes of weights in turn
GAIN = 0.98  # of the rules' time that a choice must stay below
GEMV_TILES = [(size, w, programs) for size in (2048, 4096, 8192, 16384) for w in (4, 8) for programs in (0, 4, 6)]
SPLITS = (1, 2, 4, 8)
LEAST_DEPTH = 512  # inputs of a part

Product = Callable[[Tensor], None]  # of one weight
Clock = Callable[[Product, list[Tensor]], float]  # seconds of a product, in turn on these weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a local checkpoint folder: its config.json gives the shapes")
    add("--only", default="gemv,plain,w8a8,digits", help="kinds of product, comma-separated (default: %(default)s)")
    add("--device", default="auto", help="cuda or cuda:N (default: auto)")
    add("--out", metavar="FILE", help="where to write (default: beside the kernels, named for the GPU)")


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    if device.type != "cuda":
        raise SystemExit("tune measures kernels of a GPU, and none is here")
    kinds = args.only.split(",")
    if not set(kinds) <= {"gemv", "plain", "w8a8", "digits"}:
        raise SystemExit(f"--only: unknown kind in {args.only!r}; known: gemv, plain, w8a8, digits")
    if os.environ.get(chip.VARIABLE):
        raise SystemExit(f"tune finds choices for the GPU that is here: unset {chip.VARIABLE}")
    torch.cuda.set_device(device)
    gpu = torch.cuda.get_device_name(device)
    path = Path(args.out) if args.out else tuned.table_path(gpu)
    kept = tuned.read(path, gpu) if path.exists() else {}
    tuned.choices(device).clear()  # what the rules alone choose is what a choice must beat
    found = dict(kept)
    for key, best in tune(matrices(load_model_config(args.model)), kinds, device, seconds_of):
        found.pop(key, None)
        found |= {key: best} if best else {}
        print(f"{key:44}{'the rules' if best is None else best}", flush=True)
    import triton

    when = f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, triton {triton.__version__}"
    tuned.write(path, gpu, when, found)
    print(f"{len(found)} choices in {path}")


def matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """(N, K) of each matrix, as they are stored: q, k, v and gate, up together."""
    c = config
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    shapes = [(heads, c.hidden_size), (c.hidden_size, c.num_heads * c.head_dim)]
    shapes += [(2 * c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)]
    return list(dict.fromkeys([*shapes, (c.vocab_size, c.hidden_size)]))


def tune(
    shapes: list[tuple[int, int]], kinds: list[str], device: torch.device, clock: Clock
) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """A key of `tuned` and its best choice, None where the rules are as good."""
    for width, depth in shapes:
        for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
            count = max(1, STREAMED // (width * depth * dtype.itemsize))
            weights = [_random(width, depth, dtype, device) for _ in range(count)]
            if "gemv" in kinds and dtype != torch.float8_e4m3fn:  # as many bytes as INT8, and the same key
                yield tuned.gemv_key(dtype.itemsize, width, depth), best_gemv(weights, clock)
            for kind in kinds:
                for rows in tuned.ROWS:
                    if kind != "gemv" and _multiplies(kind, dtype, rows, device):
                        yield (
                            tuned.product_key(kind, dtype, rows, width, depth),
                            best_product(kind, rows, weights, clock),
                        )


def best_gemv(weights: list[Tensor], clock: Clock) -> tuple[int, ...] | None:
    from engine.kernels.gemv import gemv

    width, depth = weights[0].shape
    x = _random(1, depth, torch.bfloat16, weights[0].device)
    scale = None if weights[0].itemsize > 1 else torch.ones(width, 1, device=x.device)
    out = torch.empty(1, width, dtype=x.dtype, device=x.device)

    def run(weight: Tensor) -> None:
        gemv(x, weight, scale, out=out)

    key, table = tuned.gemv_key(weights[0].itemsize, width, depth), tuned.choices(x.device)
    return _best(lambda choice: _override(table, key, choice, lambda: clock(run, weights)), GEMV_TILES)


def best_product(kind: str, rows: int, weights: list[Tensor], clock: Clock) -> tuple[int, ...] | None:
    from engine.kernels.matmul import multiply

    (width, depth), stored, device = weights[0].shape, weights[0].dtype, weights[0].device
    x = _random(rows, depth, stored, device)
    scale = None if kind == "plain" else torch.ones(width, 1, device=device)
    tokens = rows // 2 if kind == "digits" else rows
    x_scale = None if kind == "plain" else torch.ones(tokens, 1, device=device)
    out = torch.empty(tokens, width, dtype=torch.bfloat16, device=device)

    def run(weight: Tensor) -> None:
        multiply(x, x_scale, weight, scale, None, out.dtype, 0, out=out)

    key, table = tuned.product_key(kind, stored, rows, width, depth), tuned.choices(device)
    choices = list(product_choices(rows, width, depth, chip.num_sms(device)))
    return _best(lambda choice: _override(table, key, choice, lambda: clock(run, weights)), choices)


def product_choices(rows: int, width: int, depth: int, num_sms: int) -> Iterator[tuple[int, ...]]:
    """The known tiles that do not compute mostly padding, with the inputs in one part, and in more where SMs idle."""
    from engine.kernels import matmul as m

    tables = [m.TILES_16BIT, m.TILES_8BIT, m.PLAIN_SM90, m.W8A8_INT8_SM90, m.W8A8_FP8_SM90]
    tables += [m.DIGITS_INT8_SM90, m.DIGITS_FP8_SM90]
    for t in dict.fromkeys(tile for table in tables for _, tiles in table for tile in tiles):
        programs = -(-rows // t.block_m) * -(-width // t.block_n)
        for splits in SPLITS if t.block_m <= max(2 * rows, 16) else ():
            if splits == 1 or (depth // splits >= LEAST_DEPTH and programs * splits <= 2 * num_sms):
                yield t.block_m, t.block_n, t.block_k, t.num_warps, t.num_stages, int(t.weight_left), splits


def _multiplies(kind: str, dtype: torch.dtype, rows: int, device: torch.device) -> bool:
    """Whether the engine's own kernel gets such products here."""
    from engine.kernels.matmul import PLAIN_ROWS

    if kind == "plain":
        return dtype == torch.bfloat16 and rows <= PLAIN_ROWS
    return dtype == torch.int8 or (dtype == torch.float8_e4m3fn and chip.capability(device) >= (8, 9))


def _random(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, columns), dtype=dtype, device=device)
    return torch.randn(rows, columns, device=device).to(dtype)


def _best(
    seconds: Callable[[tuple[int, ...] | None], float], choices: Sequence[tuple[int, ...]]
) -> tuple[int, ...] | None:
    timed = {choice: seconds(choice) for choice in choices}
    best = min(timed, key=lambda choice: timed[choice])
    return best if timed[best] < GAIN * seconds(None) else None


def _override(table: Choices, key: str, choice: tuple[int, ...] | None, seconds: Callable[[], float]) -> float:
    """Seconds with this choice in the table; infinite where it does not fit the chip."""
    from triton.runtime.errors import OutOfResources

    table.pop(key, None)
    if choice is not None:
        table[key] = choice
    try:
        return seconds()
    except OutOfResources:
        return float("inf")
    finally:
        table.pop(key, None)


def seconds_of(product: Product, weights: list[Tensor]) -> float:
    """On a GPU, in one CUDA graph."""

    def run() -> None:
        for weight in weights:
            product(weight)

    product(weights[0])  # what it allocates once must not be allocated in a capture
    return machine.time_of(captured(run), weights[0].device, least=0.005) / len(weights)
