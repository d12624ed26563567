"""Gluon kernel of causal attention for several queries a sequence, in bfloat16, on sm_90. Letters as in `__init__`.

What `prefill_attention` does, but products run while exponentials are taken: Triton waits for each product at once,
here they are asynchronous. The plan is FlashAttention-3's (Shah et al., 2024, arXiv:2407.08608) over a paged pool:

One program an SM, of three parts. A warp fetches: queries, keys and values of all items of work that are this
program's, as far ahead as there is room. Two groups of four warps compute, 64 rows each, of the same KV head and
context. A step of a group issues the scores of one tile of keys and the product of the probabilities before with their
values, and takes the softmax of the scores while the values' product runs. Steps go over the ends of items: the first
scores of one are computed beside the last values of the one before, and that one is written then.

G query heads are packed into rows as in `prefill_attention`, but rounded up to a power of two, so that the copy engine
can fetch them: row m is query m // PADDED, head m % PADDED. Items are dealt out longest first, there and back.

The copy engine fetches pieces of a tile that lie in one block. It cannot stop within a piece, and what lies past a
context may be anything, also NaN, which no probability of zero removes. But it writes zeros for what is outside of the
block. So the last piece of a context begins before its block, and its positions lie `shift` rows further on.

Tiles of keys are walked from the last one, the only ones that need masks. A row may see nothing of the first: its
scores are then all the same finite number, so small that the next tile makes all of it vanish.
"""

# Gluon is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import PREFILL_TILE, AttentionPlan, chip
from engine.kernels.gluon_names import fetch, view
from engine.kernels.kv_codes import LOG2_E

_ROWS = gl.constexpr(64)  # of one group of warps
_KEYS = gl.constexpr(128)  # of one step
_STAGES = gl.constexpr(2)  # tiles of keys, and of values, in shared memory
_HALF = gl.constexpr(64)  # elements of 16 bits in the 128 bytes of one swizzle
_PIECE = gl.NVMMASharedLayout(128, 16, rank=3)
_MATRIX = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
# Of a thread that computes; 40 are left for one that fetches (504: three times the 168 that each starts with).
_REGISTERS = gl.constexpr(232)
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _KEYS.value, 16]))
_HIDDEN = gl.constexpr(-(2.0**100))


@gluon.jit
def _next_item(turn, num_items, plan, HKV: gl.constexpr, PADDED: gl.constexpr, TILE: gl.constexpr):
    """From this turn on, the first one whose item has queries: the turn after it, the item's KV head, sequence, first
    token of the sequence, position of query 0, first query, the query and the position after the last; 0 if none.
    """
    tiles, query_starts, context_lens = plan
    QUERIES: gl.constexpr = 2 * _ROWS // PADDED
    PARTS: gl.constexpr = (TILE + QUERIES - 1) // QUERIES
    num_programs, program = gl.num_programs(0), gl.program_id(0)
    kv_head, sequence, start, before, first, beyond, end = 0, 0, 0, 0, 0, 0, 0
    while (turn * num_programs < num_items) & (end == 0):
        number = turn * num_programs + gl.where(turn % 2 == 0, program, num_programs - 1 - program)
        turn += 1
        if number < num_items:
            kv_head = number % HKV
            part = number // HKV % PARTS
            tile = tiles + number // (HKV * PARTS) * 2
            sequence = gl.load(tile)
            tile_first = gl.load(tile + 1)
            start = gl.load(query_starts + sequence)
            num_queries = gl.load(query_starts + sequence + 1) - start
            before = gl.load(context_lens + sequence) - num_queries
            first = tile_first + part * QUERIES
            beyond = gl.minimum(gl.minimum(first + QUERIES, tile_first + TILE), num_queries)
            end = gl.where(first < beyond, before + beyond, 0)
    return turn, kv_head, sequence, start, before, first, beyond, end


@gluon.jit
def _fetch_tile(
    desc,
    pieces,
    full,
    stage,
    blocks,
    at,
    whole,
    shift,
    kv_head,
    BLOCK_SIZE: gl.constexpr,
    D: gl.constexpr,
    PIECE: gl.constexpr,
):
    """One tile of keys, or of values, from position `at` on."""
    HALVES: gl.constexpr = D // _HALF
    PIECES: gl.constexpr = _KEYS // PIECE
    mbarrier.expect(full.index(stage), _KEYS * D * 2)
    for i in gl.static_range(PIECES):
        position = at + i * PIECE
        row = position % BLOCK_SIZE - gl.where(position >= whole, shift, 0)
        for half in gl.static_range(HALVES):
            fetch(
                desc,
                [blocks[i], row, kv_head * D + half * _HALF],
                full.index(stage),
                pieces.index((stage * HALVES + half) * PIECES + i),
            )


