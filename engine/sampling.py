"""From logits to token ids and logprobs, all on the device, nothing awaited.

Order, as the field has it: bias, penalties, bans, then temperature, top-k, top-p, min-p, then one draw. The draw is
Gumbel-max with noise that is a pure function of (the sequence's seed, the token's position, the id): a sequence draws
the same tokens whatever else is in the batch, however it was chunked, preempted or resumed, and no generator state
exists.

Penalties count from the device's token table, for the rows that use them. Logprobs are of the model's own distribution.

Letters: B rows to sample, V vocabulary, R rows with penalties, L tokens of a sequence, K top logprobs, P named ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine import kernels
from engine.kernels.columns import FREQUENCY, PRESENCE, PROMPT_LEN, REPETITION
from engine.sequence import MAX_LOGPROBS, SamplingParams, Sequence
from engine.transfer import to_device

PENALTY_CHUNK = 64  # rows whose counts over the vocabulary exist at one time


def float_row(p: SamplingParams) -> list[float]:
    return [p.temperature, p.top_p, p.min_p, p.presence_penalty, p.frequency_penalty, p.repetition_penalty]


def int_row(sequence: Sequence) -> list[int]:
    low, high = sequence.seed & 0xFFFFFFFF, (sequence.seed >> 32) & 0xFFFFFFFF
    signed = [v - (1 << 32) if v >= 1 << 31 else v for v in (low, high)]
    p = sequence.params
    return [max(0, p.top_k), *signed, sequence.prompt_len, -1 if p.logprobs is None else p.logprobs]


@dataclass
class SamplingPlan:
    """What the host knows of one batch's sampling: which passes it needs, and the few values that are not in tables."""

    filter_width: int = 0  # how many of the best ids top-k and min-p must look at; 0: no row has either
    nucleus: bool = False  # a row has top-p without top-k
    penalised: list[int] = field(default_factory=list)  # rows of the batch
    penalty_len: int = 0  # longest sequence among them
    edits: list[tuple[int, int, float]] = field(default_factory=list)  # (row of the batch, id, added value)
    num_logprobs: int = -1  # most top logprobs any row wants; -1: none wants logprobs
    named: list[list[int]] = field(default_factory=list)  # ids by row of the batch, if any row names some

    @property
    def is_plain(self) -> bool:
        """Nothing but a greedy or a plain draw is wanted."""
        return not (self.filter_width or self.nucleus or self.penalised or self.edits) and self.num_logprobs < 0

    @property
    def is_usual(self) -> bool:
        """The kernels that draw do all that is wanted, with their own widths."""
        return not (self.penalised or self.edits or self.named) and self.filter_width <= kernels.LARGEST_TOP_K


PLAIN = SamplingPlan()
USUAL = SamplingPlan(filter_width=kernels.LARGEST_TOP_K, nucleus=True, num_logprobs=MAX_LOGPROBS)  # serves every such


def plan_sampling(sequences: list[Sequence]) -> SamplingPlan:
    """Look once at each sequence about to be sampled; the scheduler has counted the token to come in `num_tokens`."""
    draws = {s.draw for s in sequences}
    plan = SamplingPlan(
        filter_width=max((d.filter_width for d in draws), default=0),
        nucleus=any(d.nucleus for d in draws),
        num_logprobs=max((d.num_logprobs for d in draws), default=-1),
    )
    if not any(d.by_row for d in draws):
        return plan
    for row, s in enumerate(sequences):
        p = s.params
        if p.has_penalties:
            plan.penalised.append(row)
            plan.penalty_len = max(plan.penalty_len, s.num_tokens - 1)
        if p.logit_bias:
            plan.edits.extend((row, i, v) for i, v in p.logit_bias.items())
        if s.num_output_tokens <= p.min_tokens:
            # A ban replaces a bias: each (row, id) may stand in the list once.
            plan.edits = [e for e in plan.edits if e[0] != row or e[1] not in s.stop_ids]
            plan.edits.extend((row, i, float("-inf")) for i in s.stop_ids)
        if p.logprob_token_ids:
            plan.named = plan.named or [[] for _ in sequences]
            plan.named[row] = p.logprob_token_ids
    return plan


def sample(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    floats: Tensor,
    ints: Tensor,
    token_table: Tensor,
    num_ids: int,
    plan: SamplingPlan,
) -> Tensor:
    """Sample one token a row, also into the token table.

    logits: [B, V] in any floating dtype. rows: [B] int32, row of the tables. positions: [B] int32, where the new token
    will stand. floats, ints: the parameter tables, see `kernels.columns`. token_table: [S, max_len] int32. num_ids: ids
    at or beyond it are never sampled. Returns what `unpack` takes, on the device.
    """
    tensors = (rows, positions, floats, ints, token_table, num_ids, plan.filter_width, plan.nucleus)
    top = min(plan.num_logprobs, num_ids)
    if not (plan.edits or plan.penalised or plan.named):
        return kernels.draw(logits, *tensors, top)
    edited = logits
    if plan.edits or plan.penalised:
        edited = _edit(logits.to(torch.float32, copy=True), rows.long(), positions, floats, ints, token_table, plan)
    tokens = kernels.draw(edited, *tensors)
    if plan.num_logprobs < 0:
        return tokens
    ids, values = gather_logprobs(logits, tokens[:, 0].long(), top, num_ids, plan.named)
    return torch.cat([ids.int(), values.view(torch.int32)], dim=1)


