"""The in-process face, with the bundled model: nano-vLLM's interface, text, stop strings, defaults, errors."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, ParameterError, SamplingParams
from engine.config import ModelError
from engine.core import StepResult
from engine.messages import AddRequest
from engine.runner import Flight
from engine.scheduler import Scheduled

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPTS = ["The sea was calm, and", "In the year 1850"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(POCKET, variants=["bf16", "INT8_Per_Row"], kv_cache_tokens=8192, num_threads=1)


def test_text_in_text_out(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = llm.generate(PROMPTS, GREEDY)
    assert "Generating" in capsys.readouterr().err
    for prompt, out in zip(PROMPTS, outputs, strict=True):
        assert llm.tokenizer is not None
        assert out["text"] == llm.tokenizer.decode(out["token_ids"]) and out["finish_reason"] in ("length", "stop")
        by_ids = llm.generate([llm.tokenizer.encode(prompt).ids], GREEDY, use_tqdm=False)[0]
        assert by_ids["token_ids"] == out["token_ids"]
    assert capsys.readouterr().err == ""


def test_a_variant_is_chosen_by_either_spelling(llm: LLM) -> None:
    ours = llm.generate(PROMPTS, GREEDY, variant="int8-row", use_tqdm=False)
    study = llm.generate(PROMPTS, GREEDY, variant="INT8_Per_Row", use_tqdm=False)
    assert [o["token_ids"] for o in ours] == [o["token_ids"] for o in study]
    with pytest.raises(ModelError, match="loaded: bf16, int8-row"):
        llm.generate(PROMPTS, GREEDY, variant="fp8-row")
    with pytest.raises(ValueError, match="supported"):
        llm.generate(PROMPTS, GREEDY, variant="int3")


def test_a_stop_string_ends_the_text_before_it_also_across_tokens(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)[0]
    text, ids = whole["text"], whole["token_ids"]
    assert llm.tokenizer is not None
    first, second = llm.tokenizer.decode(ids[5:6]), llm.tokenizer.decode(ids[6:7])
    stop = first[-1:] + second[:1]
    params = SamplingParams(temperature=0, max_tokens=24, stop=["never here", stop])
    out = llm.generate(PROMPTS[:1], params, use_tqdm=False)[0]
    assert out["text"] == text[: text.index(stop)] and out["finish_reason"] == "stop"
    assert out["token_ids"] == ids[: len(out["token_ids"])] and len(out["token_ids"]) < 24
    assert llm.engine.blocks.num_used == 0


def test_parameters_by_prompt_and_the_checkpoints_defaults(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (3, 5)]
    assert [len(o["token_ids"]) for o in llm.generate(PROMPTS, params, use_tqdm=False)] == [3, 5]
    with pytest.raises(ValueError, match="2 prompts but 1"):
        llm.generate(PROMPTS, params[:1], use_tqdm=False)
    defaults = llm.engine.runner.model_config.generation
    assert llm.default_params(max_tokens=7) == SamplingParams(max_tokens=7, **defaults)  # type: ignore[arg-type]


def test_bad_requests_are_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(ParameterError, match="context"):
        llm.generate([[1] * 100_000], GREEDY, use_tqdm=False)
    with pytest.raises(ParameterError, match="vocabulary"):
        llm.generate([[1, 10_000_000]], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="detokenize"):
        llm.generate([[1]], SamplingParams(stop=["x"], detokenize=False), use_tqdm=False)
    assert not llm.engine.has_work


def test_the_first_step_begins_before_the_last_prompt_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(POCKET, variants=["bf16"], max_num_batched_tokens=64, max_num_seqs=8, kv_cache_tokens=2048, num_threads=1)
    alone = [llm.generate([[i] * 24], GREEDY, use_tqdm=False)[0]["token_ids"] for i in range(8)]
    calls: list[str] = []
    add, step = llm.engine.add, llm.engine.step

    def logged_add(request: AddRequest, prompt: list[int] | None = None) -> None:
        calls.append("add")
        add(request, prompt)

    def logged_step() -> StepResult:
        calls.append("step")
        return step()

    monkeypatch.setattr(llm.engine, "add", logged_add)
    monkeypatch.setattr(llm.engine, "step", logged_step)
    together = llm.generate([[i] * 24 for i in range(8)], GREEDY, use_tqdm=False)
    assert [o["token_ids"] for o in together] == alone
    assert calls[:10] == ["add", "add", "add", "step", *["add"] * 5, "step"]
    calls.clear()
    with pytest.raises(ParameterError, match="vocabulary"):
        llm.generate([*([i] * 24 for i in range(8)), [10_000_000]], GREEDY, use_tqdm=False)
    assert calls.count("step") == 1 and not llm.engine.has_work and llm.engine.blocks.num_used == 0


@pytest.mark.parametrize(("given", "beside"), [({}, 2059), ({"max_prefill_beside_decode": 256}, 256)])
def test_prompts_take_what_a_step_has_room_for(
    given: dict[str, int], beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside decode, where a server bounds them for its streams; unless the caller does."""
    llm = LLM(POCKET, variants=["bf16"], max_num_batched_tokens=2060, kv_cache_tokens=8192, num_threads=1, **given)
    steps: list[list[int]] = []
    launch = llm.engine.runner.launch

    def watched(step: dict[str, list[Scheduled]], *rest: Any) -> Flight:
        steps.append([s.num_tokens for s in step["bf16"]])
        return launch(step, *rest)

    monkeypatch.setattr(llm.engine.runner, "launch", watched)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    llm.generate([[7] * 100, [8] * 2040, [9] * 2040], params, use_tqdm=False)
    assert steps[:2] == [[100, 1960], [1, 80, beside - 80]]


def test_no_step_of_a_call_waits_for_a_full_collection(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Young objects are searched seldom, old ones not at all; after the call as the caller has set it."""
    thresholds: list[tuple[int, int, int]] = []
    step = llm.engine.step

    def watched() -> StepResult:
        thresholds.append(gc.get_threshold())
        return step()

    monkeypatch.setattr(llm.engine, "step", watched)
    before = gc.get_threshold()
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert thresholds and all(t[0] >= 5_000 and t[1] >= 50 and t[2] > 10**9 for t in thresholds)
    with pytest.raises(ParameterError, match="vocabulary"):
        llm.generate([[10_000_000]], GREEDY, use_tqdm=False)
    assert gc.get_threshold() == before


def test_bad_settings_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="colour"):
        LLM(POCKET, colour="blue")
    with pytest.raises(ModelError, match="tensor_parallel_size"):
        LLM(POCKET, tensor_parallel_size=2)
    with pytest.raises(ModelError, match="float8"):
        LLM(POCKET, dtype="float8")
    with pytest.raises(ModelError, match="device"):
        LLM(POCKET, device="tpu")
    with pytest.raises(ModelError, match="does not exist"):
        LLM("/no/such/folder")
    with pytest.raises(ModelError, match="does not fit the KV pool"):
        LLM(POCKET, max_model_len=1024, kv_cache_tokens=512)


def test_an_interrupted_call_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = llm.engine.step, iter(range(100))

    def stepping() -> object:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", stepping)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert llm.engine.blocks.num_used == 0 and not llm.engine.scheduler.has_work
    assert len(llm.generate(PROMPTS, GREEDY, use_tqdm=False)[0]["token_ids"]) == 24
