"""The JSON of octavo-bench, for the report: `matmul-error` and `throughput`, told apart by what is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.eval.data import EvalError

JSON = dict[str, Any]


@dataclass(frozen=True)
class MatmulError:
    """One line of `octavo-bench matmul-error`: (mean, spread) over its seeds; None where there is no such format."""

    shape: str  # "16x512"
    error: str
    granularity: str
    int8: tuple[float, float] | None
    fp8: tuple[float, float] | None


@dataclass(frozen=True)
class Offline:
    """One variant of `octavo-bench throughput`, without HTTP. load: what was run, in words."""

    variant: str
    prefill_samples_s: float
    prefill_tok_s: float
    decode_tok_s: float
    load: str


@dataclass(frozen=True)
class Bench:
    """All that the files hold."""

    matmul: list[MatmulError] = field(default_factory=list)
    seeds: int = 0
    offline: list[Offline] = field(default_factory=list)


def load_bench(paths: Sequence[Path]) -> Bench:
    """Raises EvalError for a file that is neither."""
    found = Bench()
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if "phases" in content:
                found.offline.extend(_offline(content))
            else:
                found.matmul.extend(_matmul(row) for row in content["rows"])
                found = Bench(found.matmul, int(content["seeds"]), found.offline)
        except OSError as e:
            raise EvalError(f"cannot read {path}: {e.strerror or e}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            said = f"{type(e).__name__}: {e}"
            raise EvalError(
                f"{path} is not from octavo-bench matmul-error --json or throughput --json ({said})"
            ) from None
    return found


def _matmul(row: JSON) -> MatmulError:
    rows, columns = row["shape"]
    int8, fp8 = ((float(v[0]), float(v[1])) if (v := row[name]) else None for name in ("int8", "fp8"))
    return MatmulError(f"{rows}x{columns}", str(row["error"]), str(row["granularity"]), int8, fp8)


def _offline(content: JSON) -> list[Offline]:
    s = content["settings"]
    load = f"{s['batch']} x {s['input_tokens']} in, {s['output_tokens']} out, {content['device']}"
    return [
        Offline(
            str(name).removeprefix("octavo "),
            float(speeds["prefill_samples_s"]),
            float(speeds["prefill_tok_s"]),
            float(speeds["decode_tok_s"]),
            load,
        )
        for name, speeds in content["phases"].items()
    ]
