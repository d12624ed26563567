"""8-bit KV caches on a GPU, at the shapes of Qwen3-0.6B, 1.7B, 8B and Qwen2.5-1.5B, against the twins in fp32.

Every launch runs where waiting for the device is an error. Bounds: q and probabilities are rounded to fp16 (2^-12), the
output to bf16 (2^-9); the twins take the same codes and scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from engine import kernels
from engine.kernels import KVCache, kv_widen, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels need one"),
]

HEADS = {"Qwen3-0.6B and 1.7B": (16, 8, 128), "Qwen3-8B": (32, 8, 128), "Qwen2.5-1.5B": (12, 2, 128)}
MIXES = {
    "one long decode": ([1], [5000], 1),
    "64 decodes": ([1] * 64, [17 + 31 * i for i in range(64)], 64),
    "decodes and padding": ([1] * 8, [1, 0, 15, 16, 33, 64, 65, 0], 8),
    "prompt": ([2048], [2048], 0),
    "two prompts and decodes": ([1, 1, 900, 333], [700, 3, 900, 333], 2),
    "chunk": ([300], [1500], 0),
    "mixed": ([1, 1, 1, 100, 65, 1, 513], [700, 3, 64, 100, 129, 40, 900], 3),
}
EIGHT_BIT = [torch.int8, torch.float8_e4m3fn]


@contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_close(got: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """Each token and head within `bound` of its largest value: they differ in range by orders of magnitude."""
    largest = expected.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert got.isfinite().all()
    assert ((got.float() - expected).abs() / largest).max() <= bound


def of_what_is_read(batch) -> torch.Tensor:
    """The twin's attention over the values as they are; where contexts are widened beforehand, over rounded ones."""
    expected, decodes = reference.attention(*batch.widened(0.01)), batch.plan.num_decodes
    if len(batch.plan.tiles) and kv_widen.widening_pays(batch.q, batch.plan):
        expected[decodes:] = reference.attention(*batch.rounded(0.01))[decodes:]
    return expected


@pytest.mark.parametrize("kv", EIGHT_BIT)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("model", HEADS)
def test_attention(model, mix, kv, paged_batch):
    batch = paged_batch(
        *MIXES[mix], heads=HEADS[model], block_size=32, dtype=torch.bfloat16, device="cuda", kv=kv, apart=True
    )
    widened = len(batch.plan.tiles) > 0 and kv_widen.widening_pays(batch.q, batch.plan)
    assert widened == (mix in ("prompt", "two prompts and decodes", "mixed"))
    with never_waiting():
        got = kernels.attention(*batch.args(0.01))
    assert_close(got, of_what_is_read(batch), 1e-2)


@pytest.mark.parametrize("kv", EIGHT_BIT)
@pytest.mark.parametrize("model", HEADS)
def test_contexts_are_widened_to_the_bit(model, kv, paged_batch):
    lens, contexts = MIXES["two prompts and decodes"][:2]
    batch = paged_batch(
        lens, contexts, 2, heads=HEADS[model], block_size=32, dtype=torch.bfloat16, device="cuda", kv=kv, apart=True
    )
    with never_waiting():
        cache, tables, plan = kv_widen.widened(batch.cache, batch.block_tables, batch.plan, torch.bfloat16)
    for sequence in (2, 3):
        table = tables[plan.rows[sequence]][: -(-contexts[sequence] // 32)]
        for widened, values in ((cache.k, batch.keys), (cache.v, batch.values)):
            assert torch.equal(
                widened[table].flatten(0, 1)[: contexts[sequence]], values[sequence].to("cuda", torch.bfloat16)
            )


@pytest.mark.parametrize("kv", EIGHT_BIT)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-4), (torch.float16, 5e-3)])
@pytest.mark.parametrize("heads", [(14, 2, 64), (8, 1, 128), (3, 3, 128)])
def test_attention_in_other_types_and_groups(heads, dtype, bound, kv, paged_batch):
    batch = paged_batch(*MIXES["mixed"], heads=heads, block_size=64, dtype=dtype, device="cuda", kv=kv)
    with never_waiting():
        got = kernels.attention(*batch.args(0.01))
    assert_close(got, of_what_is_read(batch), bound)


@pytest.mark.parametrize("num_tokens", [1, 70])
@pytest.mark.parametrize("kv", EIGHT_BIT)
def test_every_code_is_widened_exactly(kv, num_tokens):
    """A context of one token: attention returns that token's value, times a power of two, through both kernels."""
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes = torch.where(codes & 0x7F == 0x7F, 0, codes) if kv == torch.float8_e4m3fn else codes
    pool = codes.view(kv).view(1, 1, 2, 128).expand(num_tokens, 32, 2, 128).contiguous()
    scale = torch.full((num_tokens, 2, 32), 2.0**-7, device="cuda")
    index = torch.arange(num_tokens + 1, dtype=torch.int32, device="cuda")
    ones = torch.ones(num_tokens, dtype=torch.int32).numpy()
    tables, contexts = index[:num_tokens, None].contiguous(), torch.ones_like(index[1:])
    q = torch.randn(num_tokens, 4, 128, device="cuda").bfloat16()
    expected = (codes.view(kv).float() / 128).view(1, 2, 1, 128).expand(num_tokens, 2, 2, 128).flatten(1, 2)
    for decodes in (num_tokens, 0):
        tiles = torch.from_numpy(kernels.plan_tiles(ones, decodes)).cuda()
        plan = kernels.AttentionPlan(index[:-1], index, contexts, ones, ones, decodes, tiles)
        got = kernels.attention(q, KVCache(pool, pool, scale, scale), tables, plan, 0.1)
        assert torch.equal(got.float(), expected)


