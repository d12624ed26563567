"""The engine on a GPU: the same tokens as the plain path, and a host that never waits in steady decode."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from engine import LLM, SamplingParams
from engine.messages import AddRequest, pack_ids
from engine.quant.quantize import quantize
from engine.sampling import float_row, int_row, plan_sampling, sample, unpack
from engine.sequence import Sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VARIANTS = ["bf16", "int8-row", "fp8-row"]
MARGIN = 2e-3  # float32 on the GPU, whose sums run in another order: closer choices than this may fall either way
rng = random.Random(1)
PROMPTS = [[rng.randrange(tiny.VOCAB) for _ in range(n)] for n in (5, 16, 33, 70, 130, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu")
    return tiny.make_checkpoint(path, "qwen3", head_dim=64, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def qwen2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu2")
    return tiny.make_checkpoint(path, "qwen2", hidden_size=384, num_attention_heads=6, num_key_value_heads=1)


@pytest.fixture(autouse=True)
def no_sync_check_left() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def agrees(folder: Path, prompt: list[int], got: list[int], variant: str, margin: float = MARGIN) -> None:
    """Every token is the reference's best, or within `margin` of it, given the tokens before."""
    logits = tiny.reference_logits(folder, prompt + got[:-1], variant)[len(prompt) - 1 :]
    best, chosen = logits.max(-1).values, logits[torch.arange(len(got)), got]
    assert (best - chosen).max() <= margin


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_cache_tokens": 320}, {"max_num_batched_tokens": 48}, {"overlap": False}, {"cuda_graphs": False}],
)
def test_greedy_tokens_agree_with_the_reference(folder: Path, qwen2_folder: Path, options: dict[str, int]) -> None:
    for path in (folder, qwen2_folder):
        settings = {"kv_cache_tokens": 4096, "max_num_seqs": 16, "dtype": "float32", **options}
        llm = LLM(path, variants=VARIANTS, device="cuda", **settings)
        for variant in VARIANTS:
            for _ in range(2):  # the second time with prefix hits
                params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
                outputs = llm.generate(PROMPTS, params, variant=variant, use_tqdm=False)
                for prompt, out in zip(PROMPTS, outputs, strict=True):
                    assert len(out["token_ids"]) == 48
                    agrees(path, prompt, out["token_ids"], variant)
        assert llm.engine.blocks.num_used == 0


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": False}, {"overlap": False}])
def test_steps_in_which_nothing_is_sampled(folder: Path, options: dict[str, bool]) -> None:
    """A prompt that takes several, and one that is only read."""
    budget = {"max_num_batched_tokens": 48, "max_num_seqs": 16, "kv_cache_tokens": 1024}
    llm = LLM(folder, device="cuda", dtype="float32", enable_prefix_caching=False, **budget, **options)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    out = llm.generate([PROMPTS[4]], params, use_tqdm=False)[0]
    assert len(PROMPTS[4]) > 2 * 48 and len(out["token_ids"]) == 8
    agrees(folder, PROMPTS[4], out["token_ids"], "bf16")
    for asked in ({}, {"prompt_logprobs": 0}):
        params = SamplingParams(temperature=0, max_tokens=0, **asked)
        out = llm.generate([PROMPTS[4]], params, use_tqdm=False)[0]
        assert out["token_ids"] == [] and out["finish_reason"] == "length"
        assert len(out.get("prompt_logprobs", [])) == (len(PROMPTS[4]) if asked else 0)


@pytest.mark.parametrize("options", [{}, {"kv_cache_tokens": 64}, {"max_num_batched_tokens": 48}])
def test_greedy_tokens_over_8_bit_caches_agree_with_the_reference(
    folder: Path, qwen2_folder: Path, options: dict[str, int]
) -> None:
    """The margin is wider: a key between two codes falls to either side with the order of a sum."""
    variants = ["bf16+kv8", "int8-row+kvint8"]
    for path in (folder, qwen2_folder):
        settings = {"kv_cache_tokens": 4096, "max_num_seqs": 16, "dtype": "float32", **options}
        llm = LLM(path, variants=variants, device="cuda", **settings)
        for variant in variants:
            for _ in range(2):  # the second time with prefix hits
                params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
                outputs = llm.generate(PROMPTS, params, variant=variant, use_tqdm=False)
                for prompt, out in zip(PROMPTS, outputs, strict=True):
                    assert len(out["token_ids"]) == 48
                    agrees(path, prompt, out["token_ids"], variant, margin=0.05)
        assert llm.engine.blocks.num_used == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_the_same_on_every_device(dtype: torch.dtype, stored: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(2048, 1024) * 0.02).to(dtype)
    on_cpu, on_gpu = quantize(weight, stored, "row"), quantize(weight.cuda(), stored, "row")
    assert torch.equal(on_gpu[1].cpu(), on_cpu[1])
    assert torch.equal(on_gpu[0].cpu().view(torch.uint8), on_cpu[0].view(torch.uint8))


