"""The least time that each piece of work can take on a machine, by arithmetic from its two rates.

A matrix product takes the longer of its bytes (weights, scales, bias) over the copy rate and its FLOPs over the product
rate of its operands' type; decode adds the keys and values that it reads over the copy rate, prefill the FLOPs of
causal attention over the product rate of the computing type. Activations, norms, launches and sampling are free here.
Every token counts in every layer, though the engine takes a prompt's tokens no further than the last layer's keys and
values unless they are sampled: of 28 layers that is 3 % of prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.benchmarks.machine import Rates, name_of
from engine.config import ModelConfig
from engine.kv_pool import kv_dtype
from engine.quant.formats import Format
from engine.quant.linear import Linear, W8A8Linear
from engine.quant.variants import Variant


@dataclass(frozen=True)
class Product:
    """One stored matrix: its bytes, FLOPs a row, and the FLOP/s of its operands' type."""

    nbytes: int
    flops: int
    rate: float


@dataclass(frozen=True)
class Limits:
    """One variant on one machine. Times in seconds."""

    linears: list[Product]  # of all layers
    head: Product
    kv_bytes: int  # of one token of context, all layers
    attention_flops: int  # of one query and one key, all layers
    attention_rate: float
    copy: float

    @staticmethod
    def of(variant: Variant, config: ModelConfig, dtype: torch.dtype, rates: Rates) -> Limits:
        model = variant.model
        linears = [m for layer in model.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        return Limits(
            linears=[product(m, dtype, rates) for m in linears],
            head=product(model.head, dtype, rates),
            kv_bytes=kv_bytes(config, variant.format, dtype),
            attention_flops=4 * config.num_heads * config.head_dim * config.num_layers,
            attention_rate=rates.products[name_of(dtype)],
            copy=rates.copy,
        )

    def seconds(self, products: Sequence[Product], rows: int) -> float:
        """Of these products of `rows` rows each, one after the other."""
        return sum(max(p.nbytes / self.copy, p.flops * rows / p.rate) for p in products)

    def decode_step(self, rows: int, context_tokens: float) -> float:
        """A token for each of `rows` sequences, `context_tokens` in all."""
        return self.seconds([*self.linears, self.head], rows) + context_tokens * self.kv_bytes / self.copy

    def prefill(self, lengths: Sequence[int]) -> float:
        """Prompts of these lengths, all at once, and one token for each."""
        pairs = sum(n * (n + 1) // 2 for n in lengths)
        attention = pairs * self.attention_flops / self.attention_rate
        return self.seconds(self.linears, sum(lengths)) + self.seconds([self.head], len(lengths)) + attention

    def generation(self, inputs: Sequence[int], outputs: Sequence[int]) -> float:
        """All prompts first, then decode of whoever is not done yet, all together."""
        total = self.prefill(inputs)
        for step in range(1, max(outputs)):
            contexts = [i + step for i, o in zip(inputs, outputs, strict=True) if o > step]
            total += self.decode_step(len(contexts), sum(contexts))
        return total


def product(linear: Linear, dtype: torch.dtype, rates: Rates) -> Product:
    width, depth = linear.tensors[0].shape
    operands = linear.tensors[0].dtype if isinstance(linear, W8A8Linear) else dtype
    # Where 8-bit operands have no rate of their own, they are multiplied in the computing type.
    rate = rates.products.get(name_of(operands), rates.products[name_of(dtype)])
    return Product(sum(t.nbytes for t in linear.tensors), 2 * width * depth, rate)


def kv_bytes(config: ModelConfig, fmt: Format, dtype: torch.dtype) -> int:
    """Keys and values of one token over all layers, with the scale of each head where they are in 8 bits."""
    head = config.head_dim * dtype.itemsize if fmt.kv is None else config.head_dim * kv_dtype(fmt.kv).itemsize + 4
    return 2 * config.num_layers * config.num_kv_heads * head