def unpack(sampled: Tensor, plan: SamplingPlan) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Views of what was sampled, [B, 1] or [B, 2 * W] int32: tokens [B] and, if the plan has logprobs, ids [B, N] and
    values [B, N] float32 of the token, the top ones and those named. N <= W: a graph has room for more.
    """
    if plan.num_logprobs < 0:
        return sampled[:, 0], None, None
    ids, values = sampled.chunk(2, dim=1)
    shown = None if plan.named else 1 + plan.num_logprobs
    return sampled[:, 0], ids[:, :shown], values[:, :shown].view(torch.float32)


def warm_up(logits: Tensor, floats: Tensor, ints: Tensor, token_table: Tensor, num_ids: int) -> None:
    """Sample in every way that has kernels of its own, so that none is compiled later. logits: [1, V], any values."""
    rows = torch.full((1,), floats.shape[0] - 1, dtype=torch.int32, device=logits.device)  # the spare one
    positions = torch.zeros_like(rows)
    for edits, penalised in (([], []), ([(0, 0, 0.0)], [0])):
        for width in (0, 1, kernels.LARGEST_TOP_K + 1):
            for top in (-1, 0, MAX_LOGPROBS):
                plan = SamplingPlan(width, False, penalised, len(penalised), edits, top)
                sample(logits, rows, positions, floats, ints, token_table, num_ids, plan)


def _edit(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    floats: Tensor,
    ints: Tensor,
    token_table: Tensor,
    plan: SamplingPlan,
) -> Tensor:
    """Bias and bans, then penalties; logits [B, V] float32 changed in place."""
    if plan.edits:
        where = to_device(np.array([e[:2] for e in plan.edits]).T, logits.device)  # [2, number of edits]
        values = to_device(np.array([e[2] for e in plan.edits], dtype=np.float32), logits.device)
        logits[where[0], where[1]] = logits[where[0], where[1]] + values
    for start in range(0, len(plan.penalised), PENALTY_CHUNK):
        index = to_device(np.array(plan.penalised[start : start + PENALTY_CHUNK]), logits.device)
        logits[index] = penalise(
            logits[index],
            token_table[rows[index], : plan.penalty_len],
            positions[index],
            ints[rows[index], PROMPT_LEN],
            floats[rows[index]],
        )
    return logits


def penalise(logits: Tensor, tokens: Tensor, lengths: Tensor, prompt_lens: Tensor, floats: Tensor) -> Tensor:
    """Repetition penalty over prompt and output (Keskar et al., 2019, arXiv:1909.05858), then frequency and presence
    penalties over the output (OpenAI's definition).

    logits [R, V]; tokens [R, L] int32, of which the first `lengths` [R] are real and the first `prompt_lens` [R]
    prompt; floats [R, 6]. Returns [R, V].
    """
    place = torch.arange(tokens.shape[1], device=logits.device)[None, :]
    real = place < lengths[:, None]
    output = real & (place >= prompt_lens[:, None])
    ids = torch.where(real, tokens, 0).long()
    counts = torch.zeros_like(logits).scatter_add_(1, ids, output.to(logits.dtype))  # of output tokens
    seen = torch.zeros_like(logits).scatter_add_(1, ids, real.to(logits.dtype)) > 0
    repetition = floats[:, REPETITION, None]
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - floats[:, FREQUENCY, None] * counts - floats[:, PRESENCE, None] * (counts > 0)


def gather_logprobs(
    logits: Tensor, tokens: Tensor, top: int, num_ids: int, named: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Logprobs of the model's own distribution: of the tokens, of the `top` best ids, of named ids by row.

    logits [B, V] untouched, in any floating dtype; tokens [B] int64. Returns ids and values [B, 1 + top + P]; P is the
    longest list of `named`, shorter ones repeat id 0 at their end.
    """
    log_sums, _, best = kernels.survey(logits, min(top, num_ids), num_ids)
    ids = [tokens[:, None], best]
    if named:
        width = max(map(len, named))
        padded = np.array([n + [0] * (width - len(n)) for n in named], dtype=np.int64)
        ids.append(to_device(padded, logits.device))
    chosen = torch.cat(ids, dim=1)
    return chosen, logits.gather(1, chosen).float() - log_sums[:, None]
