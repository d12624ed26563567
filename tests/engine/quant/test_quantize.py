"""Stored numbers equal torchao's own, bit for bit."""

from __future__ import annotations

import pytest
import torch

from engine.quant.formats import group_size
from engine.quant.quantize import dequantize, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRANULARITIES = ["tensor", "row", "g64", "g128", "g256", "g512"]
STORED = [torch.int8, torch.float8_e4m3fn]


def weight(dtype: torch.dtype) -> torch.Tensor:
    """[64, 512]: ordinary rows, one of a single value, one with an outlier, tiny and large ones; no group is zero."""
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    w[1] = -0.3
    w[2, 7] = 25.0
    w[3] *= 1e-2
    w[4] *= 1e3
    w[5, 1:] = 1e-3
    w[6] = torch.arange(512) - 256
    return w.to(dtype)


def torchao_quantized(
    w: torch.Tensor, stored: torch.dtype, granularity: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qdata, scale and the dequantised weight, through torchao's public quantize_ of a Linear."""
    quantization = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    linear.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    shared = {"tensor": quantization.PerTensor(), "row": quantization.PerRow()}
    per = shared[granularity] if granularity in shared else quantization.PerGroup(group_size(granularity))
    config = quantization.Int8WeightOnlyConfig if stored == torch.int8 else quantization.Float8WeightOnlyConfig
    quantization.quantize_(linear, config(granularity=per, version=2, set_inductor_config=False))
    return linear.weight.qdata, linear.weight.scale, linear.weight.dequantize()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("stored", STORED)
def test_equals_torchao(stored, granularity, dtype):
    w = weight(dtype)
    if stored == torch.int8:
        w[0] = 0.0
    qdata, scale = quantize(w, stored, granularity)
    groups = 512 // (group_size(granularity) or 512)
    assert qdata.dtype == stored and qdata.shape == w.shape and qdata.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (64, groups) and scale.is_contiguous()
    expected, expected_scale, expected_weight = torchao_quantized(w, stored, granularity)
    assert torch.equal(qdata.view(torch.int8), expected.view(torch.int8))
    assert torch.equal(scale, expected_scale.expand(64, groups))
    assert torch.equal(dequantize(qdata, scale, group_size(granularity), dtype), expected_weight)


def test_blocks_equal_torchaos():
    """Through the tensor's own constructor: the public config for blocks asks for a GPU with FP8."""
    quantization = pytest.importorskip("torchao.quantization")
    w = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    w[130, 200] = 30.0
    expected = quantization.Float8Tensor.from_hp(w, granularity=quantization.PerBlock([128, 128]))
    qdata, scale = quantize(w, torch.float8_e4m3fn, "block")
    assert expected.scale.shape == (2, 3)
    assert torch.equal(scale, expected.scale.repeat_interleave(128, dim=0))
    assert torch.equal(qdata.view(torch.int8), expected.qdata.view(torch.int8))


@pytest.mark.parametrize("stored", STORED)
def test_tokens_equal_torchaos_dynamic_activations(stored):
    """A token is a row, or 128 inputs of one, of what torchao's W8A8 tensors quantise activations to."""
    quantization = pytest.importorskip("torchao.quantization")
    x = weight(torch.bfloat16)
    if stored == torch.int8:
        module = pytest.importorskip("torchao.quantization.quantize_.workflows")
        expected = module.Int8Tensor.from_hp(x, quantization.PerRow())
    else:
        expected = quantization.Float8Tensor.from_hp(x, granularity=quantization.PerRow())
    qdata, scale = quantize(x, stored, "row")
    assert torch.equal(scale, expected.scale) and torch.equal(qdata.view(torch.int8), expected.qdata.view(torch.int8))
    if stored == torch.float8_e4m3fn:
        expected = quantization.Float8Tensor.from_hp(x, granularity=quantization.PerBlock([1, 128]))
        qdata, scale = quantize(x, stored, "g128")
        assert torch.equal(scale, expected.scale)
        assert torch.equal(qdata.view(torch.int8), expected.qdata.view(torch.int8))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("shape", [(5, 200), (130, 300), (1, 1), (7, 63)])
@pytest.mark.parametrize("granularity", ["g64", "g128", "block"])
def test_a_group_may_end_short(granularity, shape, stored):
    """What is left over is a group or block of its own: each equals that part, quantised as one tensor."""
    rows, depth = shape
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    width, height = group_size(granularity), 128 if granularity == "block" else 1
    qdata, scale = quantize(w, stored, granularity)
    assert scale.shape == (rows, -(-depth // width))
    for top in range(0, rows, height):
        for left in range(0, depth, width):
            part = slice(top, top + height), slice(left, left + width)
            expected, expected_scale = quantize(w[part], stored, "tensor")
            assert torch.equal(qdata[part].view(torch.int8), expected.view(torch.int8))
            assert torch.equal(scale[part[0], left // width][:, None], expected_scale)
    wide = qdata.float() * scale.repeat_interleave(width, dim=1)[:, :depth]
    assert torch.equal(dequantize(qdata, scale, width, torch.float32), wide)


@pytest.mark.parametrize("granularity", [*GRANULARITIES, "block"])
@pytest.mark.parametrize("stored", STORED)
def test_zeros_stay_zeros(stored, granularity):
    """torchao stores NaN for zeros in fp8, 0 / 0; everything else is as if they were not there."""
    w = weight(torch.bfloat16)
    w[0] = 0.0
    w[9, 64:128] = 0.0
    qdata, scale = quantize(w, stored, granularity)
    again = dequantize(qdata, scale, group_size(granularity), torch.bfloat16)
    assert torch.equal(again[0], w[0]) and torch.equal(again[9, 64:128], w[9, 64:128]) and again.isfinite().all()
    if granularity == "row" and stored == torch.float8_e4m3fn:
        expected, expected_scale, _ = torchao_quantized(w, stored, granularity)
        assert expected[0].float().isnan().all() and torch.equal(scale, expected_scale) and scale[0] == 0
        assert torch.equal(qdata[1:].view(torch.int8), expected[1:].view(torch.int8))
    nothing, _ = quantize(torch.zeros(3, 70), stored, granularity)
    assert not nothing.float().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_error(dtype):
    """Half a step of int8; half of fp8's last mantissa bit, relative (2^-4), and half its least step below 2^-6."""
    w = torch.randn(16, 256).to(dtype)
    wide = w.float()
    slack = 1 + 1e-2  # the scale of a bf16 weight has eight bits
    qdata, scale = quantize(w, torch.int8, "row")
    # The largest value of a row may lie half a step beyond 127.
    assert ((dequantize(qdata, scale, 0, torch.float32) - wide).abs() <= scale / 2 * (1 + 127 * (slack - 1))).all()
    qdata, scale = quantize(w, torch.float8_e4m3fn, "row")
    error = (dequantize(qdata, scale, 0, torch.float32) - wide).abs()
    assert (error <= (wide.abs() / 16).maximum(scale * 2**-10) * slack).all()


def test_smaller_groups_err_less_where_there_are_outliers():
    """Theory's order, group <= row <= tensor. In FP8 too, though less: its steps are relative already."""
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(256, 1024, generator=generator) * 0.02
    w[torch.rand(w.shape, generator=generator) < 1e-3] *= 50
    w *= torch.logspace(-2, 0, 256)[:, None]
    for stored in STORED:
        errors = []
        for granularity in ("g64", "g128", "g256", "g512", "row", "tensor"):
            qdata, scale = quantize(w, stored, granularity)
            error = dequantize(qdata, scale, group_size(granularity), torch.float32) - w
            errors.append(float(error.square().mean()))
        assert errors == sorted(errors)
