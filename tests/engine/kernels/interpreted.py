"""Every Triton kernel against its twin under Triton's interpreter, on a CPU.

Run by test_kernels.py in a process of its own: TRITON_INTERPRET must be set before Triton is imported. Shapes are at
most two tiles a side and a remainder. The interpreter of Triton 3.6 knows no product of bfloat16 (it multiplies the
bits as integers) and no int8 to bfloat16, so 16-bit products are tested in float16 here, and in both by test_gpu.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from engine import kernels
from engine.kernels import PREFILL_TILE, fused, matmul, paged_attention, reference

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_kernels.py"

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_for_numpy(tensor: type, scope: interpreter._LangPatchScope) -> None:
    """Triton 3.6 turns a one-element array into a loop bound by int(), which numpy 2.4 refuses."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_for_numpy

FP32_TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
BF16_TOLERANCE = {"atol": 2e-2, "rtol": 2e-2}  # a few roundings of eight bits; the interpreter's truncate


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch fills what `empty` returns with NaN: an element that no program writes fails the comparison.

    And numpy keeps quiet about log2(0), which is -inf as on a GPU.
    """
    torch.use_deterministic_algorithms(True)
    with np.errstate(divide="ignore"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 515])
def test_norms(width, dtype):
    x, residual = torch.randn(2, 3, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    torch.testing.assert_close(fused.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), **tolerance)
    normed, total = fused.add_rms_norm(x, residual, weight, 1e-6)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(total, expected_total, **tolerance)
    torch.testing.assert_close(normed, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 1100])
def test_silu_mul(width, dtype):
    gate_up = torch.randn(3, 2 * width).to(dtype)
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    torch.testing.assert_close(fused.silu_mul(gate_up), reference.silu_mul(gate_up), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("heads", [(6, 1, 128), (2, 2, 64)])
def test_rope_and_store(heads, norm, dtype, rope_case):
    case = rope_case(5, heads, norm=norm, dtype=dtype)
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    got = case.on_fresh_pool(fused.rope_and_store, "cpu")
    expected = case.on_fresh_pool(reference.rope_and_store, "cpu")
    for a, b in zip(got, expected, strict=True):  # q, and both caches with NaN where nothing was stored
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance)


@pytest.mark.parametrize("heads", [(2, 1, 128), (6, 1, 64), (8, 1, 64), (2, 2, 64)])
def test_prefill(heads, paged_batch):
    tile = paged_attention.prefill_tile(torch.float32)
    lens, contexts = [1, 5, PREFILL_TILE + 3], [9, tile.block_n + 5, PREFILL_TILE + tile.block_n + 7]
    batch = paged_batch(lens, contexts, 1, heads=heads)
    out = torch.full_like(batch.q, torch.nan)
    paged_attention.prefill(*batch.args(0.1), out)
    assert out[0].isnan().all()  # the decode sequence's token is not this kernel's
    torch.testing.assert_close(out[1:], kernels.attention(*batch.args(0.1))[1:], **FP32_TOLERANCE)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize("heads", [(4, 2, 128), (6, 1, 64), (7, 1, 64)])
def test_decode(heads, num_splits, paged_batch):
    n = paged_attention.decode_tile(torch.float32).block_n
    batch = paged_batch([1] * 5 + [2], [1, n, 2 * n + 3, 0, n + 1, 2], 5, heads=heads)
    out = torch.full_like(batch.q, torch.nan)
    paged_attention.decode(*batch.args(0.1), num_splits, out)
    assert out[5:].isnan().all()
    torch.testing.assert_close(out[:5], kernels.attention(*batch.args(0.1))[:5], **FP32_TOLERANCE)


@pytest.mark.parametrize("block_size", [16, 64])
def test_attention_over_blocks_that_lie_apart(block_size, paged_batch):
    batch = paged_batch([1, 1, 9], [70, 5, 80], 2, heads=(2, 1, 64), block_size=block_size, apart=True)
    out = torch.full_like(batch.q, torch.nan)
    paged_attention.decode(*batch.args(0.1), 2, out)
    paged_attention.prefill(*batch.args(0.1), out)
    torch.testing.assert_close(out, kernels.attention(*batch.args(0.1)), **FP32_TOLERANCE)


def test_attention_in_float16(paged_batch):
    batch = paged_batch([1, 1, 9], [70, 5, 80], 2, heads=(2, 1, 64), dtype=torch.float16)
    out = torch.full_like(batch.q, torch.nan)
    paged_attention.decode(*batch.args(0.1), 2, out)
    paged_attention.prefill(*batch.args(0.1), out)
    expected = kernels.attention(*batch.widened(0.1))
    torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=2e-3)


# (M, N, K): inside one tile of the narrow shape, past it in each direction, and the wide shape.
@pytest.mark.parametrize("shape", [(1, 5, 64), (3, 33, 257), (16, 16, 600), (17, 70, 40), (130, 65, 33)])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_weight_only_matmul(shape, stored):
    m, n, k = shape
    x, scale, bias = torch.randn(m, k), torch.rand(n, 1) / 16, torch.randn(n)
    qdata = (torch.randn(n, k) * 40).clamp(-128, 127).to(stored)
    for b in (bias, None):
        got = matmul.weight_only_matmul(x, qdata, scale, b)
        torch.testing.assert_close(got, reference.weight_only_matmul(x, qdata, scale, b), atol=1e-3, rtol=1e-4)


def test_weight_only_matmul_widens_every_code():
    """x picks one column each: the product is the value of every finite fp8 and int8 code, exactly."""
    codes = torch.arange(256, dtype=torch.uint8)
    fp8 = torch.where(codes & 0x7F == 0x7F, 0, codes).view(torch.float8_e4m3fn)
    for qdata in (codes.view(torch.int8), fp8):
        x = torch.eye(256)[:16].half()
        for start in range(0, 256, 16):
            row = qdata[start : start + 16].view(torch.uint8)
            stored = torch.zeros(1, 256, dtype=torch.uint8)
            stored[0, :16] = row
            got = matmul.weight_only_matmul(x, stored.view(qdata.dtype), torch.ones(1, 1))
            assert torch.equal(got[:, 0].float(), row.view(qdata.dtype).float())
