"""Every Triton kernel against its twin under Triton's interpreter, on a CPU.

Run by test_kernels.py in a process of its own: TRITON_INTERPRET must be set before Triton is imported. Shapes are at
most two tiles a side and a remainder. The interpreter of Triton 3.6 knows no product of bfloat16 (it multiplies the
bits as integers) and no int8 to bfloat16, so 16-bit products are tested in float16 here, and in both by test_gpu.py.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from engine import kernels
from engine.kernels import (
    PREFILL_TILE,
    chip,
    columns,
    decode_attention,
    fused,
    inputs,
    kv_widen,
    paged_attention,
    prefill_attention,
    ranking,
    reference,
    rope,
    sample,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_kernels.py"

FP32_TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
BF16_TOLERANCE = {"atol": 2e-2, "rtol": 2e-2}  # a few roundings of eight bits; the interpreter's truncate


def test_decode_inputs():
    """More sequences than one program takes; padding, contexts at both ends of a block."""
    rows = torch.arange(130, dtype=torch.int32).flip(0) % 7
    contexts = torch.arange(130, dtype=torch.int32) % 50
    tokens = torch.randint(0, 1000, (7, 51), dtype=torch.int32)
    blocks = torch.randint(0, 1000, (7, 4), dtype=torch.int32)
    got = inputs.decode_inputs(rows, contexts, tokens, blocks, 16)
    for a, b in zip(got, reference.decode_inputs(rows, contexts, tokens, blocks, 16), strict=True):
        assert torch.equal(a, b)


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
    planes = torch.randn(3, *x.shape)
    whole = (planes[0] + planes[1] + planes[2]).to(dtype)
    for twin in (reference.add_rms_norm(p, residual, weight, 1e-6) for p in (planes, whole)):
        for a, b in zip(fused.add_rms_norm(planes, residual, weight, 1e-6), twin, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 1100])
def test_silu_mul(width, dtype):
    gate_up = torch.randn(3, 2 * width).to(dtype)
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    torch.testing.assert_close(fused.silu_mul(gate_up), reference.silu_mul(gate_up), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("heads", "num_tokens"), [((6, 1, 128), 5), ((2, 2, 64), rope._FEW_TOKENS + 1)])
def test_rope_and_store(heads, num_tokens, norm, dtype, rope_case):
    case = rope_case(num_tokens, heads, norm=norm, dtype=dtype)
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    got = case.on_fresh_pool(rope.rope_and_store, "cpu")
    expected = case.on_fresh_pool(reference.rope_and_store, "cpu")
    for a, b in zip(got, expected, strict=True):  # q, and both caches with NaN where nothing was stored
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance)


@pytest.mark.parametrize("heads", [(2, 1, 128), (6, 1, 64), (8, 1, 64), (2, 2, 64)])
def test_prefill(heads, paged_batch):
    tile = prefill_attention.choose_tile(torch.float32, "", (0, 0))
    lens, contexts = [1, 5, PREFILL_TILE + 3], [9, tile.block_n + 5, PREFILL_TILE + tile.block_n + 7]
    batch = paged_batch(lens, contexts, 1, heads=heads)
    out = torch.full_like(batch.q, torch.nan)
    prefill_attention.prefill(*batch.args(0.1), out)
    assert out[0].isnan().all()  # the decode sequence's token is not this kernel's
    torch.testing.assert_close(out[1:], kernels.attention(*batch.args(0.1))[1:], **FP32_TOLERANCE)


@pytest.fixture
def split_early(monkeypatch):
    """Contexts of two tiles and more are split."""
    monkeypatch.setattr(decode_attention, "min_split", lambda programs, num_sms: 16)
    yield
    assert not decode_attention._counters(torch.device("cpu")).any(), "the next launch expects zeros"


@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize("heads", [(4, 2, 128), (6, 1, 64), (7, 1, 64)])
def test_decode(heads, num_splits, paged_batch, split_early):
    """Contexts of one part, of as many as there may be, and of fewer because parts are whole tiles."""
    n = decode_attention.choose_tile(torch.float32, "", 16, 1).block_n
    batch = paged_batch([1] * 6 + [2], [1, n, 2 * n + 3, 0, n + 1, 5 * n + 1, 2], 6, heads=heads)
    out = torch.full_like(batch.q, torch.nan)
    decode_attention.decode(*batch.args(0.1), num_splits, out)
    assert out[6:].isnan().all()
    torch.testing.assert_close(out[:6], kernels.attention(*batch.args(0.1))[:6], **FP32_TOLERANCE)


@pytest.mark.parametrize("block_size", [16, 64])
def test_attention_over_blocks_that_lie_apart(block_size, paged_batch, split_early):
    batch = paged_batch([1, 1, 9], [70, 5, 80], 2, heads=(2, 1, 64), block_size=block_size, apart=True)
    out = torch.full_like(batch.q, torch.nan)
    decode_attention.decode(*batch.args(0.1), 2, out)
    prefill_attention.prefill(*batch.args(0.1), out)
    torch.testing.assert_close(out, kernels.attention(*batch.args(0.1)), **FP32_TOLERANCE)


def test_attention_in_float16(paged_batch, split_early):
    batch = paged_batch([1, 1, 9], [70, 5, 80], 2, heads=(2, 1, 64), dtype=torch.float16)
    out = torch.full_like(batch.q, torch.nan)
    decode_attention.decode(*batch.args(0.1), 2, out)
    prefill_attention.prefill(*batch.args(0.1), out)
    expected = kernels.attention(*batch.widened(0.1))
    torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kv", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("heads", "num_tokens"), [((6, 1, 128), rope._FEW_TOKENS + 1), ((2, 2, 64), 5)])
def test_rope_and_store_in_8_bits(heads, num_tokens, norm, kv, rope_case):
    case = rope_case(num_tokens, heads, norm=norm, dtype=torch.float32, kv=kv)
    got = case.on_fresh_pool(rope.rope_and_store, "cpu")
    expected = case.on_fresh_pool(reference.rope_and_store, "cpu")
    torch.testing.assert_close(got[0], expected[0], **FP32_TOLERANCE)
    for codes, scales, want, want_scales in zip(got[1:3], got[3:], expected[1:3], expected[3:], strict=True):
        torch.testing.assert_close(scales, want_scales, equal_nan=True, **FP32_TOLERANCE)
        # The last bit of k may move a value that lies between two codes; nearly all agree.
        differs = codes.view(torch.uint8) != want.view(torch.uint8)
        assert differs.float().mean() < 0.01
        stored = want_scales.isfinite().transpose(1, 2)
        one_step = 0.07 * 448 if kv == torch.float8_e4m3fn else 1
        assert ((codes.float() - want.float())[stored].abs() <= one_step).all()
        assert (codes.view(torch.uint8)[~stored] == 0x7F).all()


@pytest.mark.parametrize("kv", [torch.int8, torch.float8_e4m3fn])
def test_encoding_equals_torch(kv, rope_case):
    """Values without a norm or a rotation: every code, every middle between two codes, and random ones, to the bit."""
    codes = torch.arange(256, dtype=torch.uint8).view(kv).float()
    codes = codes[codes.isfinite() & (codes != -128)].sort().values
    middles = (codes[:-1] + codes[1:]) / 2
    values = torch.cat([codes, middles, middles * (1 + 2**-23), torch.randn(8000) * codes.max() / 4])
    values = torch.cat([values, values.new_zeros(-len(values) % 126)]).view(-1, 126).clamp(-codes.max(), codes.max())
    rows = torch.cat([values, codes.max().expand(len(values), 1), values.new_zeros(len(values), 1)], dim=1)
    num = len(rows)
    case = rope_case(num, (1, 1, 128), norm=False, dtype=torch.float32, kv=kv)
    case.qkv = torch.cat([torch.zeros(num, 256), rows], dim=1)
    got = case.on_fresh_pool(rope.rope_and_store, "cpu")
    expected = case.on_fresh_pool(reference.rope_and_store, "cpu")
    assert torch.equal(got[2].view(torch.uint8), expected[2].view(torch.uint8))
    torch.testing.assert_close(got[4], expected[4], atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kv", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("heads", [(6, 1, 64), (4, 2, 128)])
def test_attention_over_an_8_bit_cache(heads, kv, dtype, paged_batch, split_early):
    n = decode_attention.choose_tile(dtype, "int8", 32, 1).block_n
    lens, contexts = [1, 1, 1, 1, 9, PREFILL_TILE + 3], [1, 2 * n + 3, 0, n + 1, 80, PREFILL_TILE + n + 7]
    batch = paged_batch(lens, contexts, 4, heads=heads, block_size=32, dtype=dtype, kv=kv, apart=True)
    out = torch.full_like(batch.q, torch.nan)
    decode_attention.decode(*batch.args(0.01), 2, out)
    assert out[4:].isnan().all()
    prefill_attention.prefill(*batch.args(0.01), out)
    expected = kernels.attention(*batch.widened(0.01))
    bound = (1e-5 if dtype == torch.float32 else 2e-3) * float(expected.abs().max())
    torch.testing.assert_close(out.float(), expected, atol=bound, rtol=bound)
    once = torch.full_like(batch.q, torch.nan)
    decode_attention.decode(*batch.args(0.01), 1, once)
    torch.testing.assert_close(once[:4], out[:4], atol=bound, rtol=bound)


def in_two_launches(*args):
    """`rope_and_attend` by the two kernels that it joins."""
    known, (cache, slots, tables, plan, scale) = args[:6], args[6:]
    q = rope.rope_and_store(*known, cache, slots)
    out = torch.full_like(q, torch.nan)
    decode_attention.decode(q, cache, tables, plan, scale, 1, out)
    return out


def in_one_launch(num_splits):
    def function(qkv, *rest):
        num_kv_heads, head_dim = rest[5].k.shape[2:]
        out = qkv.new_full((len(qkv), qkv.shape[1] // head_dim - 2 * num_kv_heads, head_dim), torch.nan)
        decode_attention.rope_and_decode(qkv, *rest, num_splits, out)
        return out

    return function


@pytest.mark.parametrize(
    ("kv", "num_splits"), [(None, 1), (None, 2), (None, 5), (torch.int8, 2), (torch.float8_e4m3fn, 1)]
)
@pytest.mark.parametrize(
    ("heads", "norm"), [((4, 2, 128), True), ((6, 1, 64), False), ((7, 1, 64), True), ((2, 2, 64), False)]
)
def test_decode_that_stores(heads, norm, num_splits, kv, decode_case, split_early):
    """Norm, rotation and store in decode attention: the same bits in the pool, and the same attention over it."""
    block_size = 16 if kv is None else 32
    n = decode_attention.choose_tile(torch.float32, "int8", block_size, 1).block_n
    contexts = [1, n, 2 * n + 3, 0, n + 1, 5 * n + 1]
    case = decode_case(contexts, norm=norm, heads=heads, block_size=block_size, kv=kv, apart=True)
    out, *pool = case.on_fresh_pool(in_one_launch(num_splits), 0.02)
    expected, *expected_pool = case.on_fresh_pool(in_two_launches, 0.02)
    for got, want in zip(pool, expected_pool, strict=True):
        assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))
    bound = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(out, expected, atol=bound, rtol=2e-5)
    if kv is None:
        twin, *twin_pool = case.on_fresh_pool(kernels.rope_and_attend, 0.02)
        torch.testing.assert_close(out, twin, **FP32_TOLERANCE)
        for got, want in zip(pool, twin_pool, strict=True):
            torch.testing.assert_close(got, want, equal_nan=True, **FP32_TOLERANCE)


def test_decode_that_stores_in_float16(decode_case, split_early):
    case = decode_case([70, 1, 0, 33], norm=True, heads=(8, 2, 64), dtype=torch.float16)
    out, *pool = case.on_fresh_pool(in_one_launch(2), 0.02)
    expected, *expected_pool = case.on_fresh_pool(in_two_launches, 0.02)
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(pool, expected_pool, strict=True))
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)


@pytest.fixture
def launched(monkeypatch):
    """Which of the two ways `paged_attention.rope_and_attend` went."""
    names = []
    for name in ("rope_and_decode", "rope_and_store"):
        launch = getattr(paged_attention, name)
        monkeypatch.setattr(paged_attention, name, lambda *a, n=name, launch=launch: names.append(n) or launch(*a))
    return names


@pytest.mark.parametrize("fuses", [True, False])
def test_a_batch_that_decodes_is_one_launch(fuses, launched, decode_case, monkeypatch):
    monkeypatch.setattr(chip, "fuses", lambda: fuses)
    case = decode_case([40, 0, 1], norm=True, heads=(4, 2, 64))
    got = case.on_fresh_pool(paged_attention.rope_and_attend, 0.1)
    assert launched == ["rope_and_decode" if fuses else "rope_and_store"]
    for a, b in zip(got, case.on_fresh_pool(reference.rope_and_attend, 0.1), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **FP32_TOLERANCE)


def test_a_batch_with_a_prompt_is_not(launched, decode_case, paged_batch):
    case = decode_case([40, 1, 2], norm=True, heads=(4, 2, 64))
    case.batch = paged_batch([1, 2], [40, 2], 1, heads=(4, 2, 64))
    blocks = case.batch.block_tables[case.batch.plan.rows.long()]
    case.slots = torch.stack([blocks[0, 2] * 16 + 7, blocks[1, 0] * 16, blocks[1, 0] * 16 + 1])
    got = case.on_fresh_pool(paged_attention.rope_and_attend, 0.1)
    assert launched == ["rope_and_store"]
    for a, b in zip(got, case.on_fresh_pool(reference.rope_and_attend, 0.1), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **FP32_TOLERANCE)


@pytest.mark.parametrize("kv", [torch.int8, torch.float8_e4m3fn])
def test_prompts_over_an_8_bit_cache_are_widened_once(kv, paged_batch):
    """Three heads a token leave a remainder; blocks lie apart; one sequence has no context, one decodes."""
    lens, contexts = [1, 40, 0, 7, 70], [50, 40, 0, 39, 70]
    batch = paged_batch(lens, contexts, 1, heads=(3, 3, 64), block_size=32, dtype=torch.float16, kv=kv, apart=True)
    queries = sum(lens) - 1
    unknown = replace(batch.plan, context_lens_host=np.full(5, 10**6), most_context=2 * queries)  # as in a graph
    for plan in (batch.plan, unknown):
        assert kv_widen.widening_pays(batch.q, plan)
        cache, tables, plan = kv_widen.widened(batch.cache, batch.block_tables, plan, torch.float16)
        for sequence in (1, 3, 4):
            context = contexts[sequence]
            table = tables[plan.rows[sequence]][: -(-context // 32)]
            assert torch.equal(cache.k[table].flatten(0, 1)[:context], batch.keys[sequence].half())
            assert torch.equal(cache.v[table].flatten(0, 1)[:context], batch.values[sequence].half())
    assert not kv_widen.widening_pays(batch.q, replace(unknown, most_context=2 * queries + 1))
    got = paged_attention.attention(*batch.args(0.01)).float()
    expected = kernels.attention(*batch.rounded(0.01))
    largest = expected.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert ((got - expected).abs() / largest).max() <= 5e-3
    chunk = paged_batch([9], [80], 0, heads=(1, 1, 64), block_size=32, dtype=torch.float16, kv=kv)
    assert not kv_widen.widening_pays(chunk.q, chunk.plan)


def sampling_case(dtype):
    """Logits, rows, positions, tables: rows greedy and drawn, with every filter and wish for logprobs, ids beyond the
    tokenizer, ties, three slices and a remainder.
    """
    torch.manual_seed(0)
    logits = torch.randn(16, 240).to(dtype)
    logits[6, 20:] = -torch.inf  # whole slices are banned
    logits[8] = logits[8].round()
    logits[9] = 1.0  # all tie: more of them than are ranked
    logits[:, 200:] = 100.0  # ids that the tokenizer does not know
    rows = torch.randperm(16, dtype=torch.int32)
    floats, ints = torch.zeros(17, columns.NUM_FLOATS), torch.zeros(17, columns.NUM_INTS, dtype=torch.int32)
    f, i = torch.zeros(16, columns.NUM_FLOATS), torch.randint(-(2**31), 2**31, (16, columns.NUM_INTS)).int()
    f[:, columns.TEMPERATURE] = torch.tensor([0, 1, 0.3, 5, 1e-9, 1, 2, 0.7, 1, 1, 0, 1, 0.8, 3, 1.5, 1])
    f[:, columns.TOP_P] = torch.tensor([0.5, 0.1, 0.95, 0.3, 0.5, 1e-6, 0.4, 1, 0.8, 0.9, 1, 1, 0.9, 1, 0.2, 1])
    f[:, columns.MIN_P] = torch.tensor([0, 0, 0, 0.2, 0, 0, 0, 0, 0, 0, 0, 0.1, 0.5, 0.02, 0, 1])
    i[:, columns.TOP_K] = torch.tensor([5, 0, 0, 0, 0, 0, 0, 0, 7, 3, 0, 0, 20, 64, 50, 0])
    i[:, columns.NUM_LOGPROBS] = torch.tensor([-1, 0, 1, 5, -1, 3, 2, -1, 5, 0, 5, 5, 1, 0, -1, 5])
    floats[rows.long()], ints[rows.long()] = f, i
    return logits, rows, torch.arange(16, dtype=torch.int32) * 3, floats, ints


@triton.jit
def draws_kernel(logits, draws, bounds, t, key, N: tl.constexpr):
    ids = tl.arange(0, N)
    logit = tl.load(logits + ids)
    tl.store(draws + ids, sample._drawn(logit, ids, t, key.to(tl.uint32)))
    tl.store(bounds + ids, sample._bound(logit, ids, (-sample._STEP * sample._LOG2_E) / t, key.to(tl.uint32)))


@pytest.mark.parametrize("t", [0.01, 0.7, 1.0, 5.0])
def test_bounds_of_draws(t):
    """No draw is above its bound by more than the search allows for, and large noise is within log2's 0.086 below it.
    Of key 0, id 0 has the largest noise there is.
    """
    n, largest = 1 << 16, -math.log(0.5 * 2.0**-32)
    logits = torch.randn(n) * 3
    for key, spread in ((0, 1.0), (0, 0.0), (0x7A3B91C5, 1.0)):
        draws, bounds = torch.zeros(2, n).unbind(0)
        draws_kernel[(1,)](logits * spread, draws, bounds, t, key, N=n)
        bounds = (bounds - sample._BOUND_SHIFT.value).double() * (-math.log(2) / sample._STEP.value)
        noise = draws - logits * spread / t
        allowed = 1e-4 + draws.abs() * 2.0**-20
        assert draws.isfinite().all() and (draws <= bounds + allowed).all()
        sharp = noise > 4.7  # where -log(1 - v) is v within half a percent
        sharp[0] &= key != 0  # bounded by what no noise reaches
        assert sharp.sum() > 300 and (bounds <= draws + 0.0597 + 0.005 + allowed)[sharp].all()
        if spread == 0 and t == 1:
            one = torch.zeros(1, dtype=torch.int32)
            assert abs(noise[0] - largest) < 1e-4 and noise.max() == noise[0]
            assert reference.mix(reference.mix(reference.mix(one) ^ one) + one) == key  # of seed 0 at position 0
            torch.testing.assert_close(draws, reference.gumbel_noise(one, one, one, n)[0], **FP32_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rounds", "top", "few"), [(0, -1, 8), (0, 5, 8), (1, -1, 8), (1, 5, 4), (3, 5, 8)])
def test_draw(rounds, top, few, dtype, monkeypatch):
    """The twin's very ids and logprobs. rounds 0: no filters; 1: one program a row finishes most of them. few: so many
    best ids are found one by one.
    """
    monkeypatch.setattr(sample, "FEW", few)
    monkeypatch.setattr(sample, "SLICE", 64)
    monkeypatch.setattr(sample, "GROUP", 8)
    monkeypatch.setattr(sample, "_CHECKED", 128)
    monkeypatch.setattr(sample, "ROUNDS", max(rounds, 1))
    logits, rows, positions, floats, ints = sampling_case(dtype)
    at = rows.long()
    if rounds == 0:
        floats[:, columns.TOP_P], floats[:, columns.MIN_P], ints[:, columns.TOP_K] = 1, 0, 0
    tokens, expected_tokens = torch.zeros(2, 17, 50, dtype=torch.int32).unbind(0)
    got = sample.draw(logits, rows, positions, floats, ints, tokens, 200, None, rounds > 0, top)
    filters = (64, True) if rounds else (0, False)
    want = reference.draw(logits, rows, positions, floats, ints, expected_tokens, 200, *filters, top)
    assert got[:, 0].tolist() == want[:, 0].tolist()
    assert torch.equal(tokens, expected_tokens) and tokens[at, positions.long()].tolist() == got[:, 0].tolist()
    assert got[:, 0].max() < 200 and got[0, 0] == logits[0, :200].argmax()
    for row in range(16 if top >= 0 else 0):
        wanted = int(ints[at[row], columns.NUM_LOGPROBS])
        (ids, values), (_, best) = got[row].chunk(2), want[row].chunk(2)
        values, best = values[: 1 + wanted].view(torch.float32), best[: 1 + wanted].view(torch.float32)
        torch.testing.assert_close(values, best, **FP32_TOLERANCE)
        if wanted > 0:
            assert torch.equal(
                logits[row].float()[ids[1 : 1 + wanted].long()], logits[row, :200].float().topk(wanted)[0]
            )
            assert len(set(ids[1 : 1 + wanted].tolist())) == wanted


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_draw_of_more_rows_than_programs(spread, monkeypatch):
    """A nucleus is read by few programs, and no further than decides: the twin's ids."""
    monkeypatch.setattr(sample, "SLICE", 64)
    monkeypatch.setattr(sample, "GROUP", 8)
    monkeypatch.setattr(sample, "_CHECKED", 64)
    monkeypatch.setattr(sample, "_READERS", 3)
    torch.manual_seed(0)
    logits, rows = torch.randn(30, 500) * spread, torch.arange(30, dtype=torch.int32)
    floats, ints = torch.zeros(30, columns.NUM_FLOATS), torch.zeros(30, columns.NUM_INTS, dtype=torch.int32)
    floats[:, columns.TEMPERATURE], floats[:, columns.TOP_P] = 0.8, torch.linspace(0.05, 0.99, 30)
    ints[:, columns.SEED_LOW] = torch.randint(2**31, (30,)).int()
    tokens, expected_tokens = torch.zeros(2, 30, 50, dtype=torch.int32).unbind(0)
    got = sample.draw(logits, rows, rows, floats, ints, tokens, 500, None, True, -1)
    want = reference.draw(logits, rows, rows, floats, ints, expected_tokens, 500, 0, True, -1)
    assert got.tolist() == want.tolist() and torch.equal(tokens, expected_tokens)


