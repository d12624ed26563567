"""What the scheduler promises: decode first, budgets, sharing, waiting for prefixes, rotation."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import tiny

from engine import LLM, SamplingParams
from engine.block_manager import BlockManager, hash_blocks, prefix_seed
from engine.scheduler import Scheduler
from engine.sequence import Sequence


def make_scheduler(num_blocks: int = 64, budget: int = 32, variants: str = "x", seqs: int = 8) -> Scheduler:
    return Scheduler(BlockManager(num_blocks), dict.fromkeys(variants, 4), seqs, budget)


def make(i: int, prompt: list[int], variant: str = "x", max_tokens: int = 8, cached: bool = True) -> Sequence:
    seed = prefix_seed(variant.encode()) if cached else b""
    hashes = hash_blocks(seed, prompt, 4) if cached else []
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return Sequence(i, variant, prompt, params, frozenset(), 0, seed, hashes, 0.0)


def shape(step: dict[str, list]) -> dict[str, list[tuple[int, int, int]]]:  # type: ignore[type-arg]
    return {v: [(s.sequence.id, s.start, s.num_tokens) for s in share] for v, share in step.items()}


def arrive(step: dict[str, list], scheduler: Scheduler, token: int = 1) -> None:  # type: ignore[type-arg]
    for share in step.values():
        for s in share:
            if s.samples:
                s.sequence.token_ids.append(token)
                scheduler.token_arrived(s.sequence)


def test_a_prompt_longer_than_the_budget_is_chunked_and_decode_goes_first() -> None:
    scheduler = make_scheduler(budget=10)
    scheduler.add(make(0, [1, 2, 3]))
    scheduler.add(make(1, list(range(20))))
    step = scheduler.schedule()
    assert shape(step) == {"x": [(0, 0, 3), (1, 0, 7)]}
    arrive(step, scheduler)
    step = scheduler.schedule()
    assert shape(step) == {"x": [(0, 3, 1), (1, 7, 9)]}
    assert [s.samples for s in step["x"]] == [True, False]
    arrive(step, scheduler)
    step = scheduler.schedule()
    assert shape(step) == {"x": [(0, 4, 1), (1, 16, 4)]}
    assert [s.samples for s in step["x"]] == [True, True]


def test_prefill_beside_decode_is_bounded() -> None:
    scheduler = make_scheduler(budget=32)
    scheduler.max_prefill_beside_decode = 6
    scheduler.add(make(0, [1, 2, 3]))
    arrive(scheduler.schedule(), scheduler)
    scheduler.add(make(1, list(range(20))))
    step = scheduler.schedule()
    assert shape(step) == {"x": [(0, 3, 1), (1, 0, 6)]}


def test_a_sequence_waits_for_the_prefix_another_computes() -> None:
    scheduler = make_scheduler(budget=8)
    prompt = list(range(18))
    for i in range(3):
        scheduler.add(make(i, prompt))
    computed = 0
    for _ in range(3):
        step = scheduler.schedule()
        computed += sum(n for share in shape(step).values() for i, _, n in share if i == 0 or n > 1)
        arrive(step, scheduler)
    # 18 tokens once; each other sequence only the two past the last full block.
    assert computed == 18 + 2 + 2
    assert [q.num_cached_tokens for q in scheduler.running.values()] == [0, 16, 16]


def test_a_block_that_a_single_token_completes_is_a_hit_one_step_later() -> None:
    """A batch of single tokens stores and attends in one launch: none of them may read what another stores in it."""
    scheduler = make_scheduler(budget=11)
    scheduler.add(make(0, list(range(12))))
    scheduler.add(make(1, list(range(13))))
    steps = []
    for _ in range(3):
        step = scheduler.schedule()
        steps += shape(step).values()
        arrive(step, scheduler)
    assert steps == [[(0, 0, 11)], [(0, 11, 1)], [(0, 12, 1), (1, 12, 1)]]
    assert scheduler.counters["x"].prefix_hits == 12


def test_n_sequences_compute_their_prompt_once(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path, "qwen3")
    rng = random.Random(3)
    prompt = [rng.randrange(tiny.VOCAB) for _ in range(100)]
    for overlap in (False, True):
        llm = LLM(folder, kv_cache_tokens=4096, max_num_batched_tokens=64, overlap=overlap)
        params = SamplingParams(temperature=1, seed=5, n=6, max_tokens=8, ignore_eos=True)
        outputs = llm.generate([prompt], params, use_tqdm=False)[0]["outputs"]
        assert len({tuple(o["token_ids"]) for o in outputs}) == 6
        # 100 = 6 blocks of 16 and 4 tokens over: these four are each sequence's own.
        assert llm.engine.phases["bf16"].prefill_tokens == 100 + 5 * 4


def test_an_aborted_owner_of_a_prefix_does_not_strand_who_waits_for_it() -> None:
    scheduler = make_scheduler(budget=8)
    first, second = make(0, list(range(18))), make(1, list(range(18)))
    scheduler.add(first)
    scheduler.add(second)
    assert shape(scheduler.schedule()) == {"x": [(0, 0, 8)]}
    scheduler.finish(first)
    assert shape(scheduler.schedule()) == {"x": [(1, 8, 8)]}  # the two computed blocks are still a hit
    scheduler.blocks.check([second.blocks])


def test_prefill_budget_rotates_between_variants() -> None:
    scheduler = make_scheduler(budget=8, variants="xyz", seqs=8)
    for i in range(9):
        scheduler.add(make(i, [i] * 7, variant="xyz"[i % 3], cached=False))
    first = [next(iter(scheduler.schedule())) for _ in range(1)]
    order = [first[0]]
    for _ in range(2):
        step = scheduler.schedule()
        order.append(next(v for v, share in step.items() if any(s.num_tokens > 1 for s in share)))
    assert sorted(order) == ["x", "y", "z"]


def test_the_newest_is_preempted_and_the_oldest_goes_on() -> None:
    scheduler = make_scheduler(num_blocks=4, budget=16)
    old, new = make(0, [1] * 7, cached=False), make(1, [2] * 7, cached=False)
    scheduler.add(old)
    scheduler.add(new)
    step = scheduler.schedule()
    assert len(step["x"]) == 2
    arrive(step, scheduler)
    arrive(scheduler.schedule(), scheduler)  # position 7: still in the second block
    step = scheduler.schedule()  # position 8 wants a third block each, and none is free
    assert shape(step) == {"x": [(0, 8, 1)]}
    assert scheduler.counters["x"].preemptions == 1
    assert new.num_computed == 0 and not new.blocks


def test_a_sequence_is_admitted_only_with_room_for_all_it_knows() -> None:
    scheduler = make_scheduler(num_blocks=5, budget=32)
    scheduler.add(make(0, [1] * 12, cached=False))
    scheduler.add(make(1, [2] * 12, cached=False))
    assert shape(scheduler.schedule()) == {"x": [(0, 0, 12)]}
    assert scheduler.blocks.num_free == 2


def test_it_tells_what_waiting_sequences_wait_for() -> None:
    def waits(prompts: list[list[int]], **settings: int) -> dict[str, int]:
        scheduler = make_scheduler(**settings)
        for i, prompt in enumerate(prompts):
            scheduler.add(make(i, prompt))
        scheduler.schedule()
        return {reason: count for reason, count in scheduler.waits("x").items() if count}

    different = [[i] * 12 for i in range(3)]
    assert waits(different, budget=24) == {"budget": 1}
    assert waits(different, num_blocks=5, budget=99) == {"blocks": 2}
    assert waits(different, seqs=2, budget=99) == {"rows": 1}
    assert waits([list(range(18))] * 3, budget=8) == {"budget": 2}


def test_sampling_stops_at_max_tokens_without_a_wasted_step() -> None:
    scheduler = make_scheduler()
    q = make(0, [1, 2], max_tokens=1)
    scheduler.add(q)
    scheduler.schedule()
    assert q.in_flight and q.wants == 0 and scheduler.schedule() == {}


def test_preempted_sequences_still_hit_their_own_blocks(tmp_path: Path) -> None:
    make_llm: Callable[..., LLM] = LLM
    llm = make_llm(tiny.make_checkpoint(tmp_path, "qwen3"), kv_cache_tokens=512)
    prompt = list(range(40))
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    before = llm.engine.phases["bf16"].prefill_tokens
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert llm.engine.phases["bf16"].prefill_tokens - before == 8
