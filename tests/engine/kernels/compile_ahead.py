"""Compile every kernel for one GPU architecture without a GPU: `python compile_ahead.py 89 bfloat16` prints JSON.

The wrappers are called as the engine calls them, with CPU tensors and a Triton driver that only knows the target, so
what is compiled is what would be launched: tiles, warps and stages are not repeated here. Triton 3.6 cannot compile for
two architectures in one process.

Output: [[what, shared memory in bytes], …], one entry for each binary.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from engine.kernels import AttentionPlan, fused, matmul, paged_attention, plan_tiles


class CompileOnly(DriverBase):
    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def compile_all(capability: int, dtype: torch.dtype) -> list[tuple[str, int]]:
    driver.set_active(CompileOnly(capability))
    launch, compiled = JITFunction.run, {}

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = (kernel.metadata.name, kernel.metadata.shared)
        return kernel

    JITFunction.run = compile_instead
    x = torch.zeros(2, 2048, dtype=dtype)
    weight = torch.zeros(2048, dtype=dtype)
    fused.rms_norm(x, weight, 1e-6)
    fused.add_rms_norm(x, x, weight, 1e-6)
    fused.silu_mul(x)
    for stored in (torch.int8, torch.float8_e4m3fn):
        qdata, scale = torch.zeros(2048, 2048, dtype=stored), torch.zeros(2048, 1)
        for tile in matmul.TILES_32BIT if dtype == torch.float32 else matmul.TILES_16BIT:
            matmul.weight_only_matmul(torch.zeros(min(tile.max_rows, 512), 2048, dtype=dtype), qdata, scale, weight)
    attend(16, 8, 128, dtype, qk_norm=True)  # Qwen3-0.6B and 1.7B
    attend(14, 2, 64, dtype, qk_norm=False)  # Qwen2.5-0.5B
    return sorted(compiled.values())


def attend(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, *, qk_norm: bool) -> None:
    lens = np.array([1, 3])
    index = torch.zeros(4, dtype=torch.int32)
    tiles = torch.from_numpy(plan_tiles(lens, 1))
    plan = AttentionPlan(index[:2], index[:3], index[:2], lens, lens, 1, tiles)
    pool = torch.zeros(2, 16, num_kv_heads, head_dim, dtype=dtype)
    qkv = torch.zeros(4, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    norm = torch.zeros(head_dim, dtype=dtype) if qk_norm else None
    cos_sin = torch.zeros(16, head_dim)
    q = fused.rope_and_store(qkv, norm, norm, 1e-6, cos_sin, index, pool, pool, index)
    tables = torch.zeros(2, 4, dtype=torch.int32)
    paged_attention.prefill(q, pool, pool, tables, plan, 0.1, q)
    paged_attention.decode(q, pool, pool, tables, plan, 0.1, 2, q)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), getattr(torch, sys.argv[2]))))
