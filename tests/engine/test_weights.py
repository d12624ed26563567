"""Loading: shards, broken files, sharing between variants, dummies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from engine import LLM, SamplingParams
from engine.config import ModelError
from engine.quant.linear import PlainLinear, WeightOnlyLinear
from engine.quant.memory import weight_tensors
from engine.quant.quantize import quantize
from engine.weights import SafetensorsCheckpoint, count_token_ids

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
Checkpoint = Callable[[str], Path]


def test_sharded_checkpoints_load_alike(checkpoint: Checkpoint, tmp_path: Path) -> None:
    sharded = tiny.make_checkpoint(tmp_path, "qwen3", max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    outputs = [
        LLM(f, kv_cache_tokens=512).generate([[1, 2]], GREEDY, use_tqdm=False) for f in (sharded, checkpoint("qwen3"))
    ]
    assert outputs[0] == outputs[1]


def test_broken_checkpoints_are_refused_in_one_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path, "qwen3")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(ModelError, match=match) as e:
            LLM(folder)
        assert "\n" not in str(e.value)

    weights.write_bytes(whole[: len(whole) // 2])
    refused("not a whole safetensors file")
    weights.write_bytes(b"\xff" * 100)
    refused("not a whole safetensors file")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}, weights)
    refused(r"layers\.1\.mlp\.up_proj\.weight")
    save_file(tensors | {"model.norm.weight": torch.ones(5)}, weights)
    refused(r"model\.norm\.weight .*\[5\]")
    save_file(tensors | {"model.norm.weight": torch.ones(96, dtype=torch.int32)}, weights)
    refused("I32")
    weights.unlink()
    refused("neither")


def test_variants_share_every_tensor_they_do_not_change(checkpoint: Checkpoint) -> None:
    llm = LLM(checkpoint("qwen2"), variants=["bf16", "int8-row", "fp8-row"], kv_cache_tokens=512)
    variants = llm.engine.runner.variants
    plain, int8, fp8 = (variants[n].model for n in ("bf16", "int8-row", "fp8-row"))
    for other in (int8, fp8):
        assert other.embedding.data_ptr() == plain.embedding.data_ptr()
        assert other.norm.data_ptr() == plain.norm.data_ptr()
        assert other.head.tensors[0].data_ptr() == plain.head.tensors[0].data_ptr()
        assert other.rotary.data_ptr() == plain.rotary.data_ptr()
        for a, b in zip(other.layers, plain.layers, strict=True):
            assert a.input_norm.data_ptr() == b.input_norm.data_ptr()
            assert a.post_norm.data_ptr() == b.post_norm.data_ptr()
            assert a.qkv.bias is not None and b.qkv.bias is not None
            assert a.qkv.bias.data_ptr() == b.qkv.bias.data_ptr()
            assert isinstance(a.qkv, WeightOnlyLinear) and isinstance(b.qkv, PlainLinear)
    sizes = {n: (v.own_bytes, v.shared_bytes) for n, v in variants.items()}
    matrices = sum(
        m.tensors[0].numel() for layer in plain.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)
    )
    assert sizes["bf16"][0] == 4 * matrices and sizes["int8-row"] == sizes["fp8-row"]
    assert matrices < sizes["int8-row"][0] < 1.1 * matrices
    assert len({s[1] for s in sizes.values()}) == 1
    alone = LLM(checkpoint("qwen2"), variants=["int8-row"], kv_cache_tokens=512).engine.runner.variants["int8-row"]
    assert alone.shared_bytes == 0 and alone.own_bytes == sum(sizes["int8-row"])


def test_each_matrix_is_quantised_by_itself_and_then_fused(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen3")
    layer = LLM(folder, variants=["int8-row"], kv_cache_tokens=512).engine.runner.variants["int8-row"].model.layers[1]
    tensors = load_file(folder / "model.safetensors")
    parts = [quantize(tensors[f"model.layers.1.mlp.{n}_proj.weight"], torch.int8, "row") for n in ("gate", "up")]
    assert isinstance(layer.gate_up, WeightOnlyLinear)
    assert torch.equal(layer.gate_up.qdata, torch.cat([q for q, _ in parts]))
    assert torch.equal(layer.gate_up.scale, torch.cat([s for _, s in parts]))


def test_dummy_weights_need_only_a_config(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint("qwen2") / "config.json").read_bytes())
    outputs = []
    for _ in range(2):
        llm = LLM(tmp_path, variants=["bf16", "fp8-row"], load_format="dummy", kv_cache_tokens=512)
        outputs.append(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0]["token_ids"])
    assert outputs[0] == outputs[1] and len(outputs[0]) == 8
    assert all(t.isfinite().all() for t in weight_tensors(llm.engine.runner.variants["bf16"].model))


def test_identity_changes_with_the_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with SafetensorsCheckpoint(checkpoint("qwen3")) as a, SafetensorsCheckpoint(checkpoint("qwen2")) as b:
        assert a.identity() != b.identity() and a.identity() == a.identity()


def test_the_tokenizers_ids_are_counted(tmp_path: Path) -> None:
    assert count_token_ids(tmp_path) is None
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {"vocab": {"a": 0, "b": 4}}, "added_tokens": [{"id": 6, "content": "<x>"}]}')
    assert count_token_ids(tmp_path) == 7
    path.write_text("{}")
    with pytest.raises(ModelError, match="tokenizer"):
        count_token_ids(tmp_path)
