"""The best ids of each row and the logarithm of its sum of exponentials, from one pass over the logits.

A first kernel reads the logits once: of each slice the sum, of each group of 64 ids the largest. The k largest values
of a row lie in the k groups whose largest are largest (were one of them elsewhere, k groups would each hold a value at
least as large). So a second kernel, one program a row, picks those groups, reads them again, and picks among their ids.
`sample.py` has both steps in its own kernels.

Picking does not sort: it bisects the values, as integers that compare alike, for the k-th largest, 16 counts for bf16,
and writes what is chosen side by side. (Triton's sort of 4,096 values for the best 64 takes 50 us, most of it exchanges
between threads.) The few that are left are ranked by comparing each with each.

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
FEW = 32  # up to so many are found one after the other
_WIDTHS = (32, LARGEST_TOP_K)  # how many are selected: few versions of the kernel


@triton.jit
def ordered(x, SHIFT: tl.constexpr):
    """fp32 -> int32 that compare alike. SHIFT: low bits that are the same in all values, 16 for bf16."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _choose(key, found, TOP: tl.constexpr):
    """The indices of the TOP largest of key[N] int32, of equal ones the first, in their order. found: TOP int32
    of memory.
    """
    # Cut in TOP parts, there are TOP values that are no less than the least of the parts' largest.
    largest = tl.max(tl.reshape(key, (TOP, key.shape[0] // TOP)), axis=1)
    low, high = tl.min(largest, axis=0), tl.max(largest, axis=0)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up
        if tl.sum((key >= middle).to(tl.int32), axis=0) >= TOP:
            low = middle
        else:
            high = middle - 1
    # above the TOP-th largest, and equal to it, counted in one scan
    larger, ties = (key > low).to(tl.int32), (key == low).to(tl.int32)
    num_ties = TOP - tl.sum(larger, axis=0)
    counts = tl.cumsum(larger + (ties << 16), axis=0)
    chosen = (larger > 0) | ((ties > 0) & ((counts >> 16) <= num_ties))
    place = (counts & 0xFFFF) + tl.minimum(counts >> 16, num_ties) - 1
    tl.debug_barrier()  # what was there before has been read
    tl.store(found + place, tl.arange(0, key.shape[0]), mask=chosen)
    tl.debug_barrier()
    return tl.load(found + tl.arange(0, TOP))


@triton.jit
def best_ids(logits, peaks, found, num_ids, TOP: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr):
    """Of one row, given its groups' largest values as fp32, -inf for groups that it lacks: the TOP largest logits as
    fp32 and their ids, in the order of ids; of equal ones the first. -inf where there are fewer. found: TOP int32 of
    memory.
    """
    groups = _choose(ordered(peaks, SHIFT), found, TOP)
    ids = tl.reshape(groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (TOP * GROUP,))
    logit = tl.load(logits + ids, mask=ids < num_ids, other=float("-inf")).to(tl.float32)
    place = _choose(ordered(logit, SHIFT), found, TOP)
    own = tl.where((place // GROUP)[:, None] == tl.arange(0, TOP)[None, :], groups[None, :], 0)
    ids = tl.sum(own, axis=1) * GROUP + place % GROUP
    return tl.load(logits + ids, mask=ids < num_ids, other=float("-inf")).to(tl.float32), ids


@triton.jit
def each_best(
    logits,
    peaks,
    k,
    log_sum,
    ids_out,
    logprobs_out,
    num_ids,
    num_groups,
    FEW: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Stores ids and logprobs (the bits of an fp32) of the k <= FEW best of one row, falling, of equal ones the first.
    peaks: its groups' largest values as fp32. One search for each, first of the groups, then of their ids: for 5 a
    third of what `best_ids` takes.
    """
    none: tl.constexpr = -0x80000000
    group, place = tl.arange(0, peaks.shape[0]), tl.arange(0, FEW)
    key, groups = tl.where(group < num_groups, ordered(peaks, 0), none), tl.zeros((FEW,), tl.int32) + num_groups
    if SHIFT == 16:  # a value and its place, below 2^16, in one number: half the exchanges
        key = (key & -0x10000) | (0xFFFF - group)
        for i in range(k):
            top = tl.max(key, axis=0)
            groups = tl.where(place == i, 0xFFFF - (top & 0xFFFF), groups)
            key = tl.where(key == top, none, key)
    else:
        for i in range(k):
            top = tl.max(key, axis=0)
            index = tl.min(tl.where(key == top, group, 0x7FFFFFFF), axis=0)
            groups = tl.where(place == i, index, groups)
            key = tl.where(group == index, none, key)
    ids = tl.reshape(groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (FEW * GROUP,))
    logit = tl.load(logits + ids, mask=ids < num_ids, other=0.0).to(tl.float32)
    key = tl.where(ids < num_ids, ordered(logit, 0), none)
    for i in range(k):
        top = tl.max(key, axis=0)
        token = tl.minimum(tl.min(tl.where(key == top, ids, 0x7FFFFFFF), axis=0), num_ids - 1)
        key = tl.where(ids == token, none, key)
        tl.store(ids_out + i, token)
        value = (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(logprobs_out + i, (value - log_sum).to(tl.int32, bitcast=True))


@triton.jit
def precedes(value):
    """[TOP, TOP]: whether value i stands before value j when they fall; equal ones stand in their order."""
    place = tl.arange(0, value.shape[0])
    tie = (value[:, None] == value[None, :]) & (place[:, None] < place[None, :])
    return (value[:, None] > value[None, :]) | tie


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
def joined_sum(sums):
    """The `slice_sum` of one row's slices, joined; -inf for those that it lacks."""
    peak = tl.max(sums, axis=0)
    return peak + tl.log(tl.sum(tl.exp(sums - peak), axis=0))


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
    found,
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
    part = tl.arange(0, MAX_PARTS)
    sum_ = tl.load(sums + row * num_parts + part, mask=part < num_parts, other=float("-inf"))
    tl.store(log_sums + row, joined_sum(sum_))
    if TOP > 0:
        own, group = logits + row * stride, tl.arange(0, MAX_GROUPS)
        peak = tl.load(peaks + row * num_groups + group, mask=group < num_groups, other=float("-inf"))
        value, ids = best_ids(own, peak, found + row * TOP, num_ids, TOP, GROUP, SHIFT)
        rank = tl.sum(precedes(value).to(tl.int32), axis=0)
        tl.store(values + row * k + rank, value, mask=rank < k)
        tl.store(best + row * k + rank, ids.to(tl.int64), mask=rank < k)


def survey(logits: Tensor, k: int, num_ids: int) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and 0 <= k <= min(num_ids, LARGEST_TOP_K) and num_ids <= vocab_size
    top = next(w for w in _WIDTHS if k <= w) if k else 0
    parts, groups = triton.cdiv(vocab_size, SLICE), triton.cdiv(num_ids, GROUP)
    shapes = ((num_rows, parts), (num_rows, groups), (num_rows,), (num_rows, k))
    sums, peaks, log_sums, values = (logits.new_empty(shape, dtype=torch.float32) for shape in shapes)
    best, found = (logits.new_empty(num_rows, n, dtype=dtype) for n, dtype in ((k, torch.int64), (top, torch.int32)))
    survey_kernel[(num_rows, parts)](
        *(logits, sums, peaks, vocab_size, num_ids, groups, logits.stride(0)),
        TOP=top > 0,
        SLICE=SLICE,
        GROUP=GROUP,
        num_warps=8,
    )
    pick_kernel[(num_rows,)](
        *(logits, sums, peaks, log_sums, found, values, best, num_ids, groups, parts, k, logits.stride(0)),
        TOP=top,
        GROUP=GROUP,
        MAX_GROUPS=max(top, triton.next_power_of_2(groups)),
        MAX_PARTS=triton.next_power_of_2(parts),
        SHIFT=same_bits(logits.dtype),
        num_warps=8,
    )
    return log_sums, values, best


def same_bits(dtype: torch.dtype) -> int:
    """Low bits that are alike in all values of `dtype` as fp32 (of one sign)."""
    return {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)
