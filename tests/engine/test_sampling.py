"""Sampling: each filter against a plain definition, the draw's distribution, seeds, penalties, bans, logprobs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from engine import LLM, ParameterError, SamplingParams
from engine.kernels.reference import filter_thresholds, gumbel_noise, nucleus_thresholds
from engine.sampling import SamplingPlan, penalise, plan_sampling, unpack
from engine.sequence import Sequence, check_params

Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def llm(checkpoint: Checkpoint) -> LLM:
    return LLM(checkpoint("qwen3"), kv_cache_tokens=4096, max_num_seqs=64)


def generate(llm: LLM, params: SamplingParams | list[SamplingParams], prompts: list[list[int]]) -> list[dict]:  # type: ignore[type-arg]
    return llm.generate(prompts, params, use_tqdm=False)


def kept(
    logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, temperature: float = 1.0
) -> set[int]:
    """Ids at or above the thresholds, which must be the same whether all or only the best are looked at."""
    floats = torch.tensor([[temperature, top_p, min_p, 0, 0, 1]])
    found = set()
    for width in (len(logits), max(top_k, 1)):
        ordered = logits[None].sort(descending=True).values[:, :width]
        found.add(filter_thresholds(ordered, floats, torch.tensor([top_k])).item())
    (threshold,) = found
    if top_k == 0:
        nucleus = nucleus_thresholds(logits[None], torch.tensor([temperature]), torch.tensor([top_p]))
        threshold = max(threshold, nucleus.item())
    return set((logits >= threshold).nonzero()[:, 0].tolist())


def test_filters_keep_what_their_definitions_say() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        logits = torch.randn(50) * 2
        p = logits.softmax(-1)
        order = p.argsort(descending=True).tolist()
        assert kept(logits, top_k=7) == set(order[:7])
        mass, nucleus = 0.0, set()
        for i in order:
            if mass >= 0.8:
                break
            nucleus.add(i)
            mass += p[i].item()
        assert kept(logits, top_p=0.8) == nucleus
        best_nine = (logits / 3)[order[:9]].softmax(-1).tolist()
        few = {i for n, i in enumerate(order[:9]) if sum(best_nine[:n]) < 0.6}
        assert kept(logits, top_k=9, top_p=0.6, temperature=3.0) == few
        assert kept(logits, min_p=0.1) == {i for i in order if p[i] >= 0.1 * p[order[0]]}
        assert kept(logits) == set(order)
        assert kept(logits, top_p=1e-6) == {order[0]}


def test_noise_is_standard_gumbel_and_depends_on_all_three() -> None:
    seeds = torch.arange(200, dtype=torch.int32)
    noise = gumbel_noise(seeds, seeds * 0, torch.full_like(seeds, 7), 1000)
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772) < 0.02 and abs(noise.var().item() - math.pi**2 / 6) < 0.03
    largest = noise.amax(-1)  # of 1,000 standard ones: a Gumbel about log(1000)
    assert abs(largest.mean().item() - math.log(1000) - 0.5772) < 4 * math.pi / math.sqrt(6 * 200)
    one = torch.tensor([1], dtype=torch.int32)
    base = gumbel_noise(one, one, one, 100)
    for other in (gumbel_noise(one + 1, one, one, 100), gumbel_noise(one, one + 1, one, 100)):
        assert (base - other).abs().min() > 0
    assert torch.equal(base, gumbel_noise(one, one, one, 100))
    flat = noise.flatten()
    neighbours = torch.corrcoef(torch.stack([flat[:-1], flat[1:]]))[0, 1]
    assert abs(neighbours.item()) < 0.01


def test_draws_follow_the_distribution(checkpoint: Checkpoint, llm: LLM) -> None:
    """4,000 seeded draws of one position: within four standard deviations of the model's probabilities, per id."""
    prompt, n = [3, 1, 4], 4000
    params = [SamplingParams(temperature=1.7, seed=1000 + i, max_tokens=1, ignore_eos=True) for i in range(n)]
    counts = Counter(o["token_ids"][0] for o in generate(llm, params, [prompt] * n))
    p = (tiny.reference_logits(checkpoint("qwen3"), prompt)[-1] / 1.7).softmax(-1)
    for i in range(tiny.VOCAB):
        expected, deviation = n * p[i].item(), math.sqrt(n * p[i].item() * (1 - p[i].item()))
        assert abs(counts[i] - expected) <= 4 * deviation + 1, i


