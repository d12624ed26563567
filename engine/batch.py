"""Scheduled work to device tensors: one upload a step for the tables, one for each variant's batch.

The device holds, by row (a running sequence's place): its token ids, its block table and its sampling parameters. The
host sends deltas; the ids that a batch feeds to the model are read from the device's own token table, because the
newest of them may not have reached the host.

Letters: T tokens of the batch, B sequences, N of them sampled, P prompt logprobs that are owed, S rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine import kernels, sampling
from engine.kernels import AttentionPlan, columns, plan_tiles
from engine.models.qwen import Batch, Wanted
from engine.scheduler import Scheduled
from engine.sequence import Sequence
from engine.transfer import to_device, upload

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tables:
    """The device's state by row; changed in place, in stream order. The last row is spare: padding writes there."""

    tokens: Tensor  # [S, max_model_len + 1] int32
    blocks: Tensor  # [S, max_blocks] int32
    floats: Tensor  # [S, columns.NUM_FLOATS] float32
    ints: Tensor  # [S, columns.NUM_INTS] int32

    @staticmethod
    def allocate(num_sequences: int, max_model_len: int, block_size: int, device: torch.device) -> Tables:
        num_rows = num_sequences + 1
        return Tables(
            tokens=torch.zeros(num_rows, max_model_len + 1, dtype=torch.int32, device=device),
            blocks=torch.zeros(num_rows, -(-max_model_len // block_size), dtype=torch.int32, device=device),
            floats=torch.zeros(num_rows, columns.NUM_FLOATS, dtype=torch.float32, device=device),
            ints=torch.zeros(num_rows, columns.NUM_INTS, dtype=torch.int32, device=device),
        )

    def update(self, admitted: list[Sequence], new_blocks: list[tuple[int, int, int]]) -> None:
        """Tell the device of newly admitted sequences and newly taken blocks (row, index, block)."""
        if not new_blocks:
            return
        taken = np.array(new_blocks, dtype=np.int32)
        pieces: list[Ints] = [taken[:, 0] * self.blocks.shape[1] + taken[:, 1], taken[:, 2]]
        if admitted:
            width = self.tokens.shape[1]
            lengths = np.array([len(s.token_ids) for s in admitted])
            rows = np.array([s.row for s in admitted], dtype=np.int32)
            starts = np.repeat(rows * width - (np.cumsum(lengths) - lengths), lengths)
            pieces += [
                (starts + np.arange(len(starts))).astype(np.int32),
                np.concatenate([np.array(s.token_ids, dtype=np.int32) for s in admitted]),
                rows,
                np.array([sampling.int_row(s) for s in admitted], dtype=np.int32),
                np.array([sampling.float_row(s.params) for s in admitted], dtype=np.float32).view(np.int32),
            ]
        parts = upload(pieces, self.blocks.device)
        self.blocks.view(-1).index_copy_(0, parts[0].long(), parts[1])
        if admitted:
            self.tokens.view(-1).index_copy_(0, parts[2].long(), parts[3])
            index = parts[4].long()
            self.ints.index_copy_(0, index, parts[5])
            self.floats.index_copy_(0, index, parts[6].view(torch.float32))


def decode_batch(rows: Tensor, contexts: Tensor, tables: Tables, block_size: int) -> Batch:
    """A batch of one token for each of N sequences, built on the device alone.

    rows [N] int32; contexts [N] int32, the token of this step included; 0 marks padding, which stores nothing.
    """
    num, max_len = rows.shape[0], tables.tokens.shape[1] - 1
    token_ids, positions, slots = kernels.decode_inputs(rows, contexts, tables.tokens, tables.blocks, block_size)
    return Batch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        block_tables=tables.blocks,
        plan=decode_plan(rows, contexts, np.full(num, max_len, dtype=np.int32)),
    )


def decode_plan(rows: Tensor, contexts: Tensor, contexts_host: Ints) -> AttentionPlan:
    """Attention of one token of each of N sequences. rows, contexts [N] int32."""
    num = rows.shape[0]
    starts = torch.arange(num + 1, dtype=torch.int32, device=rows.device)
    ones, tiles = np.ones(num, dtype=np.int32), rows.new_empty((0, 2))
    return AttentionPlan(rows, starts, contexts, ones, contexts_host, num, tiles)


def prefill_batch(row: int, num_tokens: int, tables: Tables) -> Batch:
    """A prompt of `num_tokens` ids 0 in one row of the tables, which stores nothing: to run the kernels once."""
    device = tables.tokens.device
    lengths = np.array([num_tokens], dtype=np.int32)
    tokens = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    counts = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
    rows, tiles = torch.full_like(counts[:1], row), to_device(plan_tiles(lengths, 0), device)
    return Batch(
        token_ids=tokens,
        positions=torch.arange(num_tokens, dtype=torch.int32, device=device),
        slots=tokens - 1,
        block_tables=tables.blocks,
        plan=AttentionPlan(rows, counts, counts[1:].clone(), lengths, lengths, 0, tiles),
    )


@dataclass(frozen=True)
class PromptPiece:
    """Prompt logprobs of one sequence that one step computes: of positions `start` on, from number `offset` of the
    batch's on. token: of the batch, whose hidden state predicts the first.
    """

    sequence: Sequence
    start: int
    count: int
    offset: int
    token: int


@dataclass(frozen=True)
class Assembled:
    """The host's view of a batch, in the batch's order, and what becomes of the hidden states."""

    scheduled: list[Scheduled]
    sampled: list[Sequence]
    pieces: list[PromptPiece]
    num_decode_tokens: int  # of sequences past their prompt
    num_prefill_tokens: int
    index: Tensor  # [N + P] int32: the tokens that are sampled, then those that predict what the pieces owe
    sample_rows: Tensor  # [N] int32
    sample_positions: Tensor  # [N] int32: where the new token will stand
    owed_rows: Tensor  # [P] int32, of the tables; with owed_positions, the token whose logprob is owed
    owed_positions: Tensor  # [P] int32


def assemble(scheduled: list[Scheduled], tables: Tables, block_size: int) -> tuple[Batch, Assembled]:
    """Build the inputs of one variant's batch. Sequences with one token come first, as the attention wants them."""
    scheduled = sorted(scheduled, key=lambda s: s.num_tokens > 1)
    lengths = np.array([s.num_tokens for s in scheduled], dtype=np.int32)
    starts = np.array([s.start for s in scheduled], dtype=np.int32)
    rows = np.array([s.sequence.row for s in scheduled], dtype=np.int32)
    num_decodes = int((lengths == 1).sum())
    query_starts = np.zeros(len(scheduled) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_starts[1:])
    token_rows = np.repeat(rows, lengths)
    positions = np.arange(query_starts[-1], dtype=np.int32) + np.repeat(starts - query_starts[:-1], lengths)
    contexts = starts + lengths
    device = tables.blocks.device
    parts = upload([token_rows, positions, rows, query_starts, contexts, plan_tiles(lengths, num_decodes)], device)
    token_rows_d, positions_d = parts[0].long(), parts[1]
    where = positions_d.long()
    slots = tables.blocks[token_rows_d, where // block_size] * block_size + positions_d % block_size
    a = finish_assembly(scheduled, query_starts[1:] - 1, owed(scheduled), device)
    wanted = None
    if a.pieces:
        wanted = Wanted(a.index, None)
    elif len(a.sampled) < len(positions):
        sampled = contexts[[s.samples for s in scheduled]]
        wanted = Wanted(a.index, decode_plan(a.sample_rows, a.sample_positions, sampled))
    batch = Batch(
        token_ids=tables.tokens[token_rows_d, where],
        positions=positions_d,
        slots=slots,
        block_tables=tables.blocks,
        plan=AttentionPlan(parts[2], parts[3], parts[4], lengths, contexts, num_decodes, parts[5]),
        wanted=wanted,
    )
    return batch, a


def owed(scheduled: list[Scheduled]) -> list[PromptPiece]:
    """The prompt logprobs that this step's hidden states give. No token is also sampled: it predicts a known one."""
    pieces: list[PromptPiece] = []
    first = offset = 0
    for s in scheduled:
        q, end = s.sequence, s.start + s.num_tokens
        begin, stop = max(q.next_prompt_logprob, s.start + 1), min(end + 1, q.prompt_len)
        if begin < stop:
            pieces.append(PromptPiece(q, begin, stop - begin, offset, first + begin - 1 - s.start))
            offset += stop - begin
        first += s.num_tokens
    return pieces


def finish_assembly(
    scheduled: list[Scheduled], last: Ints, pieces: list[PromptPiece], device: torch.device
) -> Assembled:
    """What follows the forward. last: each sequence's last token in the batch, or where its hidden state lies, in the
    order of `scheduled`.
    """
    sampled = np.array([s.samples for s in scheduled], dtype=bool)
    rows = np.array([s.sequence.row for s in scheduled], dtype=np.int32)
    contexts = np.array([s.start + s.num_tokens for s in scheduled], dtype=np.int32)
    owed_rows = np.repeat(np.array([p.sequence.row for p in pieces], dtype=np.int32), [p.count for p in pieces])
    tokens = [np.arange(p.token, p.token + p.count, dtype=np.int32) for p in pieces]
    positions = [np.arange(p.start, p.start + p.count, dtype=np.int32) for p in pieces]
    index = np.concatenate([last[sampled], *tokens])
    owed_positions = np.concatenate([rows[:0], *positions])
    parts = upload([index, rows[sampled], contexts[sampled], owed_rows, owed_positions], device)
    past_prompt = sum(s.num_tokens == 1 and s.start >= s.sequence.prompt_len for s in scheduled)
    return Assembled(
        scheduled=scheduled,
        sampled=[s.sequence for s in scheduled if s.samples],
        pieces=pieces,
        num_decode_tokens=past_prompt,
        num_prefill_tokens=sum(s.num_tokens for s in scheduled) - past_prompt,
        index=parts[0],
        sample_rows=parts[1],
        sample_positions=parts[2],
        owed_rows=parts[3],
        owed_positions=parts[4],
    )
