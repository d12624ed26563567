"""Builders that the kernel tests share: paged batches whose pool is NaN where nothing may read, and what they mean.

And what `test_kernels.AHEAD` names runs in processes that begin with the session, behind the other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels import AttentionPlan, KVCache, plan_tiles
from engine.kernels.reference import quantize_kv

ROOT = Path(__file__).resolve().parents[3]
CACHES = pytest.StashKey[tempfile.TemporaryDirectory[str]]()
NOT_A_NUMBER = 0x7F  # as e4m3; as int8 it is 127, and its scale is NaN


@dataclass
class Ahead:
    """Commands that run two at a time and behind the tests: their futures by key, and the processes that have begun."""

    pool: ThreadPoolExecutor
    futures: dict[Any, Future[subprocess.CompletedProcess[str]]]
    begun: list[subprocess.Popen[str]]

    def run(self, words: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        command = ["nice", "-n", "5", sys.executable, *words]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True) as process:
            self.begun.append(process)
            out, err = process.communicate()
        return subprocess.CompletedProcess(words, process.returncode, out, err)


AHEAD = pytest.StashKey[Ahead]()


def pytest_collection_finish(session: pytest.Session) -> None:
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    jobs = next((module.AHEAD for module in modules if hasattr(module, "AHEAD")), None)
    if jobs is None or session.config.option.collectonly:
        return
    folder = session.stash[CACHES] = tempfile.TemporaryDirectory(prefix="triton-")
    ahead = session.stash[AHEAD] = Ahead(ThreadPoolExecutor(2), {}, [])
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    for number, (key, (words, more)) in enumerate(jobs.items()):
        env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": f"{folder.name}/{number}"}
        ahead.futures[key] = ahead.pool.submit(ahead.run, words, env | more)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if AHEAD not in session.stash:
        return
    ahead = session.stash[AHEAD]
    ahead.pool.shutdown(wait=False, cancel_futures=True)
    for process in ahead.begun:
        process.kill()
    ahead.pool.shutdown()
    session.stash[CACHES].cleanup()


@pytest.fixture
def ahead(request: pytest.FixtureRequest) -> Callable[[Any], subprocess.CompletedProcess[str]]:
    """Waits for what began with the session, by its key."""
    return lambda key: request.session.stash[AHEAD].futures[key].result()


@dataclass
class PagedBatch:
    """Arguments of `attention`, and each sequence's keys and values [context, Hkv, D], which the pool stands for."""

    q: Tensor
    cache: KVCache
    block_tables: Tensor
    plan: AttentionPlan
    keys: list[Tensor]
    values: list[Tensor]

    def args(self, scale: float) -> tuple[Tensor, KVCache, Tensor, AttentionPlan, float]:
        return self.q, self.cache, self.block_tables, self.plan, scale

    def widened(self, scale: float) -> tuple[Tensor, KVCache, Tensor, AttentionPlan, float]:
        """The same arguments in fp32: what a 16-bit kernel is compared with."""
        return self.q.float(), widen_cache(self.cache), self.block_tables, self.plan, scale

    def rounded(self, scale: float) -> tuple[Tensor, KVCache, Tensor, AttentionPlan, float]:
        """The same in fp32 over what an 8-bit cache stands for, rounded to q's dtype: the definition."""
        stored = ((self.cache.k, self.cache.k_scale), (self.cache.v, self.cache.v_scale))
        wide = [codes.float() * s.transpose(1, 2)[..., None] for codes, s in stored if s is not None]
        cache = KVCache(*(x.to(self.q.dtype).float() for x in wide))
        return self.q.float(), cache, self.block_tables, self.plan, scale


def widen_cache(cache: KVCache) -> KVCache:
    """A cache in fp32; an 8-bit one as it is, which the twins dequantise to whatever they compute in."""
    return KVCache(cache.k.float(), cache.v.float()) if cache.k_scale is None else cache


