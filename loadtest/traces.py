"""Recorded arrivals and lengths: the Azure LLM inference trace and the Mooncake traces, plain or xz.

Azure (`TIMESTAMP,ContextTokens,GeneratedTokens`; github.com/Azure/AzurePublicDataset) has lengths alone. Mooncake
(`timestamp` in ms, `input_length`, `output_length`, `hash_ids`; github.com/kvcache-ai/Mooncake) also names each
prompt's blocks of 512 tokens, so that shared prefixes can be replayed.
"""

from __future__ import annotations

import csv
import json
import lzma
import math
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from loadtest.settings import LoadError

MOONCAKE_BLOCK = 512  # tokens that one hash id stands for
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_KEYS = ("timestamp", "input_length", "output_length")


class Row(NamedTuple):
    """One request: seconds after the first, lengths in tokens, ids of its prompt's blocks (empty: unknown)."""

    at: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(path: str) -> list[Row]:
    """The rows in order of time, the first at 0. Raises LoadError for a file that is not such a trace."""
    name = path.removesuffix(".xz")
    read = {".csv": _azure, ".jsonl": _mooncake}.get(Path(name).suffix)
    if read is None:
        raise LoadError(f"{path}: a trace is a .csv (Azure) or a .jsonl (Mooncake), perhaps with .xz")
    try:
        raw = Path(path).read_bytes()
        text = (lzma.decompress(raw) if path.endswith(".xz") else raw).decode("utf-8")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as e:
        raise LoadError(f"cannot read {path}: {e}") from None
    rows = sorted(read(path, text.splitlines()))
    if not rows:
        raise LoadError(f"{path}: the trace is empty")
    if not all(math.isfinite(row.at) for row in rows):
        raise LoadError(f"{path}: a timestamp is not a number")
    return [row._replace(at=row.at - rows[0].at) for row in rows]


def _azure(path: str, lines: list[str]) -> Iterable[Row]:
    reader = csv.DictReader(lines)
    missing = [name for name in AZURE_COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise LoadError(f"{path}: the trace has no column {', '.join(missing)}")
    for row in reader:
        try:
            when = datetime.fromisoformat(row["TIMESTAMP"][:26])  # seven decimals, of which datetime takes six
            yield Row(when.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (TypeError, ValueError) as e:
            raise LoadError(f"{path}, line {reader.line_num}: {e}") from None


def _mooncake(path: str, lines: list[str]) -> Iterable[Row]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            missing = [key for key in MOONCAKE_KEYS if key not in row]
            if missing:
                raise LoadError(f"{path}, line {number}: the trace has no column {', '.join(missing)}")
            blocks = tuple(int(i) for i in row.get("hash_ids", ()))
            yield Row(float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"]), blocks)
        except (TypeError, ValueError) as e:
            if isinstance(e, LoadError):
                raise
            raise LoadError(f"{path}, line {number}: {e}") from None
