"""Sampling one id a row, with logprobs: no order of all ids, no pass for each operation, few launches.

Gumbel-max is an arg max over logit / temperature + noise, and the noise is a hash of (seed, position, id). Its two
logarithms of full precision would be most of the work. So `scan_kernel` bounds each id's draw from above without any,
and keeps the largest bound of each group of 64 ids. `join_kernel`, one program a row, draws exactly in the group with
the largest bound, then in the next, until no bound reaches the best draw: mostly one group. Where nothing is filtered,
these two launches are all. Parameters are read from the tables, by row; the id goes to the
token table and, with logprobs, to a packed row that one copy takes to the host.

The filters keep the ids whose logit is above a pivot, and the same search, with groups whose largest logit is not above
it left out, draws among them:

    top-k     (up to TOP) the pivot lies among the TOP best ids, which `ranking.best_ids` finds; the draw is made among
              these, unless more ids tie with the last one kept
    min-p     the pivot follows from the largest logit
    top-p     an id belongs to the nucleus if the mass of the ids above it is below the limit top_p * total: a property
              of the id's logit, and the larger the logit, the truer. So: draw from all ids, then bound the mass above
              the drawn one by that of the groups whose largest logit is above it. Where that reaches the limit,
              `check_kernel` adds up the mass itself, of all rows one part after the other, and reads no more of a row
              once it must stay below. Below the limit, the draw is what drawing from the nucleus alone would give.
              Otherwise the whole nucleus lies above it: it is the pivot of the next draw. With top_p 0.95
              one row in twenty needs the second draw. (Drawing first and checking afterwards is known from
              FlashInfer's sampling kernels; here the noise is a function of the id, so that the result is the arg max
              over the nucleus.)

Rows to be checked stand in a queue; the last program of a row to end draws again if need be and puts it into the next
queue. The grid is as large as the device, whatever the queue holds: a program that finds nothing to do costs 4 ns, and
would there be one for each slice of 256 rows, 39 us a launch. What is open after `ROUNDS` is finished by one program a
row.

Floor: B * V * itemsize bytes, 78 MB and 18 us for 256 rows of 151,936 in bf16 on an H200; with top-p twice that. With
noise the hash of each id: 8 instructions, 5 of them on the half-rate integer units, and 4 for the bound, 19 us.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import LARGEST_TOP_K, chip, columns
from engine.kernels.ranking import FEW, GROUP, best_ids, each_best, joined_sum, load_slice, precedes, same_bits

SLICE = 2048  # ids that one program of the scan looks at in one turn
ROUNDS = 3  # up to 7, of checking and drawing again, before single programs finish what is open

_TURNS = 4  # of one program of the scan, where that leaves programs enough
_PROGRAMS_PER_SM = 2  # of the check: as many as have room at once, since those that come later may have less to read
_NUM_COUNTS = 8
_CHECKED = 16384  # ids that one program of the check reads at a time, so that many loads are on their way
_READERS = 4  # programs of the check that share a row, where there are not more than enough
_NEAR = tl.constexpr(0.9999)  # of the limit: what is below this is below it however sums are rounded

_TOO_LARGE = tl.constexpr(0x7FFFFFFF)

_STEP = tl.constexpr(8388608.0)  # 2^23: by so much the bits of an fp32 grow from one power of two to the next
_BOUND_SHIFT = tl.constexpr((127 + 32) * 8388608.0)  # the exponent's bias, and v counted in 2^-32

_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)

_TEMPERATURE = tl.constexpr(columns.TEMPERATURE)
_TOP_P = tl.constexpr(columns.TOP_P)
_MIN_P = tl.constexpr(columns.MIN_P)
_TOP_K = tl.constexpr(columns.TOP_K)
_SEED_LOW = tl.constexpr(columns.SEED_LOW)
_SEED_HIGH = tl.constexpr(columns.SEED_HIGH)
_NUM_LOGPROBS = tl.constexpr(columns.NUM_LOGPROBS)
_NUM_FLOATS = tl.constexpr(columns.NUM_FLOATS)
_NUM_INTS = tl.constexpr(columns.NUM_INTS)


@triton.jit
def _wishes(floats, ints, at, t, width, TOP: tl.constexpr):
    """What a row asks for, for the scan and the join alike: top-p, min-p, top-k, logprobs (-1: none); whether it draws
    among the TOP best, has a nucleus, has any filter.
    """
    top_p = tl.load(floats + at * _NUM_FLOATS + _TOP_P)
    min_p = tl.load(floats + at * _NUM_FLOATS + _MIN_P)
    top_k = tl.load(ints + at * _NUM_INTS + _TOP_K)
    num_logprobs = tl.minimum(tl.load(ints + at * _NUM_INTS + _NUM_LOGPROBS), width - 1)
    is_ranked = (t > 0) & (top_k > 0) & (top_k <= TOP)
    has_nucleus = (t > 0) & (top_k <= 0) & (top_p < 1)
    is_filtered = (t > 0) & ((top_p < 1) | (min_p > 0) | (top_k > 0))
    return top_p, min_p, top_k, num_logprobs, is_ranked, has_nucleus, is_filtered


@triton.jit
def _scramble(x):
    """`_mix` but for its last step, which small numbers pass unchanged."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    return x * 0x846CA68B


