"""The Triton kernels without a GPU: under the interpreter against their twins, and compiled for three architectures.

Both run in processes of their own: the interpreter is chosen when Triton is imported, and Triton 3.6 cannot compile for
two architectures in one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (Linux only)")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
LARGEST_SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes of one block: CUDA C++ guide, table 30
# 16-bit tiles on all; fp32 is for exactness, not for a particular chip, and its code does not differ between them.
COMPILED = [(80, "bfloat16"), (89, "bfloat16"), (90, "bfloat16"), (89, "float32")]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.timeout(300)
def test_kernels_equal_their_twins_under_the_interpreter():
    files = [str(HERE / f"interpreted{part}.py") for part in ("", "_products")]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory):
    """One compiling process for each of COMPILED, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            (capability, dtype): pool.submit(
                run,
                str(HERE / "compile_ahead.py"),
                str(capability),
                dtype,
                TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")),
            )
            for capability, dtype in COMPILED
        }


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("capability", "dtype"), COMPILED)
def test_kernels_compile_and_fit(
    capability: int, dtype: str, compilations: dict[tuple[int, str], Future[subprocess.CompletedProcess[str]]]
):
    done = compilations[capability, dtype].result()
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
        "widen_kernel",
        "silu_mul_quantize_kernel",
    }
    too_large = [(name, size) for name, size in shared if size > LARGEST_SHARED[capability]]
    assert not too_large
