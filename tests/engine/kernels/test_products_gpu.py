"""Products with stored weights on a GPU, at the shapes of Qwen3-0.6B, 1.7B, 8B and Qwen2.5-1.5B, against fp32 twins.

Every launch runs where waiting for the device is an error, and every output begins as NaN. Bounds: outputs are rounded
to bf16 once (2^-9); past DIGIT_ROWS rows the weights are too, and the twin's are with them. On sm_90, products of 2 to
256 rows are those of bulk tiles, which have no twin under the interpreter: here they meet the twins themselves.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine import kernels
from engine.kernels import Codes, Quantised, chip, convert, matmul, reference
from engine.kernels.tiles import GATED, ONE_TURN, GatedTile, Tile, count_tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels need one"),
]

# (hidden, intermediate, qkv width, attention width, qkv bias)
LINEARS = {
    "Qwen3-0.6B": (1024, 3072, 4096, 2048, False),
    "Qwen3-1.7B": (2048, 6144, 4096, 2048, False),
    "Qwen3-8B": (4096, 12288, 6144, 4096, False),
    "Qwen2.5-1.5B": (1536, 8960, 2048, 1536, True),
}
ROWS = [1, 2, 7, 16, 17, 33, 64, 65, 129, 300]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch's deterministic mode asks of cuBLAS
STORED = [torch.int8, torch.float8_e4m3fn]


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """What `empty` returns is NaN, and fp32 is fp32."""
    torch.manual_seed(0)
    assert not torch.backends.cuda.matmul.allow_tf32, "the twins must compute in full fp32"
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def without_waiting(function: object, *args: object) -> Tensor:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return function(*args)  # type: ignore[operator]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def matrices(model: str) -> list[tuple[int, int, bool]]:
    hidden, intermediate, qkv, attention, has_bias = LINEARS[model]
    return [
        (qkv, hidden, has_bias),
        (hidden, attention, False),
        (2 * intermediate, hidden, False),
        (hidden, intermediate, False),
    ]


def stored_weight(n: int, k: int, group: int, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    groups = -(-k // group) if group else 1
    qdata = (torch.randn(n, k, device="cuda") * 40).clamp(-128, 127).to(stored)
    return qdata, torch.rand(n, groups, device="cuda") / 1000


def widened(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def close(got: Tensor, expected: Tensor, slack: float = 2e-4) -> None:
    torch.testing.assert_close(got.float(), expected, rtol=4e-3, atol=float(expected.std()) * slack)


def close_in_fp8(got: Tensor, expected: Tensor, depth: int) -> None:
    """sm_90 adds 32 products at a time to a sum of 14 bits, of which each addition can lose the last: 2^-13 of the
    largest sum on the way, which is taken to be the result or three standard deviations. On average it is far less,
    about what rounding to bf16 costs (1.7e-3 of the standard deviation); quantising the activations costs 3.6e-2.
    """
    lost, std = depth / 32 * 2.0**-13, float(expected.std())
    torch.testing.assert_close(got.float(), expected, rtol=4e-3 + lost, atol=3 * std * lost)
    assert float((got.float() - expected).std()) < 6e-3 * std


def fp8_products() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.parametrize("group", [0, 64, 128, 256, 512])
@pytest.mark.parametrize("num_rows", [n for n in [*ROWS, 256] if n <= matmul.DIGIT_ROWS])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("model", LINEARS)
def test_weight_only_matmul(model, stored, group, num_rows):
    """In two digits, the activations keep 15 bits of the largest of a token."""
    for n, k, has_bias in matrices(model):
        x = torch.randn(num_rows, k, device="cuda").bfloat16()
        if num_rows >= matmul.DEQUANTIZE_ROWS and not matmul.takes_digits(x, stored, group):
            pytest.skip("multiplied by rounded weights: tested below")
        qdata, scale = stored_weight(n, k, group, stored)
        bias = torch.randn(n, device="cuda").bfloat16() if has_bias else None
        got = without_waiting(kernels.weight_only_matmul, x, qdata, scale, bias, group)
        expected = reference.weight_only_matmul(x.float(), qdata, scale, widened(bias), group)
        if matmul.takes_digits(x, stored, group) and stored != torch.int8:
            close_in_fp8(got, expected, k)
        else:
            close(got, expected, 5e-4)


@pytest.mark.parametrize("num_rows", [1, 33, 600])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("model", LINEARS)
def test_digits_are_the_twins(model, stored, num_rows):
    hidden, intermediate, *_ = LINEARS[model]
    gate_up = torch.randn(num_rows, 2 * intermediate, device="cuda").bfloat16() * 3
    x, weight = torch.randint(-9, 10, (num_rows, hidden), device="cuda").bfloat16(), torch.rand(hidden, device="cuda")
    weight, codes = weight.bfloat16(), Codes(stored, digits=2)
    normed = kernels.rms_norm(x, weight, 1e-6)
    cases = [
        (kernels.split_tokens(gate_up, stored), gate_up),
        (kernels.silu_mul(gate_up, codes), kernels.silu_mul(gate_up)),
        (kernels.rms_norm(x, weight, 1e-6, codes), normed),
        (kernels.add_rms_norm(x, torch.zeros_like(x), weight, 1e-6, codes)[0], normed),
    ]
    for got, value in cases:
        qdata, scale = (got.qdata, got.scale) if isinstance(got, Quantised) else got
        expected, expected_scale = reference.split_tokens(value, stored)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(qdata.view(torch.int8), expected.view(torch.int8))


@pytest.mark.parametrize("num_rows", [1, 5, 300])
def test_a_product_is_written_where_it_is_asked_for(num_rows):
    x, weight = torch.randn(num_rows, 1024, device="cuda").bfloat16(), torch.randn(70, 1024, device="cuda").bfloat16()
    out = torch.full((num_rows, 70), torch.nan, device="cuda").bfloat16()
    assert without_waiting(kernels.linear, x, weight, None, out) is out
    assert torch.equal(out, kernels.linear(x, weight))


@pytest.mark.parametrize("num_rows", [1, 5, 300, 1100])
@pytest.mark.parametrize("stored", STORED)
def test_an_8_bit_product_is_written_where_it_is_asked_for(stored, num_rows):
    if stored != torch.int8 and not fp8_products():
        pytest.skip("no FP8 products before sm_89")
    x = torch.randn(num_rows, 1024, device="cuda").bfloat16()
    qdata, scale = stored_weight(80, 1024, 0, stored)
    tokens = kernels.quantize_tokens(x, stored)
    for function, args in (
        (kernels.weight_only_matmul, (x, qdata, scale, None, 0)),
        (kernels.w8a8_matmul, (*tokens, qdata, scale, None, torch.bfloat16, 0)),
    ):
        out = torch.full((num_rows, 80), torch.nan, device="cuda").bfloat16()
        assert without_waiting(function, *args, out) is out
        assert torch.equal(out, function(*args))


@pytest.mark.parametrize("group", [None, 0, 128])
@pytest.mark.parametrize("num_rows", [1, 256, 257, 1000])
@pytest.mark.parametrize("model", LINEARS)
def test_a_product_is_added_to_a_residual(model, num_rows, group):
    """By the library, in the residual's place; not where the products are ours. The product may be rounded before the
    sum is. group: of an INT8 weight, None of one in 16 bits.
    """
    for n, k, _ in matrices(model):
        x, weight = torch.randn(num_rows, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda").bfloat16()
        scale, wide = None, weight.float()
        if group is not None:
            weight, scale = stored_weight(n, k, group, torch.int8)
            wide = convert.dequantize(weight, scale, group, torch.bfloat16).float()
        product = x.float() @ wide.t()
        residual = (torch.randn_like(product) * product.std()).bfloat16()
        expected = product + residual.float()
        got = without_waiting(kernels.added, x, residual, weight, scale, group or 0)
        if num_rows <= matmul.BULK_ROWS:
            assert got is None
        else:
            assert got.data_ptr() == residual.data_ptr()
            bound = 4e-3 * (expected.abs() + product.abs()) + 2e-4 * product.std()
            assert ((got.float() - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    ("num_rows", "stored", "group"),
    [
        *((rows, None, 0) for rows in (1, 3, 30, 100, 256, 300, 2048)),
        *((rows, *how) for rows in (1, 3, 2048) for how in ((torch.int8, 0), (torch.float8_e4m3fn, 128))),
    ],
)
@pytest.mark.parametrize("model", LINEARS)
def test_gated(model, num_rows, stored, group):
    hidden, intermediate, *_ = LINEARS[model]
    x = torch.randn(num_rows, hidden, device="cuda").bfloat16()
    if stored is None:
        weight, scale = torch.randn(2 * intermediate, hidden, device="cuda").bfloat16() / 40, None
        product = x.float() @ weight.float().t()
    else:
        weight, scale = stored_weight(2 * intermediate, hidden, group, stored)
        rounded = torch.bfloat16 if num_rows > matmul.DIGIT_ROWS else torch.float32
        product = x.float() @ reference.dequantize(weight, scale, group, rounded).float().t()
    got = without_waiting(kernels.gated, x, weight, scale, group)
    expected = reference.silu_mul(product.bfloat16().float())
    torch.testing.assert_close(got.float(), expected, rtol=1.6e-2, atol=float(expected.std()) * 4e-3)


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("num_rows", [matmul.DIGIT_ROWS + 1, 2000])
def test_many_rows_are_multiplied_by_rounded_weights(stored, group, num_rows):
    x = torch.randn(num_rows, 1536, device="cuda").bfloat16()
    qdata, scale = stored_weight(2048, 1536, group, stored)
    got = without_waiting(kernels.weight_only_matmul, x, qdata, scale, None, group)
    weight = reference.dequantize(qdata, scale, group, x.dtype)
    assert torch.equal(got, F.linear(x, weight))
    expected = reference.weight_only_matmul(x, qdata, scale, None, group).float()
    assert float((got.float() - expected).std()) < 4e-3 * float(expected.std())  # bf16 rounds by 1.7e-3, twice here


@pytest.mark.parametrize("num_rows", [*ROWS, 1000])
@pytest.mark.parametrize(("stored", "group"), [(torch.int8, 0), (torch.float8_e4m3fn, 0), (torch.float8_e4m3fn, 128)])
@pytest.mark.parametrize("model", LINEARS)
def test_w8a8_matmul(model, stored, group, num_rows):
    if stored != torch.int8 and not fp8_products():
        pytest.skip("no FP8 products before sm_89")
    for n, k, has_bias in matrices(model):
        x = torch.randn(num_rows, k, device="cuda").bfloat16()
        x[0, 3] = 50.0
        qdata, scale = stored_weight(n, k, group, stored)
        bias = torch.randn(n, device="cuda").bfloat16() if has_bias else None
        tokens = kernels.quantize_tokens(x, stored, group)
        expected_tokens = reference.quantize_tokens(x, stored, group)
        assert torch.equal(tokens[1], expected_tokens[1])
        assert torch.equal(tokens[0].view(torch.int8), expected_tokens[0].view(torch.int8))
        got = without_waiting(kernels.w8a8_matmul, *tokens, qdata, scale, bias, torch.bfloat16, group)
        expected = reference.w8a8_matmul(*tokens, qdata, scale, bias, torch.float32, group)
        if stored == torch.int8:
            close(got, expected)
        else:
            close_in_fp8(got, expected, k)


@pytest.mark.parametrize("num_rows", [256, 257, 300, 1003])
@pytest.mark.parametrize("model", LINEARS)
def test_w8a8_matmul_with_scales_of_blocks(model, num_rows):
    """On sm_90 torch multiplies from LIBRARY_BLOCK_ROWS rows on, but for the last of an odd number."""
    if not fp8_products():
        pytest.skip("no FP8 products before sm_89")
    for n, k, has_bias in matrices(model):
        qdata, _ = stored_weight(n, k, 128, torch.float8_e4m3fn)
        block_scale = torch.rand(n // 128, k // 128, device="cuda") / 1000
        scale = block_scale.repeat_interleave(128, dim=0)
        bias = torch.randn(n, device="cuda").bfloat16() if has_bias else None
        tokens = kernels.quantize_tokens(torch.randn(num_rows, k, device="cuda").bfloat16(), torch.float8_e4m3fn, 128)
        expected = reference.w8a8_matmul(*tokens, qdata, scale, bias, torch.float32, 128)
        out = torch.full((num_rows, n), torch.nan, device="cuda").bfloat16()
        for where in (None, out):
            args = (*tokens, qdata, scale, bias, torch.bfloat16, 128, where, block_scale)
            got = without_waiting(kernels.w8a8_matmul, *args)
            close_in_fp8(got, expected, k)
            assert where is None or got is where


@pytest.mark.parametrize("num_rows", [1, 33, 600])
@pytest.mark.parametrize(("stored", "group"), [(torch.int8, 0), (torch.float8_e4m3fn, 0), (torch.float8_e4m3fn, 128)])
@pytest.mark.parametrize("model", LINEARS)
def test_norms_and_silu_quantise_as_the_two_kernels_one_after_the_other(model, stored, group, num_rows):
    """Bit for bit; small integers, as the norm's sum of squares is then exact in any order."""
    if stored != torch.int8 and not fp8_products():
        pytest.skip("no FP8 products before sm_89")
    hidden, intermediate, *_ = LINEARS[model]
    x, residual = (torch.randint(-9, 10, (num_rows, hidden), device="cuda").bfloat16() for _ in range(2))
    weight, codes = torch.rand(hidden, device="cuda").bfloat16(), Codes(stored, group)
    gate_up = torch.randn(num_rows, 2 * intermediate, device="cuda").bfloat16() * 3
    gate_up[:, 5] = -0.0
    normed, total = kernels.add_rms_norm(x, residual, weight, 1e-6, codes)
    assert torch.equal(total, x + residual)
    for got, expected in (
        (kernels.rms_norm(x, weight, 1e-6, codes), kernels.rms_norm(x, weight, 1e-6)),
        (normed, kernels.add_rms_norm(x, residual, weight, 1e-6)[0]),
        (kernels.silu_mul(gate_up, codes), kernels.silu_mul(gate_up)),
    ):
        assert isinstance(got, Quantised)
        qdata, scale = reference.quantize_tokens(expected, stored, group)
        assert torch.equal(got.scale, scale)
        assert torch.equal(got.qdata.view(torch.int8), qdata.view(torch.int8))


