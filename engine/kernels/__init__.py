"""The one door to fast code: a function per operation, Triton for CUDA tensors, the plain PyTorch twin for the rest.

The twins in `reference.py` are the definitions; the other files hold the Triton kernels and are imported when the
first CUDA tensor arrives. On CUDA no function here waits for the device or reads its values.

Letters: T tokens, H hidden, I intermediate, Hq and Hkv query and KV heads, G = Hq / Hkv, D head dimension, S rows of
the block table, B sequences, M x K activations, N x K weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.kernels import chip, columns, reference

__all__ = [
    "LARGEST_TOP_K",
    "PREFILL_TILE",
    "AttentionPlan",
    "Codes",
    "KVCache",
    "Quantised",
    "add_rms_norm",
    "added",
    "attention",
    "decode_inputs",
    "digits_matmul",
    "draw",
    "gated",
    "gated_codes",
    "linear",
    "longest_first",
    "plan_tiles",
    "quantize_tokens",
    "rms_norm",
    "rope_and_attend",
    "rope_and_store",
    "silu_mul",
    "split_tokens",
    "survey",
    "takes_digits",
    "w8a8_matmul",
    "warm_up",
    "weight_only_matmul",
]

PROGRAMS_PER_SM = 13  # of decode attention, from which on they do not all run at once: measured on an H200
LARGEST_TOP_K = 64  # up to which the kernels rank themselves
PREFILL_TILE = 64  # queries of one sequence in one entry of AttentionPlan.tiles
WIDENED_CONTEXT = 2  # positions of 8-bit context a query, at most, that prefill widens beforehand: see `kv_widen`


@dataclass(frozen=True)
class AttentionPlan:
    """Which tokens attend to what in one batch. Decode sequences (one query token each) come first.

    rows: [B] int32, row of the block table of each sequence. query_starts: [B+1] int32, first token of each sequence
    and the end. context_lens: [B] int32, tokens in the cache including this step's; 0 marks a padding sequence, whose
    output is zeros. query_lens_host, context_lens_host: [B], the same on the host; the kernels only size their grids
    by them (a captured graph may hold larger contexts than the device has). num_decodes: the first so many sequences
    have one query token. tiles: [num_tiles, 2] int32 (sequence, first query offset), `plan_tiles` of the sequences past
    num_decodes. most_context: what the contexts of those are together at most, where that is not context_lens_host's
    sum.
    """

    rows: Tensor
    query_starts: Tensor
    context_lens: Tensor
    query_lens_host: npt.NDArray[np.int32]
    context_lens_host: npt.NDArray[np.int32]
    num_decodes: int
    tiles: Tensor
    most_context: int | None = None


@dataclass(frozen=True)
class KVCache:
    """One layer's keys and values in the pool, as one variant sees them; written in place.

    k, v: [num_blocks, block_size, Hkv, D] in the computing dtype, int8 or float8_e4m3fn. k_scale, v_scale:
    [num_blocks, Hkv, block_size] fp32, one for each token and head, for the two 8-bit dtypes only. What is stored
    stands for k.float() * k_scale, and the scale is the head's largest magnitude / 127 or / 448, so that each head of
    each token fills the range. A head of zeros is stored as zeros.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True)
class Codes:
    """What a product wants its activations in: `dtype`, int8 or float8_e4m3fn, as `quantize_tokens` gives them, or, of
    two digits, as `split_tokens` does. pre_scale: of `quantize_tokens`.
    """

    dtype: torch.dtype
    group_size: int = 0
    digits: int = 1
    pre_scale: Tensor | None = None


@dataclass(frozen=True)
class Quantised:
    """Activations in 8 bits: qdata [M * digits, K], scale [M, G] fp32, and the dtype of what is made of them."""

    qdata: Tensor
    scale: Tensor
    dtype: torch.dtype


