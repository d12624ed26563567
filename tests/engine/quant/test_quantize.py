"""Stored numbers equal torchao's own, bit for bit."""

from __future__ import annotations

import pytest
import torch

from engine.quant.quantize import dequantize, quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(dtype: torch.dtype) -> torch.Tensor:
    """[64, 512]: ordinary rows, one of a single value, one with an outlier, tiny and large ones; no row is zero."""
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    w[1] = -0.3
    w[2, 7] = 25.0
    w[3] *= 1e-2
    w[4] *= 1e3
    w[5, 1:] = 0.0
    w[6] = torch.arange(512) - 256
    return w.to(dtype)


def torchao_quantized(w: torch.Tensor, stored: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qdata, scale and the dequantised weight, through torchao's public quantize_ of a Linear."""
    quantization = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    linear.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    per_row = {"granularity": quantization.PerRow(), "version": 2, "set_inductor_config": False}
    config = quantization.Int8WeightOnlyConfig if stored == torch.int8 else quantization.Float8WeightOnlyConfig
    quantization.quantize_(linear, config(**per_row))
    return linear.weight.qdata, linear.weight.scale, linear.weight.dequantize()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_equals_torchao(stored, dtype):
    w = weight(dtype)
    if stored == torch.int8:
        w[0] = 0.0
    qdata, scale = quantize_rows(w, stored)
    assert qdata.dtype == stored and qdata.shape == w.shape and qdata.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (64, 1)
    expected, expected_scale, expected_weight = torchao_quantized(w, stored)
    assert torch.equal(qdata.view(torch.int8), expected.view(torch.int8))
    assert torch.equal(scale, expected_scale)
    assert torch.equal(dequantize(qdata, scale, dtype), expected_weight)


def test_a_zero_fp8_row_is_zeros_where_torchao_stores_nan():
    w = weight(torch.bfloat16)
    w[0] = 0.0
    qdata, scale = quantize_rows(w, torch.float8_e4m3fn)
    expected, expected_scale, _ = torchao_quantized(w, torch.float8_e4m3fn)
    assert expected[0].float().isnan().all()
    assert torch.equal(scale, expected_scale) and scale[0] == 0
    assert torch.equal(dequantize(qdata, scale, torch.bfloat16)[0], w[0])
    assert torch.equal(qdata[1:].view(torch.int8), expected[1:].view(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_error(dtype):
    """Half a step of int8; half of fp8's last mantissa bit, relative (2^-4), and half its least step below 2^-6."""
    w = torch.randn(16, 256).to(dtype)
    wide = w.float()
    slack = 1 + 1e-2  # the scale of a bf16 weight has eight bits
    qdata, scale = quantize_rows(w, torch.int8)
    # The largest value of a row may lie half a step beyond 127.
    assert ((dequantize(qdata, scale, torch.float32) - wide).abs() <= scale / 2 * (1 + 127 * (slack - 1))).all()
    qdata, scale = quantize_rows(w, torch.float8_e4m3fn)
    error = (dequantize(qdata, scale, torch.float32) - wide).abs()
    assert (error <= (wide.abs() / 16).maximum(scale * 2**-10) * slack).all()
