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

from engine.sequence import SamplingParams, Sequence
from engine.transfer import to_device

# Columns of the parameter tables, one row a running sequence.
TEMPERATURE, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION = range(6)
TOP_K, SEED_LOW, SEED_HIGH, PROMPT_LEN = range(4)
NUM_FLOATS, NUM_INTS = 6, 4

PENALTY_CHUNK = 64  # rows whose counts over the vocabulary exist at one time


def float_row(p: SamplingParams) -> list[float]:
    return [p.temperature, p.top_p, p.min_p, p.presence_penalty, p.frequency_penalty, p.repetition_penalty]


def int_row(sequence: Sequence) -> list[int]:
    low, high = sequence.seed & 0xFFFFFFFF, (sequence.seed >> 32) & 0xFFFFFFFF
    signed = [v - (1 << 32) if v >= 1 << 31 else v for v in (low, high)]
    return [max(0, sequence.params.top_k), *signed, sequence.prompt_len]


@dataclass
class SamplingPlan:
    """What the host knows of one batch's sampling: which passes it needs, and the few values that are not in tables."""

    draw: bool = False
    filters: bool = False
    penalised: list[int] = field(default_factory=list)  # rows of the batch
    penalty_len: int = 0  # longest sequence among them
    edits: list[tuple[int, int, float]] = field(default_factory=list)  # (row of the batch, id, added value)
    num_logprobs: int = -1  # most top logprobs any row wants; -1: none wants logprobs
    named: list[list[int]] = field(default_factory=list)  # ids by row of the batch, if any row names some

    @property
    def is_greedy(self) -> bool:
        """Nothing but the arg max is wanted."""
        return not (self.draw or self.penalised or self.edits) and self.num_logprobs < 0


def plan_sampling(sequences: list[Sequence]) -> SamplingPlan:
    """Look once at each sequence about to be sampled; the scheduler has counted the token to come in `num_tokens`."""
    plan = SamplingPlan()
    for row, s in enumerate(sequences):
        p = s.params
        if p.temperature > 0:
            plan.draw = True
            if p.top_p < 1 or p.top_k > 0 or p.min_p > 0:
                plan.filters = True
        if p.has_penalties:
            plan.penalised.append(row)
            plan.penalty_len = max(plan.penalty_len, s.num_tokens - 1)
        if p.logit_bias:
            plan.edits.extend((row, i, v) for i, v in p.logit_bias.items())
        if s.num_output_tokens <= p.min_tokens:
            # A ban replaces a bias on the same id: both in one list would add -inf to a finite value, which is the
            # same.
            plan.edits = [e for e in plan.edits if e[0] != row or e[1] not in s.stop_ids]
            plan.edits.extend((row, i, float("-inf")) for i in s.stop_ids)
        if p.logprobs is not None:
            plan.num_logprobs = max(plan.num_logprobs, p.logprobs)
        if p.logprob_token_ids:
            plan.num_logprobs = max(plan.num_logprobs, 0)
            plan.named = plan.named or [[] for _ in sequences]
            plan.named[row] = p.logprob_token_ids
    return plan


@dataclass(frozen=True)
class Sampled:
    """On the device: tokens [B] int64; with logprobs, `values` [B, 1 + K + P] float32 and `ids`, int64, alike."""

    tokens: Tensor
    ids: Tensor | None
    values: Tensor | None


