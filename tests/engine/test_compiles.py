"""Compilations of Triton kernels are counted, and none happens after the engine is ready."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (Linux only)")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILE_TWICE = """
import torch
from compile_ahead import CompileOnly
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from engine.kernels import compiles, fused

driver.set_active(CompileOnly(90))
run = JITFunction.run
JITFunction.run = lambda self, *args, grid, warmup, **rest: run(self, *args, grid=grid, warmup=True, **rest)
x = torch.zeros(2, 64)
fused.silu_mul(x)
names = compiles.watch()
assert compiles.watch() is names and names == []
fused.silu_mul(x)
fused.silu_mul(torch.zeros(5, 64))
assert names == []
fused.silu_mul(x.half())
fused.rms_norm(x, x[0], 1e-6)
print(*names)
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(HERE / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.timeout(300)
def test_each_new_version_of_a_kernel_is_noted_once(tmp_path: Path) -> None:
    for _ in range(2):  # the second time from the cache on disk
        done = run("-c", COMPILE_TWICE, TRITON_CACHE_DIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["silu_mul_kernel", "rms_norm_kernel"]


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("variants", "graphs"),
    [
        ("bf16,bf16+kv8", "graphs"),
        ("bf16,bf16+kv8", "eager"),
        ("int8-row,fp8-g128+kvint8", "graphs"),
        ("w8a8-int8-row", "graphs"),
        ("w8a8-fp8-row,w8a8-fp8-block", "graphs"),
    ],
)
def test_nothing_is_compiled_after_ready(variants: str, graphs: str, tmp_path: Path) -> None:
    done = run(str(HERE / "serve_everything.py"), str(tmp_path), variants, graphs)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["before"] > 0 and found["after"] == []
    assert found["late"] == ["silu_mul_kernel"]
    assert "a step waited for the compiler: silu_mul_kernel" in done.stderr