@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 33, 64, 100, 200, 256])
@pytest.mark.parametrize("model", LINEARS)
def test_linear(model, num_rows):
    for n, k, has_bias in matrices(model):
        x = torch.randn(num_rows, k, device="cuda").bfloat16()
        weight = (torch.randn(n, k, device="cuda") * 0.02).bfloat16()
        bias = torch.randn(n, device="cuda").bfloat16() if has_bias else None
        got = without_waiting(kernels.linear, x, weight, bias)
        close(got, torch.nn.functional.linear(x.float(), weight.float(), widened(bias)))


needs_bulk = pytest.mark.skipif(
    not torch.cuda.is_available()
    or not matmul.takes_bulk(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, 64, 64),
    reason="bulk tiles need sm_90 and a Triton whose Gluon is known",
)


def bulk(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(block_m, block_n, block_k, num_warps, num_stages, bulk=True)


@needs_bulk
@pytest.mark.parametrize("num_rows", [2, 40, 100, 129, 256])
@pytest.mark.parametrize("model", ["Qwen3-1.7B", "Qwen2.5-1.5B"])
def test_a_gated_product_is_that_of_the_two_kernels(model, num_rows):
    """Bit for bit, of the same inputs in the same order: silu and the product with up are rounded where theirs are."""
    hidden, intermediate, *_ = LINEARS[model]
    x = torch.randn(num_rows, hidden, device="cuda").bfloat16()
    weight = torch.randn(2 * intermediate, hidden, device="cuda").bfloat16() / 40
    apart = kernels.silu_mul(matmul.multiply(x, None, weight, None, None, x.dtype, 0, bulk(64, 64, 128, 4, 3), 1))
    assert torch.equal(without_waiting(kernels.gated, x, weight), apart)


@needs_bulk
@pytest.mark.parametrize("tile", dict.fromkeys((*GATED, *ONE_TURN)), ids=str)
@pytest.mark.parametrize(
    ("num_rows", "inputs", "width"),
    [
        (1, 2048, 6144),
        (200, 2048, 2048),
        (257, 2048, 6144),
        (3001, 2048, 6144),
        (2000, 1536, 8960),
        (700, 1000, 200),
        (65, 72, 8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gated_product_of_many_rows_is_that_of_the_two_kernels(
    dtype: torch.dtype, num_rows: int, inputs: int, width: int, tile: GatedTile
) -> None:
    """Bit for bit, also past the edges of tiles: some of tokens, of inputs, and of gate, where up begins."""
    from engine.kernels import gated_hopper

    x = torch.randn(num_rows, inputs, device="cuda").to(dtype)
    weight = torch.randn(2 * width, inputs, device="cuda").to(dtype) / 40
    apart = kernels.silu_mul(matmul.multiply(x, None, weight, None, None, dtype, 0, bulk(64, 64, 64, 4, 3), 1))
    assert torch.equal(without_waiting(gated_hopper.launch, x, weight, tile), apart)
    if count_tiles(num_rows, width, tile.height, tile.width) <= chip.num_sms(x.device):
        assert torch.equal(without_waiting(gated_hopper.launch, x, weight, tile, True), apart)


@needs_bulk
@pytest.mark.parametrize("num_rows", [1, 2, 15, 32, 40, 129, 256])
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("model", ["Qwen3-1.7B", "Qwen2.5-1.5B"])
def test_a_gated_8_bit_product_is_that_of_the_two_kernels(model, stored, digits, num_rows):
    """Bit for bit, as above."""
    hidden, intermediate, *_ = LINEARS[model]
    x = torch.randn(num_rows, hidden, device="cuda").bfloat16()
    qdata, scale = stored_weight(2 * intermediate, hidden, 0, stored)
    tokens = kernels.quantize_tokens(x, stored) if digits == 1 else kernels.split_tokens(x, stored)
    apart = matmul.multiply(*tokens, qdata, scale, None, x.dtype, 0, bulk(64, 64, 128, 4, 4), 1)
    got = without_waiting(kernels.gated_codes, Quantised(*tokens, x.dtype), qdata, scale)
    if digits == 2 and num_rows > matmul.GATED_DIGIT_ROWS:
        assert got is None
    else:
        assert got is not None and torch.equal(got, kernels.silu_mul(apart))


@needs_bulk
@pytest.mark.parametrize("num_rows", [1, 9, 37, 64])
def test_rows_of_a_bulk_tile_do_not_depend_on_each_other(num_rows):
    x, weight = torch.randn(64, 2048, device="cuda").bfloat16(), torch.randn(2048, 2048, device="cuda").bfloat16()
    every, some = (
        matmul.multiply(rows, None, weight, None, None, x.dtype, 0, bulk(64, 64, 128, 4, 7), 2)
        for rows in (x, x[:num_rows])
    )
    assert torch.equal(every[:num_rows], some)


@needs_bulk
@pytest.mark.parametrize("num_rows", [1, 20, 96, 160])
def test_nobody_sees_what_lies_behind_the_rows(num_rows):
    """Where there is memory behind them it is fetched: here NaN, and codes that are NaN."""
    whole = torch.full((256, 2048), torch.nan, device="cuda").bfloat16()
    whole[:num_rows].normal_()
    weight, bias = torch.randn(2048, 2048, device="cuda").bfloat16(), torch.randn(2048, device="cuda").bfloat16()
    rows, tile = whole[:num_rows], bulk(128, 64, 64, 4, 4)
    got, expected = (matmul.multiply(x, None, weight, None, bias, x.dtype, 0, tile, 2) for x in (rows, rows.clone()))
    assert got.isfinite().all() and torch.equal(got, expected)
    qdata, scale = stored_weight(2048, 2048, 128, torch.float8_e4m3fn)
    codes, x_scale = kernels.quantize_tokens(rows, torch.float8_e4m3fn, 128)
    behind = torch.full((256, 2048), 127, dtype=torch.uint8, device="cuda").view(codes.dtype)
    behind[:num_rows] = codes
    tile = bulk(64, 64, 128, 4, 6)
    got, expected = (
        matmul.multiply(x, x_scale, qdata, scale, bias, torch.bfloat16, 128, tile, 2)
        for x in (behind[:num_rows], codes.clone())
    )
    assert got.isfinite().all() and torch.equal(got, expected)
    assert not got.isnan().any() and len(kernels.rms_norm(rows, bias, 1e-6).untyped_storage()) // 4096 >= 16


@needs_bulk
@pytest.mark.parametrize(
    ("n", "k", "dtype"), [(8, 64, torch.bfloat16), (72, 136, torch.float16), (2056, 1104, torch.bfloat16)]
)
def test_bulk_tiles_at_odd_shapes(n, k, dtype):
    """What lies past an edge counts as zeros, and is not stored; parts of no inputs add nothing."""
    x, weight = torch.randn(33, k, device="cuda").to(dtype), torch.randn(n, k, device="cuda").to(dtype)
    bias, scale = torch.randn(n, device="cuda").to(dtype), torch.rand(n, 1, device="cuda") / 100
    qdata, _ = stored_weight(n, k, 0, torch.int8)
    around = torch.full((35, n), 7.0, device="cuda", dtype=dtype)
    for splits in (1, 3):
        got = matmul.multiply(x, None, weight, None, bias, dtype, 0, bulk(64, 64, 128, 4, 3), splits, around[1:-1])
        close(got, x.float() @ weight.float().t() + bias.float())
        assert (around[0] == 7).all() and (around[-1] == 7).all()
        if k % 16 == 0:
            tokens = kernels.quantize_tokens(x, torch.int8)
            got = matmul.multiply(*tokens, qdata, scale, bias, dtype, 0, bulk(64, 64, 128, 4, 4), splits)
            close(got, reference.w8a8_matmul(*tokens, qdata, scale, bias, torch.float32))


@needs_bulk
@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize(("num_rows", "tile"), [(9, bulk(16, 64, 128, 4, 8)), (100, bulk(64, 64, 128, 4, 4))], ids=str)
def test_planes_of_bulk_tiles_add_up_to_the_product(num_rows: int, tile: Tile, splits: int) -> None:
    """Bit for bit, of each kind, at odd shapes; the norm that adds them gives what it gives of the product."""
    n, k = 1032, 1104
    x, weight = (torch.randn(rows, k, device="cuda").bfloat16() for rows in (num_rows, n))
    residual, gain = torch.randn(num_rows, n, device="cuda").bfloat16(), torch.rand(n, device="cuda").bfloat16()
    cases: list[tuple[Any, ...]] = [(x, None, weight, None, None, x.dtype, 0)]
    for stored, group in itertools.product(STORED, (0, 128)):
        qdata, scale = stored_weight(n, k, group, stored)
        for codes in (kernels.split_tokens(x, stored), kernels.quantize_tokens(x, stored, group)):
            cases.append((*codes, qdata, scale, None, x.dtype, group))
    for case in cases:
        planes = without_waiting(partial(matmul.multiply, *case, tile, splits, planes=True))
        whole = matmul.multiply(*case, tile, splits)
        assert planes.shape == (splits, num_rows, n) and planes.dtype == torch.float32
        assert torch.equal(sum(planes[1:], start=planes[0]).bfloat16(), whole)
        for codes in (None, Codes(torch.int8)):
            got, expected = (kernels.add_rms_norm(p, residual, gain, 1e-6, codes) for p in (planes, whole))
            assert torch.equal(got[1], expected[1])
            same = (got[0], expected[0]) if codes is None else (got[0].qdata, expected[0].qdata)
            assert torch.equal(*same)


@needs_bulk
@pytest.mark.parametrize("num_rows", [129, 200, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_many_inputs_the_library_leaves_two_planes(dtype: torch.dtype, num_rows: int) -> None:
    """To the norm alone, and of up to 256 rows."""
    n, k = 1000, 2016
    x = torch.randn(num_rows, k, device="cuda").to(dtype)
    weight, bias = torch.randn(n, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
    planes = without_waiting(partial(kernels.linear, x, weight, planes=True))
    assert planes.shape == (2, num_rows, n) and planes.dtype == torch.float32
    expected = x.float() @ weight.float().t()
    close(planes.sum(0).to(dtype), expected)
    close(kernels.linear(x, weight), expected)
    close(kernels.linear(x, weight, bias, planes=True), expected + bias.float())
    assert kernels.linear(x, weight, out=torch.empty_like(x[:, :n].contiguous()), planes=True).shape == (num_rows, n)
    assert kernels.linear(x.repeat(3, 1), weight, planes=True).shape == (3 * num_rows, n)
    assert kernels.linear(x[:, :2008].contiguous(), weight[:, :2008].contiguous(), planes=True).dim() == 2


@needs_bulk
@pytest.mark.parametrize("num_rows", [2, 33, 100])
@pytest.mark.parametrize("group", [64, 128, 256, 512])
@pytest.mark.parametrize(("n", "k"), [(8, 64), (72, 208), (520, 1104), (1024, 896)])
def test_bulk_tiles_with_scales_of_groups_at_odd_shapes(n, k, group, num_rows):
    """Groups that end short, odd numbers of steps, parts of no inputs: for two digits, and one."""
    x = torch.randn(num_rows, k, device="cuda").bfloat16()
    for stored in STORED:
        qdata, scale = stored_weight(n, k, group, stored)
        around = torch.full((num_rows + 2, n), 7.0, device="cuda").bfloat16()
        digits, tokens = kernels.split_tokens(x, stored), kernels.quantize_tokens(x, stored, group)
        for codes, twin in ((digits, reference.digits_matmul), (tokens, reference.w8a8_matmul)):
            expected = twin(*codes, qdata, scale, None, torch.float32, group)
            for tile in (bulk(16, 64, 128, 4, 8), bulk(64, 64, 128, 4, 3), bulk(128, 128, 128, 8, 3)):
                for splits in (1, 3):
                    around[1:-1] = torch.nan
                    args = (*codes, qdata, scale, None, torch.bfloat16, group, tile, splits, around[1:-1])
                    got = without_waiting(matmul.multiply, *args)
                    assert (around[0] == 7).all() and (around[-1] == 7).all()
                    if stored == torch.int8:
                        close(got, expected)
                    else:
                        close_in_fp8(got, expected, k)


@needs_bulk
def test_a_bulk_tile_leaves_room_for_the_scales_of_many_groups():
    """Qwen3-32B has 25,600 inputs: 200 groups of 64 rows, where twelve buffers alone would fit."""
    qdata, scale = stored_weight(136, 25600, 128, torch.float8_e4m3fn)
    tokens = kernels.quantize_tokens(torch.randn(70, 25600, device="cuda").bfloat16(), torch.float8_e4m3fn, 128)
    got = matmul.multiply(*tokens, qdata, scale, None, torch.bfloat16, 128, bulk(64, 64, 128, 4, 12), 1)
    close_in_fp8(got, reference.w8a8_matmul(*tokens, qdata, scale, None, torch.float32, 128), 25600)


@needs_bulk
@pytest.mark.parametrize("num_rows", [3, 64, 200])
@pytest.mark.parametrize("stored", STORED)
def test_rows_with_scales_of_groups_do_not_depend_on_each_other(num_rows, stored):
    """Bit for bit, by one tile; whatever the rows are, and however many."""
    qdata, scale = stored_weight(2048, 2048, 128, stored)
    x, tile = torch.randn(256, 2048, device="cuda").bfloat16(), bulk(64, 64, 128, 4, 6)
    for make in (
        lambda rows: kernels.split_tokens(rows, stored),
        lambda rows: kernels.quantize_tokens(rows, stored, 128),
    ):
        every, some = (
            matmul.multiply(*make(rows), qdata, scale, None, x.dtype, 128, tile, 2) for rows in (x, x[:num_rows])
        )
        assert torch.equal(every[:num_rows], some)


@needs_bulk
@pytest.mark.parametrize("num_rows", [8, 100, 256])
@pytest.mark.parametrize("digits", [1, 2])
def test_a_chain_with_scales_of_groups_is_that_of_products_one_by_one(num_rows, digits):
    """As below: the scales of rows are read after the wait, those of weights before it."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    up, down = (stored_weight(n, k, 128, torch.float8_e4m3fn) for n, k in ((4096, 2048), (2048, 2048)))
    gain, x = torch.rand(2048, device="cuda").bfloat16(), torch.randn(num_rows, 2048, device="cuda").bfloat16()
    codes = Codes(torch.float8_e4m3fn, digits=2) if digits == 2 else Codes(torch.float8_e4m3fn, 128)
    product = kernels.digits_matmul if digits == 2 else kernels.w8a8_matmul
    steps = [
        lambda t: kernels.rms_norm(t, gain, 1e-6, codes),
        lambda t: product(t.qdata, t.scale, *up, None, t.dtype, 128),
        lambda t: kernels.silu_mul(t, codes),
        lambda t: product(t.qdata, t.scale, *down, None, t.dtype, 128),
    ]
    check_chain(steps, x)


@needs_bulk
@pytest.mark.parametrize("num_rows", [8, 100, 150, 256, 2048])
def test_a_chain_of_bulk_tiles_is_that_of_products_one_by_one(num_rows):
    """Each begins before the one before it has ended, and reads what that stored through the copy engine: bit for bit
    what they give with the device idle between them, replayed many times on other rows.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling would keep them apart
    shapes = ((4096, 2048), (2048, 2048), (8192, 2048), (2048, 4096))
    up, down, wide, deep = (torch.randn(shape, device="cuda").bfloat16() / 40 for shape in shapes)
    gain, x = torch.rand(2048, device="cuda").bfloat16(), torch.randn(num_rows, 2048, device="cuda").bfloat16()
    residual = torch.randn(num_rows, 2048, device="cuda").bfloat16()
    steps = [
        lambda t: kernels.gated(t, up),
        lambda t: kernels.linear(t, down),
        lambda t: kernels.rms_norm(t, gain, 1e-6),
        lambda t: kernels.linear(t, down, planes=True),
        lambda t: kernels.add_rms_norm(t, residual, gain, 1e-6)[0],
        lambda t: kernels.gated(t, wide),
        lambda t: kernels.linear(t, deep, planes=True),
        lambda t: kernels.add_rms_norm(t, residual, gain, 1e-6)[0],
    ]
    check_chain(steps, x)


def check_chain(steps: list[Callable[[Any], Any]], x: Tensor, times: int = 8) -> None:
    def run(wait: bool) -> Tensor:
        t = x
        for _ in range(times):
            for step in steps:
                t = step(t)
                if wait:
                    torch.cuda.synchronize()
        return t

    run(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(wait=False)
    for _ in range(20):
        x.normal_()
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, run(wait=True)) and out.isfinite().all()


@pytest.mark.parametrize("num_rows", [1, 2, 40, 144, 256, 300])
@pytest.mark.parametrize(("stored", "group"), [(s, g) for s in STORED for g in (0, 128)])
def test_a_chain_of_weight_only_products_is_that_of_products_one_by_one(stored, group, num_rows):
    """Where weights are widened first, none may be read before they are; all into the same scratch, bit for bit."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling would keep them apart
    weights = [stored_weight(2048, 2048, group, stored) for _ in range(8)]
    x = torch.randn(num_rows, 2048, device="cuda").bfloat16()
    steps = [partial(kernels.weight_only_matmul, qdata=q, scale=s, group_size=group) for q, s in weights]
    check_chain(steps, x, times=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_rows", [1, 16, 33, 100, 600])
def test_every_code_is_widened_exactly(num_rows, dtype):
    every = torch.arange(256, dtype=torch.uint8, device="cuda")
    fp8 = torch.where(every & 0x7F == 0x7F, 0, every).view(torch.float8_e4m3fn)
    ones = torch.ones(5, 1, device="cuda")
    picks = torch.eye(256, device="cuda", dtype=dtype).repeat(3, 1)
    for qdata in (every.view(torch.int8), fp8):
        stored = qdata.view(torch.int8).repeat(5, 1).view(qdata.dtype)
        for first in range(0, 256, 97 if num_rows == 1 else num_rows):
            rows = slice(first, first + num_rows)
            got = kernels.weight_only_matmul(picks[rows], stored, ones)
            assert torch.equal(got.float(), qdata.float().repeat(3)[rows][:, None].expand(-1, 5))


@pytest.mark.parametrize("shape", [(1, 33, 257), (3, 33, 257), (50, 70, 1001), (130, 129, 77)])
@pytest.mark.parametrize("group", [0, 64])
def test_fp32_at_odd_shapes(shape, group):
    m, n, k = shape
    x = torch.randn(m, k, device="cuda")
    qdata, scale = stored_weight(n, k, group, torch.int8)
    got = kernels.weight_only_matmul(x, qdata, scale, None, group)
    wide = scale.repeat_interleave(group or k, dim=1)[:, :k]
    expected = x.double() @ (qdata.double() * wide).T
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=float(expected.std()) * 1e-5)


def test_products_can_be_captured_and_replayed():
    """Replayed many times: the counters of the split products are at zero after each."""
    x = torch.randn(8, 2048, device="cuda").bfloat16()
    qdata, scale = stored_weight(2048, 2048, 0, torch.int8)
    kernels.weight_only_matmul(x, qdata, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = kernels.weight_only_matmul(x, qdata, scale)
        second = kernels.weight_only_matmul(first, qdata, scale)
    for _ in range(20):
        x.normal_()
        first.fill_(torch.nan)
        second.fill_(torch.nan)
        graph.replay()
        close(first, reference.weight_only_matmul(x.float(), qdata, scale), 5e-4)  # in two digits, as above
        close(second, reference.weight_only_matmul(first.float(), qdata, scale), 5e-4)
