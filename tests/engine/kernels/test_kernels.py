"""The Triton kernels without a GPU: under the interpreter against their twins, and compiled for three architectures.

Both run in processes of their own: the interpreter is chosen when Triton is imported, and Triton 3.6 cannot compile for
two architectures in one process.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed (Linux only)")

HERE = Path(__file__).resolve().parent
LARGEST_SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes of one block: CUDA C++ guide, table 30
# 16-bit tiles on all; fp32 is for exactness, not for a particular chip, and its code does not differ between them.
COMPILED = [(80, "bfloat16"), (89, "bfloat16"), (90, "bfloat16"), (89, "float32")]


INTERPRETED = [str(HERE / f"interpreted{part}.py") for part in ("", "_products")]
# what conftest.py starts when the session does, because it takes a core for minutes: words, environment
AHEAD: dict[Any, tuple[list[str], dict[str, str]]] = {
    "interpreted": (["-m", "pytest", "-q", "-p", "no:cacheprovider", *INTERPRETED], {"TRITON_INTERPRET": "1"}),
    **{pair: ([str(HERE / "compile_ahead.py"), *map(str, pair)], {}) for pair in COMPILED},
}
Wait = Callable[[Any], subprocess.CompletedProcess[str]]


@pytest.mark.timeout(900)
def test_kernels_equal_their_twins_under_the_interpreter(ahead: Wait):
    done = ahead("interpreted")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("capability", "dtype"), COMPILED)
def test_kernels_compile_and_fit(capability: int, dtype: str, ahead: Wait):
    done = ahead((capability, dtype))
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)
    assert {name for name, _ in shared} >= {
        "dequantize_kernel",
        "gemv_kernel",
        "matmul_kernel",
        "norm_quantize_kernel",
        "quantize_tokens_kernel",
        "decode_kernel",
        "join_kernel",
        "prefill_kernel",
        "rms_norm_kernel",
        "rope_and_store_kernel",
        "silu_mul_kernel",
        "check_kernel",
        "finish_kernel",
        "scan_kernel",
        "pick_kernel",
        "silu_mul_quantize_kernel",
        "widen_kernel",
        *(["hopper_matmul_kernel"] if (capability, dtype) == (90, "bfloat16") else []),
    }
    assert ("prefill_hopper_kernel" in {name for name, _ in shared}) == (capability == 90)
    too_large = [(name, size) for name, size in shared if size > LARGEST_SHARED[capability]]
    assert not too_large
