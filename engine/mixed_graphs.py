"""CUDA graphs of small mixed batches: prefill beside decode in one launch, so that neither waits for the host. And of
full batches of prompts, alone or, where steps beside decode may be as long, beside it: their kernels in 8 bits take
less time than the host to launch them.

A graph has room for so many decoding sequences and so many prefill tokens; a batch runs in the smallest one that holds
it. Tokens lie in two parts, decodes first, each padded: a padding token has position -1 and stores nothing, a
padding sequence has no context, a padding tile belongs to a sequence without queries. Over an 8-bit cache there are two
graphs of each kind, as short contexts are widened once (`kernels.WIDENED_CONTEXT`) and others in each tile. The graph
ends with the hidden states of each sequence's last token; head and sampling follow for those that are sampled.

All inputs are one int32 vector, so that a step costs one copy: see `Layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.batch import Assembled, Ints, Tables, decode_plan, finish_assembly
from engine.config import EngineConfig
from engine.kernels import PREFILL_TILE, WIDENED_CONTEXT, AttentionPlan, KVCache, plan_tiles
from engine.models.qwen import Batch, Qwen, Wanted
from engine.quant.linear import W8A8Linear
from engine.scheduler import Scheduled
from engine.transfer import to_device

DECODES = (16, 64, 256)  # sequences with one token
TOKENS = (128, 256, 512, 768, 1024, 1536, 2048)  # of all other sequences together
MAX_PREFILLS = 16  # sequences with more than one token, or one for each 256 tokens
SHORT = 64  # tokens of a prompt, of a full batch that may be beside decode: it takes one for each so many
FULL = 31 / 32  # of the tokens of a full batch's graph, at least: padding would cost more than the host does
MAX_FULL = 8192  # tokens of a full batch that has a graph: it keeps the memory of its activations

Record = Callable[[Callable[[], None]], torch.cuda.CUDAGraph]


@dataclass(frozen=True)
class Layout:
    """Where the inputs of a graph for D decodes and T prefill tokens lie in its int32 vector.

    N = D + T tokens; S = D + P + 1 sequences, the last one always padding; each piece starts on 16 bytes: token_rows
    [N], positions [N], rows [S], query_starts [S + 1], contexts [S], tiles [num_tiles, 2]. widens: what the contexts of
    the P sequences are together at most is so little that an 8-bit one is widened once. full: for batches alone that
    nearly have T tokens.
    """

    num_decodes: int
    num_tokens: int
    widens: bool = False
    full: bool = False

    @property
    def num_prefills(self) -> int:
        """P: sequences with more than one token, at most."""
        return max(MAX_PREFILLS, self.num_tokens // (SHORT if self.full and self.num_decodes else 256))

    @property
    def most_context(self) -> int | None:
        return WIDENED_CONTEXT * self.num_tokens if self.widens else None

    def holds(self, num_decodes: int, num_prefills: int, num_tokens: int, context: int) -> bool:
        """Whether such a batch runs in this graph. context: of its prefills together."""
        return (
            num_decodes <= self.num_decodes
            and num_prefills <= self.num_prefills
            and num_tokens <= self.num_tokens
            and (not self.full or num_decodes + num_tokens >= FULL * self.num_tokens)
            and (not self.widens or context <= WIDENED_CONTEXT * self.num_tokens)
        )

    @property
    def total_tokens(self) -> int:
        return self.num_decodes + self.num_tokens

    @property
    def num_sequences(self) -> int:
        return self.num_decodes + self.num_prefills + 1

    @property
    def num_outputs(self) -> int:
        """Hidden states: one a sequence, without the last one."""
        return self.num_decodes + self.num_prefills

    @property
    def num_tiles(self) -> int:
        return self.num_tokens // PREFILL_TILE + self.num_prefills

    @property
    def sizes(self) -> list[int]:
        n, s = self.total_tokens, self.num_sequences
        return [n, n, s, s + 1, s, 2 * self.num_tiles]

    @property
    def length(self) -> int:
        return sum(-(-size // 4) * 4 for size in self.sizes)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of the pieces."""
        pieces, offset = [], 0
        for size in self.sizes:
            pieces.append(vector[offset : offset + size])
            offset += -(-size // 4) * 4
        return pieces

    def pack(self, scheduled: list[Scheduled], spare: int) -> Ints:
        """The vector for these sequences, those with one token first. spare: the tables' row for padding."""
        vector = torch.zeros(self.length, dtype=torch.int32)
        token_rows, positions, rows, query_starts, contexts, tiles = (p.numpy() for p in self.split(vector))
        lengths = np.array([s.num_tokens for s in scheduled], dtype=np.int32)
        starts = np.array([s.start for s in scheduled], dtype=np.int32)
        own_rows = np.array([s.sequence.row for s in scheduled], dtype=np.int32)
        few, many = lengths == 1, lengths > 1
        num_few, num_many, d = int(few.sum()), int(many.sum()), self.num_decodes
        token_rows[:], positions[:], rows[:] = spare, -1, spare
        token_rows[:num_few], positions[:num_few] = own_rows[few], starts[few]
        rows[:num_few], contexts[:num_few] = own_rows[few], starts[few] + 1
        rows[d : d + num_many], contexts[d : d + num_many] = own_rows[many], starts[many] + lengths[many]
        ends = np.cumsum(lengths[many])
        total = int(ends[-1]) if num_many else 0
        firsts = ends - lengths[many]
        token_rows[d : d + total] = np.repeat(own_rows[many], lengths[many])
        positions[d : d + total] = np.arange(total) + np.repeat(starts[many] - firsts, lengths[many])
        query_starts[: d + 1] = np.arange(d + 1)
        query_starts[d + 1 :] = d + total
        query_starts[d + 1 : d + 1 + num_many] = d + ends
        tiles[0::2] = self.num_sequences - 1
        own_tiles = plan_tiles(lengths[many], 0)
        own_tiles[:, 0] += d
        tiles[: own_tiles.size] = own_tiles.ravel()
        return vector.numpy()


def mixed_layouts(config: EngineConfig, max_len: int, full_batch: int) -> list[Layout]:
    """The layouts that are captured for sequences of up to `max_len` tokens. full_batch: tokens of a full batch of
    prompts that is to have one, 0 for none.
    """
    most = min(config.max_num_seqs, DECODES[-1])
    decodes = [d for d in DECODES if d < most] + [most]
    layouts = [Layout(d, t) for d in decodes for t in TOKENS if t <= max_len]
    if full_batch:
        layouts.append(Layout(0, full_batch, full=True))
    if full_batch and config.max_prefill_beside_decode >= full_batch:
        layouts.append(Layout(most, full_batch, full=True))
    return [replace(x, widens=widens) for x in layouts for widens in (False, True)]


def outruns_host(model: Qwen) -> bool:
    """Whether the kernels of a full step, launched one by one, may take less time than the host: those of 8-bit
    products do.
    """
    return any(isinstance(layer.gate_up, W8A8Linear) for layer in model.layers)


class MixedGraphs:
    """Captured forwards of every variant for each `Layout`."""

    def __init__(
        self,
        models: dict[str, Qwen],
        tables: Tables,
        kv: dict[str, list[KVCache]],
        block_sizes: dict[str, int],
        layouts: list[Layout],
    ) -> None:
        self.models, self.tables, self.kv, self.block_sizes = models, tables, kv, block_sizes
        self._spare, self.layouts = tables.tokens.shape[0] - 1, layouts
        largest = max(self.layouts, key=lambda x: x.length, default=Layout(0, 0))
        num_outputs = max((x.num_outputs for x in self.layouts), default=0)
        device = tables.tokens.device
        self._vector = torch.from_numpy(largest.pack([], self._spare)).to(device)
        embedding = next(iter(models.values())).embedding
        self._hidden = embedding.new_zeros(num_outputs, embedding.shape[1])
        self._graphs: dict[tuple[str, Layout], torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def capture(self, record: Record) -> None:
        """Capture everything, largest first, through the recorder of the decode graphs (one memory pool)."""
        for layout in reversed(self.layouts):
            for variant in self.models:
                self.capture_one(variant, layout, record)

    @torch.inference_mode()
    def capture_one(self, variant: str, layout: Layout, record: Record) -> None:
        """Capture one variant's forward, between steps or at start, where it is of use: contexts in 16 bits need no
        widening, and the host has time enough beside full steps in 16 bits.
        """
        if layout.widens and self.kv[variant][0].k_scale is None:
            return
        if layout.full and layout.num_decodes and not outruns_host(self.models[variant]):
            return
        self._vector[: layout.length].copy_(to_device(layout.pack([], self._spare), self._vector.device))
        self._graphs[variant, layout] = record(partial(self._run, variant, layout))

    def forget(self, variant: str) -> None:
        """Drop a variant's graphs."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] != variant}

    def _run(self, variant: str, layout: Layout) -> None:
        token_rows, positions, rows, query_starts, contexts, tiles = layout.split(self._vector)
        tables, block_size = self.tables, self.block_sizes[variant]
        row, where = token_rows.long(), positions.clamp(min=0).long()
        slots = tables.blocks[row, where // block_size] * block_size + positions % block_size
        longest = np.full(layout.num_sequences, tables.tokens.shape[1] - 1, dtype=np.int32)
        plan = AttentionPlan(
            rows=rows,
            query_starts=query_starts,
            context_lens=contexts,
            query_lens_host=longest,
            context_lens_host=longest,
            num_decodes=layout.num_decodes,
            tiles=tiles.view(-1, 2),
            most_context=layout.most_context,
        )
        # A padding sequence's last token is another's: it has no context here, and nobody reads what comes out.
        n = layout.num_outputs
        wanted = Wanted((query_starts[1 : n + 1] - 1).clamp(min=0), decode_plan(rows[:n], contexts[:n], longest[:n]))
        batch = Batch(
            token_ids=tables.tokens[row, where],
            positions=where.int(),
            slots=torch.where(positions >= 0, slots, -1),
            block_tables=tables.blocks,
            plan=plan,
            wanted=wanted,
        )
        self._hidden[:n].copy_(self.models[variant].forward(batch, self.kv[variant]))

    def layout_for(self, variant: str, scheduled: list[Scheduled]) -> Layout | None:
        """The smallest graph that holds this batch; None where none is captured, or prompt logprobs are owed."""
        if any(s.sequence.next_prompt_logprob < s.sequence.prompt_len for s in scheduled):
            return None
        prefills = [s for s in scheduled if s.num_tokens > 1]
        num_tokens = sum(s.num_tokens for s in prefills)
        batch = (len(scheduled) - len(prefills), len(prefills), num_tokens, num_tokens + sum(s.start for s in prefills))
        fits = (x for x in self.layouts if x.holds(*batch) and (variant, x) in self._graphs)
        return min(fits, key=lambda x: (x.total_tokens, not x.widens), default=None)

    def forward(self, variant: str, scheduled: list[Scheduled], layout: Layout) -> tuple[Tensor, Assembled]:
        """Replay; hidden states [N, H] of the tokens that are sampled."""
        scheduled = sorted(scheduled, key=lambda s: s.num_tokens > 1)
        packed = layout.pack(scheduled, self._spare)
        self._vector[: layout.length].copy_(to_device(packed, self._vector.device))
        self._graphs[variant, layout].replay()
        num_few = sum(s.num_tokens == 1 for s in scheduled)
        places = np.arange(len(scheduled), dtype=np.int32)
        places[num_few:] += layout.num_decodes - num_few
        a = finish_assembly(scheduled, places, [], self._vector.device)
        return self._hidden.index_select(0, a.index), a
