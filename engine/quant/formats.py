"""Formats are data: how a variant's matrices are stored and multiplied, and the one place that parses their names.

The names are the project's own; the study's spellings (`INT8_Per_Row`, `FP8_Per_Group_128`, `INT8_Per_Tensor_Fake`) and
any letter case are accepted. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

BLOCK = 128  # side of a weight block, and inputs of one activation scale beside it
HEAD = "lm_head"
MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # of a layer, as they are multiplied
AUTO = "auto"  # in a list of variants: the checkpoint as it is stored

Stored = tuple[str | None, str | None, bool, bool]


@dataclass(frozen=True)
class Format:
    """How every quantisable matrix W[N, K] of a variant is stored and multiplied.

    weight: the stored dtype, a torch name ("int8", "float8_e4m3fn"); None keeps the computing dtype and has no scale.
    granularity: what shares a scale. Whatever it is, scales are stored as fp32 [N, G], and one of them belongs to
    `group_size` inputs of one output:
        "tensor": one of the whole checkpoint matrix, repeated N times; G = 1
        "row": one of each output; G = 1
        "g64", "g128", "g256", "g512": one of so many inputs of each output; G = ceil(K / group), the last may be short
        "block": one of 128 x 128 weights, repeated for each of its outputs; G = ceil(K / 128)
    activation: dtype that activations are quantised to before the product, with a scale of each token (of each 128
    inputs of a token beside "block") found as they come; None multiplies in the computing dtype.
    fake: quantise and dequantise at load, then multiply as if unquantised.
    smooth: SmoothQuant (`engine.quant.smooth`): inputs are divided by a factor of each channel before they are
    quantised, and weights multiplied by it.
    kv: dtype of the KV cache, a torch name, whose scale is fp32, one for each token and head; None is the computing
    dtype and has no scale.
    """

    name: str
    weight: str | None = None
    granularity: str | None = None
    activation: str | None = None
    fake: bool = False
    smooth: bool = False
    kv: str | None = None

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; 0 is all of them."""
        return group_size(self.granularity)

    @property
    def stored(self) -> Stored:
        """What the bytes of a stored matrix depend on: variants that agree in this hold one copy."""
        return self.weight, self.granularity, self.fake, self.smooth


def group_size(granularity: str | None) -> int:
    """Inputs that share a scale; 0 is all of them."""
    if granularity is None or granularity in ("tensor", "row"):
        return 0
    return BLOCK if granularity == "block" else int(granularity.removeprefix("g"))


KV_SUFFIXES = {"+kv8": "float8_e4m3fn", "+kvint8": "int8"}  # to any format's name
GRANULARITIES = ("tensor", "row", "g64", "g128", "g256", "g512")
_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}


def _all_formats() -> list[Format]:
    weight_only = [Format(f"{s}-{g}", dtype, g) for s, dtype in _DTYPES.items() for g in GRANULARITIES]
    fake = [Format(f"{f.name}-fake", f.weight, f.granularity, fake=True) for f in weight_only]
    w8a8 = [("int8", "row"), ("fp8", "row"), ("fp8", "tensor"), ("fp8", "block")]
    quantised = [Format(f"w8a8-{s}-{g}", _DTYPES[s], g, activation=_DTYPES[s]) for s, g in w8a8]
    smooth = [replace(f, name=f"{f.name}-smooth", smooth=True) for f in quantised if f.granularity == "row"]
    return [Format("bf16"), *weight_only, *fake, *quantised, *smooth]


FORMATS: dict[str, Format] = {f.name: f for f in _all_formats()}


def parse_format(name: str) -> Format:
    """The format called `name`. Raises ValueError naming the supported formats."""
    key = name.strip().lower().replace("_", "-").replace("-per-", "-").replace("-group-", "-g")
    base, plus, kv = key.partition("+")
    if base not in FORMATS or (plus and plus + kv not in KV_SUFFIXES):
        known = f"{', '.join(FORMATS)}; each also with {' or '.join(KV_SUFFIXES)}"
        raise ValueError(f"unknown variant {name!r}; supported: {known}")
    return replace(FORMATS[base], name=key, kv=KV_SUFFIXES[plus + kv]) if plus else FORMATS[base]


def kept_matrices(patterns: Sequence[str], num_layers: int) -> frozenset[str]:
    """Names of the matrices that stay unquantised in every variant, "lm_head" and "layers.N.NAME" with one of MATRICES.

    A pattern is a name, with or without its layer; * and ? stand for what they do in file names. Raises ValueError for
    one that fits nothing.
    """
    names = [HEAD, *(f"layers.{i}.{name}" for i in range(num_layers) for name in MATRICES)]
    kept: set[str] = set()
    for pattern in patterns:
        fitting = {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.rpartition(".")[2], pattern)}
        if not fitting:
            raise ValueError(
                f"keep_bf16: {pattern!r} names no matrix; names: {HEAD}, {', '.join(MATRICES)}, each of the last four "
                f"also of one layer, layers.0.{MATRICES[0]} to layers.{num_layers - 1}.{MATRICES[-1]}; * fits anything"
            )
        kept |= fitting
    return frozenset(kept)
