"""The Triton kernels on a GPU, at the shapes of Qwen3-0.6B, 1.7B, 8B and Qwen2.5-1.5B, against their twins in fp32.

Every launch runs where waiting for the device is an error. Bounds: outputs are rounded to bf16 once (2^-9) and
probabilities once (2^-9, averaged over the context); a norm or a rotation rounds two or three times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine import kernels
from engine.kernels import KVCache, chip, prefill_attention, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels need one"),
]

HEADS = {"Qwen3-0.6B and 1.7B": (16, 8, 128), "Qwen3-8B": (32, 8, 128), "Qwen2.5-1.5B": (12, 2, 128)}
# (hidden, intermediate, qkv width, attention width, qkv bias)
LINEARS = {
    "Qwen3-0.6B": (1024, 3072, 4096, 2048, False),
    "Qwen3-1.7B": (2048, 6144, 4096, 2048, False),
    "Qwen3-8B": (4096, 12288, 6144, 4096, False),
    "Qwen2.5-1.5B": (1536, 8960, 2048, 1536, True),
}
ATTENTION_BOUND = {"atol": 4e-3, "rtol": 1.6e-2}
NORM_BOUND = {"atol": 2e-2, "rtol": 1.6e-2}


@pytest.fixture(autouse=True)
def exact_fp32() -> None:
    torch.manual_seed(0)
    assert not torch.backends.cuda.matmul.allow_tf32, "the twins must compute in full fp32"


@contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


MIXES = {
    "one long decode": ([1], [5000], 1),
    "64 decodes": ([1] * 64, [17 + 31 * i for i in range(64)], 64),
    "decodes and padding": ([1] * 8, [1, 0, 15, 16, 17, 64, 65, 0], 8),
    "prompt": ([2048], [2048], 0),
    "chunk": ([300], [1500], 0),
    "mixed": ([1, 1, 1, 100, 65, 1, 513], [700, 3, 64, 100, 129, 40, 900], 3),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("model", HEADS)
def test_attention(model, mix, paged_batch):
    batch = paged_batch(*MIXES[mix], heads=HEADS[model], dtype=torch.bfloat16, device="cuda")
    scale = HEADS[model][2] ** -0.5
    with never_waiting():
        got = kernels.attention(*batch.args(scale))
    torch.testing.assert_close(got.float(), reference.attention(*batch.widened(scale)), **ATTENTION_BOUND)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("block_size", "heads"), [(128, (16, 8, 128)), (16, (14, 2, 64))])
def test_both_kernels_of_prefill(block_size, heads, plain, paged_batch):
    """Where the chip has two. Tokens of decodes stay as they are; a tile of a sequence without queries writes nothing;
    the pool is NaN past each context, also in the block that it ends in.
    """
    lens, contexts = [1, 3, 100, 65, 130, 0], [700, 3, 100, 1129, 900, 0]
    batch = paged_batch(lens, contexts, 1, heads=heads, block_size=block_size, dtype=torch.bfloat16, device="cuda")
    padding = torch.tensor([[len(lens) - 1, 0]] * 3, dtype=torch.int32, device="cuda")
    plan = replace(batch.plan, tiles=torch.cat([batch.plan.tiles, padding]))
    tile = prefill_attention.choose_tile(torch.bfloat16, "", chip.capability(batch.q.device)) if plain else None
    args = (batch.q, batch.cache, batch.block_tables, plan, 0.1)
    prefill_attention.prefill(*args, torch.empty_like(batch.q), tile)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(batch.q)
    with torch.cuda.graph(graph):
        prefill_attention.prefill(*args, out, tile)
    out.fill_(torch.nan)
    graph.replay()
    assert out[0].isnan().all()
    expected = reference.attention(*batch.widened(0.1))[1:]
    torch.testing.assert_close(out[1:].float(), expected, **ATTENTION_BOUND)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("heads", [(14, 2, 64), (8, 1, 128), (3, 3, 128)])
def test_attention_in_other_types_and_groups(heads, dtype, bound, paged_batch, naive_attention):
    batch = paged_batch(*MIXES["mixed"], heads=heads, block_size=32, dtype=dtype, device="cuda", apart=True)
    with never_waiting():
        got = kernels.attention(*batch.args(0.1))
    torch.testing.assert_close(got.cpu().double(), naive_attention(batch, 0.1), atol=bound, rtol=bound)


def test_pools_beyond_two_to_the_31_elements(paged_batch):
    """The last blocks of a pool of 2^31 + elements are read and written where they are."""
    far, heads = 1 << 17, (16, 8, 128)
    batch = paged_batch(*MIXES["mixed"], heads=heads, dtype=torch.bfloat16, device="cuda")
    used, tables = len(batch.cache.k), batch.block_tables + far
    k, v = torch.empty(2, far + used, 16, *heads[1:], dtype=torch.bfloat16, device="cuda")
    assert k.numel() > 1 << 31
    k[far:], v[far:] = batch.cache.k, batch.cache.v
    got = kernels.attention(batch.q, KVCache(k, v), tables, batch.plan, 0.1)
    assert torch.equal(got, kernels.attention(*batch.args(0.1)))
    num_tokens = 4
    qkv = torch.randn(num_tokens, 32 * 128, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(num_tokens, dtype=torch.int32, device="cuda")
    slots = positions + far * 16
    cos_sin = torch.zeros(num_tokens, 128, device="cuda")
    kernels.rope_and_store(qkv, None, None, 1e-6, cos_sin, positions, KVCache(k, v), slots)
    assert torch.equal(v[far, :num_tokens].flatten(1), qkv[:, 24 * 128 :])


@pytest.mark.parametrize("num", [1, 130, 512])
def test_decode_inputs(num):
    rows, contexts = torch.randint(0, 7, (2, num), dtype=torch.int32, device="cuda")
    contexts *= 8
    tokens, blocks = torch.randint(0, 1 << 30, (2, 7, 64), dtype=torch.int32, device="cuda")
    with never_waiting():
        got = kernels.decode_inputs(rows, contexts, tokens, blocks, 16)
    for a, b in zip(got, reference.decode_inputs(rows, contexts, tokens, blocks, 16), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@pytest.mark.parametrize("model", LINEARS)
def test_norms_and_silu(model, num_tokens):
    hidden, intermediate, *_ = LINEARS[model]
    x, residual = torch.randn(2, num_tokens, hidden, device="cuda").bfloat16()
    weight = torch.randn(hidden, device="cuda").bfloat16()
    gate_up = torch.randn(num_tokens, 2 * intermediate, device="cuda").bfloat16()
    with never_waiting():
        normed = kernels.rms_norm(x, weight, 1e-6)
        sum_normed, total = kernels.add_rms_norm(x, residual, weight, 1e-6)
        gated = kernels.silu_mul(gate_up)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed.float(), reference.rms_norm(x.float(), weight.float(), 1e-6), **NORM_BOUND)
    expected = reference.rms_norm(total.float(), weight.float(), 1e-6)
    torch.testing.assert_close(sum_normed.float(), expected, **NORM_BOUND)
    torch.testing.assert_close(gated.float(), reference.silu_mul(gate_up.float()), **NORM_BOUND)


@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@pytest.mark.parametrize("model", HEADS)
def test_rope_and_store(model, num_tokens, rope_case):
    case = rope_case(num_tokens, HEADS[model], norm=not model.startswith("Qwen2.5"), dtype=torch.bfloat16)

    def launch(*args: Any) -> torch.Tensor:
        with never_waiting():
            return kernels.rope_and_store(*args)

    got = case.on_fresh_pool(launch, "cuda")
    wide = replace(
        case,
        qkv=case.qkv.float(),
        q_norm=None if case.q_norm is None else case.q_norm.float(),
        k_norm=None if case.k_norm is None else case.k_norm.float(),
        cache=KVCache(case.cache.k.float(), case.cache.v.float()),
    )
    expected = wide.on_fresh_pool(reference.rope_and_store, "cuda")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.float(), b, equal_nan=True, atol=4e-2, rtol=1.6e-2)


def test_a_captured_decode_follows_the_device_not_the_host(paged_batch):
    """A CUDA graph captured for long contexts gives the right answer when replayed for shorter ones."""
    heads, scale = HEADS["Qwen3-0.6B and 1.7B"], 128**-0.5
    batch = paged_batch([1] * 4, [40, 700, 1, 0], 4, heads=heads, dtype=torch.bfloat16, device="cuda")
    longest = replace(batch.plan, context_lens_host=batch.plan.context_lens_host * 0 + 4096)
    args = (batch.q, batch.cache, batch.block_tables)
    kernels.attention(*args, longest, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.attention(*args, longest, scale)
    out.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(out.float(), reference.attention(*batch.widened(scale)), **ATTENTION_BOUND)


DECODES = {
    "one long": [5000],
    "eight": [1, 500, 0, 2048, 33, 700, 64, 0],
    "64": [17 + 31 * i for i in range(64)],
    "200 short": [1 + i % 40 for i in range(200)],
}


def in_two_launches(*args: Any) -> torch.Tensor:
    """`rope_and_attend` by the kernels that it joins. 16 tokens at a time: the version that adds in the same order."""
    qkv, *known, positions, cache, slots, tables, plan, scale = args
    parts = [slice(i, i + 16) for i in range(0, len(qkv), 16)]
    q = torch.cat([kernels.rope_and_store(qkv[p], *known, positions[p], cache, slots[p]) for p in parts])
    return kernels.attention(q, cache, tables, plan, scale)


@pytest.mark.parametrize("kv", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("mix", DECODES)
@pytest.mark.parametrize("model", HEADS)
def test_decode_that_stores(model, mix, norm, kv, decode_case):
    """The pool gets the same bits as from two launches, also when captured. The output may round another way: the
    compiler orders the sums of 16 bits as it likes.
    """
    how = {"norm": norm, "heads": HEADS[model], "dtype": torch.bfloat16, "device": "cuda", "apart": True, "kv": kv}
    case = decode_case(DECODES[mix], block_size=16 if kv is None else 32, **how)
    graph = torch.cuda.CUDAGraph()

    def launch(*args: Any) -> torch.Tensor:
        with never_waiting():
            return kernels.rope_and_attend(*args)

    def replay(*args: Any) -> torch.Tensor:
        with torch.cuda.graph(graph):
            out = kernels.rope_and_attend(*args)
        out.fill_(torch.nan)
        graph.replay()
        return out

    expected, *expected_pool = case.on_fresh_pool(in_two_launches, 0.02)
    assert expected.isfinite().all()
    for run in (launch, replay):
        out, *pool = case.on_fresh_pool(run, 0.02)
        for got, want in zip(pool, expected_pool, strict=True):
            assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))
        if kv is not None and HEADS[model][0] == 2 * HEADS[model][1]:
            assert torch.equal(out, expected)
        largest = expected.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
        assert ((out.float() - expected.float()).abs() / largest).max() <= 1e-2


@pytest.mark.parametrize("heads", [(14, 2, 64), (8, 1, 128), (3, 3, 128)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float16, 4e-3)])
def test_decode_that_stores_in_other_types_and_groups(heads, dtype, bound, decode_case):
    case = decode_case(DECODES["eight"], norm=True, heads=heads, block_size=32, dtype=dtype, device="cuda")
    got = case.on_fresh_pool(kernels.rope_and_attend, 0.02)
    for a, b in zip(got, case.on_fresh_pool(in_two_launches, 0.02), strict=True):
        torch.testing.assert_close(a, b, atol=bound, rtol=bound, equal_nan=True)


def test_fusing_can_be_turned_off(decode_case, monkeypatch):
    heads = HEADS["Qwen3-0.6B and 1.7B"]
    case = decode_case(DECODES["eight"], norm=True, heads=heads, dtype=torch.bfloat16, device="cuda")
    out, *pool = case.on_fresh_pool(kernels.rope_and_attend, 0.1)
    monkeypatch.setattr(chip, "fuses", lambda: False)
    expected, *expected_pool = case.on_fresh_pool(kernels.rope_and_attend, 0.1)
    torch.testing.assert_close(out.float(), expected.float(), **ATTENTION_BOUND)
    for a, b in zip(pool, expected_pool, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