def plan_tiles(query_lens_host: npt.NDArray[np.int32], num_decodes: int) -> npt.NDArray[np.int32]:
    """[num_tiles, 2] int32 (sequence, first query offset): PREFILL_TILE queries each, of those past num_decodes.

    Those furthest into their sequence come first: they see most and take longest, and the last to run leave no SM idle.
    """
    counts = -(-query_lens_host[num_decodes:] // PREFILL_TILE)
    sequences = np.repeat(np.arange(num_decodes, len(query_lens_host)), counts)
    firsts = np.cumsum(counts) - counts
    offsets = (np.arange(len(sequences)) - np.repeat(firsts, counts)) * PREFILL_TILE
    order = np.argsort(-offsets, kind="stable")
    return np.stack([sequences[order], offsets[order]], axis=1).astype(np.int32)


def longest_first(num_decodes: int, num_kv_heads: int, device: torch.device) -> bool:
    """Whether a batch with so many decode sequences should begin with the longest contexts: its attention then ends
    with short ones. Where all run at once, the order that chance gives spreads long ones over the SMs, and is better.
    """
    return num_decodes * num_kv_heads >= PROGRAMS_PER_SM * chip.num_sms(device)


def decode_inputs(
    rows: Tensor, contexts: Tensor, tokens: Tensor, blocks: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a decode step feeds the model: token_ids, positions, slots, [B] int32 each.

    rows: [B] int32, of the tables. contexts: [B] int32, this step's token included; 0 marks padding: slot -1. tokens:
    [S, max_len], blocks: [S, max_blocks], both int32.
    """
    if rows.is_cuda:
        from engine.kernels import inputs

        return inputs.decode_inputs(rows, contexts, tokens, blocks, block_size)
    return reference.decode_inputs(rows, contexts, tokens, blocks, block_size)


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, codes: Codes | None) -> Tensor | Quantised: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, codes: Codes | None = None) -> Tensor | Quantised:
    """x[T, H], weight[H] -> [T, H] in x's dtype: weight * (x / rms(x) in fp32, rounded), as HF's Qwen3RMSNorm.

    codes: what it is quantised to, as `quantize_tokens` does; also below.
    """
    if not x.is_cuda:
        return _quantised(reference.rms_norm(x, weight, eps), codes)
    if codes is None:
        from engine.kernels import fused

        return fused.rms_norm(x, weight, eps)
    from engine.kernels import fused_quantize

    return fused_quantize.rms_norm(x, weight, eps, codes)


@overload
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...
@overload
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, codes: Codes | None
) -> tuple[Tensor | Quantised, Tensor]: ...
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, codes: Codes | None = None
) -> tuple[Tensor | Quantised, Tensor]:
    """x[T, H], residual[T, H], weight[H] -> (rms_norm of the sum, the sum), the sum rounded to the dtype first. x can
    be a product in planes, [S, T, H] fp32 (`linear`): they are added in order, and that sum is rounded first, too.
    """
    if not x.is_cuda:
        normed, total = reference.add_rms_norm(x, residual, weight, eps)
        return _quantised(normed, codes), total
    if codes is None:
        from engine.kernels import fused

        return fused.add_rms_norm(x, residual, weight, eps)
    from engine.kernels import fused_quantize

    return fused_quantize.add_rms_norm(x, residual, weight, eps, codes)


@overload
def silu_mul(gate_up: Tensor) -> Tensor: ...
@overload
def silu_mul(gate_up: Tensor, codes: Codes | None) -> Tensor | Quantised: ...
def silu_mul(gate_up: Tensor, codes: Codes | None = None) -> Tensor | Quantised:
    """gate_up[T, 2I] (gate | up) -> silu(gate) * up [T, I]; silu in fp32, rounded to the dtype, then multiplied."""
    if not gate_up.is_cuda:
        return _quantised(reference.silu_mul(gate_up), codes)
    if codes is None:
        from engine.kernels import fused

        return fused.silu_mul(gate_up)
    from engine.kernels import fused_quantize

    return fused_quantize.silu_mul(gate_up, codes)


def _quantised(x: Tensor, codes: Codes | None) -> Tensor | Quantised:
    if codes is None:
        return x
    if codes.digits == 2:
        return Quantised(*reference.split_tokens(x, codes.dtype), x.dtype)
    return Quantised(*reference.quantize_tokens(x, codes.dtype, codes.group_size, codes.pre_scale), x.dtype)


def rope_and_store(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    cache: KVCache,
    slots: Tensor,
) -> Tensor:
    """Normalise (if weights are given) and rotate q and k per head, write k and v to the pool, return q[T, Hq, D].

    qkv: [T, (Hq + 2 Hkv) * D]. q_norm, k_norm: [D], both or neither. cos_sin: [max_len, D] fp32, cos in the first half
    of D and sin in the second, any yarn factor folded in. positions: [T] int32. slots: [T] int32, block * block_size +
    offset; -1 is padding and is not stored. The rotation pairs d with d + D/2 (HF's rotate_half), in fp32 with one
    rounding at the end; an 8-bit cache quantises what comes out of that, dividing in fp32 and rounding half to even.
    On a GPU, positions and slots must have been written before the last ordinary launch (`chip.dependent_launch`).
    """
    if qkv.is_cuda:
        from engine.kernels import rope

        return rope.rope_and_store(qkv, q_norm, k_norm, eps, cos_sin, positions, cache, slots)
    return reference.rope_and_store(qkv, q_norm, k_norm, eps, cos_sin, positions, cache, slots)


def attention(q: Tensor, cache: KVCache, block_tables: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Causal attention over the paged pool -> [T, Hq, D] in q's dtype.

    q: [T, Hq, D], this step's tokens in the plan's order; query head h reads KV head h // G. cache: this step's keys
    and values already stored. block_tables: [S, max_blocks] int32. The definition of an 8-bit cache is attention over
    what it stands for, rounded to q's dtype. The kernels follow it (`kv_widen`), or multiply the stored values, in fp16
    where q is 16 bits, and apply the scales to scores and probabilities. Query j of a sequence with n queries and
    context c sees positions 0 to c - n + j. Pool positions past a context are never read, nor table entries past it.
    Tokens past query_starts[B] are padding: their output is unspecified. On a GPU, tables and plan must have been
    written before the last ordinary launch (`chip.dependent_launch`), or waited for.
    """
    if q.is_cuda:
        from engine.kernels import paged_attention

        return paged_attention.attention(q, cache, block_tables, plan, scale)
    return reference.attention(q, cache, block_tables, plan, scale)


def rope_and_attend(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    cache: KVCache,
    slots: Tensor,
    block_tables: Tensor,
    plan: AttentionPlan,
    scale: float,
) -> Tensor:
    """`rope_and_store`, then `attention` of what it returns -> [T, Hq, D].

    Each slot is where its sequence's table has that position. A batch that only decodes (num_decodes is T, no tiles) is
    one launch on a GPU. So in such a batch no sequence may read what another stores in it; the scheduler sees to that.
    """
    rest = (positions, cache, slots, block_tables, plan, scale)
    if qkv.is_cuda:
        from engine.kernels import paged_attention

        return paged_attention.rope_and_attend(qkv, q_norm, k_norm, eps, cos_sin, *rest)
    return reference.rope_and_attend(qkv, q_norm, k_norm, eps, cos_sin, *rest)


def draw(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    floats: Tensor,
    ints: Tensor,
    tokens: Tensor,
    num_ids: int,
    filter_width: int = 0,
    nucleus: bool = False,
    top: int = -1,
) -> Tensor:
    """One id a row by Gumbel-max: the arg max of logit / temperature + noise over the ids that top-k, top-p and min-p
    keep, of the logit alone at temperature 0. It is also written to the token table.

    logits: [B, V] in any floating dtype. rows: [B] int32, of the tables. positions: [B] int32, where the new token
    stands. floats, ints: the parameter tables [S, 6] and [S, 5], see `columns`. tokens: [S, max_len] int32. Ids from
    num_ids on are never drawn and have no mass. filter_width: the largest top-k of the rows, at least 1 if any has
    min-p; nucleus: some row has top-p and no top-k. The noise is a hash of (seed, position, id).

    What is kept: `reference.filter_thresholds`, and of top-p without top-k the ids above which the mass is below top_p
    at this temperature (Holtzman et al., 2020, arXiv:1904.09751); ids that tie with the last one stay.

    Returns [B, 1] int32, the ids; or, with top >= 0, [B, 2 + 2 * top]: the id, the `top` best ids of the row, and, as
    the bits of fp32, the logprobs of all these in the model's own distribution over V. Only the row's own NUM_LOGPROBS
    of them need be there, and no logprob at all if that is -1.
    """
    tensors = (logits, rows, positions, floats, ints, tokens, num_ids)
    if not logits.is_cuda:
        return reference.draw(*tensors, filter_width, nucleus, top)
    from engine.kernels import sample

    thresholds = None
    if filter_width > LARGEST_TOP_K:
        at = rows.long()
        ordered = logits[:, :num_ids].float().topk(min(filter_width, num_ids), dim=-1).values
        thresholds = reference.filter_thresholds(ordered, floats[at], ints[at, columns.TOP_K])
    return sample.draw(*tensors, thresholds, nucleus or filter_width > 0, top)


def survey(logits: Tensor, k: int, num_ids: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits[B, V] -> log of the sum of exp over V [B], the k largest values among the first num_ids ids, falling
    [B, k], both fp32, and their ids [B, k] int64. Ties fall in any order.
    """
    if logits.is_cuda:
        from engine.kernels import ranking

        if k <= LARGEST_TOP_K:
            return ranking.survey(logits, k, num_ids)
    return reference.survey(logits, k, num_ids)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None, planes: bool = False
) -> Tensor:
    """x[M, K] @ weight[N, K].T + bias[N] -> [M, N], all in one dtype. On a GPU only the few-row products are ours.

    out: [M, N], contiguous; where it is given, the result is written there. planes: the result goes to `add_rms_norm`,
    and where the inputs are cut in S > 1 parts it may be their sums, [S, M, N] fp32, not yet added up.
    """
    if x.is_cuda:
        from engine.kernels import matmul

        return matmul.linear(x, weight, bias, out, planes)
    return _written(reference.linear(x, weight, bias), out)


def _written(product: Tensor, out: Tensor | None) -> Tensor:
    return product if out is None else out.copy_(product)


def weight_only_matmul(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    group_size: int = 0,
    out: Tensor | None = None,
    planes: bool = False,
) -> Tensor:
    """x[M, K] @ (qdata[N, K] * scale[N, G]).T + bias[N] -> [M, N] in x's dtype.

    qdata: int8 or float8_e4m3fn. scale: fp32, each of group_size inputs (the last may have fewer); 0: of all, G = 1.
    The definition is the fp32 product of the dequantised weight. The kernels multiply the stored 8-bit values,
    accumulate in fp32 and scale the sums. In 16 bits several rows are split in digits first (`split_tokens`), whose FP8
    sums are the tensor cores', and for many the weight is rounded to x's dtype. out, planes: as of `linear`, and below.
    """
    if x.is_cuda:
        from engine.kernels import matmul

        return matmul.weight_only_matmul(x, qdata, scale, bias, group_size, out, planes)
    return _written(reference.weight_only_matmul(x, qdata, scale, bias, group_size), out)


def gated(x: Tensor, weight: Tensor, scale: Tensor | None = None, group_size: int = 0) -> Tensor:
    """x[M, K], weight[2I, K] (gate | up) -> `silu_mul` of their product [M, I], which is `linear` where scale is None,
    else `weight_only_matmul`. One row is one launch on a GPU. By 16-bit weights on sm_90 up to 128 are, too, and up to
    256 where they take one turn (`tiles.one_turn`); by any weights, once they are widened, more rows that tiles fill
    well (`tiles.choose_gated`).
    """
    if x.is_cuda and x.shape[0] == 1:
        from engine.kernels import gemv

        return gemv.gemv(x, weight, scale, None, group_size, gated=True)
    if x.is_cuda:
        from engine.kernels import matmul

        product = matmul.gated(x, weight, scale, group_size)
        if product is not None:
            return product
    return silu_mul(linear(x, weight) if scale is None else weight_only_matmul(x, weight, scale, None, group_size))


def gated_codes(x: Quantised, weight: Tensor, scale: Tensor) -> Tensor | None:
    """x[M, K] in codes or digits, weight[2I, K] (gate | up), scale[2I, 1] -> `silu_mul` of their product [M, I] by one
    launch; None where there is no such one.
    """
    if not x.qdata.is_cuda:
        return None
    from engine.kernels import matmul

    return matmul.gated_codes(x.qdata, x.scale, weight, scale, x.dtype)


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compile the products that only batches of some sizes take, so that none is compiled later."""
    if device.type == "cuda":
        from engine.kernels import matmul

        matmul.warm_up(device, dtype)


def added(
    x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor | None = None, group_size: int = 0
) -> Tensor | None:
    """x[M, K], residual[M, N], weight[N, K] -> residual + their product, which is that of `linear` where scale is None,
    else of `weight_only_matmul`, in residual's memory; None where there is no such product: the norm then adds.

    There is for the many rows on a GPU that the library multiplies, which may round the product before it adds, or not.
    """
    if x.is_cuda:
        from engine.kernels import matmul

        return matmul.added(x, residual, weight, scale, group_size)
    return None


def quantize_tokens(
    x: Tensor, dtype: torch.dtype, group_size: int = 0, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x[M, K] -> its codes [M, K] in `dtype` (int8 or float8_e4m3fn), scale[M, G] fp32, each of group_size inputs (0:
    of all, G = 1). The numbers are `quant.quantize`'s, with a token as a row. pre_scale: [K] fp32, what x is multiplied
    by first; the product is not rounded, so that it is quantised as fp32 is.
    """
    if x.is_cuda:
        from engine.kernels import convert

        return convert.quantize_tokens(x, dtype, group_size, pre_scale)
    return reference.quantize_tokens(x, dtype, group_size, pre_scale)


def split_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x[M, K] in two digits of `dtype`, int8 or float8_e4m3fn -> [2M, K], scale[M, 1] fp32. Rows 2m and 2m + 1 are the
    high and low digits of row m, which is, but for rounding, scale[m] * (high + low / 254), or / 16 in fp8.

    int8: the largest magnitude is 127, so what is lost is at most 2^-16 of it. fp8: the scale is the smallest power of
    two with which nothing exceeds 448; 16-bit floats with 8 significant bits (bf16) lose nothing above 2^-14 of the
    largest, and what is lost below is at most 2^-22 of it.
    """
    if x.is_cuda:
        from engine.kernels import convert

        return convert.split_tokens(x, dtype)
    return reference.split_tokens(x, dtype)


def digits_matmul(
    x: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int = 0,
    out: Tensor | None = None,
    planes: bool = False,
) -> Tensor:
    """`weight_only_matmul` of what x[2M, K], x_scale[M, 1] of `split_tokens` stand for -> [M, N] in `dtype`."""
    if x.is_cuda:
        from engine.kernels import matmul

        return matmul.digits_matmul(x, x_scale, qdata, scale, bias, dtype, group_size, out, planes)
    return _written(reference.digits_matmul(x, x_scale, qdata, scale, bias, dtype, group_size), out)


def takes_digits(x: Tensor, stored: torch.dtype, group_size: int = 0) -> bool:
    """Whether `weight_only_matmul` splits x[M, K] in digits before it meets weights of `stored`, which whoever makes x
    may then do at once.
    """
    if x.is_cuda:
        from engine.kernels import matmul

        return matmul.takes_digits(x, stored, group_size)
    return False


def w8a8_matmul(
    x: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int = 0,
    out: Tensor | None = None,
    block_scale: Tensor | None = None,
    planes: bool = False,
) -> Tensor:
    """(x[M, K] * x_scale[M, G]) @ (qdata[N, K] * scale[N, G]).T + bias[N] -> [M, N] in `dtype`.

    x, qdata: both int8 or both float8_e4m3fn. Scales: fp32, each of group_size inputs (0: of all, G = 1). block_scale:
    [N / 128, G], if scale is that with each row repeated 128 times; None says nothing. The definition is the fp32
    product. The kernels' INT8 sums are exact before the scales; their FP8 sums are the tensor cores'.
    """
    if x.is_cuda:
        from engine.kernels import matmul

        return matmul.w8a8_matmul(x, x_scale, qdata, scale, bias, dtype, group_size, out, block_scale, planes)
    return _written(reference.w8a8_matmul(x, x_scale, qdata, scale, bias, dtype, group_size), out)