@gluon.jit
def _fetch(
    descriptors,
    pieces,
    barriers,
    tables,
    num_items,
    plan,
    BLOCK_SIZE: gl.constexpr,
    HKV: gl.constexpr,
    G: gl.constexpr,
    PADDED: gl.constexpr,
    D: gl.constexpr,
    TILE: gl.constexpr,
    PIECE: gl.constexpr,
):
    """The warp that fetches: for each item its queries, then keys and values by turns."""
    q_desc, k_desc, v_desc = descriptors
    q_pieces, k_pieces, v_pieces = pieces
    block_tables, rows, table_stride, num_blocks = tables
    q_full, q_empty, k_full, v_full, empty = barriers
    HALVES: gl.constexpr = D // _HALF
    PIECES: gl.constexpr = _KEYS // PIECE
    step, item, turn = 0, 0, 0
    turn, kv_head, sequence, start, _, first, _, end = _next_item(turn, num_items, plan, HKV, PADDED, TILE)
    while end > 0:
        place = item % 2
        mbarrier.wait(q_empty.index(place), item // 2 % 2 ^ 1)
        mbarrier.expect(q_full.index(place), 2 * _ROWS * D * 2)
        for group in gl.static_range(2):
            for half in gl.static_range(HALVES):
                fetch(
                    q_desc,
                    [start + first + group * (_ROWS // PADDED), kv_head * G, half * _HALF],
                    q_full.index(place),
                    q_pieces.index((place * 2 + group) * HALVES + half),
                )
        table = block_tables + gl.load(rows + sequence).to(gl.int64) * table_stride
        whole = end // PIECE * PIECE
        shift = (PIECE - end % PIECE) % PIECE
        at = (end + _KEYS - 1) // _KEYS * _KEYS
        while at > 0:
            at -= _KEYS
            blocks = ()
            for i in gl.static_range(PIECES):
                position = at + i * PIECE
                # Past the end a block that does not exist, which reads as zeros.
                block = gl.load(table + position // BLOCK_SIZE, mask=position < end, other=num_blocks)
                blocks = blocks + (block,)  # noqa: RUF005 (Gluon knows no star)
            stage = step % _STAGES
            mbarrier.wait(empty.index(stage), step // _STAGES % 2 ^ 1)
            _fetch_tile(k_desc, k_pieces, k_full, stage, blocks, at, whole, shift, kv_head, BLOCK_SIZE, D, PIECE)
            # A step frees its keys, and the values of the step before.
            mbarrier.wait(empty.index((step + 1) % _STAGES), (step + 1) // _STAGES % 2 ^ 1)
            _fetch_tile(v_desc, v_pieces, v_full, stage, blocks, at, whole, shift, kv_head, BLOCK_SIZE, D, PIECE)
            step += 1
        item += 1
        turn, kv_head, sequence, start, _, first, _, end = _next_item(turn, num_items, plan, HKV, PADDED, TILE)


@gluon.jit
def _step(
    q,
    k_matrices,
    v_matrices,
    barriers,
    step,
    p,  # [M, N] probabilities of the step before
    acc,  # [M, D]
    m_max,  # [M] running maximum of the scores, base 2
    l_sum,  # [M] running sum of exponentials
    last,  # [M] last position each row sees
    at,  # position of the first key
    whole,
    shift,
    scale_log2,
    MASKED: gl.constexpr,
    O_LAYOUT: gl.constexpr,
):
    """One tile of keys that has arrived -> its probabilities, maxima, sums; acc with the values of the step before, and
    what of acc this tile leaves over. Also waits for the item's next keys.
    """
    _, _, k_full, v_full, empty = barriers
    stage = step % _STAGES
    none = gl.zeros([_ROWS, _KEYS], gl.float32, _SCORES)
    scores = warpgroup_mma(q, k_matrices.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    # The first step of all has no step before: its probabilities are zeros, and what comes out is not used.
    old = (step + _STAGES - 1) % _STAGES
    mbarrier.wait(v_full.index(old), (step + _STAGES - 1) // _STAGES % 2 ^ 1, pred=step > 0)
    product = warpgroup_mma(p, v_matrices.index(old), acc, is_async=True)
    score = warpgroup_mma_wait(1, [scores])
    if MASKED:
        position = at + gl.arange(0, _KEYS, layout=gl.SliceLayout(0, _SCORES))
        if shift > 0:
            shifted = position - shift
            position = gl.where(position < whole, position, gl.where(shifted < whole, 1 << 30, shifted))
        score = gl.where(position[None, :] <= last[:, None], score, _HIDDEN)
    new_max = gl.maximum(m_max, gl.max(score, axis=1) * scale_log2)
    exponential = gl.exp2(score * scale_log2 - new_max[:, None])
    fade = gl.exp2(m_max - new_max)
    l_sum = l_sum * fade + gl.sum(exponential, axis=1)
    next_p = gl.convert_layout(exponential.to(p.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    # ptxas moves no softmax from here to behind the product: a wait for a barrier is a loop.
    mbarrier.wait(k_full.index((step + 1) % _STAGES), (step + 1) // _STAGES % 2, pred=at > 0)
    acc, p, next_p, fade, l_sum = warpgroup_mma_wait(0, [product, p, next_p, fade, l_sum])
    mbarrier.arrive(empty.index(stage), count=1)
    return next_p, acc, new_max, l_sum, gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))


@gluon.jit
def _write(
    out,
    acc,
    l_sum,
    start,
    first,
    beyond,
    kv_head,
    HKV: gl.constexpr,
    G: gl.constexpr,
    PADDED: gl.constexpr,
    D: gl.constexpr,
    O_LAYOUT: gl.constexpr,
):
    """acc / l_sum into the rows of queries first to beyond of the sequence that begins at token `start`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    factor = gl.convert_layout(1.0 / l_sum, gl.SliceLayout(1, O_LAYOUT))
    result = gl.convert_layout((acc * factor[:, None]).to(out.dtype.element_ty), LAYOUT)
    row = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    query, head = first + row // PADDED, row % PADDED
    place = (start + query).to(gl.int64) * (HKV * G * D) + (kv_head * G + head) * D
    gl.store(out + place[:, None] + d[None, :], result, mask=((query < beyond) & (head < G))[:, None])


@gluon.jit
def _compute(
    matrices,
    barriers,
    out,
    scale_log2,
    num_items,
    plan,
    GROUP: gl.constexpr,
    HKV: gl.constexpr,
    G: gl.constexpr,
    PADDED: gl.constexpr,
    D: gl.constexpr,
    TILE: gl.constexpr,
    PIECE: gl.constexpr,
):
    """One of the two groups of four warps that compute: rows GROUP * 64 to GROUP * 64 + 63 of each item."""
    q_matrices, k_matrices, v_matrices = matrices
    q_full, q_empty, k_full, v_full, _ = barriers
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, _SCORES)
    step, item, turn = 0, 0, 0
    turn, kv_head, _, start, before, first, beyond, end = _next_item(turn, num_items, plan, HKV, PADDED, TILE)
    row = gl.arange(0, _ROWS, layout=OF_ROWS)
    p = gl.zeros([_ROWS, _KEYS], out.dtype.element_ty, P_LAYOUT)
    acc = gl.zeros([_ROWS, D], gl.float32, O_LAYOUT)
    l_sum = gl.full([_ROWS], 1.0, gl.float32, OF_ROWS)
    old_start, old_first, old_beyond, old_head = 0, 0, 0, 0  # the item before; none: no row to write
    while end > 0:
        first += GROUP * (_ROWS // PADDED)
        last = before + first + row // PADDED
        whole = end // PIECE * PIECE
        shift = (PIECE - end % PIECE) % PIECE
        at = (end - 1) // _KEYS * _KEYS
        seen_by_all = gl.minimum((before + first + 1) // _KEYS * _KEYS, at)
        q = q_matrices.index(item % 2 * 2 + GROUP)
        mbarrier.wait(q_full.index(item % 2), item // 2 % 2)
        mbarrier.wait(k_full.index(step % _STAGES), step // _STAGES % 2)
        m_max = gl.full([_ROWS], float("-inf"), gl.float32, OF_ROWS)
        new_sum = gl.zeros([_ROWS], gl.float32, OF_ROWS)
        p, acc, m_max, new_sum, fade = _step(
            q, k_matrices, v_matrices, barriers, step, p, acc, m_max, new_sum, last, at, whole, shift,
            scale_log2, True, O_LAYOUT,
        )  # fmt: skip
        step += 1
        _write(out, acc, l_sum, old_start, old_first, old_beyond, old_head, HKV, G, PADDED, D, O_LAYOUT)
        acc, l_sum = gl.zeros([_ROWS, D], gl.float32, O_LAYOUT), new_sum
        while at > seen_by_all:
            at -= _KEYS
            p, acc, m_max, l_sum, fade = _step(
                q, k_matrices, v_matrices, barriers, step, p, acc, m_max, l_sum, last, at, whole, shift,
                scale_log2, True, O_LAYOUT,
            )  # fmt: skip
            acc *= fade[:, None]
            step += 1
        while at > 0:
            at -= _KEYS
            p, acc, m_max, l_sum, fade = _step(
                q, k_matrices, v_matrices, barriers, step, p, acc, m_max, l_sum, last, at, whole, shift,
                scale_log2, False, O_LAYOUT,
            )  # fmt: skip
            acc *= fade[:, None]
            step += 1
        mbarrier.arrive(q_empty.index(item % 2), count=1)
        item += 1
        old_start, old_first, old_beyond, old_head = start, first, beyond, kv_head
        turn, kv_head, _, start, before, first, beyond, end = _next_item(turn, num_items, plan, HKV, PADDED, TILE)
    if step > 0:
        old = (step - 1) % _STAGES
        mbarrier.wait(v_full.index(old), (step - 1) // _STAGES % 2)
        acc = warpgroup_mma(p, v_matrices.index(old), acc)
        _write(out, acc, l_sum, old_start, old_first, old_beyond, old_head, HKV, G, PADDED, D, O_LAYOUT)


@gluon.jit(
    do_not_specialize=["num_blocks", "num_items"],
    do_not_specialize_on_alignment=["rows", "query_starts", "context_lens", "tiles"],
)
def prefill_hopper_kernel(
    q_desc,  # [T, Hq, D] in pieces of [64 / PADDED, PADDED, 64]
    k_desc,  # [num_blocks, BLOCK_SIZE, Hkv * D] in pieces of [1, PIECE, 64]
    v_desc,
    block_tables,
    rows,
    query_starts,
    context_lens,
    tiles,
    out,
    scale_log2,
    table_stride,
    num_blocks,
    num_items,
    BLOCK_SIZE: gl.constexpr,
    HKV: gl.constexpr,
    G: gl.constexpr,
    PADDED: gl.constexpr,
    D: gl.constexpr,
    TILE: gl.constexpr,
    PIECE: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dtype: gl.constexpr = out.dtype.element_ty
    HALVES: gl.constexpr = D // _HALF
    TILES: gl.constexpr = _STAGES * HALVES * (_KEYS // PIECE)
    q_pieces = gl.allocate_shared_memory(dtype, [4 * HALVES, _ROWS // PADDED, PADDED, _HALF], q_desc.layout)
    k_pieces = gl.allocate_shared_memory(dtype, [TILES, 1, PIECE, _HALF], k_desc.layout)
    v_pieces = gl.allocate_shared_memory(dtype, [TILES, 1, PIECE, _HALF], v_desc.layout)
    pieces = (q_pieces, k_pieces, v_pieces)
    matrices = (
        view(q_pieces, dtype, [4, _ROWS, D], _MATRIX),  # of two items, two groups each
        view(k_pieces, dtype, [_STAGES, _KEYS, D], _MATRIX),
        view(v_pieces, dtype, [_STAGES, _KEYS, D], _MATRIX),
    )
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, v_full, empty)
    descriptors = (q_desc, k_desc, v_desc)
    tables = (block_tables, rows, table_stride, num_blocks)
    plan = (tiles, query_starts, context_lens)
    gl.warp_specialize(
        [
            (_compute, (matrices, barriers, out, scale_log2, num_items, plan, 0, HKV, G, PADDED, D, TILE, PIECE)),
            (_compute, (matrices, barriers, out, scale_log2, num_items, plan, 1, HKV, G, PADDED, D, TILE, PIECE)),
            (
                _fetch,
                (descriptors, pieces, barriers, tables, num_items, plan, BLOCK_SIZE, HKV, G, PADDED, D, TILE, PIECE),
            ),
        ],
        [4, 1],
        [_REGISTERS, 504 - 2 * _REGISTERS],
    )


def prefill_hopper(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, plan: AttentionPlan, scale: float, out: Tensor
) -> None:
    """`prefill_attention.prefill` of a cache in bfloat16, whose arguments have been checked."""
    num_blocks, block_size, num_kv_heads, head_dim = k_cache.shape
    group = q.shape[1] // num_kv_heads
    padded = triton.next_power_of_2(group)
    piece = min(block_size, _KEYS.value)

    def pool(cache: Tensor) -> TensorDescriptor:
        width = num_kv_heads * head_dim
        shape, strides = [num_blocks, block_size, width], [cache.stride(0), width, 1]
        return TensorDescriptor(cache, shape, strides, [1, piece, _HALF.value], _PIECE)

    q_box = [_ROWS.value // padded, padded, _HALF.value]
    parts = triton.cdiv(PREFILL_TILE, 2 * _ROWS.value // padded)
    num_items = num_kv_heads * len(plan.tiles) * parts
    prefill_hopper_kernel[(min(num_items, chip.num_sms(q.device)),)](
        TensorDescriptor(q, list(q.shape), list(q.stride()), q_box, _PIECE),
        pool(k_cache),
        pool(v_cache),
        block_tables,
        plan.rows,
        plan.query_starts,
        plan.context_lens,
        plan.tiles,
        out,
        scale * LOG2_E,
        block_tables.stride(0),
        num_blocks,
        num_items,
        BLOCK_SIZE=block_size,
        HKV=num_kv_heads,
        G=group,
        PADDED=padded,
        D=head_dim,
        TILE=PREFILL_TILE,
        PIECE=piece,
        num_warps=4,
        **chip.dependent_launch(q.device),
    )
