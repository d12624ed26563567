"""CUDA graphs of decode: one launch for a whole step of a variant instead of some three hundred.

A graph is captured for each variant and each of a few batch sizes; a batch runs in the next larger size, padded with
sequences that have no context, store nothing and write to a spare row of the tables. Two parts, so that what varies
between steps can come between them:

    forward    per (variant, size): inputs from the tables, model, head -> `logits`, one buffer shared by all
    draw       per size, shared by all variants: an id a row, also into the token table. One for greedy and plain draws
               alone, of two launches; one for every `SamplingPlan.is_usual`, whose kernels read in the tables what each
               row asks for

All forwards share one memory pool, of which L2 keeps what it can (`l2.KeptMemory`), and all other graphs another one:
their replays follow one another on one stream. Inputs are two int32 vectors, the rows and the contexts, in buffers of
their own; everything else is already on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch import Tables, decode_batch
from engine.kernels import KVCache
from engine.l2 import KeptMemory
from engine.models.qwen import Qwen
from engine.sampling import PLAIN, USUAL, sample
from engine.scheduler import Scheduled
from engine.transfer import to_device

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
WARM_UP_RUNS = 2  # before a capture: libraries allocate workspaces and compile on the first call


def decode_sizes(max_size: int) -> list[int]:
    """The batch sizes that are captured for up to `max_size` sequences."""
    return [s for s in SIZES if s < max_size] + [max_size] if max_size else []


class DecodeGraphs:
    """Captured decode steps of every variant for up to `max_size` sequences."""

    def __init__(
        self,
        models: dict[str, Qwen],
        tables: Tables,
        kv: dict[str, list[KVCache]],
        block_sizes: dict[str, int],
        num_ids: int,
        max_size: int,
        kept_bytes: int,
    ) -> None:
        """kept_bytes: of a step's activations, to be kept in L2; 0: none."""
        self.models, self.tables, self.kv = models, tables, kv
        self.block_sizes, self.num_ids = block_sizes, num_ids
        self.device = tables.tokens.device
        self.sizes = decode_sizes(max_size)
        embedding = next(iter(models.values())).embedding  # [V, H]
        self.logits = embedding.new_zeros(max_size, embedding.shape[0])
        spare = tables.tokens.shape[0] - 1
        # rows and contexts (this step's token included) of up to max_size sequences; context 0 is padding
        self._inputs = torch.tensor([[spare] * max_size, [0] * max_size], dtype=torch.int32, device=self.device)
        self._spare = spare
        self._forward: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._draw: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}  # by size, and whether it is the plain one
        self._sampled: dict[tuple[int, bool], Tensor] = {}  # what they return
        self._pool = torch.cuda.graph_pool_handle()
        self.kept = KeptMemory(kept_bytes, self.device)

    @property
    def max_size(self) -> int:
        return self.logits.shape[0]

    @property
    def rows(self) -> Tensor:
        """[max_size] int32 of the last `forward`."""
        return self._inputs[0]

    @property
    def contexts(self) -> Tensor:
        """[max_size] int32 of the last `forward`: where each new token will stand."""
        return self._inputs[1]

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture everything, largest first, so that smaller graphs reuse the memory of larger ones."""
        for size in reversed(self.sizes):
            for variant in self.models:
                self.capture_one(variant, size)
            for plain in (True, False):
                self._draw[size, plain] = self.record(partial(self._run_draw, size, plain))

    @torch.inference_mode()
    def capture_one(self, variant: str, size: int) -> None:
        """Capture one variant's forward, between steps or at start."""
        self._inputs[0].fill_(self._spare)  # the last step's rows and contexts: their slots must not be written again
        self._inputs[1].zero_()
        self._forward[variant, size] = self.record(partial(self._run_forward, variant, size), self.kept)

    def forget(self, variant: str) -> None:
        """Drop a variant's graphs."""
        self._forward = {key: graph for key, graph in self._forward.items() if key[0] != variant}

    def record(self, work: Callable[[], None], kept: KeptMemory | None = None) -> torch.cuda.CUDAGraph:
        """Capture `work`, with what it allocates in `kept` or in the pool that other graphs share."""
        for _ in range(WARM_UP_RUNS):
            work()
        graph = torch.cuda.CUDAGraph()
        with kept.capture(graph) if kept else torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph

    def _run_forward(self, variant: str, size: int) -> None:
        model = self.models[variant]
        batch = decode_batch(self._inputs[0, :size], self._inputs[1, :size], self.tables, self.block_sizes[variant])
        model.logits(model.forward(batch, self.kv[variant]), self.logits[:size])

    def _run_draw(self, size: int, plain: bool) -> None:
        rows, contexts, t, plan = self.rows[:size], self.contexts[:size], self.tables, PLAIN if plain else USUAL
        self._sampled[size, plain] = sample(
            self.logits[:size], rows, contexts, t.floats, t.ints, t.tokens, self.num_ids, plan
        )

    def covers(self, variant: str, scheduled: list[Scheduled]) -> bool:
        """Whether this batch is one token of each of at most `max_size` sequences, all sampled, no prompt logprobs, and
        its graph is captured.
        """
        return (
            len(scheduled) <= self.max_size
            and (variant, self._size(len(scheduled))) in self._forward
            and all(
                s.num_tokens == 1 and s.samples and s.sequence.next_prompt_logprob >= s.sequence.prompt_len
                for s in scheduled
            )
        )

    def forward(self, variant: str, rows: npt.NDArray[np.int32], contexts: npt.NDArray[np.int32]) -> Tensor:
        """Replay one variant's decode step; logits [B, V], valid until the next call."""
        size = self._size(len(rows))
        padded = np.zeros((2, size), dtype=np.int32)
        padded[0, len(rows) :] = self._spare
        padded[0, : len(rows)], padded[1, : len(rows)] = rows, contexts
        self._inputs[:, :size].copy_(to_device(padded, self.device))
        self._forward[variant, size].replay()
        return self.logits[: len(rows)]

    def draw(self, num_sequences: int, plain: bool) -> Tensor:
        """What `sampling.sample` returns for the rows of the last `forward`; valid until the next call.

        plain: for `SamplingPlan.is_plain`; what else the rows' parameters ask for is ignored. Otherwise for `is_usual`.
        """
        kind = self._size(num_sequences), plain
        self._draw[kind].replay()
        return self._sampled[kind][:num_sequences]

    def _size(self, num_sequences: int) -> int:
        return next(s for s in self.sizes if s >= num_sequences)