def test_prompt_logprobs_agree_with_the_reference(folder: Path) -> None:
    llm = LLM(folder, device="cuda", dtype="float32", kv_cache_tokens=4096)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3)
    for prompt, out in zip(PROMPTS, llm.generate(PROMPTS, params, use_tqdm=False), strict=True):
        want = tiny.reference_logits(folder, prompt).log_softmax(-1)
        for position in range(1, len(prompt)):
            got = out["prompt_logprobs"][position]
            torch.testing.assert_close(torch.tensor(got.values), want[position - 1, list(got.ids)], atol=MARGIN, rtol=0)


def test_seeded_draws_do_not_depend_on_the_batch(folder: Path) -> None:
    llm = LLM(folder, device="cuda", dtype="float32", kv_cache_tokens=4096)
    mine = SamplingParams(temperature=1, top_p=0.9, seed=11, max_tokens=40, ignore_eos=True)
    alone = llm.generate([[1, 2]], mine, use_tqdm=False)[0]["token_ids"]
    other = SamplingParams(temperature=0.7, max_tokens=50, ignore_eos=True, top_k=5)
    crowd = llm.generate([[3]] * 9 + [[1, 2]], [other] * 9 + [mine], use_tqdm=False)
    assert crowd[9]["token_ids"] == alone


