"""The books of the KV pool hold under any sequence of adds, aborts, stops, preemptions and steps."""

from __future__ import annotations

import hashlib
from array import array

from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.block_manager import BlockManager, hash_block, hash_blocks, prefix_seed
from engine.scheduler import Scheduled, Scheduler
from engine.sequence import SamplingParams, Sequence

BLOCK = {"x": 4, "y": 8}  # tokens in a block, by variant: y has an 8-bit cache


def test_hash_chain_is_sha256_over_seed_and_tokens() -> None:
    seed = prefix_seed(b"weights", "salt")
    ids = list(range(10))
    first = hashlib.sha256(seed + array("i", ids[:4]).tobytes()).digest()
    second = hashlib.sha256(first + array("i", ids[4:8]).tobytes()).digest()
    assert hash_blocks(seed, ids, 4) == [first, second]
    assert hash_block(first, ids[4:8]) == second


def test_seeds_differ_by_fingerprint_and_salt_without_ambiguity() -> None:
    seeds = {prefix_seed(f, s) for f, s in ((b"ab", ""), (b"a", "b"), (b"", "ab"), (b"ab", "x"), (b"abx", ""))}
    assert len(seeds) == 5


def test_blocks_are_reused_least_recently_used_first_and_blank_before_cached() -> None:
    blocks = BlockManager(3)
    a, b, c = (blocks.allocate() for _ in range(3))
    blocks.register(a, b"a", pending=False)
    blocks.register(b, b"b", pending=False)
    blocks.release([c])
    blocks.release([a])
    blocks.release([b])
    assert (blocks.num_free, blocks.num_cached, blocks.num_used) == (3, 2, 0)
    assert blocks.allocate() == c
    assert blocks.allocate() == a  # released before b
    assert blocks.find(b"a") is None
    assert blocks.find(b"b") == (b, False)


def test_a_pending_block_that_is_released_is_forgotten() -> None:
    blocks = BlockManager(1)
    block = blocks.allocate()
    blocks.register(block, b"h", pending=True)
    assert blocks.find(b"h") == (block, True)
    blocks.release([block])
    assert blocks.find(b"h") is None
    blocks.check([])


def make_sequence(i: int, variant: str, prompt: list[int], max_tokens: int) -> Sequence:
    seed = prefix_seed(variant.encode())
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return Sequence(i, variant, prompt, params, frozenset(), 0, seed, hash_blocks(seed, prompt, BLOCK[variant]), 0.0)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("xy"), st.integers(1, 30), st.integers(0, 2), st.integers(0, 12)),
        st.tuples(st.just("abort"), st.integers(0, 40)),
        st.tuples(st.just("preempt"), st.integers(0, 40)),
        st.tuples(st.just("step")),
        st.tuples(st.just("step")),
        st.tuples(st.just("step")),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@example([("add", "x", 1, 0, 0), ("add", "x", 22, 0, 8), ("add", "x", 3, 0, 7), ("add", "x", 1, 0, 6)], 12, 4, True)
@given(operations, st.integers(12, 40), st.sampled_from([4, 7, 64]), st.booleans())
def test_books_hold_under_random_operations(
    ops: list[tuple[object, ...]], num_blocks: int, budget: int, late: bool
) -> None:
    """free + cached + used = total, nothing referenced twice; every sequence left alone ends with all its tokens.

    `late`: tokens arrive one step after they were launched, as on a GPU.
    """
    blocks = BlockManager(num_blocks)
    scheduler = Scheduler(blocks, BLOCK, max_num_seqs=4, max_num_batched_tokens=budget)
    alive: dict[int, Sequence] = {}
    flights: list[dict[str, list[Scheduled]]] = []
    count = 0

    def take(flight: dict[str, list[Scheduled]]) -> None:
        for share in flight.values():
            for s in share:
                q = s.sequence
                if q.finished:
                    continue
                if s.samples:
                    q.token_ids.append(len(q.token_ids) % 3)
                    scheduler.token_arrived(q)
                # As the engine does: with its last token, though it was preempted while that was on its way.
                most = q.params.max_tokens
                if len(q.token_ids) - q.prompt_len >= most if most else q.wants == 0:
                    scheduler.finish(q)
                    del alive[q.id]

    def step() -> None:
        plan = scheduler.schedule()
        scheduled = [s for share in plan.values() for s in share]
        assert sum(s.num_tokens for s in scheduled) <= budget
        assert len({s.sequence.id for s in scheduled}) == len(scheduled)
        rows = [q.row for q in scheduler.running.values()]
        assert len(set(rows)) == len(rows)
        for s in scheduled:  # there is a block for every token that this step writes
            assert len(s.sequence.blocks) * BLOCK[s.sequence.variant] >= s.start + s.num_tokens
        if plan:
            flights.append(plan)
        while len(flights) > (1 if late and plan else 0):
            take(flights.pop(0))

    def check() -> None:
        blocks.check([q.blocks for q in scheduler.running.values()])
        assert all(not q.blocks for queue in scheduler.waiting.values() for q in queue)

    for op, *rest in ops:
        match op:
            case "add":
                variant, length, first, max_tokens = rest
                prompt = [first] * length  # type: ignore[list-item, operator]
                alive[count] = make_sequence(count, variant, prompt, max_tokens)  # type: ignore[arg-type]
                scheduler.add(alive[count])
                count += 1
            case "abort" if rest[0] in alive:
                scheduler.finish(alive.pop(rest[0]))  # type: ignore[call-overload]
            case "preempt" if rest[0] in scheduler.running:
                scheduler.preempt(scheduler.running[rest[0]])  # type: ignore[index]
            case "step":
                step()
        check()
    for _ in range(2000):
        if not scheduler.has_work and not flights:
            break
        step()
        check()
    assert not alive and not scheduler.has_work
    assert blocks.num_used == 0
