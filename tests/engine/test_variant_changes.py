"""Variants that come and go between steps: nothing in flight changes, nothing leaks, what has no room is refused."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.block_manager import hash_blocks, prefix_seed
from engine.config import EngineConfig, VariantRefused
from engine.core import Engine
from engine.messages import AddRequest, pack_ids
from engine.quant.memory import weight_tensors
from engine.sequence import SamplingParams

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
MATRICES = 3 * 4  # fused ones of the bundled model
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8], list(range(40, 80)), [900, 17, 3]]


def engine(*variants: str, headroom: int = 200 << 20, **options: object) -> Engine:
    settings = {"model": str(POCKET), "device": "cpu", "kv_cache_tokens": 2048, "num_threads": 1} | options
    return Engine(EngineConfig(variants=variants, variant_headroom=headroom, **settings))


class Load:
    """Requests of an engine, and the tokens that they got so far."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[int, list[int]] = {}
        self.cached: dict[int, int] = {}

    def add(self, variant: str, prompt: list[int], params: SamplingParams = GREEDY) -> int:
        info = next(v for v in self.engine.info.variants if v.name == variant)
        number, seed = len(self.tokens), prefix_seed(info.fingerprint)
        self.tokens[number] = []
        hashes = hash_blocks(seed, prompt, info.block_size)
        self.engine.add(AddRequest(number, variant, pack_ids(prompt), params, seed, hashes))
        return number

    def step(self) -> None:
        if self.engine.has_work:
            result = self.engine.step()
            for number, token in zip(result.sequence_ids, result.token_ids, strict=True):
                self.tokens[number].append(token)
            self.cached |= {s.sequence_id: s.num_cached_tokens for s in result.started}

    def run(self) -> None:
        while self.engine.has_work:
            self.step()

    def remove(self, variant: str) -> None:
        self.engine.begin_removal(variant)
        while self.engine.uses(variant):
            self.step()
        self.engine.end_removal()


def alone(variant: str) -> list[list[int]]:
    load = Load(engine(variant))
    numbers = [load.add(variant, prompt) for prompt in PROMPTS]
    load.run()
    return [load.tokens[n] for n in numbers]


@pytest.fixture(scope="module")
def wanted() -> dict[str, list[list[int]]]:
    return {name: alone(name) for name in ("bf16", "int8-row", "fp8-row+kv8")}


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_in_flight_do_not_notice(wanted: dict[str, list[list[int]]], overlap: bool) -> None:
    """Greedy tokens while another variant is loaded, used and removed, and those of that variant."""
    load = Load(engine("bf16", overlap=overlap))
    numbers = [load.add("bf16", prompt, SamplingParams(**{**_fields(GREEDY), "max_tokens": 200})) for prompt in PROMPTS]
    load.step()
    turns = 0

    def between() -> None:
        nonlocal turns
        turns += 1
        load.step()

    load.engine.add_variant("int8-row", between)
    assert turns == 2 * MATRICES  # planned and loaded
    assert all(len(load.tokens[n]) >= turns - 1 for n in numbers)
    added = [load.add("int8-row", prompt) for prompt in PROMPTS]
    load.step()
    load.remove("int8-row")
    assert not load.engine.takes("int8-row") and load.engine.has_work
    load.run()
    assert [load.tokens[n] for n in added] == wanted["int8-row"]
    assert [load.tokens[n][:24] for n in numbers] == wanted["bf16"]
    assert all(len(load.tokens[n]) == 200 for n in numbers)
    assert load.engine.blocks.num_used == 0 and list(load.engine.stats().variants) == ["bf16"]


def _fields(params: SamplingParams) -> dict[str, object]:
    return {name: getattr(params, name) for name in params.__struct_fields__}


@pytest.mark.parametrize(
    ("first", "added", "options"),
    [
        (["bf16"], ["int8-row", "w8a8-int8-row", "fp8-g128", "int8-tensor-fake"], {}),
        (["int8-row"], ["bf16", "w8a8-fp8-block"], {}),
        (["int8-row-fake"], ["int8-row", "bf16"], {"keep_bf16": ("layers.1.*",)}),
        (["bf16+kv8"], ["fp8-row+kvint8", "w8a8-fp8-row-smooth", "w8a8-int8-row-smooth"], {"load_format": "dummy"}),
    ],
)
def test_an_added_variant_is_as_if_loaded_at_start(
    first: list[str], added: list[str], options: dict[str, object]
) -> None:
    options = {"keep_bf16": ()} | options  # the head too
    at_start, later = engine(*first, *added, **options), engine(*first, **options)
    for name in added:
        later.add_variant(name, lambda: None)
    assert [v.name for v in later.info.variants] == [*first, *added]
    assert later.info.variants == at_start.info.variants  # fingerprints, bytes own and shared
    assert at_start.info.headroom - later.info.headroom == (
        at_start.runner.plan.weights.total - later.runner.plan.weights.total
    )
    for name in added:
        ours = weight_tensors(later.runner.variants[name].model)
        theirs = weight_tensors(at_start.runner.variants[name].model)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours, theirs, strict=True))


