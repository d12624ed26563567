"""Triton kernel of a decode step's inputs: one launch where indexing takes ten. Letters as in `__init__`."""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import chip

_SEQUENCES = 128  # of one program


@triton.jit
def decode_inputs_kernel(
    rows,
    contexts,
    tokens,
    blocks,
    token_ids,
    positions,
    slots,
    B,
    token_stride,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = place < B
    row = tl.load(rows + place, mask=exists, other=0).to(tl.int64)
    context = tl.load(contexts + place, mask=exists, other=0)
    position = tl.maximum(context - 1, 0)
    token = tl.load(tokens + row * token_stride + position, mask=exists, other=0)
    block = tl.load(blocks + row * block_stride + position // BLOCK_SIZE, mask=exists, other=0)
    tl.store(token_ids + place, token, mask=exists)
    tl.store(positions + place, position, mask=exists)
    slot = tl.where(context > 0, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(slots + place, slot, mask=exists)


def decode_inputs(
    rows: Tensor, contexts: Tensor, tokens: Tensor, blocks: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    for t in (rows, contexts, tokens, blocks):
        assert t.dtype == torch.int32 and t.stride(-1) == 1
    # each begins on 16 bytes: Triton compiles another version of a kernel for one that does not
    token_ids, positions, slots = rows.new_empty(3, triton.cdiv(len(rows), 4) * 4)[:, : len(rows)]
    decode_inputs_kernel[(triton.cdiv(len(rows), _SEQUENCES),)](
        rows,
        contexts,
        tokens,
        blocks,
        token_ids,
        positions,
        slots,
        len(rows),
        tokens.stride(0),
        blocks.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=_SEQUENCES,
        num_warps=4,
        **chip.dependent_launch(rows.device),
    )
    return token_ids, positions, slots
