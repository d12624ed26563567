"""Every way a sequence can be computed gives transformers' own greedy tokens, in float32."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from msgspec import structs

from engine import LLM, SamplingParams, kernels
from engine.block_manager import hash_blocks, prefix_seed
from engine.core import StepResult
from engine.kernels import KVCache
from engine.messages import AddRequest, pack_ids
from engine.models.qwen import Batch, Qwen

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
MAIN = ["qwen2", "qwen3"]
Checkpoint = Callable[[str], Path]


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(tiny.VOCAB) for _ in range(n)] for n in lengths]


PROMPTS = prompts_of((5, 16, 33, 70, 1))


def make_llm(folder: Path, **options: object) -> LLM:
    return LLM(folder, **{"kv_cache_tokens": 2048, "max_num_seqs": 16, **options})  # type: ignore[arg-type]


def tokens(
    llm: LLM, prompts: list[list[int]], variant: str | None = None, params: SamplingParams = GREEDY
) -> list[list[int]]:
    return [o["token_ids"] for o in llm.generate(prompts, params, variant=variant, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> Callable[..., list[list[int]]]:
    known: dict[tuple[str, str], list[list[int]]] = {}

    def get(family: str, variant: str = "bf16") -> list[list[int]]:
        if (family, variant) not in known:
            folder = checkpoint(family)
            known[family, variant] = [tiny.reference_greedy(folder, p, 64, variant) for p in PROMPTS]
        return known[family, variant]

    return get


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_prompt_logprobs_equal_transformers(checkpoint: Checkpoint, family: str) -> None:
    folder = checkpoint(family)
    llm = make_llm(folder, max_num_batched_tokens=24)
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=5)
    for prompt, out in zip(PROMPTS, llm.generate(PROMPTS, params, use_tqdm=False), strict=True):
        want = tiny.reference_logits(folder, prompt).log_softmax(-1)
        assert len(out["prompt_logprobs"]) == (len(prompt) if len(prompt) > 1 else 0)
        for position in range(1, len(prompt)):
            got = out["prompt_logprobs"][position]
            assert got.ids[0] == prompt[position]
            torch.testing.assert_close(torch.tensor(got.values), want[position - 1, list(got.ids)], atol=1e-4, rtol=0)
            assert list(got.ids[1:]) == want[position - 1].topk(5).indices.tolist()


@pytest.mark.parametrize("programs", [0, 1 << 30])
def test_the_order_of_a_batch_changes_nothing(
    checkpoint: Checkpoint, expected: Callable[..., list[list[int]]], monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    """Longest first, as large batches are, and as they come; with a prompt beside those that decode."""
    monkeypatch.setattr(kernels, "PROGRAMS_PER_SM", programs)
    assert kernels.longest_first(3, 2, torch.device("cpu")) == (programs == 0)
    llm = make_llm(checkpoint("qwen3"), max_num_batched_tokens=24)
    assert tokens(llm, PROMPTS) == expected("qwen3")


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_logits_equal_transformers(checkpoint: Checkpoint, family: str) -> None:
    """All logits of a prompt, within 1e-4, from the engine's own forward over its paged pool."""
    folder = checkpoint(family)
    llm = make_llm(folder)
    seen: list[torch.Tensor] = []
    variant = llm.engine.runner.variants["bf16"]
    forward = type(variant.model).forward

    def spy(model: Qwen, batch: Batch, kv: list[KVCache]) -> torch.Tensor:
        hidden = forward(model, replace(batch, wanted=None), kv)
        seen.append(variant.model.logits(hidden))
        return hidden if batch.wanted is None else hidden[batch.wanted.index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(variant.model), "forward", spy)
        for prompt in PROMPTS:
            seen.clear()
            llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
            torch.testing.assert_close(seen[0], tiny.reference_logits(folder, prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_alone_and_batched(
    checkpoint: Checkpoint, expected: Callable[..., list[list[int]]], family: str, overlap: bool
) -> None:
    llm = make_llm(checkpoint(family), overlap=overlap, enable_prefix_caching=False)
    assert [tokens(llm, [p])[0] for p in PROMPTS] == expected(family)
    assert tokens(llm, PROMPTS) == expected(family)


@pytest.mark.parametrize("budget", [16, 17, 40])
@pytest.mark.parametrize("family", MAIN)
def test_chunked_prefill(
    checkpoint: Checkpoint, expected: Callable[..., list[list[int]]], family: str, budget: int
) -> None:
    llm = make_llm(checkpoint(family), max_num_batched_tokens=budget)
    assert tokens(llm, PROMPTS) == expected(family)
    assert llm.engine.num_steps > 64 + 70 // budget


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", MAIN)
def test_prefix_hit(
    checkpoint: Checkpoint, expected: Callable[..., list[list[int]]], family: str, overlap: bool
) -> None:
    llm = make_llm(checkpoint(family), overlap=overlap)
    assert tokens(llm, PROMPTS) == expected(family)
    again = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [o["token_ids"] for o in again] == expected(family)
    assert [o["num_cached_tokens"] for o in again] == [0, 0, 32, 64, 0]
    # A prompt that reaches into what was generated hits blocks that decode filled.
    longer = [p + t[:40] for p, t in zip(PROMPTS, expected(family), strict=True)]
    out = llm.generate(longer, GREEDY, use_tqdm=False)
    assert [o["token_ids"][:24] for o in out] == [t[40:] for t in expected(family)]
    assert [o["num_cached_tokens"] for o in out] == [32, 48, 64, 96, 32]


def preempting_at(llm: LLM, k: int) -> Callable[[], StepResult]:
    """The engine's step, which at its k-th call first preempts the newest running sequence."""
    step, calls = llm.engine.step, itertools.count()

    def stepping() -> StepResult:
        running = llm.engine.scheduler.running
        if next(calls) == k and running:
            llm.engine.scheduler.preempt(next(reversed(running.values())))
        return step()

    return stepping


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", MAIN)
def test_forced_preemption_at_each_step(
    checkpoint: Checkpoint, expected: Callable[..., list[list[int]]], family: str, overlap: bool
) -> None:
    """One run for each step k: at k the newest running sequence loses its blocks; all tokens stay the same."""
    options = {"overlap": overlap, "max_num_batched_tokens": 64}
    llms = [make_llm(checkpoint(family), enable_prefix_caching=caching, **options) for caching in (True, False)]
    short = structs.replace(GREEDY, max_tokens=24)  # enough for both to fill a block of 16 while they decode
    prompts, want = PROMPTS[2:4], [t[:24] for t in expected(family)[2:4]]
    for k in range(26):
        llm = llms[k % 2]
        llm.engine.blocks.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llm.engine, "step", preempting_at(llm, k))
            assert tokens(llm, prompts, params=short) == want, f"preempted at step {k}"
    assert sum(llm.engine.scheduler.counters["bf16"].preemptions for llm in llms) >= 24


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", MAIN)
def test_small_pool_preempts_by_itself(
    checkpoint: Checkpoint, expected: Callable[..., list[list[int]]], family: str, overlap: bool
) -> None:
    llm = make_llm(checkpoint(family), kv_cache_tokens=160, overlap=overlap)
    assert tokens(llm, PROMPTS) == expected(family)
    assert llm.engine.scheduler.counters["bf16"].preemptions > 0
    assert llm.engine.blocks.num_used == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", MAIN)
def test_mixed_with_other_variants(
    checkpoint: Checkpoint, expected: Callable[..., list[list[int]]], family: str, overlap: bool
) -> None:
    """The same prompts in three variants at once: each gives its own reference's tokens, no prefix crosses."""
    names = ["bf16", "int8-row", "fp8-row"]
    llm = make_llm(checkpoint(family), variants=names, overlap=overlap, max_num_batched_tokens=48)
    seed = {v.name: v.fingerprint for v in llm.engine.info.variants}
    assert len(set(seed.values())) == 3
    engine, got = llm.engine, {(n, i): [] for n in names for i in range(len(PROMPTS))}  # type: ignore[var-annotated]
    ids = {key: number for number, key in enumerate(got)}
    for _ in range(2):  # the second time with prefix hits
        for key, number in ids.items():
            chain = prefix_seed(seed[key[0]])
            prompt = PROMPTS[key[1]]
            hashes = hash_blocks(chain, prompt, 16)
            engine.add(AddRequest(number, key[0], pack_ids(prompt), GREEDY, chain, hashes))
        by_id = {number: key for key, number in ids.items()}
        for tokens_ in got.values():
            tokens_.clear()
        while engine.has_work:
            result = engine.step()
            for sequence_id, token in zip(result.sequence_ids, result.token_ids, strict=True):
                got[by_id[sequence_id]].append(token)
        for name in names:
            assert [got[name, i] for i in range(len(PROMPTS))] == expected(family, name), name
    hits = [engine.scheduler.counters[n].prefix_hits for n in names]
    assert hits[0] > 0 and len(set(hits)) == 1


def test_a_short_sliced_vocabulary_is_never_exceeded(checkpoint: Checkpoint) -> None:
    """Ids beyond the tokenizer are never sampled, greedy or not, and never listed."""
    llm = make_llm(checkpoint("qwen3"))
    llm.engine.runner.num_ids = 50
    params = [SamplingParams(temperature=t, max_tokens=40, logprobs=20, ignore_eos=True) for t in (0.0, 1.0, 2.0)]
    for out in llm.generate([[1, 2, 3]] * 3, params, use_tqdm=False):
        assert max(out["token_ids"]) < 50
        assert max(i for entry in out["logprobs"] for i in entry.ids) < 50
