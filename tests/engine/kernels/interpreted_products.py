"""The kernels of products and conversions against their twins under Triton's interpreter; run as interpreted.py is.

The twins are `reference.py`'s; outputs are NaN until they are written.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from engine.benchmarks import tune
from engine.kernels import Codes, convert, fused_quantize, gemv, matmul, reference, tuned
from engine.quant.quantize import dequantize

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_kernels.py"

SMALL_TILE = matmul.Tile(16, 32, 64, 4, 2)
BOTH_WAYS = (SMALL_TILE, matmul.Tile(16, 32, 64, 4, 2, weight_left=False))


def stored_weight(n: int, k: int, group: int, stored: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    groups = -(-k // group) if group else 1
    return (torch.randn(n, k) * 40).clamp(-128, 127).to(stored), torch.rand(n, groups) / 16


# (M, N, K): one row; inside one tile, past it in each direction; the wide tile.
@pytest.mark.parametrize("shape", [(1, 5, 64), (1, 9, 700), (3, 33, 257), (16, 16, 600), (17, 70, 40), (70, 65, 33)])
@pytest.mark.parametrize("group", [0, 64, 256])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_weight_only_matmul(shape, group, stored):
    """In fp32, with groups that end short."""
    m, n, k = shape
    x, bias = torch.randn(m, k), torch.randn(n)
    qdata, scale = stored_weight(n, k, group, stored)
    for b in (bias, None):
        got = matmul.weight_only_matmul(x, qdata, scale, b, group)
        expected = reference.weight_only_matmul(x, qdata, scale, b, group)
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 64), (38, 700), (16, 2048)])
@pytest.mark.parametrize(("stored", "group"), [(None, 0), (torch.int8, 0), (torch.float8_e4m3fn, 64)])
def test_gated_product_of_one_row(shape, stored, group, monkeypatch):
    """silu(gate) * up; one program for all tiles, and one each."""
    n, k = shape
    x = torch.randn(1, k) / 16
    weight, scale = (torch.randn(n, k), None) if stored is None else stored_weight(n, k, group, stored)
    if scale is None:
        expected = reference.silu_mul(reference.linear(x, weight, None))
    else:
        expected = reference.silu_mul(reference.weight_only_matmul(x, weight, scale, None, group))
    for programs in (1, 0):
        monkeypatch.setattr(gemv, "TILES", {1: (1024, 4, programs), 4: (1024, 4, programs)})
        got = gemv.gemv(x, weight, scale, None, group, gated=True)
        torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_products_split_along_the_inputs(stored, group):
    """The last program to arrive adds the parts, also where some are empty, and leaves the counters at zero. In planes
    they are what it would have added.
    """
    m, n, k = 9, 70, 300
    x, bias = torch.randn(m, k), torch.randn(n)
    qdata, scale = stored_weight(n, k, group, stored)
    expected = reference.weight_only_matmul(x, qdata, scale, bias, group)
    tokens = reference.quantize_tokens(x, stored, group)
    expected_w8a8 = reference.w8a8_matmul(*tokens, qdata, scale, bias, torch.float32, group)
    for splits in (2, 3, 7):
        tile = BOTH_WAYS[splits % 2]
        got = matmul.multiply(x, None, qdata, scale, bias, torch.float32, group, tile, splits)
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)
        got = matmul.multiply(*tokens, qdata, scale, bias, torch.float32, group, tile, splits)
        torch.testing.assert_close(got, expected_w8a8, atol=1e-3, rtol=1e-4)
        rest = (qdata, scale, None, torch.float32, group, tile, splits)
        for operands in ((x, None), tokens):
            whole, planes = (matmul.multiply(*operands, *rest, planes=p) for p in (False, True))
            assert planes.shape == (splits, m, n) and torch.equal(sum(planes[1:], start=planes[0]), whole)
        assert matmul.multiply(x, None, *rest[:-1], 1, planes=True).shape == (m, n)


@pytest.mark.parametrize("shape", [(1, 5, 64), (3, 33, 257), (17, 40, 130)])
@pytest.mark.parametrize(("stored", "group"), [(torch.int8, 0), (torch.float8_e4m3fn, 0), (torch.float8_e4m3fn, 128)])
def test_w8a8_matmul(shape, stored, group):
    m, n, k = shape
    qdata, scale = stored_weight(n, k, group, stored)
    tokens = reference.quantize_tokens(torch.randn(m, k), stored, group)
    for bias, tile in zip((torch.randn(n), None), BOTH_WAYS, strict=True):
        got = matmul.multiply(*tokens, qdata, scale, bias, torch.float32, group, tile)
        expected = reference.w8a8_matmul(*tokens, qdata, scale, bias, torch.float32, group)
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("k", [64, 300, 896])
def test_w8a8_matmul_of_one_row_with_scales_of_groups(k):
    qdata, scale = stored_weight(9, k, 128, torch.float8_e4m3fn)
    tokens = reference.quantize_tokens(torch.randn(1, k), torch.float8_e4m3fn, 128)
    for bias in (torch.randn(9), None):
        got = matmul.w8a8_matmul(*tokens, qdata, scale, bias, torch.float32, 128)
        expected = reference.w8a8_matmul(*tokens, qdata, scale, bias, torch.float32, 128)
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_products_of_two_digits(stored, group):
    """Of one row, of several, with the inputs split; the twin is that of the digits."""
    for m, n, k in ((1, 9, 100), (11, 40, 257)):
        x, bias = torch.randn(m, k).half(), torch.randn(n)
        qdata, scale = stored_weight(n, k, group, stored)
        tokens = reference.split_tokens(x, stored)
        expected = reference.digits_matmul(*tokens, qdata, scale, bias, torch.float32, group)
        for splits, tile in zip((1, 2), BOTH_WAYS, strict=True):
            got = matmul.multiply(*tokens, qdata, scale, bias, torch.float32, group, tile, splits)
            torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_fetching_weights_early_changes_nothing(stored, group, monkeypatch):
    """Bit for bit, for every kind of product; 300 inputs end inside a step, and of three parts all have some, of seven
    not.
    """
    x, bias = torch.randn(5, 300), torch.randn(70)
    qdata, scale = stored_weight(70, 300, group, stored)
    cases = [
        (x.half(), None, torch.randn(70, 300).half(), None),
        (x, None, qdata, scale),
        (*reference.quantize_tokens(x, stored, group), qdata, scale),
        (*reference.split_tokens(x.half(), stored), qdata, scale),
    ]
    for case in cases:
        for splits, tile in zip((1, 3, 7), (*BOTH_WAYS, SMALL_TILE), strict=True):
            got = []
            for early_rows in (0, 16):
                monkeypatch.setattr(matmul, "EARLY_ROWS", early_rows)
                used_group = group if case[3] is not None else 0
                got.append(matmul.multiply(*case, bias, torch.float32, used_group, tile, splits))
            assert torch.equal(*got) and got[0].isfinite().all()


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_two_digits_stand_for_the_activations(stored):
    """The product of the digits is that of the 16-bit activations, to 2^-16 of the largest for each input."""
    x, (qdata, scale) = torch.randn(5, 192).bfloat16(), stored_weight(24, 192, 0, stored)
    got = reference.digits_matmul(*reference.split_tokens(x, stored), qdata, scale, None, torch.float32)
    bound = x.abs().amax(1, keepdim=True).float() * 2**-16 @ (qdata.float().abs() * scale).sum(1)[None]
    assert ((got - reference.weight_only_matmul(x.float(), qdata, scale)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_tokens_are_split_as_the_twin_says(stored, dtype):
    x = torch.randn(5, 300).to(dtype)
    x[1] = 0.0
    x[2, 5] = 300.0
    got, got_scale = convert.split_tokens(x, stored)
    expected, scale = reference.split_tokens(x, stored)
    assert torch.equal(got_scale, scale)
    same = got.float() == expected.float()
    assert same.all() if stored == torch.int8 else same.float().mean() > 0.9  # as below


@pytest.mark.parametrize("shape", [(1, 40), (2, 16), (1, 1100), (9, 300)])
def test_linear_of_few_rows(shape):
    m, k = shape
    x, weight, bias = torch.randn(m, k).half(), torch.randn(19, k).half(), torch.randn(19).half()
    for b in (bias, None):
        expected = reference.linear(x.float(), weight.float(), None if b is None else b.float())
        torch.testing.assert_close(matmul.linear(x, weight, b).float(), expected, atol=5e-2, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_stored_codes_are_widened_exactly(dtype):
    """x picks one input each: the product is the value of every finite fp8 and int8 code, whichever kernel it is."""
    every = torch.arange(256, dtype=torch.uint8)
    fp8 = torch.where(every & 0x7F == 0x7F, 0, every).view(torch.float8_e4m3fn)
    ones = torch.ones(3, 1)
    for qdata in (every.view(torch.int8), fp8):
        stored = qdata.view(torch.uint8).repeat(3, 1).view(qdata.dtype)
        expected = qdata.float()[:, None].expand(256, 3)
        picks = torch.eye(256, dtype=dtype)
        for rows in (slice(0, 64), slice(64, 128), slice(128, 192), slice(192, 256)):
            got = matmul.multiply(picks[rows], None, stored, ones, None, dtype, 0)
            assert torch.equal(got.float(), expected[rows])
        for row in range(0, 256, 9):
            got = matmul.weight_only_matmul(picks[row : row + 1], stored, ones)
            assert torch.equal(got.float(), expected[row : row + 1])
        assert torch.equal(convert.dequantize(stored, ones, 0, dtype).float(), expected.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("group", [0, 64, 128])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_tokens_are_quantised_as_the_definition_says(stored, group, dtype):
    x = torch.randn(5, 300).to(dtype)
    x[1] = 0.0
    x[2, 5] = 300.0
    x[3] = torch.arange(300) / 2 - 64
    x[4, :100] = -0.0
    for pre_scale in (None, torch.rand(300) * 3):
        qdata, scale = convert.quantize_tokens(x, stored, group, pre_scale)
        expected, expected_scale = reference.quantize_tokens(x, stored, group, pre_scale)
        assert torch.equal(scale, expected_scale)
        same = qdata.float() == expected.float()
        # The interpreter's conversion to fp8 loses the carry where rounding reaches the next power of two; a GPU's does
        # not.
        assert same.all() if stored == torch.int8 else same.float().mean() > 0.95
        if stored != torch.int8:
            assert qdata[4, :100].float().signbit().all()  # -0 stays -0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("group", "smooth"), [(0, False), (128, False), (0, True)])
def test_norms_and_silu_quantise_as_the_twins_one_after_the_other(group, smooth, dtype):
    """Small integers: the norm's sum of squares is exact in any order."""
    x, residual = (torch.randint(-9, 10, (3, 300)).to(dtype) for _ in range(2))
    weight, codes = (
        torch.rand(300).to(dtype),
        Codes(torch.int8, group, pre_scale=torch.rand(300) * 3 if smooth else None),
    )
    half = replace(codes, pre_scale=None if codes.pre_scale is None else codes.pre_scale[:150].clone())
    total = x + residual
    cases = [
        (fused_quantize.rms_norm(x, weight, 1e-6, codes), reference.rms_norm(x, weight, 1e-6)),
        (fused_quantize.silu_mul(x / 4, half), reference.silu_mul(x / 4)),
    ]
    normed, got_total = fused_quantize.add_rms_norm(x, residual, weight, 1e-6, codes)
    assert torch.equal(got_total, total)
    planes = torch.stack([x.float() - 3, torch.full(x.shape, 3.0)])
    again, got_total = fused_quantize.add_rms_norm(planes, residual, weight, 1e-6, codes)
    assert torch.equal(got_total, total)
    assert torch.equal(again.qdata, normed.qdata) and torch.equal(again.scale, normed.scale)
    for got, expected in (*cases, (normed, reference.rms_norm(total, weight, 1e-6))):
        pre_scale = (codes if expected.shape[1] == 300 else half).pre_scale
        qdata, scale = reference.quantize_tokens(expected, torch.int8, group, pre_scale)
        torch.testing.assert_close(got.scale, scale, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=0)
        assert (got.qdata.int() - qdata.int()).abs().max() <= 1  # the exponential and the root differ in their last bit
        assert (got.qdata == qdata).float().mean() > 0.98
        assert got.dtype == dtype
    digits = fused_quantize.silu_mul(x / 4, Codes(torch.int8, digits=2))
    gated, high, low = cases[1][1].double(), digits.qdata[::2].double(), digits.qdata[1::2].double()
    rounding = dict(rtol=2e-3, atol=float(gated.abs().max()) * 2**-15)
    torch.testing.assert_close((high + low / 254) * digits.scale, gated, **rounding)