def test_what_is_captured_and_what_comes_back() -> None:
    """Which parameters leave the captured draws; a packed row of more logprobs than were asked for."""

    def plan(**params: object) -> SamplingPlan:
        sequence = Sequence(0, "bf16", [1], SamplingParams(**params), frozenset([2]), 1, b"", [], 0.0)  # type: ignore[arg-type]
        sequence.num_tokens += 1
        return plan_sampling([sequence])

    assert plan(temperature=0.8).is_plain and plan(temperature=0, top_k=99).is_plain
    for params in ({"top_p": 0.9, "logprobs": 20}, {"top_k": 64}, {"min_p": 0.1}, {"temperature": 0, "logprobs": 0}):
        assert plan(**params).is_usual and not plan(**params).is_plain
    for params in ({"top_k": 65}, {"logit_bias": {1: 1}}, {"min_tokens": 1}, {"presence_penalty": 1}):
        assert not plan(**params).is_usual
    assert not plan(logprob_token_ids=[1]).is_usual
    values = torch.tensor([[-1.5, -0.5, -2.0, 0.0]])
    sampled = torch.cat([torch.tensor([[7, 3, 4, 0]], dtype=torch.int32), values.view(torch.int32)], dim=1)
    tokens, ids, shown = unpack(sampled, SamplingPlan(num_logprobs=2))
    assert ids is not None and shown is not None
    assert (tokens.tolist(), ids.tolist(), shown.tolist()) == ([7], [[7, 3, 4]], [[-1.5, -0.5, -2.0]])
    assert unpack(sampled, SamplingPlan()) == (tokens, None, None)
    named = unpack(sampled, SamplingPlan(num_logprobs=2, named=[[0]]))
    assert named[1] is not None and named[1].tolist() == [[7, 3, 4, 0]]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(checkpoint: Checkpoint, overlap: bool) -> None:
    llm = LLM(checkpoint("qwen3"), kv_cache_tokens=400, overlap=overlap, max_num_batched_tokens=64)
    mine = SamplingParams(temperature=1, top_p=0.9, top_k=40, seed=11, max_tokens=30, ignore_eos=True)
    prompt = [9, 8, 7, 6]
    alone = generate(llm, mine, [prompt])[0]["token_ids"]
    assert alone != generate(llm, SamplingParams(temperature=1, seed=12, max_tokens=30), [prompt])[0]["token_ids"]
    others = [SamplingParams(temperature=0.8, max_tokens=60, ignore_eos=True, presence_penalty=0.5)] * 9
    crowd = generate(
        llm, [*others, mine, *others], [[i] * 5 for i in range(9)] + [prompt] + [[i] * 9 for i in range(9)]
    )
    assert crowd[9]["token_ids"] == alone
    assert llm.engine.scheduler.counters["bf16"].preemptions > 0  # the pool is too small for the crowd


def test_sequence_i_of_n_draws_from_seed_plus_i(llm: LLM) -> None:
    many = generate(llm, SamplingParams(temperature=1, seed=5, n=3, max_tokens=12, ignore_eos=True), [[1, 2]])[0]
    for i, output in enumerate(many["outputs"]):
        one = generate(llm, SamplingParams(temperature=1, seed=5 + i, max_tokens=12, ignore_eos=True), [[1, 2]])[0]
        assert output["token_ids"] == one["token_ids"]