@pytest.mark.parametrize("kv", EIGHT_BIT)
def test_keys_reach_the_scores(kv, paged_batch):
    """q picks one channel: the weights of two positions are what that channel's codes and scales say."""
    batch = paged_batch([1] * 128, [2] * 128, 128, heads=(8, 8, 128), block_size=32, device="cuda", kv=kv)
    batch.q = (100 * torch.eye(128, device="cuda"))[:, None, :].expand(128, 8, 128).bfloat16().contiguous()
    got = kernels.attention(*batch.args(0.01))
    assert_close(got, reference.attention(*batch.widened(0.01)), 1e-2)


@pytest.mark.parametrize("kv", EIGHT_BIT)
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@pytest.mark.parametrize("model", HEADS)
def test_rope_and_store(model, num_tokens, kv, rope_case):
    """The codes and scales are, to the bit, those of the keys and values that an unquantised cache is given."""
    norm = not model.startswith("Qwen2.5")
    case = rope_case(num_tokens, HEADS[model], norm=norm, dtype=torch.bfloat16, kv=kv)
    plain = rope_case(num_tokens, HEADS[model], norm=norm, dtype=torch.bfloat16)
    q, *got = case.on_fresh_pool(kernels.rope_and_store, "cuda")
    plain_q, *exact = plain.on_fresh_pool(kernels.rope_and_store, "cuda")
    assert torch.equal(q, plain_q)
    stored = case.slots[case.slots >= 0].long().cuda()
    for codes, scales, values in zip(got[:2], got[2:], exact, strict=True):
        want, want_scale = reference.quantize_kv(values.flatten(0, 1)[stored], kv)
        flat, flat_scales = codes.view(torch.uint8).flatten(0, 1), scales.transpose(1, 2).flatten(0, 1)
        assert torch.equal(flat[stored], want.view(torch.uint8))
        assert torch.equal(flat_scales[stored], want_scale)
        others = torch.ones(len(flat), dtype=torch.bool, device="cuda")
        others[stored] = False
        assert (flat[others] == 0x7F).all() and flat_scales[others].isnan().all()


def test_pools_beyond_two_to_the_31_codes(paged_batch):
    """The last blocks of a pool of 2^31 + codes are read and written where they are."""
    far, heads = 1 << 16, (16, 8, 128)
    batch = paged_batch(
        *MIXES["mixed"], heads=heads, block_size=32, dtype=torch.bfloat16, device="cuda", kv=torch.float8_e4m3fn
    )
    used, tables = len(batch.cache.k), batch.block_tables + far
    k, v = torch.empty(2, far + used, 32, *heads[1:], dtype=torch.int8, device="cuda").view(torch.float8_e4m3fn)
    scales = torch.empty(2, far + used, heads[1], 32, device="cuda")
    assert k.numel() > 1 << 31
    for large, small in ((k, batch.cache.k), (v, batch.cache.v)):
        large.view(torch.int8)[far:] = small.view(torch.int8)
    scales[0, far:], scales[1, far:] = batch.cache.k_scale, batch.cache.v_scale
    cache = KVCache(k, v, *scales)
    got = kernels.attention(batch.q, cache, tables, batch.plan, 0.01)
    assert torch.equal(got, kernels.attention(*batch.args(0.01)))
    qkv = torch.randn(4, 32 * 128, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(4, dtype=torch.int32, device="cuda")
    cos_sin = torch.zeros(4, 128, device="cuda")
    kernels.rope_and_store(qkv, None, None, 1e-6, cos_sin, positions, cache, positions + far * 32)
    want, scale = reference.quantize_kv(qkv[:, 24 * 128 :].view(4, 8, 128), torch.float8_e4m3fn)
    assert torch.equal(v.view(torch.int8)[far, :4], want.view(torch.int8))
    assert torch.equal(scales[1, far, :, :4], scale.t())


def test_a_captured_decode_follows_the_device_not_the_host(paged_batch):
    batch = paged_batch(
        [1] * 4, [40, 700, 1, 0], 4, heads=(16, 8, 128), block_size=32, dtype=torch.bfloat16, device="cuda",
        kv=torch.float8_e4m3fn,
    )  # fmt: skip
    longest = replace(batch.plan, context_lens_host=batch.plan.context_lens_host * 0 + 4096)
    args = (batch.q, batch.cache, batch.block_tables, longest, 0.01)
    kernels.attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.attention(*args)
    out.fill_(torch.nan)
    graph.replay()
    assert_close(out, reference.attention(*batch.widened(0.01)), 1e-2)
