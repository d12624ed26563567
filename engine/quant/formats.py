"""Formats are data: how a variant's matrices are stored and multiplied, and the one place that parses their names.

The names are the project's own; the study's spellings (`INT8_Per_Row`) and any letter case are accepted. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """How every quantisable matrix W[N, K] of a variant is stored and multiplied.

    weight: the stored dtype, a torch name ("int8", "float8_e4m3fn"); None keeps the computing dtype and has no scale.
    granularity: what shares a scale. "row": fp32 scale[N, 1]. None: no scale.
    activation: dtype that activations are quantised to before the product; None multiplies in the computing dtype.
    fake: quantise and dequantise at load, then multiply as if unquantised.
    kv: dtype of the KV cache; None is the computing dtype.
    """

    name: str
    weight: str | None = None
    granularity: str | None = None
    activation: str | None = None
    fake: bool = False
    kv: str | None = None


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("bf16"),
        Format("int8-row", weight="int8", granularity="row"),
        Format("fp8-row", weight="float8_e4m3fn", granularity="row"),
    )
}


def parse_format(name: str) -> Format:
    """The format called `name`. Raises ValueError naming the supported formats."""
    key = name.strip().lower().replace("_", "-").replace("-per-", "-")
    if key not in FORMATS:
        raise ValueError(f"unknown variant {name!r}; supported: {', '.join(FORMATS)}")
    return FORMATS[key]
