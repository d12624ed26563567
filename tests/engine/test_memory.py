"""The memory plan: what it says is what is loaded, what does not fit is refused with numbers, loading streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from engine import LLM
from engine.config import EngineConfig, ModelError, load_model_config
from engine.core import complete
from engine.dry_run import DryRunConfig, dry_run, planned
from engine.memory import META, DeviceMemory, MemoryPlan, planned_weights
from engine.quant.formats import HEAD, parse_format
from engine.quant.memory import count_bytes
from engine.weights import DummyCheckpoint

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "models" / "pocket"
QWEN3_1_7B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-1.7B's configuration, without weights."""
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(QWEN3_1_7B))
    return folder


def plan(folder: Path, memory: DeviceMemory | None, variants: str, **options: object) -> MemoryPlan:
    model = load_model_config(folder)
    config = EngineConfig(model=str(folder), variants=tuple(variants.split(",")), load_format="dummy")
    config = complete(msgspec.structs.replace(config, **options), model, memory is not None)
    return planned(config, model, [parse_format(v) for v in config.variants], torch.bfloat16, memory)


@pytest.mark.parametrize(("variants", "most"), [("bf16,int8-row,fp8-row", (3.44 + 2 * 1.41) * 1.03), ("int8-row", 2.1)])
def test_a_whole_qwen_takes_what_it_may(qwen: Path, variants: str, most: float) -> None:
    config, formats = load_model_config(qwen), [parse_format(v) for v in variants.split(",")]
    shapes = DummyCheckpoint(config, torch.bfloat16, META)
    weights = planned_weights(config, shapes, formats, torch.bfloat16, frozenset({HEAD}))
    assert 0.95 * most < weights.total / 1e9 < most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_is_what_the_start_does(dtype: str) -> None:
    variants = ("bf16", "w8a8-fp8-block", "int8-g512-fake", "int8-row+kv8", "w8a8-int8-row+kvint8")
    config = EngineConfig(model=str(POCKET), variants=variants, device="cpu", dtype=dtype, max_num_seqs=3)
    model = load_model_config(POCKET)
    formats = [parse_format(name) for name in variants]
    want = planned(complete(config, model, False), model, formats, getattr(torch, dtype), None)
    runner = LLM(POCKET, list(variants), device="cpu", dtype=dtype, max_num_seqs=3).engine.runner
    assert runner.plan == want
    assert want.weights == count_bytes({name: v.model for name, v in runner.variants.items()})
    assert {n: (v.own_bytes, v.shared_bytes) for n, v in runner.variants.items()} == {
        n: (want.weights.own[n], want.weights.shared[n]) for n in variants
    }
    assert runner.pool.scales is not None
    assert want.pool == runner.pool.data.nbytes + runner.pool.scales.nbytes
    assert want.reserves["rotary table"] == runner.variants["bf16"].model.rotary.nbytes
    tables = runner.tables
    assert want.reserves["tables of sequences"] == sum(
        t.nbytes for t in (tables.tokens, tables.blocks, tables.floats, tables.ints)
    )
    assert want.kv_tokens[dtype] == want.num_blocks * 16
    assert (
        want.kv_tokens["int8"]
        == want.kv_tokens["float8_e4m3fn"]
        == want.num_blocks * runner.block_sizes["int8-row+kv8"]
    )


def test_a_gpus_plan_adds_up_to_what_it_gives(qwen: Path) -> None:
    card = DeviceMemory(24 << 30, 600 << 20)
    got = plan(qwen, card, "bf16,int8-row+kv8")
    assert got.limit == int(0.85 * card.total) and 0 <= got.limit - got.total < got.block_bytes
    assert {"activations of a step", "logits of a step", "CUDA graphs (allowance)"} <= set(got.reserves)
    more = plan(qwen, card, "bf16,int8-row+kv8", variant_headroom=2 << 30)
    assert abs(got.pool - more.pool - (2 << 30)) < got.block_bytes and more.total <= got.limit
    fixed = plan(qwen, card, "bf16", kv_cache_tokens=1024)
    assert (fixed.num_blocks, fixed.max_model_len, fixed.limit) == (64, 1024, card.total)
    with pytest.raises(ModelError, match=r"max_model_len 2048 does not fit the KV pool of 1024 tokens"):
        plan(qwen, card, "bf16", kv_cache_tokens=1024, max_model_len=2048)


def test_full_batches_have_a_graph_where_it_takes_little_of_the_memory(qwen: Path) -> None:
    large, small = (plan(qwen, DeviceMemory(size << 30, 600 << 20), "bf16") for size in (80, 24))
    assert (large.full_batch, small.full_batch) == (8192, 0)
    taken, without = (p.reserves["CUDA graphs (allowance)"] for p in (large, small))
    assert 2 * without < taken < without + 0.02 * (80 << 30)
    assert plan(qwen, DeviceMemory(80 << 30, 600 << 20), "bf16", max_num_batched_tokens=16384).full_batch == 0


