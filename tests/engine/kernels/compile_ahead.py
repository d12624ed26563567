"""Compile every kernel for one GPU architecture without a GPU: `python compile_ahead.py 89 bfloat16` prints JSON.

The wrappers are called as the engine calls them, with CPU tensors and a Triton driver that only knows the target, so
what is compiled is what would be launched: tiles, warps and stages are not repeated here. Triton 3.6 cannot compile for
two architectures in one process.

Output: [[what, shared memory in bytes], …], one entry for each binary.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from engine.kernels import (
    AttentionPlan,
    Codes,
    KVCache,
    chip,
    columns,
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
from engine.kernels.tiles import (
    BYTES_BULK,
    GATED_BULK,
    GATED_BYTES_BULK,
    GROUPED_DIGITS_BULK,
    GROUPED_W8A8_BULK,
    ONE_TURN,
    PLAIN_BULK,
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
        if self is matmul.matmul_kernel and kwargs["PDL"]:
            check_early(kernel.asm["ptx"], args[2], **kwargs)
        if kernel.metadata.name == "prefill_hopper_kernel":
            check_asynchronous(kernel.asm["sass"])
        if kernel.metadata.name == "gated_hopper_kernel":
            check_alternating(kernel.asm["sass"], kwargs["GROUPS"], 2 if kwargs["SIDE"] else 1)
            most = 8 if triton.__version__.startswith("3.9.") else 2  # there, tiles of three groups spill a little
            assert kernel.asm["sass"].count("STL") <= most, "the sums of a tile stay in registers"
            before = kernel.asm["ptx"].partition("griddepcontrol.wait")[0]
            asked = before.count("cp.async.bulk.tensor.2d.shared")
            assert asked == kwargs["ONE_TURN"] * kwargs["STAGES"] * (4 if kwargs["SIDE"] else 2), asked
        if kwargs.get("PLANES") and "norm" in kernel.metadata.name:
            assert not re.search(r"ld\.global\.[bf]?(16|32)\b", kernel.asm["ptx"]), "planes are read in wide pieces"
        if self is decode_attention.decode_kernel and kwargs["PDL"]:
            before = kernel.asm["ptx"].partition("griddepcontrol.wait")[0]
            assert "ld.global" in before, "the plan is fetched early"
            assert not any(word in before for word in ("st.global", "cp.async", "atom")), "keys and values are not"
        if self is decode_attention.decode_kernel and kwargs["FUSED"] and kwargs["num_warps"] == 1:
            early = kernel.asm["ptx"].partition("griddepcontrol.wait")[2] if kwargs["PDL"] else kernel.asm["ptx"]
            exchanges = early.partition("cp.async")[0].count("bar.sync")
            assert exchanges <= 2, "queries are rotated where they are, and change places once"
        if self is sample.scan_kernel and dtype == torch.bfloat16:
            exchanges = kernel.asm["ptx"].count("shfl.sync")
            assert exchanges <= 10, "a thread has ids of one group, and four threads a group"
        if kernel.metadata.name == "hopper_matmul_kernel":
            check_bulk(kernel.asm["ptx"], **kwargs)
            if kwargs["GROUP"]:
                check_alternating(kernel.asm["sass"])
        return kernel

    JITFunction.run = compile_instead
    x = torch.zeros(2, 2048, dtype=dtype)
    weight = torch.zeros(2048, dtype=dtype)
    fused.rms_norm(x, weight, 1e-6)
    fused.add_rms_norm(x, x, weight, 1e-6)
    fused.add_rms_norm(torch.zeros(3, 2, 2048), x, weight, 1e-6)
    fused.silu_mul(x)
    floats, ints = torch.ones(2), torch.zeros(2, dtype=torch.int32)
    inputs.decode_inputs(ints, ints, ints[None], ints[None], 16)
    tables = torch.zeros(5, columns.NUM_FLOATS), torch.zeros(5, columns.NUM_INTS, dtype=torch.int32)
    tokens = torch.zeros(5, 41, dtype=torch.int32)
    for thresholds, filtered, top in ((None, False, -1), (None, True, 20), (floats, True, -1)):
        logits = torch.zeros(2, 151936, dtype=dtype)
        sample.draw(logits, ints, ints, *tables, tokens, 151669, thresholds, filtered, top)
    for k in (0, 5, 20, 64):
        ranking.survey(torch.zeros(2, 151936, dtype=dtype), k, 151669)
    known = len(compiled)
    odd, ints = torch.zeros(3, 151936, dtype=dtype), torch.zeros(7, dtype=torch.int32)
    for filtered, top in ((False, -1), (False, 5), (True, -1), (True, 0)):
        sample.draw(odd, ints[:3], ints[1:4], *tables, tokens, 151669, None, filtered, top)
    ranking.survey(odd, 5, 151669)
    assert len(compiled) == known, "a batch of another size must not need another version"
    multiply(capability, dtype)
    # fp32 is for exactness, not for speed: one type of 8 bits stands for both.
    eight_bit = [torch.int8] if dtype == torch.float32 else [torch.int8, torch.float8_e4m3fn]
    attend(16, 8, 128, dtype, [dtype, *eight_bit], qk_norm=True)  # Qwen3-0.6B and 1.7B
    attend(32, 8, 128, dtype, [dtype], qk_norm=True)  # Qwen3-4B and 8B
    attend(14, 2, 64, dtype, [dtype], qk_norm=False)  # Qwen2.5-0.5B, whose tiles are half as large
    known = len(compiled)
    attend(14, 2, 64, dtype, [dtype], qk_norm=False, offset=1)
    assert len(compiled) == known, "indices that begin elsewhere must not need another version"
    return sorted(compiled.values())


def check_early(
    ptx: str, w: torch.Tensor, *, EARLY: bool, BLOCK_N: int, BLOCK_K: int, num_warps: int, **rest: object
) -> None:
    """Before a product waits for the kernel before it, it reads the weights of its first step, or nothing."""
    before, _, after = ptx.partition("griddepcontrol.wait")
    assert after and "ld.global" not in before
    fetched = 16 * 32 * num_warps * before.count("cp.async.cg.shared.global")
    assert fetched == (BLOCK_N * BLOCK_K * w.itemsize if EARLY else 0), (fetched, BLOCK_N, BLOCK_K, rest)
    assert not EARLY or after.count("cp.async.cg.shared.global") > 0


def check_asynchronous(sass: str) -> None:
    """Each step of attention goes on with one product still running; ptxas has not made every product wait for itself,
    as it does when it takes a register of one for touched too early; and the softmax is before the next wait. (Triton
    disassembles about half of so large a kernel.)
    """
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)(.*?)(?=WARPGROUP)", sass, flags=re.DOTALL)
    steps = [after for left, after in waits if left == "1"]
    assert steps and len(waits) < sass.count("HGMMA") // 4, (len(steps), len(waits))
    assert all(step.count("MUFU.EX2") >= 64 for step in steps), [step.count("MUFU.EX2") for step in steps]


def check_alternating(sass: str, groups: int = 1, products: int = 1) -> None:
    """While one step, of so many products, is multiplied the next is begun, or the one before scaled, by each group of
    warps: ptxas has not made every product wait for itself.
    """
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", sass)
    assert waits == [str(products), "0"] * groups, waits


def check_bulk(ptx: str, *, KIND: int, GATED: bool, PLANES: bool, STAGES: int, **rest: object) -> None:
    """Before a bulk tile waits for the kernel before it, it asks for the weights of all its buffers, and for scales of
    weights, and no more.
    """
    before, _, after = ptx.partition("griddepcontrol.wait")
    scaled = matmul.PLAIN.value != KIND
    assert after and ("ld.global" in before) == scaled
    asked = before.count("cp.async.bulk.tensor.2d.shared")
    assert asked == STAGES * (2 if GATED else 1), (asked, STAGES, rest)
    assert ("cp.async.bulk.tensor.2d.global.shared" in after) != PLANES and "wgmma.mma_async" in after


def multiply(capability: int, dtype: torch.dtype) -> None:
    """Every tile with one scale a row, and the smallest and largest with groups (scales cost a few registers)."""
    matrix = torch.zeros(2048, 2048, dtype=dtype)
    matmul.linear(matrix[:1], matrix)
    multiply_with(matmul.PLAIN, matrix[:2], None, matrix, None, 0)
    if capability == 90 and dtype != torch.float32:
        multiply_in_bulk(matrix)
    for depth in (2048, 6144, 12288):
        gemv.gemv(torch.zeros(1, depth, dtype=dtype), torch.zeros(64, depth, dtype=dtype), gated=depth == 2048)
    for stored in (torch.int8,) if dtype == torch.float32 else (torch.int8, torch.float8_e4m3fn):
        for group in (0, 128):
            qdata, scale = torch.zeros(2048, 2048, dtype=stored), torch.zeros(2048, 2048 // (group or 2048))
            x = torch.zeros(2, 2048, dtype=dtype)
            convert.dequantize(qdata, scale, group, dtype)
            matmul.weight_only_matmul(x[:1], qdata, scale, x[0], group)
            native = stored == torch.int8 or capability >= 89
            if dtype == torch.float32 or not native:
                multiply_with(matmul.WEIGHT_ONLY, x, None, qdata, scale, group)
            if not native:
                continue
            for codes in (Codes(stored, group), Codes(stored, digits=2)):
                if group and stored == torch.int8 and codes.digits == 1:
                    continue  # no such format
                fused_quantize.add_rms_norm(x, x, x[0], 1e-6, codes)
                fused_quantize.add_rms_norm(torch.zeros(2, 2, 2048), x, x[0], 1e-6, codes)
                fused_quantize.silu_mul(x, codes)
            if group == 0:
                factors = torch.zeros(2048)
                convert.quantize_tokens(x, stored, 0, factors)
                fused_quantize.add_rms_norm(x, x, x[0], 1e-6, Codes(stored, pre_scale=factors))
                fused_quantize.silu_mul(x, Codes(stored, pre_scale=factors[:1024]))
            # The types differ in the instruction: each tile is compiled for one of them, the largest for all.
            if group == 0 or stored != torch.int8:
                tokens = convert.quantize_tokens(x, stored, group)
                if group:
                    row = tokens[0][:1], tokens[1][:1]
                    matmul.w8a8_matmul(*row, qdata, scale, None, dtype, group)
                multiply_with(matmul.W8A8, *tokens, qdata, scale, group, every=stored != torch.int8)
            if dtype != torch.float32:
                tokens = convert.split_tokens(x, stored)
                multiply_with(matmul.DIGITS, *tokens, qdata, scale, group, every=stored == torch.int8)


def multiply_in_bulk(matrix: torch.Tensor) -> None:
    """By the bulk tiles that are tried first, which take most of an SM, and by what an engine takes for two rows; in 8
    bits each for one type and one kind.
    """
    from engine.kernels import gated_hopper

    x, bias, scale = matrix[:2], matrix[0], torch.zeros(2048, 1)
    assert matmul.multiply(x, None, matrix, None, None, x.dtype, 0, PLAIN_BULK[0][1][0], 2, planes=True).dim() == 3
    assert matmul.takes_bulk(x.device, x.dtype, *matrix.shape), "a new Triton: does hopper_matmul.py compile with it?"
    matmul.linear(x, matrix)
    assert matmul.gated(x, matrix) is not None
    matmul.warm_up(x.device, x.dtype)
    for gated_tile in ONE_TURN:
        gated_hopper.launch(x, matrix[:64], gated_tile, one_turn=True)
    for tile in (some[0] for _, some in PLAIN_BULK):
        matmul.multiply(x, None, matrix, None, bias, x.dtype, 0, tile)
    for tile in (some[0] for _, some in GATED_BULK):
        matmul.multiply(x, None, matrix, None, None, x.dtype, 0, tile, gated=True)
    for number, tile in enumerate(some[0] for _, some in BYTES_BULK):
        stored, digits = (torch.int8, torch.float8_e4m3fn)[number % 2], 1 + number // 2 % 2
        codes, qdata = torch.zeros(2, 2048, dtype=stored), torch.zeros(2048, 2048, dtype=stored)
        matmul.multiply(codes, scale[: 2 // digits], qdata, scale, None, x.dtype, 0, tile)
    for number, tile in enumerate(some[0] for _, some in GATED_BYTES_BULK):
        stored, digits = (torch.float8_e4m3fn, torch.int8)[number % 2], 2 - number // 2 % 2
        codes, qdata = torch.zeros(2, 2048, dtype=stored), torch.zeros(2048, 2048, dtype=stored)
        matmul.multiply(codes, scale[: 2 // digits], qdata, scale, None, x.dtype, 0, tile, gated=True)
    codes, qdata, scale = codes.view(torch.int8), qdata.view(torch.int8), torch.zeros(2048, 16)
    for tile in dict.fromkeys(tile for _, some in GROUPED_DIGITS_BULK for tile in some):
        matmul.multiply(codes, scale[:1, :1], qdata, scale, bias, x.dtype, 128, tile)
    codes, qdata = codes.view(torch.float8_e4m3fn), qdata.view(torch.float8_e4m3fn)
    matmul.multiply(codes, scale[:1, :1], qdata, torch.zeros(2048, 32), None, x.dtype, 64)
    for tile in dict.fromkeys(tile for _, some in GROUPED_W8A8_BULK for tile in some):
        matmul.multiply(codes, scale[:2], qdata, scale, None, x.dtype, 128, tile)
    wide, scale = torch.zeros(8, 25600, dtype=codes.dtype), torch.zeros(8, 200)  # Qwen3-32B: scales take much room
    matmul.multiply(wide, scale, wide, scale, None, x.dtype, 128, GROUPED_W8A8_BULK[-1][1][0], 1)


def multiply_with(
    kind: Any,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    w: torch.Tensor,
    scale: torch.Tensor | None,
    group: int,
    *,
    every: bool = True,
) -> None:
    """By every tile, or the largest; with groups, whose scales cost a few registers, by the largest."""
    tiles = matmul.tiles_for(x.device, kind.value, x.dtype, group)
    chosen = list(dict.fromkeys(t for _, some in tiles for t in some))
    for tile in chosen if every and not group else chosen[-1:]:
        matmul.multiply(x, x_scale, w, scale, None, torch.bfloat16, group, tile)


def attend(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    caches: list[torch.dtype],
    *,
    qk_norm: bool,
    offset: int = 0,
) -> None:
    """offset: where the index tensors begin, in elements."""
    lens = np.array([1, 3])
    index = torch.zeros(17 + offset, dtype=torch.int32)[offset:]
    tiles = torch.from_numpy(plan_tiles(lens, 1))
    plan = AttentionPlan(index[:2], index[:3], index[:2], lens, lens, 1, tiles)
    qkv = torch.zeros(17, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    norm = torch.zeros(head_dim, dtype=dtype) if qk_norm else None
    cos_sin = torch.zeros(16, head_dim)
    tables = torch.zeros(2, 4, dtype=torch.int32)
    scale = torch.zeros(2, num_kv_heads, 32)
    for stored in caches:
        pool = torch.zeros(2, 16 if stored == dtype else 32, num_kv_heads, head_dim, dtype=stored)
        cache = KVCache(pool, pool) if stored == dtype else KVCache(pool, pool, scale, scale)
        for num_tokens in (17, 4):  # many and few
            some = index[:num_tokens]
            q = rope.rope_and_store(qkv[:num_tokens], norm, norm, 1e-6, cos_sin, some, cache, some)
        if stored != dtype:
            kv_widen.widened(cache, tables, plan, dtype)
        prefill_attention.prefill(q, cache, tables, plan, 0.1, q)
        one, out = index[:1], q[:1]
        known = (qkv[:1], norm, norm, 1e-6, cos_sin)
        for num_splits in (1, 2):  # few and many programs an SM
            decode_attention.decode(q, cache, tables, plan, 0.1, num_splits, q)
            decode_attention.rope_and_decode(*known, one, cache, one, tables, plan, 0.1, num_splits, out)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), getattr(torch, sys.argv[2]))))
