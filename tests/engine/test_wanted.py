"""What the last layer leaves out for tokens that nobody asks for changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from engine import LLM, SamplingParams, kernels, mixed_graphs
from engine.batch import Assembled
from engine.config import EngineConfig
from engine.kernels import AttentionPlan, KVCache, reference
from engine.mixed_graphs import Layout, MixedGraphs, mixed_layouts, outruns_host
from engine.models.qwen import Batch, Qwen
from engine.scheduler import Scheduled

Checkpoint = Callable[[str], Path]
Forward = Callable[[Qwen, Batch, list[KVCache]], Tensor]

RNG = random.Random(5)
PROMPTS = [[RNG.randrange(tiny.VOCAB) for _ in range(n)] for n in (5, 33, 1, 70, 90, 40, 1, 120, 2, 61)]
PLAIN = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
OTHERS = [
    SamplingParams(temperature=0, max_tokens=0),  # nothing is sampled
    SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=2),
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=0, prompt_logprobs_start=25),
]


def whole(forward: Forward) -> Forward:
    """The plain definition: all hidden states, of which some are taken."""

    def run(model: Qwen, batch: Batch, kv: list[KVCache]) -> Tensor:
        hidden = forward(model, replace(batch, wanted=None), kv)
        return hidden if batch.wanted is None else hidden[batch.wanted.index.long()]

    return run


def answers(llm: LLM, params: list[SamplingParams]) -> list[dict[str, Any]]:
    return llm.generate(PROMPTS, params, use_tqdm=False)


def same(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a["token_ids"] == b["token_ids"] and a["finish_reason"] == b["finish_reason"]
        for key in ("logprobs", "prompt_logprobs"):
            for x, y in zip(a.get(key, []), b.get(key, []), strict=True):
                assert (x is None) == (y is None)
                if x is not None:
                    assert x.ids == y.ids
                    torch.testing.assert_close(torch.tensor(x.values), torch.tensor(y.values), atol=2e-5, rtol=0)


@pytest.mark.parametrize("budget", [17, 100, 2048])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_answers_stay_the_same(checkpoint: Checkpoint, family: str, budget: int) -> None:
    """Chunks, mixed batches, prompt logprobs from a start on, prompts that sample nothing; beside each other or not."""
    llm = LLM(checkpoint(family), kv_cache_tokens=2048, max_num_seqs=8, max_num_batched_tokens=budget)
    for kinds in ([PLAIN, OTHERS[0]], [PLAIN, *OTHERS]):
        params = [kinds[i % len(kinds)] for i in range(len(PROMPTS))]
        llm.engine.blocks.clear()
        got = answers(llm, params)
        llm.engine.blocks.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Qwen, "forward", whole(Qwen.forward))
            want = answers(llm, params)
        same(got, want)


@pytest.mark.parametrize("variant", ["bf16", "int8-row", "w8a8-fp8-row+kv8"])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_wanted_hidden_states_are_those_of_the_whole(checkpoint: Checkpoint, family: str, variant: str) -> None:
    options = {"kv_cache_tokens": 2048, "max_num_seqs": 8, "max_num_batched_tokens": 48, "enable_prefix_caching": False}
    llm = LLM(checkpoint(family), [variant], **options)
    forward, seen = Qwen.forward, set()

    def compared(model: Qwen, batch: Batch, kv: list[KVCache]) -> Tensor:
        want, got = whole(forward)(model, batch, kv), forward(model, batch, kv)
        # codes of 8-bit activations may fall to either side of a half with the order of a sum
        torch.testing.assert_close(got, want, atol=0.1 if variant.startswith("w8a8") else 2e-5, rtol=1e-4)
        w = batch.wanted
        seen.add("all" if w is None else "none" if not len(w.index) else "last" if w.plan else "some")
        return got

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen, "forward", compared)
        answers(llm, [PLAIN] * len(PROMPTS))
        answers(llm, [[PLAIN, *OTHERS][i % 4] for i in range(len(PROMPTS))])
        llm.generate(PROMPTS[7:8], PLAIN, use_tqdm=False)  # 120 tokens: two chunks of 48, of which nobody wants any
    assert seen == {"all", "none", "last", "some"}


@pytest.mark.parametrize("beside", [40, 150])
def test_a_mixed_graph_gives_the_hidden_states_that_are_sampled(checkpoint: Checkpoint, beside: int) -> None:
    """Its work runs here without being captured; attention is told the lengths that kernels read from the device."""
    options = {"max_num_batched_tokens": 150, "max_prefill_beside_decode": beside}
    llm = LLM(checkpoint("qwen3"), kv_cache_tokens=2048, max_num_seqs=20, **options)
    params = [[PLAIN, PLAIN, OTHERS[0]][i % 3] for i in range(len(PROMPTS))]
    want = answers(llm, params)
    llm.engine.blocks.clear()

    def attention(q: Tensor, cache: KVCache, block_tables: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        lengths = np.diff(plan.query_starts.numpy())
        plan = replace(plan, query_lens_host=lengths, context_lens_host=plan.context_lens.numpy())
        return reference.attention(q, cache, block_tables, plan, scale)

    def rope_and_attend(*args: Any) -> Tensor:
        new, rest = args[:8], args[8:]
        return attention(kernels.rope_and_store(*new), args[6], *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "attention", attention)
        patch.setattr(kernels, "rope_and_attend", rope_and_attend)
        runner = llm.engine.runner
        patch.setattr(mixed_graphs, "outruns_host", lambda model: True)
        layouts = mixed_layouts(llm.engine.config, runner.max_model_len, 150)
        graphs = MixedGraphs(runner.models, runner.tables, runner.kv, runner.block_sizes, layouts)
        graphs.capture(lambda work: SimpleNamespace(replay=work))  # type: ignore[arg-type, return-value]
        runner.mixed_graphs = graphs
        before, used = llm.engine.num_steps, set()

        def forward(variant: str, scheduled: list[Scheduled], layout: Layout) -> tuple[Tensor, Assembled]:
            used.add((layout.num_decodes, layout.num_tokens))
            return MixedGraphs.forward(graphs, variant, scheduled, layout)

        patch.setattr(graphs, "forward", forward)
        same(answers(llm, params), want)
        assert runner.num_replays == llm.engine.num_steps - before > 12
        assert ((20, 150) in used) == (beside == 150)


def test_which_graph_holds_a_batch() -> None:
    """A full batch must fill its graph; one that widens contexts has room for so many."""
    full, beside, widening = Layout(0, 8192, full=True), Layout(256, 8192, full=True), Layout(16, 512, widens=True)
    assert full.holds(0, 4, 8192, 30000) and full.holds(0, 32, 8000, 8000)
    assert not full.holds(1, 4, 8191, 8191) and not full.holds(0, 33, 8192, 8192) and not full.holds(0, 4, 7900, 7900)
    assert beside.holds(0, 128, 8192, 8192) and beside.holds(256, 20, 7936, 9000)
    assert not beside.holds(256, 20, 7600, 9000) and not beside.holds(0, 129, 8192, 8192)
    assert widening.holds(0, 1, 2, 1024) and not widening.holds(0, 1, 2, 1025)


@pytest.mark.parametrize("beside", [2048, 8192])
def test_which_full_batches_have_a_graph(beside: int) -> None:
    config = EngineConfig(model="", max_num_seqs=100, max_prefill_beside_decode=beside)
    sizes = [(x.num_decodes, x.num_tokens, x.widens) for x in mixed_layouts(config, 4096, 8192) if x.full]
    want = [(0, 8192), (100, 8192)] if beside == 8192 else [(0, 8192)]
    assert sizes == [(*size, widens) for size in want for widens in (False, True)]
    assert not any(x.full for x in mixed_layouts(config, 4096, 0))


def test_the_host_is_outrun_by_8_bit_products_alone(checkpoint: Checkpoint) -> None:
    variants = ["bf16", "int8-row", "w8a8-fp8-row+kv8"]
    models = LLM(checkpoint("qwen3"), variants, kv_cache_tokens=2048).engine.runner.models
    assert [outruns_host(models[name]) for name in variants] == [False, False, True]