def test_penalties_equal_their_definitions() -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 12)
    tokens = torch.tensor([[3, 3, 5, 7, 7, 7, 9, 9]], dtype=torch.int32)  # 3 prompt, 4 output, 1 beyond the end
    floats = torch.tensor([[1.0, 1.0, 0.0, 0.4, 0.3, 1.5]])
    got = penalise(logits.clone(), tokens, torch.tensor([7]), torch.tensor([3]), floats)[0]
    want = logits[0].clone()
    for i in (3, 5, 7, 9):
        want[i] = want[i] / 1.5 if want[i] > 0 else want[i] * 1.5
    want[7] -= 0.3 * 3 + 0.4
    want[9] -= 0.3 * 1 + 0.4
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("overlap", [False, True])
def test_penalised_greedy_equals_a_step_by_step_reference(checkpoint: Checkpoint, overlap: bool) -> None:
    folder = checkpoint("qwen2")
    llm = LLM(folder, kv_cache_tokens=1024, overlap=overlap)
    prompt = [5, 6, 5, 6, 5]
    params = SamplingParams(
        temperature=0, max_tokens=20, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.2
    )
    got = generate(llm, [params, SamplingParams(temperature=0, max_tokens=20)], [prompt, [1, 2, 3]])[0]["token_ids"]
    ids, out = list(prompt), []
    for _ in range(20):
        logits = tiny.reference_logits(folder, ids)[-1]
        for i in set(ids):
            logits[i] = logits[i] / 1.3 if logits[i] > 0 else logits[i] * 1.3
        for i, count in Counter(out).items():
            logits[i] -= 0.2 * count + 0.7
        out.append(int(logits.argmax()))
        ids.append(out[-1])
    assert got == out


def test_bias_bans_and_stop_ids(llm: LLM) -> None:
    plain = generate(llm, SamplingParams(temperature=0, max_tokens=12), [[1, 2, 3]])[0]["token_ids"]
    forced = SamplingParams(temperature=0, max_tokens=5, logit_bias={17: 100})
    assert generate(llm, forced, [[1, 2, 3]])[0]["token_ids"] == [17] * 5
    stop = plain[3]
    first = plain.index(stop)
    out = generate(llm, SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop]), [[1, 2, 3]])[0]
    assert out["token_ids"] == plain[: first + 1] and out["finish_reason"] == "stop"
    params = SamplingParams(temperature=0, max_tokens=30, min_tokens=10, stop_token_ids=[stop], logit_bias={stop: 100})
    out = generate(llm, params, [[1, 2, 3]])[0]
    assert stop not in out["token_ids"][:10] and out["token_ids"][10] == stop and len(out["token_ids"]) == 11


def test_eos_ends_and_ignore_eos_does_not(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path, "qwen3", eos_token_id=[21, 22])
    llm = LLM(folder, kv_cache_tokens=512)
    biased = {"temperature": 0.0, "max_tokens": 6, "logit_bias": {22: 100.0}}
    out = generate(llm, SamplingParams(**biased), [[1]])[0]  # type: ignore[arg-type]
    assert out["token_ids"] == [22] and out["finish_reason"] == "stop"
    out = generate(llm, SamplingParams(**biased, ignore_eos=True), [[1]])[0]  # type: ignore[arg-type]
    assert out["token_ids"] == [22] * 6 and out["finish_reason"] == "length"
    out = generate(llm, SamplingParams(**biased, min_tokens=3), [[1]])[0]  # type: ignore[arg-type]
    assert len(out["token_ids"]) == 4 and out["token_ids"][-1] == 22


def test_logprobs_are_of_the_models_own_distribution(checkpoint: Checkpoint, llm: LLM) -> None:
    """Whatever temperature, penalties or bias chose the token; top-n, named ids and neighbours' wishes do not mix."""
    prompt = [2, 4, 6]
    params = [
        SamplingParams(temperature=0, max_tokens=4, logprobs=5),
        SamplingParams(temperature=1.5, seed=1, max_tokens=4, logprobs=0, logit_bias={50: 20}, presence_penalty=1),
        SamplingParams(temperature=0, max_tokens=4, logprobs=2, logprob_token_ids=[7, 150, 3]),
        SamplingParams(temperature=0, max_tokens=4, logprob_token_ids=[9]),
        SamplingParams(temperature=0, max_tokens=4),
    ]
    outputs = generate(llm, params, [prompt] * len(params))
    assert "logprobs" not in outputs[4]
    for p, out in zip(params[:4], outputs, strict=False):
        ids = list(prompt)
        for token, entry in zip(out["token_ids"], out["logprobs"], strict=True):
            want = tiny.reference_logits(checkpoint("qwen3"), ids)[-1].log_softmax(-1)
            top = want.topk(p.logprobs or 0).indices.tolist() if p.logprobs else []
            assert list(entry.ids) == [token, *top, *p.logprob_token_ids]
            torch.testing.assert_close(torch.tensor(entry.values), want[list(entry.ids)], atol=1e-4, rtol=0)
            ids.append(token)


