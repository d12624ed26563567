"""8-bit KV caches, however a sequence is computed, and one pool of blocks for all of them.

The reference is transformers with a cache that puts each head of each token through 8 bits (`tiny.EightBitCache`). A
key that lies between two codes falls to either side with the order of a sum, so one code may differ: tokens are the
reference's best or within MARGIN of it, log-probabilities within MARGIN (0.012 was the most seen).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from engine import LLM, SamplingParams
from engine.block_manager import hash_blocks, prefix_seed
from engine.config import load_model_config
from engine.core import StepResult
from engine.kv_pool import KVPool, bytes_per_block
from engine.messages import AddRequest, pack_ids

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
FORMATS = ["bf16+kv8", "bf16+kvint8", "int8-row+kvint8", "fp8-row+kv8"]
MARGIN = 0.05
rng = random.Random(2)
PROMPTS = [[rng.randrange(tiny.VOCAB) for _ in range(n)] for n in (5, 64, 33, 140, 1)]
Checkpoint = Callable[[str], Path]


def make_llm(folder: Path, **options: object) -> LLM:
    return LLM(folder, **{"kv_cache_tokens": 2048, "max_num_seqs": 16, **options})  # type: ignore[arg-type]


def check_greedy(folder: Path, llm: LLM, variant: str) -> None:
    """Every token is the reference's best, or within MARGIN of it, given the tokens before."""
    outputs = llm.generate(PROMPTS, GREEDY, variant=variant, use_tqdm=False)
    for prompt, out in zip(PROMPTS, outputs, strict=True):
        got = out["token_ids"]
        assert len(got) == GREEDY.max_tokens
        logits = tiny.reference_logits(folder, prompt + got[:-1], variant)[len(prompt) - 1 :]
        assert (logits.max(-1).values - logits[torch.arange(len(got)), got]).max() <= MARGIN
    assert llm.engine.blocks.num_used == 0


@pytest.mark.parametrize("variant", FORMATS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_greedy_tokens_are_the_references(checkpoint: Checkpoint, family: str, variant: str) -> None:
    folder = checkpoint(family)
    for options in ({}, {"max_num_batched_tokens": 17}, {"kv_cache_tokens": 64}, {"overlap": True}):
        llm = make_llm(folder, variants=[variant], **options)
        for _ in range(2):  # the second time with prefix hits
            check_greedy(folder, llm, variant)
        counters = llm.engine.scheduler.counters[variant]
        small = "kv_cache_tokens" in options
        assert small or counters.prefix_hits > 0
        assert (counters.preemptions > 0) == small


@pytest.mark.parametrize("variant", FORMATS[:2])
def test_a_preempted_sequence_goes_on_with_the_same_tokens(checkpoint: Checkpoint, variant: str) -> None:
    folder = checkpoint("qwen3")
    llm = make_llm(folder, variants=[variant], enable_prefix_caching=False)
    step, calls = llm.engine.step, itertools.count()

    def stepping() -> StepResult:
        running = llm.engine.scheduler.running
        if next(calls) % 7 == 6 and running:
            llm.engine.scheduler.preempt(next(reversed(running.values())))
        return step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.engine, "step", stepping)
        check_greedy(folder, llm, variant)
    assert llm.engine.scheduler.counters[variant].preemptions > 5


@pytest.mark.parametrize("variant", FORMATS)
def test_prompt_logprobs_are_the_references(checkpoint: Checkpoint, variant: str) -> None:
    folder = checkpoint("qwen3")
    llm = make_llm(folder, variants=[variant], max_num_batched_tokens=24)
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=2)
    for prompt, out in zip(PROMPTS, llm.generate(PROMPTS, params, use_tqdm=False), strict=True):
        want = tiny.reference_logits(folder, prompt, variant).log_softmax(-1)
        for position in range(1, len(prompt)):
            got = out["prompt_logprobs"][position]
            torch.testing.assert_close(torch.tensor(got.values), want[position - 1, list(got.ids)], atol=MARGIN, rtol=0)


