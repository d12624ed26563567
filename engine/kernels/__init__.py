"""The one door to fast code: a function per operation, Triton for CUDA tensors, the plain PyTorch twin for the rest.

The twins in `reference.py` are the definitions; `fused.py`, `paged_attention.py` and `matmul.py` hold the Triton
kernels and are imported when the first CUDA tensor arrives. On CUDA no function here waits for the device or reads its
values.

Letters: T tokens, H hidden, I intermediate, Hq and Hkv query and KV heads, G = Hq / Hkv, D head dimension, S rows of
the block table, B sequences, M x K activations, N x K weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from engine.kernels import reference

__all__ = [
    "PREFILL_TILE",
    "AttentionPlan",
    "add_rms_norm",
    "attention",
    "linear",
    "plan_tiles",
    "rms_norm",
    "rope_and_store",
    "silu_mul",
    "weight_only_matmul",
]

PREFILL_TILE = 64  # queries of one sequence in one entry of AttentionPlan.tiles


@dataclass(frozen=True)
class AttentionPlan:
    """Which tokens attend to what in one batch. Decode sequences (one query token each) come first.

    rows: [B] int32, row of the block table of each sequence. query_starts: [B+1] int32, first token of each sequence
    and the end. context_lens: [B] int32, tokens in the cache including this step's; 0 marks a padding sequence, whose
    output is zeros. query_lens_host, context_lens_host: [B], the same on the host; the kernels only size their grids
    by them (a captured graph may hold larger contexts than the device has). num_decodes: the first so many sequences
    have one query token. tiles: [num_tiles, 2] int32 (sequence, first query offset), `plan_tiles` of the sequences past
    num_decodes.
    """

    rows: Tensor
    query_starts: Tensor
    context_lens: Tensor
    query_lens_host: npt.NDArray[np.integer]
    context_lens_host: npt.NDArray[np.integer]
    num_decodes: int
    tiles: Tensor


def plan_tiles(query_lens_host: npt.NDArray[np.integer], num_decodes: int) -> npt.NDArray[np.int32]:
    """[num_tiles, 2] int32 (sequence, first query offset): PREFILL_TILE queries each, in order, past `num_decodes`."""
    counts = -(-query_lens_host[num_decodes:] // PREFILL_TILE)
    sequences = np.repeat(np.arange(num_decodes, len(query_lens_host)), counts)
    firsts = np.cumsum(counts) - counts
    offsets = (np.arange(len(sequences)) - np.repeat(firsts, counts)) * PREFILL_TILE
    return np.stack([sequences, offsets], axis=1).astype(np.int32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x[T, H], weight[H] -> [T, H] in x's dtype: weight * (x / rms(x) in fp32, rounded), as HF's Qwen3RMSNorm."""
    if x.is_cuda:
        from engine.kernels import fused

        return fused.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x[T, H], residual[T, H], weight[H] -> (rms_norm of the sum, the sum), the sum rounded to the dtype first."""
    if x.is_cuda:
        from engine.kernels import fused

        return fused.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up[T, 2I] (gate | up) -> silu(gate) * up [T, I]; silu in fp32, rounded to the dtype, then multiplied."""
    if gate_up.is_cuda:
        from engine.kernels import fused

        return fused.silu_mul(gate_up)
    return reference.silu_mul(gate_up)


def rope_and_store(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Normalise (if weights are given) and rotate q and k per head, write k and v to the pool, return q[T, Hq, D].

    qkv: [T, (Hq + 2 Hkv) * D]. q_norm, k_norm: [D], both or neither. cos_sin: [max_len, D] fp32, cos in the first half
    of D and sin in the second, any yarn factor folded in. positions: [T] int32. k_cache, v_cache: [num_blocks,
    block_size, Hkv, D]. slots: [T] int32, block * block_size + offset; -1 is padding and is not stored. The rotation
    pairs d with d + D/2 (HF's rotate_half), in fp32 with one rounding at the end.
    """
    if qkv.is_cuda:
        from engine.kernels import fused

        return fused.rope_and_store(qkv, q_norm, k_norm, eps, cos_sin, positions, k_cache, v_cache, slots)
    return reference.rope_and_store(qkv, q_norm, k_norm, eps, cos_sin, positions, k_cache, v_cache, slots)


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """Causal attention over the paged pool -> [T, Hq, D] in q's dtype.

    q: [T, Hq, D], this step's tokens in the plan's order; query head h reads KV head h // G. k_cache, v_cache:
    [num_blocks, block_size, Hkv, D], this step's keys and values already stored. block_tables: [S, max_blocks] int32.
    Query j of a sequence with n queries and context c sees positions 0 to c - n + j. Pool positions past a context are
    never read, nor table entries past it. Tokens past query_starts[B] are padding: their output is unspecified.
    """
    if q.is_cuda:
        from engine.kernels import paged_attention

        return paged_attention.attention(q, k_cache, v_cache, block_tables, plan, scale)
    return reference.attention(q, k_cache, v_cache, block_tables, plan, scale)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[M, K] @ weight[N, K].T + bias[N] -> [M, N], all in one dtype. On a GPU this is the library's product."""
    return reference.linear(x, weight, bias)


def weight_only_matmul(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[M, K] @ (qdata[N, K] * scale[N, 1]).T + bias[N] -> [M, N] in x's dtype.

    qdata: int8 or float8_e4m3fn. scale: fp32. The definition is the linear layer of the dequantised weight, that is
    (qdata.float() * scale) rounded to x's dtype. The kernel multiplies the stored 8-bit values, accumulates in fp32 and
    scales the sum: in 16 bits it is closer to the exact product than the twin, in fp32 they differ by rounding only.
    """
    if x.is_cuda:
        from engine.kernels import matmul

        return matmul.weight_only_matmul(x, qdata, scale, bias)
    return reference.weight_only_matmul(x, qdata, scale, bias)
