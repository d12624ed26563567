"""The best ids of each row and the logarithm of its sum of exponentials, from one pass over the logits.

A first kernel reads the logits once: of each slice the sum, of each group of 64 ids the largest. The k largest values
of a row lie in the k groups whose largest are largest (were one of them elsewhere, k groups would each hold a value at
least as large). So a second kernel, one program a row, picks those groups, reads them again, and picks among their ids.
`sample.py` has both steps in its own kernels.

Picking is a sort of integers that compare as (value, smaller index first). Of 16-bit logits and indices below 4,096
they have 32 bits, which takes half of the exchanges between threads.

Floor: B * V * itemsize bytes, 78 MB and 18 us for 256 rows of 151,936 in bf16 on an H200.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import LARGEST_TOP_K

SLICE = 4096  # ids of one program
GROUP = 64
_WIDTHS = (32, LARGEST_TOP_K)  # how many are selected: few versions of the kernel


@triton.jit
def ordered(x, SHIFT: tl.constexpr):
    """fp32 -> int32 that compare alike. SHIFT: low bits that are the same in all values, 16 for bf16."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def unordered(key, SHIFT: tl.constexpr):
    """The fp32 that `ordered` made this of."""
    key = key << SHIFT
    if SHIFT > 0:
        key += tl.where(key < 0, (1 << SHIFT) - 1, 0)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _largest(value, index, TOP: tl.constexpr, SHIFT: tl.constexpr):
    """The TOP largest of value[N], falling, as keys of `ordered`, and their indices; of equal ones the first."""
    key = ordered(value, SHIFT)
    if SHIFT >= 13:
        packed = tl.topk((key << 12) | (4095 - index), TOP)
        return packed >> 12, 4095 - (packed & 4095)
    else:
        packed = tl.topk((key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64), TOP)
        return (packed >> 32).to(tl.int32), 0x7FFFFFFF - (packed & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def best_ids(
    logits,
    group_peaks,
    num_ids,
    num_groups,
    TOP: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Of one row, given its groups' largest values: the TOP largest logits, falling, as fp32, and their ids, of equal
    ones the first. -inf where there are fewer.
    """
    group = tl.arange(0, MAX_GROUPS)
    value = tl.load(group_peaks + group, mask=group < num_groups, other=float("-inf"))
    _, chosen = _largest(value, group, TOP, SHIFT)
    chosen = tl.sort(chosen)  # so that places among the candidates have the order of ids
    ids = tl.reshape(chosen[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (TOP * GROUP,))
    logit = tl.load(logits + ids, mask=ids < num_ids, other=float("-inf")).to(tl.float32)
    key, place = _largest(logit, tl.arange(0, TOP * GROUP), TOP, SHIFT)
    own = tl.where((place // GROUP)[:, None] == tl.arange(0, TOP)[None, :], chosen[None, :], 0)
    return unordered(key, SHIFT), tl.sum(own, axis=1) * GROUP + place % GROUP


@triton.jit
def load_slice(logits, ids, start, end, SLICE: tl.constexpr):
    """Logits of ids from `start` on as fp32, -inf from `end` on. Only the last slice has a mask: with one, each element
    is a load of its own.
    """
    if start + SLICE <= end:
        logit = tl.load(logits + ids)
    else:
        logit = tl.load(logits + ids, mask=ids < end, other=float("-inf"))
    return logit.to(tl.float32)


@triton.jit
def slice_sum(logit):
    """Of logit[groups, GROUP] the log of the sum of exponentials; -inf of nothing."""
    peak = tl.max(tl.max(logit, axis=1), axis=0)
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    return finite + tl.log(tl.sum(tl.sum(tl.exp(logit - finite), axis=1), axis=0))


@triton.jit
def joined_sum(sums, num_parts, MAX_PARTS: tl.constexpr):
    """The slices' `slice_sum` of one row, joined."""
    part = tl.arange(0, MAX_PARTS)
    sum_ = tl.load(sums + part, mask=part < num_parts, other=float("-inf"))
    peak = tl.max(sum_, axis=0)
    return peak + tl.log(tl.sum(tl.exp(sum_ - peak), axis=0))


@triton.jit(do_not_specialize=["num_ids", "num_groups"])
def survey_kernel(
    logits,
    sums,
    peaks,
    vocab_size,
    num_ids,
    num_groups,
    stride,
    TOP: tl.constexpr,
    SLICE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """sums[B, parts]: log of the sum of exponentials of each slice; peaks[B, num_groups]: the largest of each group."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    group = part * (SLICE // GROUP) + tl.arange(0, SLICE // GROUP)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logit = load_slice(logits + row * stride, ids, part * SLICE, vocab_size, SLICE)
    tl.store(sums + row * tl.num_programs(1) + part, slice_sum(logit))
    if TOP:
        known = tl.where(ids < num_ids, logit, float("-inf"))
        tl.store(peaks + row * num_groups + group, tl.max(known, axis=1), mask=group < num_groups)


@triton.jit(do_not_specialize=["num_ids", "num_groups", "num_parts", "k"])
def pick_kernel(
    logits,
    sums,
    peaks,
    log_sums,
    values,
    best,
    num_ids,
    num_groups,
    num_parts,
    k,
    stride,
    TOP: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """log_sums[B]; TOP > 0: the k <= TOP largest values[B, k] fp32, falling, and their ids best[B, k] int64."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(log_sums + row, joined_sum(sums + row * num_parts, num_parts, MAX_PARTS))
    if TOP > 0:
        own, peaks = logits + row * stride, peaks + row * num_groups
        value, ids = best_ids(own, peaks, num_ids, num_groups, TOP, GROUP, MAX_GROUPS, SHIFT)
        place = tl.arange(0, TOP)
        tl.store(values + row * k + place, value, mask=place < k)
        tl.store(best + row * k + place, ids.to(tl.int64), mask=place < k)


def survey(logits: Tensor, k: int, num_ids: int) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and 0 <= k <= min(num_ids, LARGEST_TOP_K) and num_ids <= vocab_size
    top = next(w for w in _WIDTHS if k <= w) if k else 0
    parts, groups = triton.cdiv(vocab_size, SLICE), triton.cdiv(num_ids, GROUP)
    shapes = ((num_rows, parts), (num_rows, groups), (num_rows,), (num_rows, k))
    sums, peaks, log_sums, values = (logits.new_empty(shape, dtype=torch.float32) for shape in shapes)
    best = logits.new_empty(num_rows, k, dtype=torch.int64)
    survey_kernel[(num_rows, parts)](
        *(logits, sums, peaks, vocab_size, num_ids, groups, logits.stride(0)),
        TOP=top > 0,
        SLICE=SLICE,
        GROUP=GROUP,
        num_warps=8,
    )
    pick_kernel[(num_rows,)](
        *(logits, sums, peaks, log_sums, values, best, num_ids, groups, parts, k, logits.stride(0)),
        TOP=top,
        GROUP=GROUP,
        MAX_GROUPS=max(top, triton.next_power_of_2(groups)),
        MAX_PARTS=triton.next_power_of_2(parts),
        SHIFT=key_shift(logits.dtype, groups),
        num_warps=8,
    )
    return log_sums, values, best


def key_shift(dtype: torch.dtype, num_groups: int) -> int:
    """SHIFT of `best_ids`: the low bits that are alike in all values of `dtype` as fp32 (of one sign), if keys without
    them and the groups' indices fit 32 bits; or 0.
    """
    return {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0) if num_groups <= 4096 else 0