def sample(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    floats: Tensor,
    ints: Tensor,
    token_table: Tensor,
    num_ids: int,
    plan: SamplingPlan,
) -> Sampled:
    """Sample one token a row.

    logits: [B, V] float32, changed in place. rows: [B] int64, row of the tables. positions: [B] int32, where the new
    token will stand. floats, ints: the parameter tables [S, 6], [S, 4]. token_table: [S, max_len] int32. num_ids: ids
    at or beyond it are never sampled.
    """
    device = logits.device
    raw = logits.clone() if plan.num_logprobs >= 0 and _edits_logits(plan, logits, num_ids) else logits
    if plan.edits:
        where = to_device(np.array([e[:2] for e in plan.edits]).T, device)  # [2, number of edits]
        values = to_device(np.array([e[2] for e in plan.edits], dtype=np.float32), device)
        logits[where[0], where[1]] = logits[where[0], where[1]] + values
    for start in range(0, len(plan.penalised), PENALTY_CHUNK):
        chunk = plan.penalised[start : start + PENALTY_CHUNK]
        index = to_device(np.array(chunk), device)
        logits[index] = penalise(
            logits[index],
            token_table[rows[index], : plan.penalty_len],
            positions[index],
            ints[rows[index], PROMPT_LEN],
            floats[rows[index]],
        )
    if num_ids < logits.shape[1]:
        logits[:, num_ids:] = float("-inf")
    if not plan.draw:
        tokens = logits.argmax(-1)
    else:
        f = floats[rows]
        temperature = f[:, TEMPERATURE, None]
        scaled = logits / torch.where(temperature > 0, temperature, 1.0).clamp(min=1e-5)
        if plan.filters:
            scaled = filter_logits(scaled, ints[rows, TOP_K], f[:, TOP_P], f[:, MIN_P])
        noise = gumbel_noise(ints[rows, SEED_LOW], ints[rows, SEED_HIGH], positions, logits.shape[1])
        tokens = torch.where(temperature > 0, scaled + noise, logits).argmax(-1)
    if plan.num_logprobs < 0:
        return Sampled(tokens, None, None)
    ids, values = gather_logprobs(raw, tokens, plan.num_logprobs, num_ids, plan.named)
    return Sampled(tokens, ids, values)


def _edits_logits(plan: SamplingPlan, logits: Tensor, num_ids: int) -> bool:
    return bool(plan.edits or plan.penalised or num_ids < logits.shape[1])


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


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Mask all but the top-k, then all but the smallest set holding top-p of what is left, then ids below min-p of the
    best.

    logits [B, V] after temperature; top_k [B] int32 (0: off), top_p, min_p [B]. Top-p follows Holtzman et al., 2020
    (arXiv:1904.09751): an id stays while the mass before it is below top_p.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(logits.shape[1], device=logits.device)[None, :]
    keep = (place < top_k[:, None]) | (top_k[:, None] <= 0)
    probabilities = ordered.masked_fill(~keep, float("-inf")).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    keep &= before < top_p[:, None]
    keep &= probabilities >= min_p[:, None] * probabilities[:, :1]
    keep[:, 0] = True
    return torch.empty_like(logits).scatter_(1, order, ordered.masked_fill(~keep, float("-inf")))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers with good avalanche (Wellons' lowbias32, github.com/skeeto/hash-prospector),
    int32.
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))  # as a signed 32-bit factor
    return x ^ ((x >> 16) & 0xFFFF)


def gumbel_noise(seed_low: Tensor, seed_high: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """[B, V] float32 standard Gumbel noise, a function of (seed, position, id) alone. Seeds, positions: [B] int32."""
    key = _mix(_mix(_mix(seed_low) ^ seed_high) + positions)[:, None]
    ids = torch.arange(vocab_size, dtype=torch.int32, device=key.device)[None, :]
    bits = _mix(_mix(ids * (0x9E3779B1 - (1 << 32)) ^ key) + key)  # the golden ratio spreads neighbouring ids
    uniform = (((bits >> 9) & 0x7FFFFF).float() + 0.5) * 2.0**-23  # in (0, 1), exact in float32
    return -torch.log(-torch.log(uniform))


def gather_logprobs(
    logits: Tensor, tokens: Tensor, top: int, num_ids: int, named: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Logprobs of the model's own distribution: of the tokens, of the `top` best ids, of named ids by row.

    logits [B, V] float32 untouched; tokens [B] int64. Returns ids and values [B, 1 + top + P]; P is the longest list of
    `named`, shorter ones repeat id 0 at their end.
    """
    ids = [tokens[:, None]]
    if top > 0:
        ids.append(logits[:, :num_ids].topk(min(top, num_ids), dim=-1).indices)
    if named:
        width = max(map(len, named))
        padded = np.array([n + [0] * (width - len(n)) for n in named], dtype=np.int64)
        ids.append(to_device(padded, logits.device))
    chosen = torch.cat(ids, dim=1)
    return chosen, logits.gather(1, chosen) - logits.logsumexp(-1, keepdim=True)
