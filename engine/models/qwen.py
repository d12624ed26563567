"""The forward pass of Qwen2, Qwen2.5 and Qwen3 (dense), top to bottom.

Family differences are fields of `ModelConfig`: a bias on q, k and v (Qwen2) or RMSNorm on each head of q and k (Qwen3),
a tied head or not. The model never hears of variants: it is given its matrices.

Letters: T tokens of the batch, R of them wanted, H hidden, I intermediate, Hq and Hkv query and KV heads, D head
dimension, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine import kernels
from engine.config import ModelConfig
from engine.kernels import AttentionPlan, KVCache, Quantised
from engine.quant.linear import Linear, add_rms_norm


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights. Norms are shared by all variants; the four matrices are the variant's."""

    input_norm: Tensor  # [H]
    qkv: Linear  # H -> (Hq + 2 Hkv) * D
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    out: Linear  # Hq * D -> H
    post_norm: Tensor  # [H]
    gate_up: Linear  # H -> 2 I
    down: Linear  # I -> H


@dataclass(frozen=True)
class Wanted:
    """The tokens of a batch whose hidden states are used. In the last layer the others only leave keys and values.

    index: [R] int32, of the batch's tokens, in any order. plan: attention of these alone, in this order, where each is
    the last of its sequence; None where some are not.
    """

    index: Tensor
    plan: AttentionPlan | None


@dataclass(frozen=True)
class Batch:
    """One variant's share of a step, as the forward needs it."""

    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int32: block * block_size + offset
    block_tables: Tensor  # [S, max_blocks] int32
    plan: AttentionPlan
    wanted: Wanted | None = None  # None: all tokens, in their order


@dataclass(frozen=True)
class Qwen:
    """One variant's model tree."""

    config: ModelConfig
    embedding: Tensor  # [V, H]
    layers: list[Layer]
    norm: Tensor  # [H]
    head: Linear  # H -> V
    rotary: Tensor  # [max_len, D] float32

    def forward(self, batch: Batch, kv: list[KVCache]) -> Tensor:
        """Hidden states after the last norm of the tokens that are wanted, [R, H]; R = T where all are.

        kv: the cache of each layer, written.
        """
        c = self.config
        scale = c.head_dim**-0.5
        residual = torch.nn.functional.embedding(batch.token_ids, self.embedding)  # [T, H]
        down: tuple[Linear, Tensor | Quantised] | None = None  # the layer before's, and what it takes [T, I]
        for layer, cache in zip(self.layers, kv, strict=True):
            x: Tensor | Quantised
            if down is None:
                x = kernels.rms_norm(residual, layer.input_norm, c.rms_norm_eps, layer.qkv.takes(residual))
            else:
                x, residual = add_rms_norm(*down, residual, layer.input_norm, c.rms_norm_eps, layer.qkv.takes(residual))
            qkv = layer.qkv(x)
            del down, x  # each as soon as it is used: what comes next takes its place, which is in L2
            new = (layer.q_norm, layer.k_norm, c.rms_norm_eps, self.rotary, batch.positions, cache, batch.slots)
            wanted = batch.wanted if layer is self.layers[-1] else None
            if wanted is None:
                attended = kernels.rope_and_attend(qkv, *new, batch.block_tables, batch.plan, scale)  # [T, Hq, D]
            else:  # from here on T is R
                q, residual = kernels.rope_and_store(qkv, *new), residual.index_select(0, wanted.index)
                if not len(residual):
                    return residual
                if wanted.plan is None:
                    attended = kernels.attention(q, cache, batch.block_tables, batch.plan, scale)
                    attended = attended.index_select(0, wanted.index)
                else:
                    q = q.index_select(0, wanted.index)
                    attended = kernels.attention(q, cache, batch.block_tables, wanted.plan, scale)
            del qkv
            attended = attended.view(-1, c.num_heads * c.head_dim)
            x, residual = add_rms_norm(
                layer.out, attended, residual, layer.post_norm, c.rms_norm_eps, layer.gate_up.takes(residual)
            )
            del attended
            down = layer.down, layer.gate_up.gated(x, layer.down.takes(residual))
            del x
        assert down is not None
        hidden, _ = add_rms_norm(*down, residual, self.norm, c.rms_norm_eps)
        assert isinstance(hidden, Tensor)
        return hidden

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [N, H] -> [N, V] in the computing dtype, written to `out` where it is given."""
        return self.head(hidden, out)
