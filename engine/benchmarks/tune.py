"""`octavo-bench tune`: measure which tiles and splits suit this GPU for a model's matrices, and write its table.

    octavo-bench tune DIR                                  the table that engines on this GPU read at their start
    octavo-bench tune DIR --out FILE                       elsewhere: OCTAVO_TUNED=FILE names it to an engine
    octavo-bench tune DIR --only gemv                      the products of one row alone
    octavo-bench tune DIR --only plain --rows 16,32        16-bit products of up to 16 and up to 32 rows
    octavo-bench tune DIR --shapes 4096x2048               one matrix (outputs x inputs) alone

For each shape of matrix, and each range of rows that the engine's kernels take: every tile that the kernels know for
any chip and that fits this one, for few rows smaller ones, and where the chip has them bulk tiles with all the buffers
that there is room for; each with one and more parts of the inputs; for 16-bit weights the library, too. All are
compiled first, by a process for each core. Then they are timed: random weights of a few hundred MB in turn, so that
none stays in the cache, and a CUDA graph of all of them. What a layer adds to its input is timed with the norm that
adds it, and the parts of the inputs where they are cut. A choice is written where it beats the kernels' own rules by
more than 2 %. Some minutes for everything. See `engine/kernels/tuned.py`.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine import kernels
from engine.benchmarks import machine
from engine.benchmarks.works import captured
from engine.config import ModelConfig, load_model_config
from engine.kernels import chip, tuned
from engine.runner import pick_device

KINDS = ("gemv", "gemv-g128", "plain", "gated", "w8a8", "digits", "w8a8-g128", "digits-g128")
STREAMED = 256 << 20  # bytes of weights in turn
GAIN = 0.98  # of the rules' time that a choice must stay below
GEMV_TILES = [(size, w, programs) for size in (2048, 4096, 8192, 16384) for w in (2, 4, 8) for programs in (0, 4, 6, 8)]
SPLITS = (1, 2, 4, 8)
LEAST_DEPTH = 512  # inputs of a part
FEW_ROWS = 32  # up to so many, smaller tiles than the known ones are tried
BULK_SHAPES = ((64, 4), (128, 4), (128, 8))  # weights of a bulk tile, warps
GATED_SHAPES = ((64, 4), (64, 8))
IN_FLIGHT = (3 << 20, 16 << 20)  # bytes of weights under way at once: fewer wait for memory, more for each other
COPIES = (4, 16)  # of 16 bytes, by one thread for one step

Choice = tuple[int, ...]
Product = Callable[[Tensor], object]  # of one weight
Clock = Callable[[Product, list[Tensor]], float]  # seconds of a product, in turn on these weights


@dataclass(frozen=True)
class Case:
    """What one entry of a table is for. dtype: the weights'. rows: as they are multiplied. added: to a layer's input,
    by the norm that follows.
    """

    kind: str  # one of KINDS
    dtype: torch.dtype
    rows: int
    width: int
    depth: int
    added: bool = False

    @property
    def group_size(self) -> int:
        return int(self.kind.partition("-g")[2] or 0)

    @property
    def one_row(self) -> bool:
        return self.kind.startswith("gemv")

    @property
    def tokens(self) -> int:
        return self.rows // 2 if self.kind.startswith("digits") else self.rows

    @property
    def key(self) -> str:
        if self.one_row:
            return tuned.gemv_key(self.dtype.itemsize, self.width, self.depth, group_size=self.group_size)
        return tuned.product_key(self.kind, self.dtype, self.rows, self.width, self.depth)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a local checkpoint folder: its config.json gives the shapes")
    add("--only", default=",".join(KINDS), help="kinds of product, comma-separated (default: %(default)s)")
    rows = ",".join(map(str, tuned.ROWS))
    add("--rows", default=rows, help="ranges of rows, each named by its last (default: %(default)s); gemv is one row")
    add("--shapes", default="", help="of matrices, NxK for N outputs of K inputs (default: all of the model's)")
    add("--device", default="auto", help="cuda or cuda:N (default: auto)")
    add("--out", metavar="FILE", help="where to write (default: beside the kernels, named for the GPU)")


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    if device.type != "cuda":
        raise SystemExit("tune measures kernels of a GPU, and none is here")
    if os.environ.get(chip.VARIABLE):
        raise SystemExit(f"tune finds choices for the GPU that is here: unset {chip.VARIABLE}")
    kinds = restricted("--only", args.only, list(KINDS))
    rows = [int(r) for r in restricted("--rows", args.rows, [str(r) for r in tuned.ROWS])]
    config = load_model_config(args.model)
    names = {f"{width}x{depth}": (width, depth) for width, depth in matrices(config)}
    shapes = [names[name] for name in restricted("--shapes", args.shapes, list(names))]
    torch.cuda.set_device(device)
    gpu = torch.cuda.get_device_name(device)
    path = Path(args.out) if args.out else tuned.table_path(gpu)
    kept = tuned.read(path, gpu) if path.exists() else {}
    tuned.choices(device).clear()  # what the rules alone choose is what a choice must beat
    found = dict(kept)
    chosen = list(cases(shapes, kinds, rows, device, config.hidden_size, config.intermediate_size))
    compile_all(chosen, device)
    import triton

    when = f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, triton {triton.__version__}"
    for key, best in tune(chosen, device, seconds_of):
        found.pop(key, None)
        if best is not None:  # read from here on, too: a gated product is compared with the best plain one
            found[key] = tuned.choices(device)[key] = best
        tuned.write(path, gpu, when, found)  # each time: who interrupts it keeps what was found
    print(f"{len(found)} choices in {path}")


def restricted(option: str, given: str, known: list[str]) -> list[str]:
    """Those of the known that are given, comma-separated; all where none is. Ends the program at an unknown one."""
    names = [name.strip() for name in given.split(",") if name.strip()] or known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"{option}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return list(dict.fromkeys(names))


def matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """(N, K) of each matrix, as they are stored: q, k, v and gate, up together."""
    c = config
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    shapes = [(heads, c.hidden_size), (c.hidden_size, c.num_heads * c.head_dim)]
    shapes += [(2 * c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)]
    return list(dict.fromkeys([*shapes, (c.vocab_size, c.hidden_size)]))


def cases(
    shapes: list[tuple[int, int]],
    kinds: list[str],
    rows: Iterable[int],
    device: torch.device,
    hidden: int = 0,
    intermediate: int = 0,
) -> Iterator[Case]:
    """Those of one shape and dtype together. hidden, intermediate: the model's, which say what is gated and added."""
    gate_up = 2 * intermediate, hidden
    for width, depth in shapes:
        for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
            for kind in ("gemv", "gemv-g128") if dtype == torch.int8 else ("gemv",):
                if kind in kinds and dtype != torch.float8_e4m3fn:  # as many bytes as INT8, and the same key
                    yield Case(kind, dtype, 1, width, depth)
            for kind, most in itertools.product(kinds, rows):
                case = Case(kind, dtype, most, width, depth, added=width == hidden)
                if not case.one_row and (kind != "gated" or (width, depth) == gate_up) and _multiplies(case, device):
                    yield case


