"""What L2 keeps of a decode step: how much is asked for, and that the graphs are captured with it."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

import msgspec
import pytest
import tiny
import torch

from engine import LLM, SamplingParams
from engine.config import EngineConfig, load_model_config
from engine.l2 import KeptMemory, _Attribute, _Window
from engine.memory import kept_bytes

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPE = {"hidden_size": 512, "intermediate_size": 3072, "head_dim": 64, "num_attention_heads": 8}


def test_the_drivers_structures_have_their_sizes() -> None:
    assert ctypes.sizeof(_Window) == 32 and ctypes.sizeof(_Attribute) == 64


def test_as_much_is_kept_as_the_largest_step_needs(tmp_path: Path) -> None:
    model = load_model_config(tiny.make_checkpoint(tmp_path, "qwen3", **SHAPE))
    config = EngineConfig(model=str(tmp_path), max_num_seqs=256)
    live = 256 * (3072 + 3 * 512) * 2 + 2 * 256 * 512 * 4  # of down: its inputs, three sums or norms, and two planes
    assert live < kept_bytes(config, model, torch.bfloat16) < 1.3 * live
    few = msgspec.structs.replace(config, max_num_seqs=64)
    assert kept_bytes(few, model, torch.bfloat16) * 4 == kept_bytes(config, model, torch.bfloat16)
    off = msgspec.structs.replace(config, keep_in_l2=False)
    assert kept_bytes(off, model, torch.bfloat16) == 0


def windows(graph: torch.cuda.CUDAGraph) -> list[tuple[int, int]]:
    """Address and size of the window of each kernel."""
    driver, raw, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t(0)
    assert driver.cuGraphGetNodes(raw, None, ctypes.byref(count)) == 0
    nodes = (ctypes.c_void_p * count.value)()
    assert driver.cuGraphGetNodes(raw, nodes, ctypes.byref(count)) == 0
    found = []
    for node in nodes:
        attribute = _Attribute()
        if driver.cuGraphKernelNodeGetAttribute(ctypes.c_void_p(node), 1, ctypes.byref(attribute)) == 0:
            found.append((attribute.window.address or 0, attribute.window.num_bytes))
    return found


class TestOnGpu:
    pytestmark = gpu

    def test_a_graph_allocates_inside_and_its_kernels_know(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        kept = KeptMemory(16 << 20, device)
        if not kept.num_bytes:
            pytest.skip("this GPU sets no part of its L2 aside")
        x, places = torch.randn(1 << 20, device=device), []

        def work() -> torch.Tensor:
            total = x
            for _ in range(4):  # 4 MiB each, and two of them live at once
                total = total * 2
                places.append(total.data_ptr())
            return total

        for _ in range(2):  # the second finds the memory of the first
            places.clear()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with kept.capture(graph):
                result = work()
            assert all(kept.address <= p < kept.address + kept.num_bytes for p in places)
            assert windows(graph) == [(kept.address, kept.num_bytes)] * 4
            graph.instantiate()
            graph.replay()
            assert torch.equal(result, x * 16)
            del result
        plain = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(plain, stream=kept._stream):
            work()
        assert windows(plain) == [(0, 0)] * 4, "the stream is as it was"

    def test_little_is_left_where_it_is(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        kept, x = KeptMemory(1 << 20, device), torch.ones(8, device=device)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with kept.capture(graph):
            y = x + 1
        assert kept.num_bytes == 0 and windows(graph) == [(0, 0)]
        graph.instantiate()
        graph.replay()
        assert y.tolist() == [2.0] * 8

    def test_the_engine_answers_the_same_without(self, tmp_path: Path) -> None:
        folder = tiny.make_checkpoint(tmp_path, "qwen3", **SHAPE)
        rng = random.Random(1)
        prompts = [[rng.randrange(tiny.VOCAB) for _ in range(rng.randint(1, 60))] for _ in range(256)]
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
        answers = []
        for keep in (True, False):
            llm = LLM(
                folder, ["bf16", "int8-row"], device="cuda", dtype="bfloat16", keep_in_l2=keep, kv_cache_tokens=32768
            )
            graphs = llm.engine.runner.graphs
            assert graphs is not None and bool(graphs.kept.num_bytes) == keep
            answers.append([llm.generate(prompts, params, variant=v, use_tqdm=False) for v in ("bf16", "int8-row")])
            segments = [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == graphs.kept._pool]
            large = [s["address"] for s in segments if s["segment_type"] == "large"]
            assert not keep or large == [graphs.kept.address], "what is no small tensor is in the kept memory"
            del llm, graphs
        assert answers[0] == answers[1]
