"""The codes of an 8-bit KV cache in Triton: `encode` for the store, `widen` for attention, and what attention is told.

e4m3 is written by bits, since sm_80 does not know it. Both types are widened to fp16, which holds every code: it takes
PTX of a half to one instruction an element, where bf16 would take two, and decode has no time for more. (Widening by
permuted bytes is from Marlin, arXiv:2408.11743.) The interpreter takes Triton's own operations.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from engine.kernels import AttentionPlan, KVCache

LOG2_E = 1.4426950408889634

# Four codes in one register to four fp16 in two. sm_89 and later have an instruction for two e4m3; before, it is
# s eeee mmm moved into s 0eeee mmm0000000, the value / 256, times 256. int8: the code + 128 is the end of the mantissa
# of 1024 + that; less 1152.
_E4M3_SM89 = tl.constexpr("""{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")


def _e4m3_sm80(first: str, second: str) -> tl.constexpr:
    """first, second: which bytes of the register go to the upper halves of the two results (`prmt`'s selectors)."""
    return tl.constexpr(f"""{{
    .reg .b32 a, b, c, d, unit;
    mov.b32 unit, 0x5c005c00;
    prmt.b32 a, 0, $2, {first};
    prmt.b32 b, 0, $2, {second};
    shr.u32 c, a, 1;
    shr.u32 d, b, 1;
    and.b32 c, c, 0x3f803f80;
    and.b32 d, d, 0x3f803f80;
    lop3.b32 a, a, 0x80008000, c, 0xea;
    lop3.b32 b, b, 0x80008000, d, 0xea;
    mul.f16x2 $0, a, unit;
    mul.f16x2 $1, b, unit;
}}""")


def _int8(first: str, second: str) -> tl.constexpr:
    """As `_e4m3_sm80`, of the lower halves."""
    return tl.constexpr(f"""{{
    .reg .b32 flipped, a, b, bias;
    mov.b32 bias, 0xe480e480;
    xor.b32 flipped, $2, 0x80808080;
    prmt.b32 a, flipped, 0x64646464, {first};
    prmt.b32 b, flipped, 0x64646464, {second};
    add.f16x2 $0, a, bias;
    add.f16x2 $1, b, bias;
}}""")


_E4M3_SM80, _INT8 = _e4m3_sm80("0x5040", "0x7060"), _int8("0x4140", "0x4342")
# Two pairs of codes in one register to fp16: the first of both, the second of both.
_E4M3_PAIRS_SM89 = tl.constexpr("""{
    .reg .b32 sorted;
    .reg .b16 low, high;
    prmt.b32 sorted, $2, 0, 0x3120;
    mov.b32 {low, high}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")
_E4M3_PAIRS_SM80, _INT8_PAIRS = _e4m3_sm80("0x6040", "0x7050"), _int8("0x4240", "0x4341")


@triton.jit
def widen(code, KIND: tl.constexpr, FAST: tl.constexpr, MOVES: tl.constexpr = True):
    """8-bit codes as fp16, exactly. FAST: in PTX.

    MOVES: Triton may widen behind shared memory, in the registers that feed the tensor cores. That is right for keys.
    From there a transposed tile of 16 bits comes as it is, but one of 8 bits byte by byte (994 instructions a tile of
    decode instead of 590), so that values either stay where they are, or are widened in pairs.
    """
    if FAST:
        e4m3: tl.constexpr = _E4M3_SM89 if cuda_capability_geq(8, 9) else _E4M3_SM80
        asm: tl.constexpr = _INT8 if KIND == "int8" else e4m3
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [code], dtype=tl.float16, is_pure=MOVES, pack=4)
    if KIND == "int8":
        return code.to(tl.float16)
    return ((code.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True) * tl.full(code.shape, 256.0, tl.float16)


@triton.jit
def widen_pairs(pair, KIND: tl.constexpr, FAST: tl.constexpr):
    """Two neighbouring 8-bit codes in an int16 as two fp16, exactly: the first ones, the second ones."""
    if FAST:
        e4m3: tl.constexpr = _E4M3_PAIRS_SM89 if cuda_capability_geq(8, 9) else _E4M3_PAIRS_SM80
        asm: tl.constexpr = _INT8_PAIRS if KIND == "int8" else e4m3
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [pair], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)
    return widen(pair.to(tl.int8), KIND, False), widen((pair >> 8).to(tl.int8), KIND, False)


@triton.jit
def fit_fp16(q, scale_log2, AXIS: tl.constexpr):
    """q in fp16 (fp32 stays), each vector along AXIS divided by a power of two, and the factor of its scores.

    The largest of a vector becomes 1 to 2; what fp16 cannot hold of the others is below 2^-25.
    """
    wide = q.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(wide), axis=AXIS, keep_dims=True), 1e-30)
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    wide *= (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    factor = exponent.to(tl.float32, bitcast=True) * scale_log2
    return wide if q.dtype == tl.float32 else wide.to(tl.float16), factor


@triton.jit
def exponents(scale):
    """log2 of fp32 scales, rounded down.

    A value's scale goes to its probability, and their product must fit fp16. So the running maximum is that of
    score + this: no product is then 2 or more.
    """
    return ((scale.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)


@triton.jit
def encode(value, KIND: tl.constexpr, FAST: tl.constexpr):
    """fp32 values within an 8-bit type's range -> their codes, rounded half to even. FAST: by the hardware if it can.

    int8 is read off the mantissa of value + 1.5 * 2^23. An e4m3 number of 2^-6 and more is the upper bits of the fp32
    number, rebiased; below, the codes count multiples of 2^-9: the mantissa of value + 2^14.
    """
    if KIND == "int8":
        return ((value + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)
    if FAST and cuda_capability_geq(8, 9):
        return value.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    size = tl.abs(value)
    bits = size.to(tl.int32, bitcast=True)
    large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(size < 0.015625, small, large) | sign).to(tl.int8)


def check_cache(cache: KVCache, dtype: torch.dtype) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
    """Check that kernels computing in `dtype` can take a cache; its kind, k, v and their scales as they are passed.

    The kind is "", "int8" or "fp8". Blocks of k and v may lie apart, a block is contiguous. Codes are passed as int8; a
    cache without scales passes k in their place, which is not read.
    """
    k, v, k_scale, v_scale = cache.k, cache.v, cache.k_scale, cache.v_scale
    num_blocks, block_size, num_kv_heads, head_dim = k.shape
    assert v.shape == k.shape and v.stride() == k.stride() and v.dtype == k.dtype
    assert k.stride()[1:] == (num_kv_heads * head_dim, head_dim, 1)
    assert block_size >= 16 and block_size & (block_size - 1) == 0, block_size
    assert head_dim in (64, 128), head_dim
    if k_scale is None or v_scale is None:
        assert k_scale is v_scale and k.dtype == dtype
        return "", k, v, k, k
    kind = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}[k.dtype]
    for scale in (k_scale, v_scale):
        assert scale.shape == (num_blocks, num_kv_heads, block_size)
        assert scale.dtype == torch.float32 and scale.is_contiguous()
    return kind, k.view(torch.int8), v.view(torch.int8), k_scale, v_scale


def check_attention(
    q: Tensor, cache: KVCache, block_tables: Tensor, plan: AttentionPlan, out: Tensor
) -> tuple[str, Tensor, Tensor, Tensor, Tensor, int]:
    """Check shapes, strides and dtypes of what attention takes. What `check_cache` returns, and G."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = cache.k.shape[2]
    assert q.is_contiguous() and out.is_contiguous() and out.shape == q.shape and out.dtype == q.dtype
    assert head_dim == cache.k.shape[3] and num_heads % num_kv_heads == 0
    assert num_heads // num_kv_heads <= 8, "at most 8 query heads of a KV head"
    assert block_tables.dtype == torch.int32 and block_tables.stride(1) == 1
    for index in (plan.rows, plan.query_starts, plan.context_lens):
        assert index.dtype == torch.int32 and index.is_contiguous()
    return *check_cache(cache, q.dtype), num_heads // num_kv_heads