def test_twenty_times_in_and_out_leaves_nothing() -> None:
    load = Load(engine("bf16"))
    runner = load.engine.runner
    before = load.engine.info.variants, load.engine.info.headroom
    kept: set[int] = {t.data_ptr() for t in weight_tensors(runner.models["bf16"])}
    gone: list[weakref.ref[torch.Tensor]] = []
    for _ in range(20):
        load.engine.add_variant("fp8-row", lambda: None)
        gone += [weakref.ref(t) for t in weight_tensors(runner.models["fp8-row"]) if t.data_ptr() not in kept]
        number = load.add("fp8-row", PROMPTS[0], SamplingParams(temperature=0, max_tokens=2))
        load.remove("fp8-row")
        assert load.tokens[number]
    assert len(gone) == 20 * 2 * MATRICES  # codes and scales
    assert all(ref() is None for ref in gone)
    assert (load.engine.info.variants, load.engine.info.headroom) == before
    tables = (runner.variants, runner.models, runner.kv, runner.block_sizes, load.engine.phases)
    scheduler = load.engine.scheduler
    assert all(list(t) == ["bf16"] for t in (*tables, scheduler.waiting, scheduler.counters, scheduler.block_sizes))


def test_a_variant_that_comes_back_finds_its_prefixes_and_no_other_does() -> None:
    load = Load(engine("bf16"))
    prompt = list(range(100, 148))
    load.engine.add_variant("int8-row", lambda: None)
    first = load.add("int8-row", prompt)
    load.run()
    load.remove("int8-row")
    load.engine.add_variant("fp8-row", lambda: None)
    load.engine.add_variant("int8-row", lambda: None)
    again, other = load.add("int8-row", prompt), load.add("fp8-row", prompt)
    load.run()
    assert (load.cached[first], load.cached[again], load.cached[other]) == (0, 32, 0)
    assert load.tokens[again] == load.tokens[first]


def test_what_has_no_room_is_told_in_numbers() -> None:
    small = engine("bf16", headroom=7_127_039)
    with pytest.raises(
        VariantRefused, match=r"needs 7,127,040 bytes, and 7,127,039 are free: .* --variant-headroom 7127040$"
    ):
        small.add_variant("int8-row", lambda: None)
    assert [v.name for v in small.info.variants] == ["bf16"]
    just = engine("bf16", headroom=7_127_040)
    just.add_variant("int8-row", lambda: None)
    just.add_variant("w8a8-int8-row", lambda: None)  # the same bytes
    assert just.info.headroom == 0
    swap = engine("bf16", "fp8-row", headroom=0)
    Load(swap).remove("fp8-row")
    swap.add_variant("int8-row", lambda: None)  # in the room of the one that left


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    def refusal(engine: Engine, name: str) -> VariantRefused:
        with pytest.raises(VariantRefused) as e:
            engine.add_variant(name, lambda: None)
        return e.value

    plain = engine("bf16", cache_dir=str(tmp_path))
    no_scales = refusal(plain, "int8-row+kvint8")
    assert no_scales.code == "kv_format_unavailable" and "such as bf16+kv8" in str(no_scales)
    unsmoothed = refusal(plain, "w8a8-int8-row-smooth")
    assert unsmoothed.code == "variant_unavailable" and "keeps them on disk" in str(unsmoothed)
    long = engine("bf16+kv8", max_model_len=2048, kv_cache_tokens=512)
    assert "512 tokens of bf16 fit the KV pool, and a sequence may have 2048" in str(refusal(long, "bf16"))


def test_a_checkpoint_that_changed_is_not_mixed_in(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copyfile(POCKET / name, tmp_path / name)
    running = engine("bf16", model=str(tmp_path))
    os.utime(tmp_path / "model.safetensors", (1, 1))
    with pytest.raises(VariantRefused, match="not those that the server started with") as e:
        running.add_variant("int8-row", lambda: None)
    assert e.value.code == "checkpoint_changed"


def test_loading_that_is_broken_off_leaves_nothing() -> None:
    running = engine("bf16")
    before, calls = running.info, 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 2 * MATRICES:
            raise VariantRefused("shutting_down", "enough")

    broken: Callable[[], None] = stop
    with pytest.raises(VariantRefused, match="enough"):
        running.add_variant("int8-row", broken)
    assert running.info == before and list(running.runner.models) == ["bf16"]
