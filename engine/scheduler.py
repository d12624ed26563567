"""Which sequences compute how many tokens in the next step. No torch here.

One rule: a sequence wants `num_tokens - num_computed` tokens, and a token budget and the KV pool decide how many it
gets. Prefill, chunks of it, prefix hits, decode and resumed sequences are that one subtraction. Within a step:

1. Running sequences that want one token (decode) come first, oldest first. Who needs a block when none is free preempts
   the newest running sequence, which gives up its blocks and later computes again from its known tokens.
2. What is left of the budget, or less beside decode so that streams do not stall, goes to prefill, variant by variant,
   the first variant rotating from step to step: running sequences in the middle of their prompt, then waiting ones in
   order of arrival.

A sequence is admitted only when the pool has room for all its known tokens, and takes these blocks at once; so a
prompt, once begun, never runs out of blocks. A waiting sequence whose next prefix block is being computed by another
waits for it rather than computing it again; it may go on in the very step that computes the block, but not where a
single token completes it: a batch of single tokens stores and attends in one launch (`kernels.rope_and_attend`).
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from engine.block_manager import BlockManager, hash_block
from engine.sequence import Sequence


@dataclass(slots=True)
class Scheduled:
    """One sequence's share of a step: `num_tokens` tokens from position `start`; `samples` when they reach its end."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(slots=True)