def test_the_sampled_tokens_logprob_equals_the_top_ones_exactly(llm: LLM) -> None:
    """Clients find greedy-ness by comparing floats."""
    for entry in generate(llm, SamplingParams(temperature=0, max_tokens=16, logprobs=1), [[1, 5]])[0]["logprobs"]:
        assert entry.values[0] == entry.values[1]


def test_prompt_logprobs_start_and_prefix_cache(checkpoint: Checkpoint) -> None:
    """Positions before the start may come from the cache; those after it are computed and reported all the same."""
    llm = LLM(checkpoint("qwen3"), kv_cache_tokens=1024)
    prompt = list(range(100))
    whole = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    first = generate(llm, whole, [prompt])[0]
    again = generate(llm, whole, [prompt])[0]
    assert again["num_cached_tokens"] == 0 and len(again["prompt_logprobs"]) == 100
    late = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, prompt_logprobs_start=70)
    out = generate(llm, late, [prompt])[0]
    assert out["num_cached_tokens"] == 64
    assert out["prompt_logprobs"][:70] == [None] * 70
    for got, want in zip(out["prompt_logprobs"][70:], first["prompt_logprobs"][70:], strict=True):
        assert got.ids == want.ids
        torch.testing.assert_close(torch.tensor(got.values), torch.tensor(want.values), atol=1e-4, rtol=0)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_prompt_that_is_only_read_reports_every_position(checkpoint: Checkpoint, overlap: bool) -> None:
    """In steps that overlap, too: results of one arrive when the last one has been scheduled."""
    prompts = [[(7 * i + j) % 150 for j in range(n)] for i, n in enumerate((100, 60, 33, 7))]
    options = {"kv_cache_tokens": 1024, "max_num_batched_tokens": 32, "max_num_seqs": 4, "enable_prefix_caching": False}
    llm = LLM(checkpoint("qwen3"), overlap=overlap, **options)
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
    for prompt, out in zip(prompts, generate(llm, params, prompts), strict=True):
        want = tiny.reference_logits(checkpoint("qwen3"), prompt).log_softmax(-1)
        assert out["finish_reason"] == "length" and out["prompt_logprobs"][0] is None
        got = torch.tensor([entry.values[0] for entry in out["prompt_logprobs"][1:]])
        torch.testing.assert_close(got, want[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0], atol=1e-4, rtol=0)
    assert not llm.engine.has_work and llm.engine.blocks.num_used == 0


WRONG = [
    {"temperature": -1},
    {"temperature": float("nan")},
    {"temperature": 2.1},
    {"top_p": 0},
    {"top_p": 1.1},
    {"top_k": -2},
    {"min_p": 2},
    {"seed": -1},
    {"seed": 2**63},
    {"presence_penalty": 2.5},
    {"frequency_penalty": float("inf")},
    {"repetition_penalty": 0},
    {"logit_bias": {199: 1.0}},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {1: 101.0}},
    {"stop": [""]},
    {"stop": ["x"] * 17},
    {"stop_token_ids": [199]},
    {"stop_token_ids": [-(2**63)]},
    {"n": 0},
    {"n": 129},
    {"logprobs": 21},
    {"logprobs": -1},
    {"prompt_logprobs": 21},
    {"prompt_logprobs_start": -1},
    {"logprob_token_ids": [2**31]},
    {"max_tokens": -1},
    {"min_tokens": 65},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: f"{next(iter(w))}={next(iter(w.values()))}"[:40])
def test_out_of_range_parameters_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ParameterError) as e:
        check_params(SamplingParams(**wrong), [1], 256, 199)  # type: ignore[arg-type]
    assert e.value.param == next(iter(wrong)) and e.value.param in str(e.value)


@pytest.mark.parametrize("prompt", [[], [-1], [199], [2**31], [-(2**63)], [1] * 256])
def test_prompts_out_of_range_are_refused(prompt: list[int]) -> None:
    with pytest.raises(ParameterError) as e:
        check_params(SamplingParams(max_tokens=1), prompt, 256, 199)
    assert e.value.param == "prompt"
    assert e.value.code == ("context_length_exceeded" if len(prompt) == 256 else None)
