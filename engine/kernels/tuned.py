"""Tiles and splits found by measuring on one kind of GPU (`octavo-bench tune`), by shape of product.

A table is a JSON file named for the GPU, in `tuned/` beside this file, or the one that the variable OCTAVO_TUNED names:

    {"gpu": "NVIDIA H200", "found": "2026-11-23, torch 2.11, triton 3.6", "choices": {
        "gemv/1/4096x2048": [8192, 8, 0],
        "w8a8/int8/64/4096x2048": [64, 64, 256, 4, 5, 0, 1]}}

One row: "gemv/bytes of a weight/N x K", and the numbers of `gemv.TILES`. More rows: "kind/dtype/rows/N x K" for up to
so many, and block_m, block_n, block_k, num_warps, num_stages of `tiles.Tile`, the operand on the left (0: the rows, 1:
the weights, 2: the weights, of a bulk tile), and the splits. With scales of groups of G inputs the kind is called
"gemv-gG", "w8a8-gG" or "digits-gG", and the tile of more rows is a bulk tile. An entry of 16-bit weights can have no
numbers: the library multiplies ("plain"), or silu has a launch of its own ("gated"). What a table lacks is chosen by
the rules in `gemv.py` and `tiles.py`; so is everything on a GPU without a table, or when kernels are chosen as for
another chip.
"""

from __future__ import annotations

import json
import logging
import os
import re
from functools import cache
from pathlib import Path

import torch

from engine.config import ModelError
from engine.kernels import chip
from engine.kernels.tiles import Tile

VARIABLE = "OCTAVO_TUNED"
FOLDER = Path(__file__).parent / "tuned"
ROWS = (16, 32, 64, 128, 256, 512)  # products of up to so many rows are tuned together
BULK = 2  # of the numbers that stand for an operand on the left
NOT_OURS: tuple[int, ...] = ()  # instead of numbers

Choices = dict[str, tuple[int, ...]]

log = logging.getLogger("octavo.engine")
_KEY = re.compile(
    r"(gemv(-g(64|128|256|512))?/[124]|(plain|gated|(w8a8|digits)(-g(64|128|256|512))?)/[a-z0-9_]+/(16|32|64|128|256|512))/[1-9]\d*x[1-9]\d*"
)
_POWERS = {1 << i for i in range(17)}


def gemv_key(itemsize: int, width: int, depth: int, *, group_size: int = 0) -> str:
    kind = f"gemv-g{group_size}" if group_size else "gemv"
    return f"{kind}/{itemsize}/{width}x{depth}"


def product_key(kind: str, dtype: torch.dtype, rows: int, width: int, depth: int, *, group_size: int = 0) -> str:
    """dtype: the weights'. rows: of the activations as they are multiplied; more than the last of ROWS: not tuned."""
    bucket = next((r for r in ROWS if rows <= r), 0)
    kind += f"-g{group_size}" if group_size else ""
    return f"{kind}/{str(dtype).removeprefix('torch.')}/{bucket}/{width}x{depth}"


@cache
def choices(device: torch.device) -> Choices:
    """The table for this GPU, empty without one. A table that cannot be used is named in the log, and not used."""
    if device.type != "cuda" or os.environ.get(chip.VARIABLE):
        return {}
    given = os.environ.get(VARIABLE)
    gpu = torch.cuda.get_device_name(device)
    path = Path(given) if given else table_path(gpu)
    if not given and not path.exists():
        return {}
    try:
        return read(path, gpu)
    except ModelError as e:
        log.warning("%s; kernels are chosen by their rules", e)
        return {}


def table_path(gpu: str) -> Path:
    return FOLDER / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def read(path: Path, gpu: str) -> Choices:
    """The choices of a table for this GPU. Raises ModelError, in one line that names the file and the entry."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"cannot read the tuned table {path}: {e}") from None
    entries = whole.get("choices") if isinstance(whole, dict) else None
    if not isinstance(entries, dict):
        raise ModelError(f"the tuned table {path} has no object `choices`")
    if whole.get("gpu") != gpu:
        raise ModelError(f"the tuned table {path} is for {json.dumps(whole.get('gpu'))}, this GPU is {gpu}")
    for key, numbers in entries.items():
        if not _KEY.fullmatch(key) or not valid(key, numbers):
            raise ModelError(f"the tuned table {path} has no valid entry {key}: {json.dumps(numbers)}")
    return {key: tuple(numbers) for key, numbers in entries.items()}


def valid(key: str, numbers: object) -> bool:
    """Whether this is an entry that `gemv` or `multiply` can be given."""
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
        return False
    if not numbers:
        return key.startswith(("plain/", "gated/")) and "/int8/" not in key and "/float8" not in key
    if key.startswith("gemv"):
        return len(numbers) == 3 and {*numbers[:2]} <= _POWERS and numbers[1] <= 32 and 0 <= numbers[2] <= 64
    if len(numbers) != 7 or not {*numbers[:4]} <= _POWERS:
        return False
    blocks, (num_warps, num_stages, left, splits) = numbers[:3], numbers[3:]
    return (
        all(16 <= b <= 512 for b in blocks)
        and num_warps <= 16
        and 1 <= num_stages <= (16 if left == BULK else 8)
        and left in (0, 1, BULK)
        and (left != BULK or num_warps >= 4)
        and (not key.startswith("gated") or (left == BULK and splits == 1))
        and ("-g" not in key or left == BULK)
        and 1 <= splits <= 32
    )


def choice(kind: str, x: torch.Tensor, weight: torch.Tensor, *, group_size: int = 0) -> tuple[int, ...] | None:
    """The table's for x[M, K] by weight[N, K]; None where it has none."""
    return choices(x.device).get(product_key(kind, weight.dtype, x.shape[0], *weight.shape, group_size=group_size))


def tile(numbers: tuple[int, ...]) -> tuple[Tile, int]:
    """The tile and the splits that the numbers of a product stand for."""
    block_m, block_n, block_k, num_warps, num_stages, left, splits = numbers
    return Tile(block_m, block_n, block_k, num_warps, num_stages, left > 0, left == BULK), splits


def write(path: Path, gpu: str, found: str, entries: Choices) -> None:
    """One line an entry, in order, so that a new table differs from the old one where it differs."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(list(entries[key]))}" for key in sorted(entries))
    head = f' "gpu": {json.dumps(gpu)},\n "found": {json.dumps(found)},\n "choices": {{\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{\n{head}{lines}\n }}\n}}\n", encoding="utf-8")
