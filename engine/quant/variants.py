"""Variants side by side: one model tree each over shared tensors, built while the checkpoint streams by.

Embedding, norms, biases and the head exist once. A stored matrix is keyed by (matrix, stored format) and shared by
every variant that uses it. Each checkpoint matrix is quantised by itself, from the checkpoint's own dtype, and then
fused (q, k, v; gate, up), so that the stored numbers are torchao's. Peak memory is what remains plus one fused matrix.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.models.layers import rotary_table
from engine.models.qwen import Layer, Qwen
from engine.quant.formats import Format
from engine.quant.linear import Linear, PlainLinear, WeightOnlyLinear
from engine.quant.quantize import quantize_rows
from engine.weights import Checkpoint


@dataclass(frozen=True)
class Variant:
    """One named set of weights. own_bytes are of tensors that no other loaded variant uses."""

    format: Format
    model: Qwen
    fingerprint: bytes
    own_bytes: int
    shared_bytes: int


def build_linear(
    parts: list[Tensor], bias: Tensor | None, fmt: Format, device: torch.device, dtype: torch.dtype
) -> Linear:
    """One stored matrix from checkpoint matrices [N_i, K] stacked along N, each quantised by itself."""
    if fmt.weight is None:
        return PlainLinear(torch.cat([p.to(device, dtype) for p in parts]), bias)
    stored = [quantize_rows(p.to(device), getattr(torch, fmt.weight)) for p in parts]
    return WeightOnlyLinear(torch.cat([q for q, _ in stored]), torch.cat([s for _, s in stored]), bias)


def build_variants(
    config: ModelConfig,
    checkpoint: Checkpoint,
    formats: list[Format],
    max_len: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Variant]:
    """Build every format's model tree in one pass over the checkpoint. Raises ModelError for a checkpoint that lacks a
    part.
    """
    c = config
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def shared(name: str, *shape: int) -> Tensor:
        return checkpoint.load(name, shape).to(device, dtype)

    def matrices(
        prefix: str, parts: list[tuple[str, int]], inputs: int, bias: Tensor | None = None
    ) -> dict[str, Linear]:
        loaded = [checkpoint.load(f"{prefix}.{name}.weight", (rows, inputs)) for name, rows in parts]
        return {f.name: build_linear(loaded, bias, f, device, dtype) for f in formats}

    embedding = shared("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
    layers: dict[str, list[Layer]] = {f.name: [] for f in formats}
    for i in range(c.num_layers):
        prefix = f"model.layers.{i}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        bias = None
        if c.qkv_bias:
            sizes = (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size))
            bias = torch.cat([shared(f"{attention}.{name}.bias", size) for name, size in sizes])
        input_norm = shared(f"{prefix}.input_layernorm.weight", c.hidden_size)
        post_norm = shared(f"{prefix}.post_attention_layernorm.weight", c.hidden_size)
        q_norm = shared(f"{attention}.q_norm.weight", c.head_dim) if c.qk_norm else None
        k_norm = shared(f"{attention}.k_norm.weight", c.head_dim) if c.qk_norm else None
        qkv = matrices(attention, [("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)], c.hidden_size, bias)
        out = matrices(attention, [("o_proj", c.hidden_size)], q_size)
        gate_up = matrices(mlp, [("gate_proj", c.intermediate_size), ("up_proj", c.intermediate_size)], c.hidden_size)
        down = matrices(mlp, [("down_proj", c.hidden_size)], c.intermediate_size)
        for f in formats:
            layers[f.name].append(
                Layer(input_norm, qkv[f.name], q_norm, k_norm, out[f.name], post_norm, gate_up[f.name], down[f.name])
            )
    norm = shared("model.norm.weight", c.hidden_size)
    tied = c.tie_word_embeddings or "lm_head.weight" not in checkpoint
    head = PlainLinear(embedding if tied else shared("lm_head.weight", c.vocab_size, c.hidden_size))
    rotary = rotary_table(c, max_len, device)
    models = {f.name: Qwen(c, embedding, layers[f.name], norm, head, rotary) for f in formats}
    return _account(formats, models, checkpoint.identity(), dtype)


def _account(formats: list[Format], models: dict[str, Qwen], identity: bytes, dtype: torch.dtype) -> dict[str, Variant]:
    tensors = {name: {t.data_ptr(): t.nbytes for t in weight_tensors(m)} for name, m in models.items()}
    users = Counter(pointer for own in tensors.values() for pointer in own)
    variants = {}
    for f in formats:
        sizes = tensors[f.name]
        own = sum(size for pointer, size in sizes.items() if users[pointer] == 1)
        fingerprint = hashlib.sha256(identity + repr(f).encode() + str(dtype).encode()).digest()
        variants[f.name] = Variant(f, models[f.name], fingerprint, own, sum(sizes.values()) - own)
    return variants


def weight_tensors(model: Qwen) -> list[Tensor]:
    """Every weight of one model tree (a tied head's tensor appears twice)."""
    tensors = [model.embedding, model.norm, *model.head.tensors]
    for layer in model.layers:
        tensors += [t for t in (layer.input_norm, layer.q_norm, layer.k_norm, layer.post_norm) if t is not None]
        tensors += [t for m in (layer.qkv, layer.out, layer.gate_up, layer.down) for t in m.tensors]
    return tensors