def test_formats_share_one_pool_and_no_prefix_crosses(checkpoint: Checkpoint) -> None:
    """The same prompts in four KV formats at once, twice, in a pool that makes them take each other's blocks."""
    folder = checkpoint("qwen3")
    names = ["bf16", "bf16+kv8", "bf16+kvint8", "int8-row+kv8"]
    llm = make_llm(folder, variants=names, kv_cache_tokens=640)
    info, engine = llm.engine.info, llm.engine
    sizes = {v.name: v.block_size for v in info.variants}
    assert sizes == {"bf16": 16, "bf16+kv8": 64, "bf16+kvint8": 64, "int8-row+kv8": 64}
    assert len({v.fingerprint for v in info.variants}) == len(names)
    prompt = PROMPTS[3]
    for name in names:  # alone: what one variant has computed is no hit for another, and is one for itself
        cached = [llm.generate([prompt], GREEDY, variant=name, use_tqdm=False)[0]["num_cached_tokens"] for _ in "ab"]
        assert cached == [0, 139 // sizes[name] * sizes[name]]
    seeds = {v.name: prefix_seed(v.fingerprint) for v in info.variants}
    work = list(itertools.product(names, range(len(PROMPTS))))
    got: dict[int, list[int]] = {i: [] for i in range(len(work))}
    for i, (name, p) in enumerate(work):
        hashes = hash_blocks(seeds[name], PROMPTS[p], sizes[name])
        engine.add(AddRequest(i, name, pack_ids(PROMPTS[p]), GREEDY, seeds[name], hashes))
    while engine.has_work:
        result = engine.step()
        engine.blocks.check([q.blocks for q in engine.scheduler.running.values()])
        for sequence_id, token in zip(result.sequence_ids, result.token_ids, strict=True):
            got[sequence_id].append(token)
    assert sum(engine.scheduler.counters[n].preemptions for n in names) > 0
    for i, (name, p) in enumerate(work):
        logits = tiny.reference_logits(folder, PROMPTS[p] + got[i][:-1], name)[len(PROMPTS[p]) - 1 :]
        assert (logits.max(-1).values - logits[torch.arange(48), got[i]]).max() <= MARGIN, (name, p)


def test_an_8_bit_pool_holds_twice_the_tokens(checkpoint: Checkpoint) -> None:
    """In bf16: the same bytes, twice the longest sequence, and twice as many sequences at one time."""
    folder = checkpoint("qwen3")
    llms = {v: make_llm(folder, variants=[v], dtype="bfloat16", kv_cache_tokens=96) for v in ("bf16", "bf16+kv8")}
    tokens, longest, most = {}, {}, {}
    for name, llm in llms.items():
        info = llm.engine.info
        tokens[name], longest[name] = info.num_blocks * info.variants[0].block_size, info.max_model_len
        for i in range(8):
            params = SamplingParams(temperature=0, max_tokens=1)
            llm.engine.add(AddRequest(i, name, pack_ids([i] * 31), params, b"", []))
        llm.engine.step()
        most[name] = 8 - len(llm.engine.scheduler.waiting[name])
    assert tokens == {"bf16": 96, "bf16+kv8": 192} == longest
    assert most == {"bf16": 3, "bf16+kv8": 6}
    assert llms["bf16"].engine.runner.pool.data.nbytes == llms["bf16+kv8"].engine.runner.pool.data.nbytes


def test_scales_are_kept_only_for_formats_that_need_them() -> None:
    config = load_model_config(POCKET)
    cpu = torch.device("cpu")
    for kvs in ({None}, {None, "int8"}, {"int8", "float8_e4m3fn"}):
        pool = KVPool(config, 3, 16, torch.bfloat16, kvs, cpu)
        scales = 0 if pool.scales is None else pool.scales.nbytes
        assert (scales > 0) == (kvs != {None})
        assert pool.data.nbytes + scales == 3 * bytes_per_block(config, 16, torch.bfloat16, kvs)
        for kv in kvs:
            caches = pool.caches(kv)
            assert len(caches) == config.num_layers
            for layer, cache in enumerate(caches):
                assert cache.k.shape == (3, 16 if kv is None else 32, config.num_kv_heads, config.head_dim)
                assert (cache.k.data_ptr(), cache.v.data_ptr()) == tuple(t.data_ptr() for t in pool.data[layer])
                assert (cache.k_scale is None) == (kv is None)


def perplexity(variant: str, text: str) -> float:
    """Of the bundled model on `text`, in windows of 256 tokens."""
    llm = LLM(POCKET, variants=[variant], kv_cache_tokens=1 << 14)
    ids = llm.tokenizer.encode(text).ids
    windows = [ids[i : i + 256] for i in range(0, len(ids) - 255, 256)]
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
    outputs = llm.generate(windows, params, use_tqdm=False)
    values = [entry.values[0] for out in outputs for entry in out["prompt_logprobs"] if entry is not None]
    assert len(values) == 255 * len(windows) > 1000
    return math.exp(-sum(values) / len(values))


def test_perplexity_stays() -> None:
    """Of the bundled prose: 58.25, with int8 +0.03 %, with e4m3 +0.09 %; of its beginning 60.23, +0.23 %, +0.53 %."""
    text = (POCKET / "prose.txt").read_text(encoding="utf-8")[:6000]
    plain = perplexity("bf16", text)
    assert perplexity("bf16+kvint8", text) == pytest.approx(plain, rel=0.005)
    assert perplexity("bf16+kv8", text) == pytest.approx(plain, rel=0.01)
