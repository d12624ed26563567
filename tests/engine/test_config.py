"""Reading a checkpoint's config: both spellings of rope, each refusal by name, the real Qwen configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from engine.config import EngineConfig, ModelError, load_model_config, parse_model_config
from engine.core import complete
from engine.models.layers import rotary_table

QWEN = Path(__file__).resolve().parents[3] / "shared" / "data" / "qwen" / "configs"
BASE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 5,
    "torch_dtype": "bfloat16",
}


def without(*keys: str) -> dict[str, Any]:
    return {k: v for k, v in BASE.items() if k not in keys}


def test_old_and_new_spellings_agree() -> None:
    old = parse_model_config(BASE, {})
    new = parse_model_config(
        without("rope_theta", "torch_dtype")
        | {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {},
    )
    assert old == new and old.rope_theta == 1e6 and old.dtype == "bfloat16"
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    scaled_old = parse_model_config(BASE | {"rope_scaling": yarn}, {})
    scaled_new = parse_model_config(without("rope_theta") | {"rope_parameters": yarn | {"rope_theta": 1e6}}, {})
    assert scaled_old == scaled_new and scaled_old.yarn is not None and scaled_old.yarn.factor == 4


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (without("rope_theta"), "rope_theta"),
        (BASE | {"model_type": "llama"}, "llama"),
        (BASE | {"hidden_size": -1}, "hidden_size"),
        (BASE | {"vocab_size": "many"}, "vocab_size"),
        (BASE | {"num_key_value_heads": 3}, "num_key_value_heads"),
        (BASE | {"use_sliding_window": True}, "use_sliding_window"),
        (BASE | {"hidden_act": "gelu"}, "gelu"),
        (BASE | {"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "llama3"),
        (BASE | {"rope_scaling": {"type": "yarn"}}, "yarn"),
        (BASE | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_refusals_name_the_field(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parse_model_config(changed, {})


def test_generation_defaults_and_eos_lists() -> None:
    config = parse_model_config(BASE, {"eos_token_id": [7, 8], "temperature": 0.6, "top_k": 20, "do_sample": True})
    assert config.eos_token_ids == [7, 8] and config.generation == {"temperature": 0.6, "top_k": 20}
    assert parse_model_config(BASE, {}).eos_token_ids == [5]
    assert parse_model_config(BASE, {"do_sample": False, "temperature": 0.6}).generation["temperature"] == 0.0


def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_model_config(tmp_path / "none")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ModelError, match="cannot read") as e:
        load_model_config(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not QWEN.exists(), reason="the shared Qwen configs are not beside this checkout")
def test_real_qwen_configs() -> None:
    small = load_model_config(QWEN / "qwen3-1.7b")
    assert (small.num_layers, small.num_kv_heads, small.head_dim, small.qk_norm, small.qkv_bias) == (
        28,
        8,
        128,
        True,
        False,
    )
    assert small.eos_token_ids == [151645, 151643] and small.generation["temperature"] == 0.6
    old = load_model_config(QWEN / "qwen2.5-1.5b-instruct")
    assert (old.qk_norm, old.qkv_bias, old.head_dim) == (False, True, 128)
    with pytest.raises(ModelError, match="qwen3_moe"):
        load_model_config(QWEN / "qwen3-30b-a3b")


@pytest.mark.parametrize("name", ["qwen3", "qwen3-yarn"])
def test_rotary_table_equals_transformers(tmp_path: Path, name: str) -> None:
    folder = tiny.make_checkpoint(tmp_path, name)
    config = load_model_config(folder)
    table = rotary_table(config, 256, torch.device("cpu"))
    rotary = Qwen3RotaryEmbedding(AutoConfig.from_pretrained(folder))
    cos, sin = rotary(torch.zeros(1), torch.arange(256)[None])
    half = config.head_dim // 2
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], atol=2e-5, rtol=0)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], atol=2e-5, rtol=0)


def test_the_engines_defaults_are_completed_once() -> None:
    model = parse_model_config(BASE, {})
    config = complete(EngineConfig(model="m", device="cpu"), model, False)
    assert config.max_num_batched_tokens == 2048 and config.overlap is False
    assert complete(config, model, False) == config
    with pytest.raises(ModelError, match="twice"):
        complete(EngineConfig(model="m", device="cpu", variants=("bf16", "bf16")), model, False)
    with pytest.raises(ModelError, match="513"):
        complete(EngineConfig(model="m", device="cpu", max_model_len=513), model, False)
    for size in (8, 24):
        assert complete(EngineConfig(model="m", block_size=size), model, False).block_size == size
        with pytest.raises(ModelError, match=f"block_size {size}"):
            complete(EngineConfig(model="m", block_size=size), model, True)


def test_every_field_of_a_saved_config_is_read(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path, "qwen2", eos_token_id=3)
    raw = json.loads((folder / "config.json").read_text())
    config = load_model_config(folder)
    assert config.vocab_size == raw["vocab_size"] and config.eos_token_ids == [3]