def _multiplies(case: Case, device: torch.device) -> bool:
    """Whether the engine's own kernel gets such products here."""
    from engine.kernels import matmul

    if case.kind in ("plain", "gated"):
        most = matmul.BULK_ROWS if _bulk(case, device) else matmul.PLAIN_ROWS * (case.kind == "plain")
        wide = case.dtype == torch.bfloat16
        return (wide or case.kind == "gated") and case.rows <= most and case.width <= matmul.PLAIN_WIDTH
    if case.kind.startswith("digits") and case.tokens > matmul.DIGIT_ROWS:
        return False
    if case.group_size and not (_bulk(case, device) and (case.kind != "w8a8-g128" or case.dtype != torch.int8)):
        return False  # rules alone, or no such format
    return case.dtype == torch.int8 or (case.dtype == torch.float8_e4m3fn and chip.capability(device) >= (8, 9))


def _bulk(case: Case, device: torch.device) -> bool:
    from engine.kernels import matmul

    width = case.width // 2 if case.kind == "gated" else case.width
    return case.tokens <= matmul.BULK_ROWS and matmul.takes_bulk(device, case.dtype, width, case.depth)


def tune(chosen: Iterable[Case], device: torch.device, clock: Clock) -> Iterator[tuple[str, Choice | None]]:
    """A key of `tuned` and its best choice, None where the rules are as good; each is printed."""
    for (width, depth, dtype), some in itertools.groupby(chosen, lambda case: (case.width, case.depth, case.dtype)):
        count = max(1, STREAMED // (width * depth * dtype.itemsize))
        weights = [_random(width, depth, dtype, device) for _ in range(count)]
        for case in some:
            yield case.key, best_choice(case, weights, clock)


def best_choice(case: Case, weights: list[Tensor], clock: Clock) -> Choice | None:
    device = weights[0].device
    product = product_of(case, device)
    rules = _seconds(case, None, device, lambda: clock(product, weights))
    timed = {c: _seconds(case, c, device, lambda: clock(product, weights)) for c in choices_of(case, device)}
    best = min(timed, key=lambda choice: timed[choice])
    better, name = timed[best] < GAIN * rules, best or "no kernel of ours"
    print(
        f"{case.key:36} of {len(timed):3}, us: {timed[best] * 1e6:8.2f} by {name}, {rules * 1e6:8.2f} by the rules"
        f"{'' if better else ', which stay'}",
        flush=True,
    )
    return best if better else None


def product_of(case: Case, device: torch.device) -> Product:
    """The kernel of this case on random rows, with the choice that its entry in the table says."""
    from engine.kernels.gemv import gemv
    from engine.kernels.matmul import linear, multiply

    wide = case.dtype.itemsize > 1
    groups = -(-case.depth // case.group_size) if case.group_size else 1
    scale = None if wide else torch.ones(case.width, groups, device=device)
    gated = case.kind == "gated"
    width = case.width // 2 if gated else case.width
    out = torch.empty(case.tokens, width, dtype=torch.bfloat16, device=device)
    if case.one_row:
        row = _random(1, case.depth, torch.bfloat16, device)
        return lambda weight: gemv(row, weight, scale, None, case.group_size, out=out)
    x = _random(case.rows, case.depth, case.dtype, device)
    x_scale = torch.ones(case.tokens, 1 if case.tokens < case.rows else groups, device=device)
    to, gain = None if case.added else out, out.new_ones(width)

    def product(weight: Tensor) -> Tensor:
        if wide:
            return kernels.gated(x, weight) if gated else linear(x, weight, out=to, planes=case.added)
        operands = x, x_scale, weight, scale, None
        return multiply(*operands, out.dtype, case.group_size, out=to, gated=gated, planes=case.added)

    return (lambda weight: kernels.add_rms_norm(product(weight), out, gain, 1e-6)) if case.added else product


def choices_of(case: Case, device: torch.device) -> list[Choice]:
    if case.one_row:
        return list(GEMV_TILES)
    num_sms, shared = chip.num_sms(device), chip.shared_memory(device)
    found = bulk_choices(case, num_sms, shared) if _bulk(case, device) else []
    if case.dtype.itemsize > 1:
        found.append(tuned.NOT_OURS)
    return found if case.kind == "gated" or case.group_size else [*found, *product_choices(case, num_sms, shared)]


def bulk_choices(case: Case, num_sms: int, shared: int) -> list[Choice]:
    """Bulk tiles of which one, two or three have room on an SM, with as many buffers as then fit."""
    found: list[Choice] = []
    size, gates = case.dtype.itemsize, 2 if case.kind == "gated" else 1
    least = min(case.rows, 64)
    for block_m in sorted({least, min(case.rows, 128), min(case.rows, 256)}):
        steps = (min(case.group_size, 128),) if case.group_size else (128, 256)
        tiles = itertools.product(GATED_SHAPES if gates == 2 else BULK_SHAPES, steps, (1, 2, 3))
        for (block_n, num_warps), step, programs in tiles:
            held = step * (gates * block_n + block_m)  # bytes of a buffer
            room = block_m * (-(-case.depth // 128) + 16) * 4 if case.kind == "w8a8-g128" else 0  # scales of its rows
            num_stages = min(12 if case.group_size else 8, (shared // programs - 1024 - room) // held)
            sums = gates * block_n * block_m // (32 * num_warps)  # registers
            if case.group_size:  # two that alternate, and what they are added to
                sums = 2 * sums + sums * case.tokens // case.rows
            if (
                num_stages < 3
                or sums > (192 if case.group_size else 128)
                or 32 * num_warps * programs * (sums + 40) > 65536
            ):
                continue
            count = -(-case.rows // block_m) * -(-case.width // (gates * block_n))
            for splits in SPLITS if gates == 1 else (1,):
                if splits == 1 or (case.depth // splits >= LEAST_DEPTH and count * splits <= programs * num_sms):
                    found.append((block_m, block_n, step // size, num_warps, num_stages, tuned.BULK, splits))
    return list(dict.fromkeys(found))


def product_choices(case: Case, num_sms: int, shared: int) -> list[Choice]:
    """The known tiles that do not compute mostly padding, with the inputs in one part, and in more where SMs idle; and
    small ones for few rows. shared: bytes that a program can have.
    """
    from engine.kernels import tiles as known

    tables = [known.TILES_16BIT, known.TILES_8BIT, known.PLAIN_SM90, known.W8A8_INT8_SM90, known.W8A8_FP8_SM90]
    tables += [known.DIGITS_INT8_SM90, known.DIGITS_FP8_SM90]
    found: list[Choice] = []
    most = case.rows if case.rows <= FEW_ROWS else 2 * case.rows
    for t in dict.fromkeys(tile for table in tables for _, tiles in table for tile in tiles):
        programs = -(-case.rows // t.block_m) * -(-case.width // t.block_n)
        for splits in SPLITS if t.block_m <= most else ():
            if splits == 1 or (case.depth // splits >= LEAST_DEPTH and programs * splits <= 2 * num_sms):
                tile = t.block_m, t.block_n, t.block_k, t.num_warps, t.num_stages, int(t.weight_left)
                found.append((*tile, splits))
    few = few_row_choices(case, num_sms, shared) if case.rows <= FEW_ROWS else ()
    return list(dict.fromkeys([*found, *few]))


def few_row_choices(case: Case, num_sms: int, shared: int) -> Iterator[Choice]:
    """Tiles of few weights that keep enough of them under way: for tens of rows, that is what the time depends on."""
    size, block_m = case.dtype.itemsize, 16 if case.rows <= 16 else 32
    for block_n, block_k, num_stages in itertools.product((16, 32, 64), (128, 256, 512), (3, 4, 6)):
        step, held = block_n * block_k * size, num_stages * (block_m + block_n) * block_k * size  # bytes
        tiles, ahead = -(-case.width // block_n), num_stages - 1
        for splits in SPLITS if held <= shared else ():
            programs, part = tiles * splits, case.depth // splits
            if splits > 1 and (part < 2 * LEAST_DEPTH or tiles * splits // 2 >= num_sms or programs >= 2 * num_sms):
                continue  # adding the parts up costs, and what fills the chip needs no more of them
            flying = min(programs, num_sms * (shared // held)) * ahead * step
            least = min(IN_FLIGHT[0], case.width * case.depth * size // 3)
            if part < ahead * block_k or programs < num_sms / 2 or not least <= flying <= IN_FLIGHT[1]:
                continue
            for num_warps in (4, 8) if block_n == 64 else (2, 4):  # 64 weights are what wgmma takes, of four warps
                if COPIES[0] <= step / (512 * num_warps) <= COPIES[1]:
                    yield block_m, block_n, block_k, num_warps, num_stages, 1, splits


def compile_all(chosen: Iterable[Case], device: torch.device) -> None:
    """Fill Triton's cache on disk with every version that will be timed, by as many processes as there are cores.

    A version that cannot be compiled or launched fails again where it is timed, and is dealt with there.
    """
    versions: dict[object, tuple[Case, Choice]] = {}
    for case in chosen:
        for choice in filter(None, choices_of(case, device)):
            shape: object = (case.width, case.depth) if case.one_row else (case.depth % choice[2] == 0)
            tile = choice if case.one_row else (*choice[:6], case.added and choice[6] > 1)
            if case.group_size:  # which kernel it is depends on how many groups a program has
                shape, tile = case.depth, choice
            versions.setdefault((case.kind, case.dtype, shape, tile), (case, choice))
    count = min(len(os.sched_getaffinity(0)), len(versions))
    with ProcessPoolExecutor(max(count, 1), multiprocessing.get_context("spawn")) as pool:
        started = [pool.submit(compile_one, case, choice, device) for case, choice in versions.values()]
        for done, _ in enumerate(as_completed(started), 1):
            if done % 32 == 0 or done == len(started):
                print(f"compiled {done} of {len(started)} versions, {count} at a time", flush=True)


def compile_one(case: Case, choice: Choice, device: torch.device) -> None:
    """By launching it once; where the number of outputs is not compiled in, on few of them."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not case.one_row:
        case = replace(case, width=min(case.width, 256))
    product = product_of(case, device)
    weight = torch.zeros(case.width, case.depth, dtype=case.dtype, device=device)
    with _chosen(case.key, choice, device):
        product(weight)


def _random(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, columns), dtype=dtype, device=device)
    return torch.randn(rows, columns, device=device).to(dtype)


def _seconds(case: Case, choice: Choice | None, device: torch.device, measure: Callable[[], float]) -> float:
    """With this choice, or by the rules; infinite where it does not fit the chip."""
    from triton.runtime.errors import OutOfResources

    with _chosen(case.key, choice, device):
        try:
            return measure()
        except OutOfResources:
            return float("inf")


@contextmanager
def _chosen(key: str, choice: Choice | None, device: torch.device) -> Iterator[None]:
    """Inside, the table for this GPU has this choice, or none."""
    table = tuned.choices(device)
    table.pop(key, None)
    if choice is not None:
        table[key] = choice
    try:
        yield
    finally:
        table.pop(key, None)


def seconds_of(product: Product, weights: list[Tensor]) -> float:
    """On a GPU, in one CUDA graph."""

    def run() -> None:
        for weight in weights:
            product(weight)

    product(weights[0])  # what it allocates once must not be allocated in a capture
    return machine.time_of(captured(run), weights[0].device, least=0.005) / len(weights)