@triton.jit
def _mix(x):
    """lowbias32 on uint32; `reference.mix` is the same on int32."""
    x = _scramble(x)
    return x ^ (x >> 16)


@triton.jit
def _noise_key(ints, at, position):
    key = _mix(tl.load(ints + at * _NUM_INTS + _SEED_LOW).to(tl.uint32, bitcast=True))
    key = _mix(key ^ tl.load(ints + at * _NUM_INTS + _SEED_HIGH).to(tl.uint32, bitcast=True))
    return _mix(key + position.to(tl.uint32, bitcast=True))


@triton.jit
def _noise_bits(ids, key):
    """uint32, those of one key all different."""
    return _scramble((ids.to(tl.uint32) * 0x9E3779B1) ^ key)


@triton.jit
def _drawn(logit, ids, t, key):
    """logit / temperature - log(e), e standard exponential: -log(1 - v), v uniform in (0, 1)."""
    v = (_noise_bits(ids, key).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    rest = 1.0 - tl.minimum(v, 0.999999940395355224609375)
    lacks = tl.where(rest < 1.0, 1.0 - rest, 1.0)  # v as `rest` was rounded
    e = tl.where(rest < 1.0, -tl.log(rest) * (v / lacks), v)
    return logit / tl.maximum(t, 1e-5) - tl.log(e)


@triton.jit
def _log2(x, FAST: tl.constexpr):
    """Within 2^-22, or 2^-22 of itself. FAST: in PTX, one instruction for 28."""
    if FAST:
        asm: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def _exp2(x, FAST: tl.constexpr):
    """Denormal results may be 0. FAST: in PTX."""
    if FAST:
        asm: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def _bound(logit, ids, scale, key):
    """At most -_STEP / log(2) times `_drawn`, plus `_BOUND_SHIFT`, but for rounding. scale: -_STEP * log2(e) /
    temperature.

    -log(1 - v) is at least v, and log2(v) at least exponent and mantissa of v read as one number with a point between
    them, by up to 0.086. (Of the negative, as it is then one instruction, and the least of a group is sought.)
    """
    v = _noise_bits(ids, key).to(tl.float32)
    return logit * scale + v.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def _load_halves(own, ids, half, start, end, SLICE: tl.constexpr):
    """As `ranking.load_slice`, of ids and of those half a group further."""
    if start + SLICE <= end:
        low, high = tl.load(own + ids), tl.load(own + ids + half)
    else:
        low = tl.load(own + ids, mask=ids < end, other=float("-inf"))
        high = tl.load(own + ids + half, mask=ids + half < end, other=float("-inf"))
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _group_peaks(low, high):
    """Of each group the largest; low and high [groups, GROUP // 2] are its halves, here and below."""
    return tl.max(tl.maximum(low, high), axis=1)


@triton.jit
def _group_sums(low, high, peak, warm, FAST: tl.constexpr):
    """Of each group the sum of exp((logit - peak) / warm); peak[groups] is its largest."""
    scale = (1.0 / warm) * _LOG2_E
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    shift = finite * -scale
    rounded_by = tl.fma(finite, scale, shift)  # put right once for each group, so that an id takes one FMA
    low, high = tl.fma(low, scale, shift[:, None]), tl.fma(high, scale, shift[:, None])
    return tl.exp2(-rounded_by) * tl.sum(_exp2(low, FAST) + _exp2(high, FAST), axis=1)


@triton.jit
def _group_log_sums(low, high, peak, FAST: tl.constexpr):
    """Of each group the log of the sum of exp(logit). The product with log2(e) rounds by 2^-24 of the peak."""
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    shift = (finite * -_LOG2_E)[:, None]
    total = tl.sum(_exp2(low * _LOG2_E + shift, FAST) + _exp2(high * _LOG2_E + shift, FAST), axis=1)
    return peak + tl.where(total > 0, _LN_2 * _log2(total, FAST), 0.0)


@triton.jit
def _below(x):
    """The largest fp32 that is less than x."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    less = tl.where(bits > 0, bits - 1, tl.where(bits < 0, bits + 1, -0x7FFFFFFF))
    return tl.where(x == float("-inf"), x, less.to(tl.float32, bitcast=True))


@triton.jit
def _largest(value, index):
    """The largest of value[N] fp32, and of its places the least index."""
    top = tl.max(value, axis=0)
    return top, tl.min(tl.where(value == top, index, _TOO_LARGE), axis=0)


@triton.jit
def _search(own, bound, pivot, num_ids, t, key, GROUP: tl.constexpr, MAX_GROUPS: tl.constexpr):
    """The best draw among the ids of one row whose logit is above the pivot: its id, of equal ones the first. own: the
    row's logits. bound[MAX_GROUPS]: of the draws of its groups, -inf of those to be left out.
    """
    group = tl.arange(0, MAX_GROUPS)
    best, best_id = float("-inf"), _TOO_LARGE
    top, index = _largest(bound, group)
    # Greedy, bounds are the logits themselves. Else 1e-4 is for rounding bounds, 2^-20 for rounding the sums.
    while (top > best) | ((t > 0) & (top > float("-inf")) & (top >= best - 1e-4 - tl.abs(best) * 9.5367431640625e-07)):
        ids = index * GROUP + tl.arange(0, GROUP)
        logit = tl.load(own + ids, mask=ids < num_ids, other=float("-inf")).to(tl.float32)
        score = logit
        if t > 0:
            score = _drawn(logit, ids, t, key)
        score = tl.where(logit > pivot, score, float("-inf"))
        value, first = _largest(score, ids)
        if (value > best) | ((value == best) & (first < best_id)):
            best, best_id = value, first
        bound = tl.where(group == index, float("-inf"), bound)
        top, index = _largest(bound, group)
    return best_id


@triton.jit
def _search_above(
    own, bounds, group_peaks, pivot, num_ids, num_groups, t, key, GROUP: tl.constexpr, MAX_GROUPS: tl.constexpr
):
    """`_search`, of groups that hold ids above the pivot."""
    group = tl.arange(0, MAX_GROUPS)
    bound = tl.load(bounds + group, mask=group < num_groups, other=float("-inf"))
    peak = tl.load(group_peaks + group, mask=group < num_groups, other=float("-inf"))
    return _search(own, tl.where(peak > pivot, bound, float("-inf")), pivot, num_ids, t, key, GROUP, MAX_GROUPS)


@triton.jit
def _commit(own, row, token, at, position, tokens, tokens_stride, out, width, wants, log_sum):
    """The row's id to the token table and to `out`, with its logprob if the row wants it."""
    tl.store(tokens + at.to(tl.int64) * tokens_stride + position, token)
    tl.store(out + row * tl.maximum(2 * width, 1), token)
    if wants:
        logit = tl.load(own + token).to(tl.float32)
        tl.store(out + row * 2 * width + width, (logit - log_sum).to(tl.int32, bitcast=True))


@triton.jit
def _queue(row, pivot, pivots, queues, counts, stage, num_rows):
    """Rows stand in any order; what becomes of them does not depend on it."""
    tl.store(pivots + row, pivot)
    place = tl.atomic_add(counts + stage, 1)
    tl.store(queues + stage * num_rows + place, row.to(tl.int32))


@triton.jit
def _mass_above(own, start, num_ids, pivot, peak, scale, SLICE: tl.constexpr, FAST: tl.constexpr):
    """Of one slice, the sum of exp((logit - peak) / temperature) above the pivot. scale: log2(e) / temperature."""
    logit = load_slice(own, start + tl.arange(0, SLICE), start, num_ids, SLICE)
    return tl.sum(tl.where(logit > pivot, _exp2((logit - peak) * scale, FAST), 0.0), axis=0)


@triton.jit(
    do_not_specialize=["num_ids", "num_groups", "width", "num_slices", "turns"],
    do_not_specialize_on_alignment=["rows", "positions"],
)
def scan_kernel(
    logits,
    rows,
    positions,
    floats,
    ints,
    bounds,
    group_peaks,
    masses,
    sums,
    arrived,
    counts,
    num_ids,
    vocab_size,
    num_groups,
    width,
    num_slices,
    turns,
    stride,
    FULL: tl.constexpr,
    TOP: tl.constexpr,
    SLICE: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_COUNTS: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """bounds [B, num_groups]: of the draws of each group of a row. FULL: also, if the row's parameters ask for it, each
    group's largest logit, mass at the row's temperature (relative to that), and log of the sum of exponentials.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * stride
    at = tl.load(rows + row)
    t = tl.load(floats + at * _NUM_FLOATS + _TEMPERATURE)
    key = _noise_key(ints, at, tl.load(positions + row))
    is_ranked, has_nucleus, is_filtered, num_logprobs, warm = False, False, False, -1, tl.maximum(t, 1e-5)
    if FULL:
        _, _, _, num_logprobs, is_ranked, has_nucleus, is_filtered = _wishes(floats, ints, at, t, width, TOP)
        if tl.program_id(1) == 0:
            tl.store(arrived + row, 0)
            if row == 0:
                tl.store(counts + tl.arange(0, NUM_COUNTS), tl.zeros((NUM_COUNTS,), tl.int32))
    half: tl.constexpr = GROUP // 2  # apart, so that a thread has ids of both: four threads a group of 64 exchange less
    for part in range(tl.program_id(1) * turns, tl.minimum((tl.program_id(1) + 1) * turns, num_slices)):
        start, group = part * SLICE, part * (SLICE // GROUP) + tl.arange(0, SLICE // GROUP)
        ids = group[:, None] * GROUP + tl.arange(0, half)[None, :]
        low, high = _load_halves(own, ids, half, start, vocab_size, SLICE)
        place, exists = row * num_groups + group, group < num_groups
        if FULL:
            peak = _group_peaks(low, high)
            if num_logprobs >= 0:  # of all ids, those that are never drawn as well
                tl.store(sums + place, _group_log_sums(low, high, peak, FAST), mask=exists)
        if start + SLICE > num_ids:
            # Read again: a choice between values would be made for every id of every slice.
            low, high = _load_halves(own, ids, half, start, num_ids, SLICE)
            if FULL:
                peak = _group_peaks(low, high)
        if FULL:
            if is_filtered | (num_logprobs > 0):
                tl.store(group_peaks + place, peak, mask=exists)
            if has_nucleus:
                tl.store(masses + place, _group_sums(low, high, peak, warm, FAST), mask=exists)
        if is_ranked == 0:
            if t > 0:
                scale = (-_STEP * _LOG2_E) / warm
                least = tl.minimum(_bound(low, ids, scale, key), _bound(high, ids + half, scale, key))
                bound = (tl.min(least, axis=1) - _BOUND_SHIFT) * (-_LN_2 / _STEP)
            elif FULL:
                bound = peak
            else:
                bound = _group_peaks(low, high)
            tl.store(bounds + place, bound, mask=exists)


@triton.jit(
    do_not_specialize=["num_ids", "num_groups", "num_rows", "width"],
    do_not_specialize_on_alignment=["rows", "positions"],
)
def join_kernel(
    logits,
    rows,
    positions,
    floats,
    ints,
    thresholds,
    bounds,
    group_peaks,
    masses,
    sums,
    row_peaks,
    scales,
    limits,
    pivots,
    log_sums,
    most,
    slack,
    found,
    queues,
    counts,
    tokens,
    out,
    num_ids,
    num_groups,
    num_rows,
    width,
    stride,
    tokens_stride,
    FULL: tl.constexpr,
    WIDE: tl.constexpr,
    TOP: tl.constexpr,
    FEW: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
    PDL: tl.constexpr,
):
    """The id of each row, and its logprobs. Rows of which a nucleus must be checked stand in the first queue."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    own, first = logits + row * stride, row * num_groups
    bounds += first
    at, position = tl.load(rows + row), tl.load(positions + row)
    t, key = tl.load(floats + at * _NUM_FLOATS + _TEMPERATURE), _noise_key(ints, at, position)
    wants, log_sum, group = False, 0.0, tl.arange(0, MAX_GROUPS)
    exists = group < num_groups
    if FULL:
        wishes = _wishes(floats, ints, at, t, width, TOP)
        top_p, min_p, top_k, num_logprobs, is_ranked, has_nucleus, is_filtered = wishes
        wants = num_logprobs >= 0
        # What is known of the groups is asked for before it is needed.
        peaks = tl.load(
            group_peaks + first + group,
            mask=group < tl.where(is_filtered | (num_logprobs > 0), num_groups, 0),
            other=float("-inf"),
        )
        bound = tl.load(bounds + group, mask=group < tl.where(is_ranked, 0, num_groups), other=float("-inf"))
        sum_ = tl.load(sums + first + group, mask=group < tl.where(wants, num_groups, 0), other=float("-inf"))
        if wants:
            log_sum = joined_sum(sum_)
            tl.store(log_sums + row, log_sum)
        token, pivot, warm = _TOO_LARGE, float("-inf"), tl.maximum(t, 1e-5)
        searches = is_ranked == 0
        if (is_ranked == 0) & (num_logprobs > 0) & (num_logprobs <= FEW):
            shown = out + row * 2 * width + 1
            each_best(own, peaks, num_logprobs, log_sum, shown, shown + width, num_ids, num_groups, FEW, GROUP, SHIFT)
        elif is_ranked | (num_logprobs > 0):
            value, ids = best_ids(own, peaks, found + row * TOP, num_ids, TOP, GROUP, SHIFT)
            before = precedes(value)
            rank = tl.sum(before.to(tl.int32), axis=0)
            if num_logprobs > 0:
                shown = rank < num_logprobs
                tl.store(out + row * 2 * width + 1 + rank, ids, mask=shown)
                bits = (value - log_sum).to(tl.int32, bitcast=True)
                tl.store(out + row * 2 * width + width + 1 + rank, bits, mask=shown)
            if is_ranked:
                peak = tl.max(value, axis=0)
                share = tl.where(rank < top_k, tl.exp((value - peak) / warm), 0.0)
                share = share / tl.sum(share, axis=0)
                share_before = tl.sum(tl.where(before, share[:, None], 0.0), axis=0)
                kept = (rank == 0) | ((rank < top_k) & (share_before < top_p))
                edge = tl.min(tl.where(kept, value, float("inf")), axis=0)
                edge = tl.maximum(edge, peak + warm * tl.log(min_p))
                score = tl.where(value >= edge, _drawn(value, ids, t, key), float("-inf"))
                token = tl.min(tl.where(score == tl.max(score, axis=0), ids, _TOO_LARGE), axis=0)
                last = tl.min(value, axis=0)
                if (last >= edge) & (last > float("-inf")):
                    pivot, searches = _below(edge), True
                bound = tl.where(exists, float("inf"), bound)  # there are none: each group is looked at
        if WIDE and (t > 0) & (top_k > TOP):
            pivot = _below(tl.load(thresholds + row))
        if (t > 0) & (top_k <= 0) & (min_p > 0):
            pivot = _below(tl.max(peaks, axis=0) + warm * tl.log(min_p))
        mass = tl.load(masses + first + group, mask=group < tl.where(has_nucleus, num_groups, 0), other=0.0)
        if searches:
            if pivot > float("-inf"):
                bound = tl.where(peaks > pivot, bound, float("-inf"))
            token = _search(own, bound, pivot, num_ids, t, key, GROUP, MAX_GROUPS)
        token = tl.minimum(token, num_ids - 1)  # of logits that are no numbers, too, an id
        if has_nucleus:
            row_peak = tl.max(peaks, axis=0)
            mass *= tl.exp((peaks - row_peak) / warm)
            chosen, limit = tl.load(own + token).to(tl.float32), top_p * tl.sum(mass, axis=0)
            mass = tl.where(peaks > chosen, mass, 0.0)  # all of the groups that hold ids above it
            spare = tl.sum(mass, axis=0) - _NEAR * limit
            if spare >= 0:
                in_parts = tl.sum(tl.reshape(mass, (MAX_PARTS, MAX_GROUPS // MAX_PARTS)), axis=1)
                tl.store(most + row * MAX_PARTS + tl.arange(0, MAX_PARTS), in_parts)
                tl.store(slack + row, spare)
                tl.store(row_peaks + row, row_peak)
                tl.store(scales + row, (1.0 / warm) * _LOG2_E)
                tl.store(limits + row, limit)
                _queue(row, chosen, pivots, queues, counts, 0, num_rows)
    else:
        bound = tl.load(bounds + group, mask=exists, other=float("-inf"))
        token = tl.minimum(_search(own, bound, float("-inf"), num_ids, t, key, GROUP, MAX_GROUPS), num_ids - 1)
    _commit(own, row, token, at, position, tokens, tokens_stride, out, width, wants, log_sum)


@triton.jit(
    do_not_specialize=["num_ids", "num_groups", "num_parts", "num_rows", "width", "stage"],
    do_not_specialize_on_alignment=["rows", "positions"],
)
def check_kernel(
    logits,
    rows,
    positions,
    floats,
    ints,
    bounds,
    group_peaks,
    row_peaks,
    scales,
    limits,
    pivots,
    log_sums,
    most,
    slack,
    above,
    arrived,
    queues,
    counts,
    tokens,
    out,
    num_ids,
    num_groups,
    num_parts,
    num_rows,
    width,
    stage,
    stride,
    tokens_stride,
    SLICE: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    FAST: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    READERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """above[B, parts]: each slice's mass above the row's pivot; if all of it reaches the limit, the row gets another
    id, to be checked in the next stage. most[B, MAX_PARTS]: the most that a slice's mass can be. slack[B]: by what is
    known of a row, the most by which its mass can exceed the limit; once negative, no more of the row is read. The
    slices of a row are dealt to `readers` programs; the first of every row come before the second of any.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    count = tl.load(counts + stage)
    last = queues + stage * num_rows + count - 1  # from the end: the rows read last may still be in the cache
    readers = tl.minimum(tl.maximum(tl.num_programs(0) // tl.maximum(count, 1), READERS), num_parts)  # of a row
    for item in range(tl.program_id(0), count * readers, tl.num_programs(0)):
        row = tl.load(last - item % count).to(tl.int64)
        own, pivot = logits + row * stride, tl.load(pivots + row)
        peak, scale = tl.load(row_peaks + row), tl.load(scales + row)
        part = item // count
        bound = tl.load(most + row * MAX_PARTS + part)
        # Atomic, not loaded: one answer for all threads.
        spare = tl.atomic_add(slack + row, 0.0, sem="relaxed")
        while (part < num_parts) & (spare >= 0):
            mass = 0.0
            if bound > 0:
                mass = _mass_above(own, part * SLICE, num_ids, pivot, peak, scale, SLICE, FAST)
            tl.store(above + row * num_parts + part, mass)
            gone = tl.minimum(mass - bound, 0.0)
            spare = tl.atomic_add(slack + row, gone, sem="relaxed") + gone
            part += readers
            bound = tl.load(most + row * MAX_PARTS + tl.minimum(part, num_parts - 1))
        is_last = False
        if spare >= 0:  # a row of which not all arrive keeps its id
            tl.debug_barrier()  # every thread's part is stored before one of them says so
            is_last = tl.atomic_add(arrived + row, 1, sem="acq_rel") == readers - 1
        if is_last:
            tl.store(arrived + row, 0)  # as the next stage expects it
            parts = tl.arange(0, MAX_PARTS)
            stored = above + row * num_parts + parts
            masses = tl.load(stored, mask=parts < num_parts, other=0.0, cache_modifier=".cg")
            if tl.sum(masses, axis=0) >= tl.load(limits + row):
                at, position = tl.load(rows + row), tl.load(positions + row)
                t, key = tl.load(floats + at * _NUM_FLOATS + _TEMPERATURE), _noise_key(ints, at, position)
                first = row * num_groups
                token = _search_above(
                    *(own, bounds + first, group_peaks + first, pivot, num_ids, num_groups, t, key, GROUP, MAX_GROUPS)
                )
                if token < num_ids:  # or a limit that rounds to nothing, and the row keeps its id
                    wants = (tl.load(ints + at * _NUM_INTS + _NUM_LOGPROBS) >= 0) & (width > 0)
                    log_sum = tl.load(log_sums + row)
                    _commit(own, row, token, at, position, tokens, tokens_stride, out, width, wants, log_sum)
                    pivot = tl.load(own + token).to(tl.float32)
                    # What holds above one pivot holds above a higher one.
                    bound = tl.sum(tl.load(most + row * MAX_PARTS + parts), axis=0)
                    tl.store(slack + row, bound - _NEAR * tl.load(limits + row))
                    _queue(row, pivot, pivots, queues, counts, stage + 1, num_rows)


@triton.jit(
    do_not_specialize=["num_ids", "num_groups", "num_rows", "width", "stage"],
    do_not_specialize_on_alignment=["rows", "positions"],
)
def finish_kernel(
    logits,
    rows,
    positions,
    floats,
    ints,
    bounds,
    group_peaks,
    row_peaks,
    scales,
    limits,
    pivots,
    log_sums,
    queues,
    counts,
    tokens,
    out,
    num_ids,
    num_groups,
    num_rows,
    width,
    stage,
    stride,
    tokens_stride,
    SLICE: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """The rows that are still open: checked and drawn again by one program until they are not."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for item in range(tl.program_id(0), tl.load(counts + stage), tl.num_programs(0)):
        row = tl.load(queues + stage * num_rows + item).to(tl.int64)
        own, at, position = logits + row * stride, tl.load(rows + row), tl.load(positions + row)
        t, key, first = (
            tl.load(floats + at * _NUM_FLOATS + _TEMPERATURE),
            _noise_key(ints, at, position),
            row * num_groups,
        )
        peak, scale = tl.load(row_peaks + row), tl.load(scales + row)
        limit, pivot = tl.load(limits + row), tl.load(pivots + row)
        token, is_open = num_ids, True
        while is_open:
            mass = 0.0
            for start in range(0, num_ids, SLICE):
                mass += _mass_above(own, start, num_ids, pivot, peak, scale, SLICE, FAST)
            is_open = mass >= limit
            if is_open:
                found = _search_above(
                    *(own, bounds + first, group_peaks + first, pivot, num_ids, num_groups, t, key, GROUP, MAX_GROUPS)
                )
                is_open = found < num_ids
                if is_open:
                    token, pivot = found, tl.load(own + found).to(tl.float32)
        if token < num_ids:
            wants = (tl.load(ints + at * _NUM_INTS + _NUM_LOGPROBS) >= 0) & (width > 0)
            _commit(own, row, token, at, position, tokens, tokens_stride, out, width, wants, tl.load(log_sums + row))


def draw(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    floats: Tensor,
    ints: Tensor,
    tokens: Tensor,
    num_ids: int,
    thresholds: Tensor | None,
    filtered: bool,
    top: int,
) -> Tensor:
    """As the door's, but thresholds: [B] fp32, the filters' edge of the rows whose top-k is beyond `LARGEST_TOP_K`, if
    there are such; filtered: some row has top-k, top-p or min-p.
    """
    num_rows, vocab_size = logits.shape
    device, stride, width = logits.device, logits.stride(0), top + 1
    assert logits.stride(1) == 1 and 0 < num_ids <= vocab_size and 0 <= width <= LARGEST_TOP_K
    assert rows.shape == positions.shape == (num_rows,) and rows.dtype == positions.dtype == torch.int32
    assert floats.shape[1] == columns.NUM_FLOATS and ints.shape[1] == columns.NUM_INTS
    assert all(t.is_contiguous() for t in (rows, positions, floats, ints, tokens))
    out = torch.empty(num_rows, max(2 * width, 1), dtype=torch.int32, device=device)
    if num_rows == 0:
        return out
    full = filtered or width > 0
    parts, groups = triton.cdiv(num_ids, _CHECKED), triton.cdiv(vocab_size, GROUP)
    some, few = (num_rows * groups, num_rows) if full else (0, 0)  # as large as only the full kernels need
    max_groups = max(LARGEST_TOP_K, triton.next_power_of_2(groups))
    max_parts = max(1, max_groups * GROUP // _CHECKED)
    sizes = [num_rows * groups, some, some, some, few, few, few, few, few, few * max_parts, few, few * parts]
    bounds, group_peaks, masses, sums, row_peaks, scales, limits, pivots, log_sums, most, slack, above = _pieces(
        sizes, torch.float32, device
    )
    sizes = [few, few * LARGEST_TOP_K, few * (ROUNDS + 1), _NUM_COUNTS]
    arrived, found, queues, counts = _pieces(sizes, torch.int32, device)
    tables, dependent = (rows, positions, floats, ints), chip.dependent_launch(device)
    fast = not triton.knobs.runtime.interpret
    slices = triton.cdiv(vocab_size, SLICE)
    turns = max(1, min(_TURNS, num_rows * slices // (16 * chip.num_sms(device))))
    scan_kernel[(num_rows, triton.cdiv(slices, turns))](
        *(logits, *tables, bounds, group_peaks, masses, sums, arrived, counts),
        *(num_ids, vocab_size, groups, width, slices, turns, stride),
        FULL=full,
        TOP=LARGEST_TOP_K,
        SLICE=SLICE,
        GROUP=GROUP,
        NUM_COUNTS=_NUM_COUNTS,
        FAST=fast,
        num_warps=4,  # few, as they wait for one another
        maxnreg=64,  # eight programs an SM
        **dependent,
    )
    join_kernel[(num_rows,)](
        *(logits, *tables, thresholds, bounds, group_peaks, masses, sums),
        *(row_peaks, scales, limits, pivots, log_sums, most, slack, found, queues, counts, tokens, out),
        *(num_ids, groups, num_rows, width, stride, tokens.stride(0)),
        FULL=full,
        WIDE=thresholds is not None,
        TOP=LARGEST_TOP_K,
        FEW=FEW,
        GROUP=GROUP,
        MAX_GROUPS=max_groups,
        MAX_PARTS=max_parts,
        SHIFT=same_bits(logits.dtype),
        num_warps=8,
        maxnreg=128,  # so that two rows' programs fit on an SM
        **dependent,
    )
    if not filtered:
        return out
    state = (*tables, bounds, group_peaks, row_peaks, scales, limits, pivots, log_sums)
    shape: dict[str, Any] = {"SLICE": _CHECKED, "GROUP": GROUP, "MAX_GROUPS": max_groups, "FAST": fast, **dependent}
    for stage in range(ROUNDS):
        check_kernel[(min(num_rows * parts, _PROGRAMS_PER_SM * chip.num_sms(device)),)](
            *(logits, *state, most, slack, above, arrived, queues, counts, tokens, out),
            *(num_ids, groups, parts, num_rows, width, stage, stride, tokens.stride(0)),
            MAX_PARTS=max_parts,
            READERS=_READERS,
            num_warps=8,
            maxnreg=128,
            **shape,
        )
    finish_kernel[(min(num_rows, chip.num_sms(device)),)](
        *(logits, *state, queues, counts, tokens, out),
        *(num_ids, groups, num_rows, width, ROUNDS, stride, tokens.stride(0)),
        num_warps=16,
        **shape,
    )
    return out


def _pieces(sizes: list[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Tensors of so many elements from one allocation, each on 16 bytes: Triton compiles one version of a kernel."""
    padded = [-(-size // 4) * 4 for size in sizes]
    return list(torch.split(torch.empty(sum(padded), dtype=dtype, device=device), padded))
