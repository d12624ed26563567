"""The KV pool's book-keeping: which block is free, referenced, or kept for its prefix. No torch here.

Every block is in exactly one of three states:

    blank    free, holds nothing of use
    cached   free, but holds a full block of known tokens under a hash; taken least recently used first
    used     referenced by one or more sequences

A prefix hash is a SHA-256 chain over blocks of token ids, seeded with the variant's fingerprint and the request's
cache salt, so that nobody can forge a hit and none crosses a variant or a salt. A hash may be registered while its
block is still *pending*: allocated, but not yet scheduled for computing. Who finds a pending block waits for it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict


def prefix_seed(fingerprint: bytes, cache_salt: str = "") -> bytes:
    """The start of a hash chain: SHA-256 of the variant's fingerprint and the request's salt."""
    return hashlib.sha256(len(fingerprint).to_bytes(4, "big") + fingerprint + cache_salt.encode()).digest()


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """SHA-256 of the parent's hash and one full block of token ids."""
    return hashlib.sha256(parent + array("i", token_ids).tobytes()).digest()


def hash_blocks(seed: bytes, token_ids: list[int], block_size: int) -> list[bytes]:
    """The chain of hashes of all full blocks of `token_ids`, in order; `seed` comes from `prefix_seed`."""
    hashes: list[bytes] = []
    parent = seed
    data = memoryview(array("i", token_ids)).cast("B")
    width = 4 * block_size
    for start in range(0, len(data) - width + 1, width):
        digest = hashlib.sha256(parent)
        digest.update(data[start : start + width])
        parent = digest.digest()
        hashes.append(parent)
    return hashes


class BlockManager:
    """Reference counts, free blocks and the prefix cache of a pool of `num_blocks` blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._by_hash: dict[bytes, int] = {}
        self._pending: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def allocate(self) -> int:
        """A block with one reference and no hash. The caller has seen that `num_free` is positive."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Take one more reference to a block that `find` returned."""
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Give back one reference of each. The last blocks of a prefix become the first to be taken again."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} released too often"
            if self._references[block] == 0:
                if block in self._pending:
                    self._forget(block)
                if self._hashes[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None

    def find(self, block_hash: bytes) -> tuple[int, bool] | None:
        """The block registered under a hash and whether it is still pending, or None."""
        block = self._by_hash.get(block_hash)
        return None if block is None else (block, block in self._pending)

    def is_free(self, block: int) -> bool:
        return self._references[block] == 0

    def register(self, block: int, block_hash: bytes, pending: bool) -> None:
        """Make a referenced block findable. Where the hash is taken already, nothing changes."""
        if block_hash in self._by_hash or self._hashes[block] is not None:
            return
        self._by_hash[block_hash] = block
        self._hashes[block] = block_hash
        if pending:
            self._pending.add(block)

    def mark_computed(self, block: int) -> None:
        """The step being built computes the whole of this block: who comes after may use it, even in that step."""
        self._pending.discard(block)

    def discard(self, blocks: list[int]) -> None:
        """Forget the hashes of blocks whose contents cannot be trusted (a step that failed)."""
        for block in blocks:
            self._forget(block)

    def clear(self) -> None:
        """Forget every cached prefix that is not in use."""
        for block in self._cached:
            self._forget(block)
            self._blank.append(block)
        self._cached.clear()

    def _forget(self, block: int) -> None:
        self._pending.discard(block)
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hashes[block] = None

    def check(self, tables: list[list[int]]) -> None:
        """Assert that the books agree with the sequences' block tables: free + cached + used = total, counts equal."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counts[block] += 1
        assert counts == self._references, "reference counts differ from the block tables"
        free = self._blank + list(self._cached)
        assert len(free) == len(set(free)), "a block is free twice"
        assert all(counts[b] == 0 for b in free), "a free block is referenced"
        assert len(free) + sum(c > 0 for c in counts) == self.num_blocks, "a block is lost"
        assert all(self._hashes[b] is None for b in self._blank), "a blank block has a hash"
        assert all(self._hashes[b] is not None for b in self._cached), "a cached block has no hash"
        assert {h: b for b, h in enumerate(self._hashes) if h is not None} == self._by_hash
