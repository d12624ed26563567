"""Tiny random Qwen checkpoints, and transformers' answers on them: the independent reference of the engine's tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.quant.formats import parse_format
from engine.quant.quantize import dequantize, quantize

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 2},
    "qwen2-tied": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "head_dim": 32},
    "qwen3-tied": {"family": "qwen3", "head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3-yarn": {"family": "qwen3", "head_dim": 16, "rope_parameters": YARN},
}
VOCAB = 199


def make_checkpoint(folder: Path, name: str = "qwen3", max_shard_size: str = "5GB", **changes: Any) -> Path:
    """Write one of FAMILIES to `folder`; weights are wide enough that greedy choices are seldom close."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 96,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    settings |= FAMILIES[name] | changes
    family = settings.pop("family")
    if "rope_theta" not in settings["rope_parameters"]:
        settings["rope_parameters"] = {"rope_theta": 10000.0, **settings["rope_parameters"]}
    torch.manual_seed(7)
    kinds = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = kinds[family]
    model = model_class(config_class(**settings)).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            if key.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@cache
def reference_model(folder: Path, variant: str = "bf16") -> Any:
    """transformers' model in float32; for a quantised variant, with every linear layer's weight put through it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    fmt = parse_format(variant)
    if fmt.weight is not None and fmt.granularity is not None:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                qdata, scale = quantize(module.weight.data, getattr(torch, fmt.weight), fmt.granularity)
                module.weight.data = dequantize(qdata, scale, fmt.group_size, torch.float32)
    return model


class EightBitCache(DynamicCache):
    """transformers' cache, each head of each token put through 8 bits: what a KV format keeps."""

    def __init__(self, kv: str) -> None:
        super().__init__()
        self.kv = kv

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(self.through_8_bits(key_states), self.through_8_bits(value_states), *args, **kwargs)

    def through_8_bits(self, value: torch.Tensor) -> torch.Tensor:
        scale = value.abs().amax(-1, keepdim=True) / (127 if self.kv == "int8" else 448)
        scaled = value / scale
        codes = scaled.round() if self.kv == "int8" else scaled.to(torch.float8_e4m3fn).float()
        return codes * scale


def reference_cache(variant: str) -> DynamicCache:
    kv = parse_format(variant).kv
    return DynamicCache() if kv is None else EightBitCache(kv)


@torch.no_grad()
def reference_logits(folder: Path, ids: list[int], variant: str = "bf16") -> torch.Tensor:
    """[len(ids), V] float32."""
    cache = reference_cache(variant)
    logits: torch.Tensor = reference_model(folder, variant)(torch.tensor([ids]), past_key_values=cache).logits[0]
    return logits


@torch.no_grad()
def reference_greedy(folder: Path, ids: list[int], num_tokens: int, variant: str = "bf16") -> list[int]:
    """transformers' own greedy continuation."""
    prompt = torch.tensor([ids])
    out = reference_model(folder, variant).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=reference_cache(variant),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens
