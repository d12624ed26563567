"""The KV cache of all variants: one pool of bytes in blocks of fixed size, seen by each variant in its own KV dtype.

A block is as many bytes as `block_size` tokens take in the computing dtype; an 8-bit cache has two tokens where bf16
has one (four where a CPU computes in fp32). Any block may serve any variant, one at a time. The scales of 8-bit caches
lie in a side tensor by block; it exists only where a loaded variant has such a cache, and int8 and e4m3 share it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engine.config import ModelConfig
from engine.kernels import KVCache


def tokens_per_block(block_size: int, dtype: torch.dtype, kv: str | None) -> int:
    """Tokens of a variant in one block. dtype: the computing one. kv: `Format.kv`."""
    return block_size if kv is None else block_size * dtype.itemsize // kv_dtype(kv).itemsize


def kv_dtype(kv: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, kv)
    return dtype


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype, kvs: Iterable[str | None]) -> int:
    """Bytes of one block over all layers, keys and values, with scales where one of `kvs` needs them."""
    heads = 2 * config.num_layers * config.num_kv_heads
    scales = max((tokens_per_block(block_size, dtype, kv) for kv in kvs if kv is not None), default=0)
    return heads * (block_size * config.head_dim * dtype.itemsize + scales * torch.float32.itemsize)


class KVPool:
    """The tensors of a pool of `num_blocks` blocks for variants with the KV formats `kvs`."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        kvs: Iterable[str | None],
        device: torch.device,
    ) -> None:
        self.config, self.block_size, self.dtype = config, block_size, dtype
        c = config
        width = block_size * c.num_kv_heads * c.head_dim * dtype.itemsize
        self.data = torch.zeros(c.num_layers, 2, num_blocks, width, dtype=torch.uint8, device=device)
        self.scales: torch.Tensor | None = None  # [num_layers, 2, num_blocks, Hkv, tokens] fp32
        eight_bit = [kv for kv in kvs if kv is not None]
        if eight_bit:
            shape = (c.num_layers, 2, num_blocks, c.num_kv_heads, tokens_per_block(block_size, dtype, eight_bit[0]))
            self.scales = torch.zeros(shape, dtype=torch.float32, device=device)

    def caches(self, kv: str | None) -> list[KVCache]:
        """The cache of each layer for variants with the KV format `kv`, one of those the pool was made for."""
        c = self.config
        dtype = self.dtype if kv is None else kv_dtype(kv)
        shape = (-1, tokens_per_block(self.block_size, self.dtype, kv), c.num_kv_heads, c.head_dim)
        caches = []
        for layer in range(c.num_layers):
            k, v = (half.view(dtype).view(shape) for half in self.data[layer])
            if kv is None:
                caches.append(KVCache(k, v))
            else:
                assert self.scales is not None, "the pool was made without scales"
                caches.append(KVCache(k, v, *self.scales[layer]))
        return caches