class Counters:
    """Running totals of one variant."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class Scheduler:
    """Waiting and running sequences of every variant over one pool of blocks.

    block_sizes: tokens in a block, by variant.
    After each `schedule`, `admitted` and `new_blocks` hold what the device's tables must learn before the step.
    """

    def __init__(
        self,
        blocks: BlockManager,
        block_sizes: dict[str, int],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_beside_decode: int = 2048,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "every running sequence must be able to decode in one step"
        self.blocks = blocks
        self.block_sizes = dict(block_sizes)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_beside_decode = max_prefill_beside_decode
        self.waiting: dict[str, deque[Sequence]] = {v: deque() for v in block_sizes}
        self.running: dict[int, Sequence] = {}  # by id, oldest first
        self.counters = {v: Counters() for v in block_sizes}
        self._waits_for = dict.fromkeys(block_sizes, "budget")
        self.admitted: list[Sequence] = []
        self.new_blocks: list[tuple[int, int, int]] = []  # (row, index in the table, block)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._turn = 0
        self._completed: list[int] = []  # blocks that single tokens of the step being built complete

    @property
    def has_work(self) -> bool:
        return bool(self.running) or any(self.waiting.values())

    def add_variant(self, name: str, block_size: int) -> None:
        """Take sequences of one more variant."""
        self.counters[name] = Counters()
        self.block_sizes[name] = block_size
        self._waits_for[name] = "budget"
        self.waiting[name] = deque()

    def remove_variant(self, name: str) -> None:
        """Forget a variant that has no sequences left."""
        assert not self.waiting[name] and all(s.variant != name for s in self.running.values())
        del self.waiting[name], self.block_sizes[name], self.counters[name], self._waits_for[name]

    def waits(self, variant: str) -> dict[str, int]:
        """How many sequences wait for what stopped the queue in the last step (`messages.WAIT_REASONS`)."""
        return {self._waits_for.get(variant, "budget"): len(self.waiting.get(variant, ()))}

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller has checked that it fits the model's context, hence the pool."""
        self.waiting[sequence.variant].append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its blocks are free at once (the device works in order)."""
        if sequence.finished:
            return
        sequence.finished = True
        if sequence.row >= 0:
            self._release(sequence)
        else:
            self.waiting[sequence.variant].remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take back a running sequence's blocks; it goes to the head of its queue and computes again later."""
        self._release(sequence)
        sequence.num_computed = 0
        self.waiting[sequence.variant].appendleft(sequence)
        self.counters[sequence.variant].preemptions += 1

    def schedule(self) -> dict[str, list[Scheduled]]:
        """The next step: by variant, decode first. Empty when nobody can go on."""
        self.admitted.clear()
        self.new_blocks.clear()
        step: dict[str, list[Scheduled]] = {}
        num_decodes = self._schedule_decode(step)
        budget = self.max_num_batched_tokens - num_decodes
        if num_decodes:
            budget = min(budget, self.max_prefill_beside_decode)
        names = list(self.waiting)
        before = budget
        for name in names[self._turn :] + names[: self._turn]:
            budget = self._schedule_prefill(name, step, budget)
        if budget < before:
            self._turn = (self._turn + 1) % len(names)
        while self._completed:
            self.blocks.mark_computed(self._completed.pop())
        return step

    def token_arrived(self, sequence: Sequence) -> None:
        """The host has learnt one more token: a block that is full of known, computed tokens gets its hash."""
        if not sequence.cache_seed:
            return
        full, block_size = len(sequence.hashes), self.block_sizes[sequence.variant]
        end = (full + 1) * block_size
        if len(sequence.token_ids) < end or sequence.num_computed < end or len(sequence.blocks) <= full:
            return
        parent = sequence.hashes[-1] if full else sequence.cache_seed
        sequence.hashes.append(hash_block(parent, sequence.token_ids[end - block_size : end]))
        self.blocks.register(sequence.blocks[full], sequence.hashes[-1], pending=False)

    # ------------------------------------------------------------------------------------------------------------------

    def _schedule_decode(self, step: dict[str, list[Scheduled]]) -> int:
        used = 0
        for sequence in list(self.running.values()):
            if sequence.row < 0 or sequence.wants != 1:  # row < 0: preempted a moment ago
                continue
            held = len(sequence.blocks) * self.block_sizes[sequence.variant]
            if sequence.num_computed == held and not self._grow(sequence):
                continue
            self._schedule(step, sequence, 1)
            used += 1
        return used

    def _grow(self, sequence: Sequence) -> bool:
        """One more block for a running sequence, preempting the newest while none is free; False: that was itself."""
        while not self.blocks.num_free:
            newest = next(reversed(self.running.values()))
            self.preempt(newest)
            if newest is sequence:
                return False
        block = self.blocks.allocate()
        self.new_blocks.append((sequence.row, len(sequence.blocks), block))
        sequence.blocks.append(block)
        return True

    def _schedule_prefill(self, variant: str, step: dict[str, list[Scheduled]], budget: int) -> int:
        for sequence in self.running.values():
            if not budget:
                break
            if sequence.variant == variant and sequence.wants > 1:
                budget -= self._schedule(step, sequence, min(budget, sequence.wants))
        queue = self.waiting[variant]
        held: list[Sequence] = []  # waiting for a prefix that another computes, or for their last token to arrive
        while queue and budget and self._free_rows:
            sequence = queue[0]
            hits = self._find_prefix(sequence)
            if hits is None or sequence.in_flight:
                held.append(queue.popleft())
                continue
            if not self._admit(sequence, hits):
                break
            queue.popleft()
            if sequence.wants:
                budget -= self._schedule(step, sequence, min(budget, sequence.wants))
        queue.extendleft(reversed(held))
        self._waits_for[variant] = "rows" if not self._free_rows else "blocks" if queue and budget else "budget"
        return budget

    def _schedule(self, step: dict[str, list[Scheduled]], sequence: Sequence, num_tokens: int) -> int:
        start = sequence.num_computed
        end = start + num_tokens
        samples = end == sequence.num_tokens and sequence.params.max_tokens > 0
        step.setdefault(sequence.variant, []).append(Scheduled(sequence, start, num_tokens, samples))
        sequence.num_computed = end
        if samples:
            sequence.num_tokens += 1
        block_size = self.block_sizes[sequence.variant]
        first, last = start // block_size, end // block_size
        if first == last:
            return num_tokens
        if num_tokens == 1:
            self._completed.append(sequence.blocks[first])
            return num_tokens
        for block in sequence.blocks[first:last]:
            self.blocks.mark_computed(block)
        return num_tokens

    def _find_prefix(self, sequence: Sequence) -> list[int] | None:
        """Blocks of the longest computed prefix; None when the next one is being computed by another sequence.

        At least one token is left to compute, and every position whose prompt logprob is still owed.
        """
        if not sequence.cache_seed:
            return []
        limit = sequence.num_tokens - 1
        if sequence.next_prompt_logprob < sequence.prompt_len:
            limit = min(limit, sequence.next_prompt_logprob - 1)
        hits: list[int] = []
        for block_hash in sequence.hashes[: limit // self.block_sizes[sequence.variant]]:
            found = self.blocks.find(block_hash)
            if found is None:
                break
            if found[1]:
                return None
            hits.append(found[0])
        return hits

    def _admit(self, sequence: Sequence, hits: list[int]) -> bool:
        """Give a waiting sequence a row and blocks for all its known tokens; False when the pool has no room."""
        block_size = self.block_sizes[sequence.variant]
        total = -(-sequence.num_tokens // block_size)
        free_hits = sum(self.blocks.is_free(b) for b in hits)
        if total - len(hits) > self.blocks.num_free - free_hits:
            return False
        for block in hits:
            self.blocks.share(block)
        sequence.blocks = hits + [self.blocks.allocate() for _ in range(total - len(hits))]
        for block, block_hash in list(zip(sequence.blocks, sequence.hashes, strict=False))[len(hits) :]:
            self.blocks.register(block, block_hash, pending=True)
        sequence.row = self._free_rows.pop()
        sequence.num_computed = len(hits) * block_size
        counters = self.counters[sequence.variant]
        if sequence.first_scheduled is None:
            sequence.first_scheduled = time.monotonic()
            sequence.num_cached_tokens = sequence.num_computed
            if sequence.cache_seed:
                counters.prefix_queries += sequence.prompt_len
                counters.prefix_hits += sequence.num_computed
        self.running[sequence.id] = sequence
        self.admitted.append(sequence)
        self.new_blocks.extend((sequence.row, i, b) for i, b in enumerate(sequence.blocks))
        return True

    def _release(self, sequence: Sequence) -> None:
        del self.running[sequence.id]
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        self._free_rows.append(sequence.row)
        sequence.row = -1