def make_batch(
    query_lens: list[int],
    context_lens: list[int],
    num_decodes: int,
    *,
    heads: tuple[int, int, int],
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    apart: bool = False,
    kv: torch.dtype | None = None,
) -> PagedBatch:
    """`heads` is (Hq, Hkv, D). apart: blocks do not lie next to each other in memory. kv: an 8-bit cache's dtype.

    Table rows are shuffled, entries past a context are out of range, and the pool is NaN past each context.
    """
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    counts = [-(-c // block_size) for c in context_lens]
    num_blocks, num_rows = sum(counts) + 2, len(context_lens) + 2
    pool = torch.full((2, num_blocks, 1 + apart, block_size, num_kv_heads, head_dim), torch.nan)
    scales = torch.full((2, num_blocks, num_kv_heads, block_size), torch.nan)
    tables = torch.full((num_rows, max([*counts, 1]) + 1), 1 << 30, dtype=torch.int32)
    rows = torch.randperm(num_rows, generator=generator)[: len(context_lens)].int()
    blocks = torch.randperm(num_blocks, generator=generator).int()
    keys, values = [], []
    for row, count, context in zip(rows, counts, context_lens, strict=True):
        own, blocks = blocks[:count], blocks[count:]
        tables[row, :count] = own
        position = torch.arange(context)
        both = torch.randn(2, context, num_kv_heads, head_dim, generator=generator).to(dtype)
        if kv is not None:
            both *= torch.logspace(-3, 3, context).view(-1, 1, 1)  # heads and tokens differ in range
            both[:, ::5, 0] = 0
            codes, scale = quantize_kv(both.flatten(0, 1), kv)
            scale = scale.view(2, context, num_kv_heads)
            scales[:, own[position // block_size], :, position % block_size] = scale.transpose(0, 1)
            pool[:, own[position // block_size], 0, position % block_size] = codes.float().view(both.shape)
            both = codes.float().view(both.shape) * scale[..., None]
        else:
            pool[:, own[position // block_size], 0, position % block_size] = both.float()
        keys.append(both[0])
        values.append(both[1])
    if kv is None:
        pool = pool.to(device, dtype)
    else:
        stored = torch.where(pool.isnan(), 0, pool).to(kv).view(torch.uint8)
        pool = torch.where(pool.isnan(), NOT_A_NUMBER, stored).view(kv).to(device)
    scales = scales.to(device)
    cache = KVCache(pool[0, :, 0], pool[1, :, 0], *([] if kv is None else scales.unbind()))
    lens, contexts = np.array(query_lens), np.array(context_lens)
    plan = AttentionPlan(
        rows=rows.to(device),
        query_starts=torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32, device=device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        query_lens_host=lens,
        context_lens_host=contexts,
        num_decodes=num_decodes,
        tiles=torch.from_numpy(plan_tiles(lens, num_decodes)).to(device),
    )
    q = torch.randn(int(lens.sum()), num_heads, head_dim, generator=generator).to(device, dtype)
    return PagedBatch(q, cache, tables.to(device), plan, keys, values)


def attend_naively(batch: PagedBatch, scale: float) -> Tensor:
    """Softmax attention in fp64, one sequence at a time, from its keys and values outside the pool."""
    out = []
    for n, q, k, v in zip(
        batch.plan.query_lens_host,
        batch.q.cpu().double().split(batch.plan.query_lens_host.tolist()),
        batch.keys,
        batch.values,
        strict=True,
    ):
        context, group = len(k), q.shape[1] // batch.cache.k.shape[2]
        if context == 0:
            out.append(torch.zeros_like(q))
            continue
        k, v = (t.double().repeat_interleave(group, dim=1) for t in (k, v))  # [context, Hq, D]
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        hidden = torch.arange(context) > torch.arange(context - n, context)[:, None]
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(out)


@pytest.fixture
def paged_batch() -> Callable[..., PagedBatch]:
    return make_batch


@pytest.fixture
def naive_attention() -> Callable[[PagedBatch, float], Tensor]:
    return attend_naively


@dataclass
class RopeCase:
    """Arguments of `rope_and_store`; the pool is NaN and every fourth token is padding."""

    qkv: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    cos_sin: Tensor
    positions: Tensor
    cache: KVCache
    slots: Tensor

    def on_fresh_pool(self, function: Callable[..., Tensor], device: str) -> tuple[Tensor, ...]:
        """(q, k, v) after running `function` on copies of the arguments; an 8-bit cache's scales follow."""
        tensors = (self.cache.k, self.cache.v, self.cache.k_scale, self.cache.v_scale)
        pool = [t.to(device, copy=True) for t in tensors if t is not None]
        args = [None if t is None else t.to(device) for t in (self.qkv, self.q_norm, self.k_norm)]
        rest = [t.to(device) for t in (self.cos_sin, self.positions)]
        return function(*args, 1e-6, *rest, KVCache(*pool), self.slots.to(device)), *pool


@dataclass
class DecodeCase:
    """Arguments of `rope_and_attend` for a batch that only decodes; the pool is NaN also where they will be stored."""

    batch: PagedBatch  # its q is not used
    qkv: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    cos_sin: Tensor
    positions: Tensor
    slots: Tensor

    def on_fresh_pool(self, function: Callable[..., Tensor], scale: float) -> tuple[Tensor, ...]:
        """What `function` returns, and the pool after it: k, v, and an 8-bit cache's scales."""
        b = self.batch
        pool = [t for t in (b.cache.k, b.cache.v, b.cache.k_scale, b.cache.v_scale) if t is not None]
        before = [t.clone() for t in pool]
        norms = self.q_norm, self.k_norm
        known = (self.qkv, *norms, 1e-6, self.cos_sin, self.positions, b.cache, self.slots)
        out = function(*known, b.block_tables, b.plan, scale)
        after = [t.clone() for t in pool]
        for t, values in zip(pool, before, strict=True):
            t.copy_(values)
        return out, *after


@pytest.fixture
def decode_case() -> Callable[..., DecodeCase]:
    def make(contexts: list[int], *, norm: bool, heads: tuple[int, int, int], **how: Any) -> DecodeCase:
        """how: of `make_batch`."""
        num, (num_heads, num_kv_heads, head_dim) = len(contexts), heads
        batch = make_batch([1] * num, contexts, num, heads=heads, **how)
        cache, tables, dtype, device = batch.cache, batch.block_tables.cpu(), batch.q.dtype, batch.q.device
        block_size, slots = cache.k.shape[1], []
        for row, context in zip(batch.plan.rows.tolist(), contexts, strict=True):
            block, offset = int(tables[row, (context - 1) // block_size]), (context - 1) % block_size
            slots.append(block * block_size + offset if context else -1)
            if context and cache.k_scale is not None and cache.v_scale is not None:
                cache.k_scale[block, :, offset] = cache.v_scale[block, :, offset] = torch.nan
                for codes in (cache.k, cache.v):
                    codes.view(torch.uint8)[block, offset] = NOT_A_NUMBER
            elif context:
                cache.k[block, offset] = cache.v[block, offset] = torch.nan
        generator = torch.Generator().manual_seed(2)
        angle = torch.arange(max(contexts))[:, None] * torch.logspace(0, -4, head_dim // 2)
        qkv = torch.randn(num, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator) * 3
        qkv[0, -head_dim:] = 0  # the last value head of the first token
        gains = [torch.rand(head_dim, generator=generator) + 0.5 for _ in range(2)]
        index = torch.tensor([[max(c - 1, 0) for c in contexts], slots], dtype=torch.int32, device=device)
        return DecodeCase(
            batch,
            qkv.to(device, dtype),
            *(gain.to(device, dtype) if norm else None for gain in gains),
            torch.cat([angle.cos(), angle.sin()], dim=1).to(device),
            *index,
        )

    return make


@pytest.fixture
def rope_case() -> Callable[..., RopeCase]:
    def make(
        num_tokens: int, heads: tuple[int, int, int], *, norm: bool, dtype: torch.dtype, kv: torch.dtype | None = None
    ) -> RopeCase:
        num_heads, num_kv_heads, head_dim = heads
        generator = torch.Generator().manual_seed(1)
        num_blocks = -(-num_tokens // 16) + 1
        slots = torch.randperm(num_blocks * 16, generator=generator)[:num_tokens].int()
        slots[3::4] = -1
        angle = torch.arange(512)[:, None] * torch.logspace(0, -4, head_dim // 2)
        shape = (num_blocks, 16, num_kv_heads, head_dim)
        cache = KVCache(*(torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)))
        if kv is not None:
            codes = [torch.full(shape, NOT_A_NUMBER, dtype=torch.uint8).view(kv) for _ in range(2)]
            scales = [torch.full((num_blocks, num_kv_heads, 16), torch.nan) for _ in range(2)]
            cache = KVCache(*codes, *scales)
        gains = [torch.rand(head_dim, generator=generator).to(dtype) + 0.5 if norm else None for _ in range(2)]
        width = (num_heads + 2 * num_kv_heads) * head_dim
        qkv = torch.randn(num_tokens, width, generator=generator).to(dtype) * 3
        qkv[0, -head_dim:] = 0  # the last value head of the first token
        return RopeCase(
            qkv,
            *gains,
            torch.cat([angle.cos(), angle.sin()], dim=1),
            torch.randint(512, (num_tokens,), generator=generator).int(),
            cache,
            slots,
        )

    return make


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_for_numpy(tensor: type, scope: interpreter._LangPatchScope) -> None:
        """Triton 3.6 turns a one-element array into a loop bound by int(), which numpy 2.4 refuses."""
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_for_numpy

    @pytest.fixture(autouse=True)
    def poisoned_outputs() -> Iterator[None]:
        """torch fills what `empty` returns with NaN: an element that no program writes fails the comparison.

        And numpy keeps quiet about log2(0) and exp(1000), which are -inf and inf as on a GPU.
        """
        torch.use_deterministic_algorithms(True)
        with np.errstate(divide="ignore", over="ignore"):
            yield
        torch.use_deterministic_algorithms(False)
