"""The twins against naive fp64 definitions, and the plan's tiles against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from engine import kernels
from engine.kernels import PREFILL_TILE, plan_tiles

MIXES = {
    "decode": ([1] * 5, [1, 16, 17, 40, 3], 5),
    "decode with padding": ([1] * 3, [20, 0, 5], 3),
    "only padding": ([1] * 2, [0, 0], 2),
    "whole prompts": ([7, 33, 1], [7, 33, 1], 0),
    "chunks": ([5, 16, 1], [20, 64, 9], 0),
    "mixed": ([1, 1, 20, 3], [33, 0, 20, 50], 2),
    "chunked masks": ([1, 1100, 600], [3, 1100, 700], 1),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("heads", [(8, 4, 128), (6, 1, 64), (2, 2, 64)])
def test_attention_is_softmax_attention(mix, heads, paged_batch, naive_attention):
    batch = paged_batch(*MIXES[mix], heads=heads)
    got = kernels.attention(*batch.args(0.1))
    torch.testing.assert_close(got.double(), naive_attention(batch, 0.1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("block_size", [16, 64])
def test_attention_takes_any_pool(block_size, paged_batch, naive_attention):
    batch = paged_batch(*MIXES["mixed"], heads=(4, 2, 64), block_size=block_size, apart=True)
    assert not batch.cache.k.is_contiguous()
    got = kernels.attention(*batch.args(0.1))
    torch.testing.assert_close(got.double(), naive_attention(batch, 0.1), atol=1e-5, rtol=0)


def test_attention_in_bfloat16(paged_batch, naive_attention):
    batch = paged_batch(*MIXES["mixed"], heads=(4, 2, 64), dtype=torch.bfloat16)
    got = kernels.attention(*batch.args(0.1))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), naive_attention(batch, 0.1), atol=2e-2, rtol=2e-2)


def test_attention_ignores_padding_tokens(paged_batch):
    batch = paged_batch(*MIXES["mixed"], heads=(4, 2, 64))
    padded = torch.cat([batch.q, torch.full((3, 4, 64), torch.nan)])
    got = kernels.attention(padded, *batch.args(0.1)[1:])
    torch.testing.assert_close(got[: len(batch.q)], kernels.attention(*batch.args(0.1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype):
    x, residual = torch.randn(2, 5, 96).to(dtype)
    weight = torch.randn(96).to(dtype)
    normed, total = kernels.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, kernels.rms_norm(total, weight, 1e-6))
    wide = total.double()
    expected = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(normed.double(), expected, atol=tolerance, rtol=tolerance)


def test_silu_mul():
    gate, up = torch.randn(2, 3, 50)
    expected = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    got = kernels.silu_mul(torch.cat([gate, up], dim=1))
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("norm", [True, False])
def test_rope_and_store(norm, rope_case):
    num_heads, num_kv_heads, head_dim = heads = (4, 2, 64)
    case = rope_case(9, heads, norm=norm, dtype=torch.float32)
    q, k_cache, v_cache = case.on_fresh_pool(kernels.rope_and_store, "cpu")
    split = case.qkv.double().view(9, -1, head_dim)
    qk, v = split[:, : num_heads + num_kv_heads], split[:, num_heads + num_kv_heads :]
    if norm:
        gain = torch.stack([case.q_norm] * num_heads + [case.k_norm] * num_kv_heads)
        qk = qk / (qk.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
    # The pair (d, d + D/2) is one complex number, turned by the position's angle.
    turn = torch.complex(*case.cos_sin[case.positions].double().chunk(2, dim=1))[:, None]
    turned = torch.complex(*qk.chunk(2, dim=-1)) * turn
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(q.double(), expected[:, :num_heads], atol=1e-5, rtol=1e-5)
    stored = case.slots >= 0
    slots = case.slots[stored].long()
    for cache, values in ((k_cache, expected[:, num_heads:]), (v_cache, v)):
        flat = cache.flatten(0, 1)
        torch.testing.assert_close(flat[slots].double(), values[stored], atol=1e-5, rtol=1e-5)
        others = torch.ones(len(flat), dtype=torch.bool)
        others[slots] = False
        assert flat[others].isnan().all()


@pytest.mark.parametrize("kv", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("mix", MIXES)
def test_attention_over_an_8_bit_cache(mix, kv, paged_batch, naive_attention):
    """The definition: softmax attention over code * scale."""
    batch = paged_batch(*MIXES[mix], heads=(6, 2, 64), block_size=32, kv=kv, apart=True)
    got = kernels.attention(*batch.args(0.01)).double()
    expected = naive_attention(batch, 0.01)
    torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("kv", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_in_8_bits(kv, dtype, rope_case):
    """Codes and scales by the naive definition, of exactly the k and v that an unquantised cache would hold."""
    case = rope_case(9, (4, 2, 64), norm=True, dtype=dtype, kv=kv)
    plain = rope_case(9, (4, 2, 64), norm=True, dtype=dtype)
    q, *got = case.on_fresh_pool(kernels.rope_and_store, "cpu")
    plain_q, *exact = plain.on_fresh_pool(kernels.rope_and_store, "cpu")
    assert torch.equal(q, plain_q)
    levels = torch.arange(256, dtype=torch.uint8).view(kv).double()
    levels = levels[levels.isfinite() & (levels > -128.0 if kv == torch.int8 else True)].unique()
    stored = case.slots[case.slots >= 0].long()
    for codes, scales, values in zip(got[:2], got[2:], exact, strict=True):
        value = values.flatten(0, 1)[stored].double()  # [stored, Hkv, D]
        scale = scales.transpose(1, 2).flatten(0, 1)[stored].double()[..., None]
        largest = value.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(scale, largest.clamp(min=1e-30) / float(levels.max()), rtol=1e-7, atol=0)
        code = codes.view(torch.uint8).flatten(0, 1)[stored].view(kv).double()
        best = (value / scale - levels.view(-1, 1, 1, 1)).abs().amin(0)
        torch.testing.assert_close((value / scale - code).abs(), best, rtol=0, atol=1e-4)  # 1e-4: ties and one rounding
        others = torch.ones(scales.shape[0] * scales.shape[2], dtype=torch.bool)
        others[stored] = False
        assert (codes.view(torch.uint8).flatten(0, 1)[others] == 0x7F).all()
        assert scales.transpose(1, 2).flatten(0, 1)[others].isnan().all()
    assert (got[1].view(torch.uint8).flatten(0, 1)[case.slots[0].long(), -1] == 0).all()  # the head of zeros


@pytest.mark.parametrize("kv", [torch.int8, torch.float8_e4m3fn])
def test_quantising_kv_rounds_half_to_even_and_keeps_every_code(kv):
    codes = torch.arange(256, dtype=torch.uint8).view(kv).float()
    codes = codes[codes.isfinite() & (codes != -128)].sort().values
    for scale in (1.0, 2.0**-90, 2.0**60):
        got, scales = kernels.reference.quantize_kv((codes * scale).view(1, 1, -1), kv)
        assert torch.equal(got.float().flatten(), codes) and scales.item() == scale
    between = (codes[:-1] + codes[1:]) / 2
    got = kernels.reference.quantize_kv(torch.cat([between, codes[-1:]]).view(1, 1, -1), kv)[0].flatten()[:-1]
    assert ((got.view(torch.uint8) & 1) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_only_matmul_is_the_dequantised_linear(dtype):
    x, bias = torch.randn(3, 512).to(dtype), torch.randn(4).to(dtype)
    scale = torch.rand(4, 1) / 100
    codes = torch.arange(256, dtype=torch.uint8)
    int8 = codes.view(torch.int8).repeat(4, 2)
    fp8 = torch.where(codes & 0x7F == 0x7F, 0, codes).view(torch.float8_e4m3fn).repeat(4, 2)  # 0x7f, 0xff are NaN
    for qdata in (int8, fp8):
        for b in (bias, None):
            expected = F.linear(x.float(), qdata.float() * scale, None if b is None else b.float()).to(dtype)
            assert torch.equal(kernels.weight_only_matmul(x, qdata, scale, b), expected)


@given(st.lists(st.integers(1, 300), max_size=8), st.integers(0, 8))
def test_plan_tiles_covers_every_query_once_the_last_of_each_prompt_first(prefills, num_decodes):
    lens = np.array([1] * num_decodes + prefills, dtype=np.int64)
    expected = [(num_decodes + i, o) for i, n in enumerate(prefills) for o in range(0, n, PREFILL_TILE)]
    got = plan_tiles(lens, num_decodes)
    assert got.dtype == np.int32 and got.shape == (len(expected), 2)
    assert [tuple(t) for t in got.tolist()] == sorted(expected, key=lambda tile: -tile[1])
