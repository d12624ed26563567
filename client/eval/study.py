"""The study that this project repeats: its variants, its spelling of them, its figures, and the layout of its tables.

The study quantised Qwen's linear layers to INT8 and FP8 with torchao, weights alone, real and fake, by tensor, row and
groups, and reported matrix errors, throughput, MMLU and WikiText-2. The figures below are those known of it; what it
did not finish is said. Its reading that fake quantisation lowers perplexity by 17 % is what `claims` is about.
"""

from __future__ import annotations

from client.eval.results import BASELINE

SIZES = ("tensor", "row", "g64", "g128", "g256", "g512")
DTYPES = ("int8", "fp8")
WEIGHT_ONLY = tuple(f"{dtype}-{size}" for dtype in DTYPES for size in SIZES)
ACTIVATIONS = tuple(f"w8a8-{dtype}-row{smooth}" for smooth in ("", "-smooth") for dtype in DTYPES)
STUDY = (BASELINE, *WEIGHT_ONLY, *(f"{name}-fake" for name in WEIGHT_ONLY), *ACTIVATIONS)

PREFILL_SAMPLES_S, DECODE_TOK_S = 9.35, 177.52  # BF16; its INT8 and FP8 runs were not finished
MATMUL = {  # shape: INT8, FP8
    "16x512": (0.009608, 0.022184),
    "100x1024": (0.010707, 0.022522),
    "4096x4096": (0.013310, 0.022538),
}
FAKE_PERPLEXITY = -0.17  # the change that it read as regularisation


def spelling(variant: str) -> str:
    """The study's name: int8-g64-fake is INT8_Per_Group_64_Fake. Others as they are."""
    name, _, fake = variant.partition("-fake")
    dtype, _, size = name.partition("-")
    if name not in WEIGHT_ONLY:
        return variant.upper() if variant == BASELINE else variant
    granularity = f"Group_{size[1:]}" if size.startswith("g") else size.capitalize()
    return f"{dtype.upper()}_Per_{granularity}{'_Fake' if variant.endswith('-fake') else ''}{fake}"


def row_name(size: str) -> str:
    """A granularity as the study's tables have it."""
    return f"Per group of {size[1:]}" if size.startswith("g") else f"Per {size}"