KINDS = {
    "greedy": SamplingParams(temperature=0, max_tokens=64, ignore_eos=True),
    "drawn": SamplingParams(temperature=0.8, top_p=0.9, top_k=20, max_tokens=64, ignore_eos=True),
    "edited": SamplingParams(
        temperature=0.8,
        max_tokens=64,
        ignore_eos=True,
        presence_penalty=1,
        logit_bias={3: 1.0},
        logprobs=5,
        min_tokens=60,
    ),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_steady_decode_never_waits_for_the_device(folder: Path, kind: str) -> None:
    """Schedule and launch, three variants, any hidden synchronisation raising; results arrive one step late."""
    llm = LLM(folder, variants=VARIANTS, device="cuda", dtype="bfloat16", kv_cache_tokens=8192)
    engine = llm.engine
    for i in range(12):
        engine.add(AddRequest(i, VARIANTS[i % 3], pack_ids(PROMPTS[i % 5]), KINDS[kind], b"", []))
    for _ in range(8):  # prefill, and every kernel compiled
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    tokens = 0
    for _ in range(40):
        tokens += len(engine.step().token_ids)
    torch.cuda.set_sync_debug_mode("default")
    assert tokens == 40 * 12
    while engine.has_work:
        engine.step()
    assert engine.blocks.num_used == 0


@torch.inference_mode()
def test_captured_draws_equal_eager_ones(tmp_path: Path) -> None:
    """Every mix of parameters that the graphs take, batches of their sizes and between, in bits."""
    folder = tiny.make_checkpoint(tmp_path, "qwen3", head_dim=64, vocab_size=9000)
    runner = LLM(folder, device="cuda", dtype="bfloat16", kv_cache_tokens=8192, max_num_seqs=40).engine.runner
    graphs, t = runner.graphs, runner.tables
    assert graphs is not None
    choice = random.Random(0).choice
    torch.manual_seed(0)
    for size in (1, 7, 16, 33, 40):
        for kind in range(4):
            sequences = []
            for row in range(size):
                filters = {"top_p": choice([1, 0.95, 0.5]), "top_k": choice([0, 3, 20]), "min_p": choice([0, 0, 0.1])}
                params = SamplingParams(
                    temperature=choice([0, 0.7, 1.3]),
                    logprobs=choice([None, 0, 5, 20]) if kind % 2 else None,
                    **(filters if kind > 1 else {}),
                )
                sequences.append(Sequence(row, "bf16", [1], params, frozenset(), 77 + row, b"", [], 0.0))
            rows, padding = torch.randperm(size), torch.zeros(40 - size, dtype=torch.int32)
            t.ints[:size] = torch.tensor([int_row(s) for s in sequences]).cuda()
            t.floats[:size] = torch.tensor([float_row(s.params) for s in sequences]).cuda()
            graphs.rows.copy_(torch.cat([rows.int(), padding + 40]))
            graphs.contexts.copy_(torch.cat([torch.arange(size).int() + 1, padding]))
            graphs.logits.copy_(torch.randn(40, 9000) * (0.3, 5.0)[size % 2])
            batch = [sequences[row] for row in rows.tolist()]
            plan = plan_sampling(batch)
            assert plan.is_usual and (plan.is_plain or kind > 0)
            found = []
            for captured in (True, False):
                t.tokens.zero_()
                if captured:
                    sampled = graphs.draw(size, plan.is_plain)
                else:
                    tensors = (graphs.logits[:size], graphs.rows[:size], graphs.contexts[:size])
                    sampled = sample(*tensors, t.floats, t.ints, t.tokens, runner.num_ids, plan)
                tokens, ids, values = unpack(sampled.cpu(), plan)
                found.append([tokens, t.tokens[:-1].cpu()])
                if ids is not None and values is not None:
                    wanted = torch.tensor([-1 if s.params.logprobs is None else s.params.logprobs for s in batch])
                    shown = torch.arange(ids.shape[1])[None, :] <= wanted[:, None]
                    found[-1] += [torch.where(shown, ids, 0), torch.where(shown, values, 0)]
            for mine, its in zip(*found, strict=True):
                assert torch.equal(mine, its)


def test_a_variant_added_later_runs_without_graphs_and_then_with_them(folder: Path) -> None:
    """Graphs of it are captured between the steps of others, whose tokens stay the same; removed, it leaves nothing."""
    options = {"kv_cache_tokens": 4096, "max_num_seqs": 16, "variant_headroom": 1 << 30}
    llm = LLM(folder, device="cuda", dtype="float32", **options)
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    alone = [out["token_ids"] for out in llm.generate(PROMPTS, params, use_tqdm=False)]
    torch.cuda.empty_cache()
    allocated = torch.cuda.memory_allocated()
    engine.add_variant("int8-row", lambda: None)

    def check_added() -> int:
        before = engine.runner.num_replays
        outputs = llm.generate(PROMPTS, params, variant="int8-row", use_tqdm=False)
        for prompt, out in zip(PROMPTS, outputs, strict=True):
            agrees(folder, prompt, out["token_ids"], "int8-row")
        return engine.runner.num_replays - before

    assert engine.changes.has_captures and check_added() == 0
    for i, prompt in enumerate(PROMPTS):
        engine.add(AddRequest(10**6 + i, "bf16", pack_ids(prompt), params, b"", []))
    tokens: dict[int, list[int]] = {10**6 + i: [] for i in range(len(PROMPTS))}
    while engine.has_work:
        result = engine.step()
        for number, token in zip(result.sequence_ids, result.token_ids, strict=True):
            tokens[number].append(token)
        if engine.changes.has_captures:
            engine.changes.capture_next()
    for prompt, got, want in zip(PROMPTS, tokens.values(), alone, strict=True):
        agrees(folder, prompt, got, "bf16")
        assert len(got) == len(want) == 48
    while engine.changes.has_captures:
        engine.changes.capture_next()
    assert check_added() > 40
    engine.begin_removal("int8-row")
    engine.end_removal()
    assert torch.cuda.memory_allocated() - allocated < 1 << 20  # what is left belongs to no variant


def test_running_out_of_memory_fails_one_request_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(folder, device="cuda", dtype="float32", kv_cache_tokens=4096, cuda_graphs=False)
    engine = llm.engine
    model = type(engine.runner.variants["bf16"].model)
    forward = model.forward

    def forward_or_fail(self: object, batch: object, kv: torch.Tensor) -> torch.Tensor:
        if batch.token_ids.numel() > 100:  # type: ignore[attr-defined]
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return forward(self, batch, kv)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", forward_or_fail)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for i, prompt in enumerate([PROMPTS[0], PROMPTS[4], PROMPTS[1]]):
        engine.add(AddRequest(i, "bf16", pack_ids(prompt), params, b"", []))
    ended = {}
    while engine.has_work:
        ended |= {f.sequence_id: f.reason for f in engine.step().finished}
    assert ended == {0: "length", 1: "error", 2: "length"}
    assert engine.blocks.num_used == 0
