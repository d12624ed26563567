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

from engine.kernels import (
    AttentionPlan,
    Codes,
    KVCache,
    chip,
    convert,
    decode_attention,
    fused,
    fused_quantize,
    gemv,
    inputs,
    kv_widen,
    matmul,
    plan_tiles,
    prefill_attention,
    ranking,
    rope,
    sample,
)


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
    chip.capability = lambda device: divmod(capability, 10)
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
    floats, ints = torch.ones(2), torch.zeros(2, dtype=torch.int32)
    inputs.decode_inputs(ints, ints, ints[None], ints[None], 16)
    for thresholds in (None, floats):
        for top_p in (None, floats):
            sample.draw(torch.zeros(2, 151936, dtype=dtype), floats, thresholds, top_p, ints, ints, ints, 151669)
    for k in (0, 5, 20, 64):
        ranking.survey(torch.zeros(2, 151936, dtype=dtype), k, 151669)
    known = len(compiled)
    odd, ints = torch.zeros(3, 151936, dtype=dtype), torch.zeros(7, dtype=torch.int32)
    sample.draw(odd, odd[:, 0].float(), None, odd[:, 0].float(), ints[:3], ints[:3].clone(), ints[1:4], 151669)
    ranking.survey(odd, 5, 151669)
    assert len(compiled) == known, "a batch of another size must not need another version"
    multiply(capability, dtype)
    eight_bit = [torch.int8, torch.float8_e4m3fn]
    attend(16, 8, 128, dtype, [dtype, *eight_bit], qk_norm=True)  # Qwen3-0.6B and 1.7B
    attend(14, 2, 64, dtype, [dtype], qk_norm=False)  # Qwen2.5-0.5B, whose tiles are half as large
    return sorted(compiled.values())


def multiply(capability: int, dtype: torch.dtype) -> None:
    """Every tile with one scale a row, and the smallest and largest with groups (scales cost a few registers)."""
    for num_rows in (1, matmul.PLAIN_ROWS):
        matmul.linear(torch.zeros(num_rows, 2048, dtype=dtype), torch.zeros(2048, 2048, dtype=dtype))
    for depth in (2048, 6144, 12288):
        gemv.gemv(torch.zeros(1, depth, dtype=dtype), torch.zeros(64, depth, dtype=dtype), gated=depth == 2048)
    weight_only = matmul.TILES_32BIT if dtype == torch.float32 else matmul.TILES_16BIT
    for stored in (torch.int8, torch.float8_e4m3fn):
        for group, some in ((0, slice(None)), (128, slice(None, None, 3))):
            qdata, scale = torch.zeros(2048, 2048, dtype=stored), torch.zeros(2048, 2048 // (group or 2048))
            convert.dequantize(qdata, scale, group, dtype)
            for num_rows in (1, *(min(t.max_rows, matmul.DEQUANTIZE_ROWS - 1) for t in weight_only[some])):
                x = torch.zeros(num_rows, 2048, dtype=dtype)
                matmul.weight_only_matmul(x, qdata, scale, x[0], group)
            if (stored == torch.int8 and group) or (stored == torch.float8_e4m3fn and capability < 89):
                continue  # no such format; the device is refused
            x = torch.zeros(2, 2048, dtype=dtype)
            fused_quantize.add_rms_norm(x, x, x[0], 1e-6, Codes(stored, group))
            fused_quantize.silu_mul(x, Codes(stored, group))
            for tile in matmul.TILES_W8A8[some]:
                x = torch.zeros(min(tile.max_rows, 512), 2048, dtype=dtype)
                matmul.w8a8_matmul(*convert.quantize_tokens(x, stored, group), qdata, scale, x[0], dtype, group)


def attend(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, caches: list[torch.dtype], *, qk_norm: bool
) -> None:
    lens = np.array([1, 3])
    index = torch.zeros(4, dtype=torch.int32)
    tiles = torch.from_numpy(plan_tiles(lens, 1))
    plan = AttentionPlan(index[:2], index[:3], index[:2], lens, lens, 1, tiles)
    qkv = torch.zeros(4, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    norm = torch.zeros(head_dim, dtype=dtype) if qk_norm else None
    cos_sin = torch.zeros(16, head_dim)
    tables = torch.zeros(2, 4, dtype=torch.int32)
    scale = torch.zeros(2, num_kv_heads, 32)
    for stored in caches:
        pool = torch.zeros(2, 16 if stored == dtype else 32, num_kv_heads, head_dim, dtype=stored)
        cache = KVCache(pool, pool) if stored == dtype else KVCache(pool, pool, scale, scale)
        q = rope.rope_and_store(qkv, norm, norm, 1e-6, cos_sin, index, cache, index)
        if stored != dtype:
            kv_widen.widened(cache, tables, plan, dtype)
        prefill_attention.prefill(q, cache, tables, plan, 0.1, q)
        decode_attention.decode(q, cache, tables, plan, 0.1, 2, q)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), getattr(torch, sys.argv[2]))))