def test_what_does_not_fit_is_told_in_numbers(qwen: Path) -> None:
    card = DeviceMemory(8 << 30, 600 << 20)
    with pytest.raises(
        ModelError, match=r"needed and the GPU gives 6\.80 \(0\.85 of its memory\): weights 5\.83.*fewer or"
    ):
        plan(qwen, card, "bf16,int8-row,fp8-row")
    with pytest.raises(ModelError, match=r"gives 8\.00: .* lower kv_cache_tokens"):
        plan(qwen, card, "int8-row", kv_cache_tokens=100_000)


def test_a_dry_run_prints_the_plan(qwen: Path) -> None:
    engine = EngineConfig(model=str(qwen), variants=("bf16", "fp8-row"), load_format="dummy")
    text = dry_run(DryRunConfig(engine=engine, gpu_memory=24 << 30))
    lines = {line[:28].strip(): line[28:].split() for line in text.splitlines()}
    want = plan(qwen, DeviceMemory(24 << 30, 512 << 20), "bf16,fp8-row")
    assert lines["fp8-row"] == [f"{want.weights.own['fp8-row']:,}", f"{want.weights.shared['fp8-row']:,}"]
    assert lines["KV pool"][0] == f"{want.pool:,}" and lines["sum"][0] == f"{want.total:,}"
    assert lines["bfloat16"] == [f"{want.kv_tokens['bfloat16']:,}"]
    assert "24.00 GiB that gives 20.40 GiB" in text and "config.json alone" in text


def test_the_command_exits_by_whether_it_fits() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "server.supervisor", *words, "--dry-run"]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    fits = run(str(POCKET), "--variants", "bf16,INT8_Per_Row", "--device", "cpu")
    assert (fits.returncode, fits.stderr) == (0, "") and "\nint8-row " in fits.stdout
    too_much = run(str(POCKET), "--gpu-memory", "500MiB")
    assert (too_much.returncode, too_much.stdout) == (1, "") and too_much.stderr.count("\n") == 1
    assert "GiB are needed and the GPU gives 0.42" in too_much.stderr


PEAK = """
import sys, torch
from pathlib import Path
from engine.config import load_model_config
from engine.quant.formats import parse_format
from engine.quant.memory import count_bytes
from engine.quant.variants import build_variants
from engine.weights import SafetensorsCheckpoint

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

torch.set_num_threads(1)
config, formats = load_model_config(sys.argv[1]), [parse_format(v) for v in sys.argv[2].split(",")]
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
with SafetensorsCheckpoint(sys.argv[1]) as checkpoint:
    variants = build_variants(config, checkpoint, formats, 64, torch.device("cpu"), torch.float32)
total = count_bytes({name: v.model for name, v in variants.items()}).total
print((status("VmHWM") - before) / total)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads peak memory from /proc")
def test_loading_streams(tmp_path: Path) -> None:
    """Peak host memory, what is mapped from the file included: had that stayed, it would be 1.4 of what remains."""
    shape = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "head_dim": 64}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_1_7B | shape))
    config = load_model_config(tmp_path)
    tensors, dummy = {}, DummyCheckpoint(config, torch.bfloat16, torch.device("cpu"))

    class Recorded(DummyCheckpoint):
        def load(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
            tensors[name] = dummy.load(name, shape)
            return super().load(name, shape)

    recorded = Recorded(config, torch.bfloat16, META)
    planned_weights(config, recorded, [parse_format("bf16")], torch.bfloat16, frozenset())
    save_file(tensors, tmp_path / "model.safetensors")
    argv = [sys.executable, "-c", PEAK, str(tmp_path), "bf16,int8-row"]
    # freed memory goes back at once, so that the peak is of what is alive
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert 1.0 < float(done.stdout) < 1.15


@pytest.mark.gpu
@pytest.mark.parametrize("variants", ["int8-row", "bf16,int8-row,fp8-row"])
def test_device_memory_stays_near_what_remains(qwen: Path, variants: str) -> None:
    square = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")
    _ = square @ square  # the library's workspace: one a process, and not the engine's
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner = LLM(
        qwen,
        variants.split(","),
        load_format="dummy",
        kv_cache_tokens=2048,
        max_num_seqs=4,
        cuda_graphs=False,
    ).engine.runner
    # loading alone: the warm-up that follows stays below it
    peak = torch.cuda.max_memory_allocated() - before
    own = runner.plan.weights.total + runner.pool.data.nbytes + sum(list(runner.plan.reserves.values())[:2])
    assert torch.cuda.memory_allocated() - before < 1.01 * own
    assert peak < 1.15 * own