@pytest.mark.parametrize("group", [0, 64, 512])
def test_dequantize(group):
    qdata, scale = stored_weight(3, 2100, group, torch.int8)
    got = convert.dequantize(qdata, scale, group, torch.float32)
    assert torch.equal(got, dequantize(qdata, scale, group, torch.float32))


def test_tuning_runs_every_choice_and_keeps_the_fastest(monkeypatch):
    """By a clock that says so: what is found are entries of a table, tried in the table that the kernels read."""
    monkeypatch.setattr(tune, "GEMV_TILES", [(128, 4, 0), (256, 4, 4)])
    monkeypatch.setattr(tune, "STREAMED", 1)
    monkeypatch.setattr(tuned, "ROWS", (16,))
    table = tuned.choices(torch.device("cpu"))
    tried = []

    def clock(product, weights):
        product(weights[0])
        tried.append(dict(table))
        return 1.0 if table and {*table.values()} <= {gemv_best, product_best, tuned.NOT_OURS} else 2.0

    cpu = torch.device("cpu")
    gemv_best, product_best = (256, 4, 4), (16, 64, 256, 4, 3, 1, 1)
    found = dict(tune.tune(tune.cases([(48, 64)], ["gemv", "plain", "w8a8", "digits"], [16], cpu), cpu, clock))
    assert found == {
        "gemv/2/48x64": gemv_best,
        "plain/bfloat16/16/48x64": tuned.NOT_OURS,
        "gemv/1/48x64": gemv_best,
        "w8a8/int8/16/48x64": product_best,
        "digits/int8/16/48x64": product_best,
    }
    assert {} in tried and all(len(t) <= 1 for t in tried) and table == {}
    assert all(tuned.valid(key, list(choice)) for t in tried for key, choice in t.items())
    gemv_alone = list(tune.cases([(48, 64)], ["gemv"], [16], cpu))
    assert [b for _, b in tune.tune(gemv_alone, cpu, lambda *_: 1.0)] == [None, None]
    for case in tune.cases([(300, 64)], ["gemv", "w8a8"], [16], cpu):
        tune.compile_one(case, tune.choices_of(case, cpu)[-1], cpu)
    assert table == {}


def test_what_a_layer_adds_is_tuned_with_the_norm_that_adds_it(monkeypatch):
    """Its parts, too: a choice that cuts the inputs leaves them in planes."""
    monkeypatch.setattr(tune, "STREAMED", 1)
    cpu, seen = torch.device("cpu"), []
    real = tune.kernels.add_rms_norm
    monkeypatch.setattr(tune.kernels, "add_rms_norm", lambda x, *rest: seen.append(x.dim()) or real(x, *rest))
    monkeypatch.setattr(tune, "choices_of", lambda case, device: [(16, 64, 32, 4, 3, 1, splits) for splits in (1, 2)])
    cases = list(tune.cases([(48, 4096)], ["w8a8", "digits"], [16], cpu, hidden=48))
    assert [case.added for case in cases] == [True] * len(cases)

    def clock(product, weights):
        normed, total = product(weights[0])
        assert normed.shape == total.shape == (cases[0].tokens, 48)
        return 1.0

    list(tune.tune(cases[:1], cpu, clock))
    assert seen == [2, 2, 3]