def test_draw_beyond_what_is_ranked(monkeypatch):
    """A top-k of 100 among rows with less: its edge is given."""
    monkeypatch.setattr(sample, "SLICE", 64)
    monkeypatch.setattr(sample, "GROUP", 8)
    monkeypatch.setattr(sample, "_CHECKED", 128)
    logits, rows, positions, floats, ints = sampling_case(torch.float32)
    at, tokens = rows.long(), torch.zeros(17, 50, dtype=torch.int32)
    ints[at[::3], columns.TOP_K] = torch.tensor([65, 100, 199, 70, 90, 300], dtype=torch.int32)
    ordered = logits[:, :200].float().topk(200).values
    thresholds = reference.filter_thresholds(ordered, floats[at], ints[at, columns.TOP_K])
    got = sample.draw(logits, rows, positions, floats, ints, tokens, 200, thresholds, True, -1)
    want = reference.draw(logits, rows, positions, floats, ints, tokens, 200, 300, True, -1)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 1, 8, 20])
def test_survey(k, dtype, monkeypatch):
    """Slices whose groups end within them, ties, a banned slice, ids that the tokenizer does not know."""
    monkeypatch.setattr(ranking, "SLICE", 64)
    monkeypatch.setattr(ranking, "GROUP", 8)
    torch.manual_seed(0)
    logits = torch.randn(4, 240).to(dtype)
    logits[:, 203:] = 9.0
    logits[1] = logits[1].round()  # many ties
    logits[2, 64:128] = -torch.inf
    logits[3, 10:] = -torch.inf
    log_sums, values, ids = ranking.survey(logits, k, 203)
    expected_sums, expected, _ = reference.survey(logits, k, 203)
    torch.testing.assert_close(log_sums, expected_sums, **FP32_TOLERANCE)
    assert torch.equal(values, expected)
    assert torch.equal(logits.float().gather(1, ids), values) and ids.numel() == 4 * k
    assert all(len(set(row)) == k for row in ids[:3].tolist()) and (k == 0 or ids.max() < 203)
    for row in range(3):  # of equal ones the first
        order = sorted(range(203), key=lambda i: (-logits[row, i].item(), i))
        assert ids[row].tolist() == order[:k]
