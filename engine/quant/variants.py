"""Variants side by side: one model tree each over shared tensors, built while the checkpoint streams by.

Embedding, norms, biases and the head exist once. A stored matrix is keyed by (matrix, stored format) and shared by
every variant that uses it. Each checkpoint matrix is quantised by itself, from the checkpoint's own dtype, and then
fused (q, k, v; gate, up), so that the stored numbers are torchao's. Peak memory is what remains plus one fused matrix.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.config import ModelConfig, ModelError
from engine.models.layers import rotary_table
from engine.models.qwen import Layer, Qwen
from engine.quant.formats import Format
from engine.quant.linear import Linear, PlainLinear, W8A8Linear, WeightOnlyLinear
from engine.quant.memory import all_finite, count_bytes
from engine.quant.quantize import dequantize, quantize
from engine.weights import Checkpoint


@dataclass(frozen=True)
class Variant:
    """One named set of weights. own_bytes are of tensors that no other loaded variant uses."""

    format: Format
    model: Qwen
    fingerprint: bytes
    own_bytes: int
    shared_bytes: int


def build_linears(
    parts: list[Tensor], bias: Tensor | None, formats: list[Format], dtype: torch.dtype
) -> dict[str, Linear]:
    """By format name, checkpoint matrices [N_i, K] stacked along N, each quantised by itself. Formats that store the
    same bytes share them. `dtype` is what formats without scales compute in.
    """
    stored: dict[tuple[str | None, str | None, bool], tuple[Tensor, Tensor | None]] = {}
    linears: dict[str, Linear] = {}
    for f in formats:
        if f.stored not in stored:
            stored[f.stored] = _store(parts, f, dtype)
        weight, scale = stored[f.stored]
        if scale is None:
            linears[f.name] = PlainLinear(weight, bias)
        else:
            kind = W8A8Linear if f.activation else WeightOnlyLinear
            linears[f.name] = kind(weight, scale, bias, f.group_size)
    return linears


def _store(parts: list[Tensor], fmt: Format, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight in `dtype` and None, or codes and their scales."""
    if fmt.weight is None:
        return torch.cat([p.to(dtype) for p in parts]), None
    assert fmt.granularity is not None
    quantised = [quantize(p, getattr(torch, fmt.weight), fmt.granularity) for p in parts]
    if fmt.fake:
        return torch.cat([dequantize(q, s, fmt.group_size, dtype) for q, s in quantised]), None
    return torch.cat([q for q, _ in quantised]), torch.cat([s for _, s in quantised])


def check_device(formats: list[Format], device: torch.device) -> None:
    """Raise ModelError, naming the nearest choices, if `device` cannot multiply in a format's types."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    for f in formats:
        if f.activation == "float8_e4m3fn" and capability < (8, 9):
            raise ModelError(
                f"variant {f.name} multiplies in FP8, which {torch.cuda.get_device_name(device)} (sm_{capability[0]}"
                f"{capability[1]}) lacks: it came with sm_89. Nearest here: w8a8-int8-row, or {_weight_only(f)} "
                "(weights in FP8, products in 16 bits)"
            )


def _weight_only(fmt: Format) -> str:
    return "fp8-g128" if fmt.granularity == "block" else f"fp8-{fmt.granularity}"


def build_variants(
    config: ModelConfig,
    checkpoint: Checkpoint,
    formats: list[Format],
    max_len: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Variant]:
    """Build every format's model tree in one pass over the checkpoint. Raises ModelError for a checkpoint that lacks a
    part or holds NaN or infinity, and for a format that the device cannot multiply in. On the meta device, from a
    ShapeCheckpoint, it builds the shapes alone.
    """
    check_device(formats, device)
    c = config
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def load(name: str, *shape: int) -> Tensor:
        tensor = checkpoint.load(name, shape).to(device)
        if not all_finite(tensor):
            raise ModelError(f"{name} of the checkpoint holds NaN or infinity")
        return tensor

    def shared(name: str, *shape: int) -> Tensor:
        return load(name, *shape).to(dtype)

    def matrices(
        prefix: str, parts: list[tuple[str, int]], inputs: int, bias: Tensor | None = None
    ) -> dict[str, Linear]:
        loaded = [load(f"{prefix}.{name}.weight", rows, inputs) for name, rows in parts]
        return build_linears(loaded, bias, formats, dtype)

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
    return account(formats, models, checkpoint.identity(), dtype)


def account(formats: list[Format], models: dict[str, Qwen], identity: bytes, dtype: torch.dtype) -> dict[str, Variant]:
    """The variants of these model trees, with what each holds alone and together with others."""
    counted, variants = count_bytes(models), {}
    for f in formats:
        numbers = repr(replace(f, name="")) + str(dtype)  # what the KV depends on beside the checkpoint
        fingerprint = hashlib.sha256(identity + numbers.encode()).digest()
        variants[f.name] = Variant(f, models[f.name], fingerprint, counted.own[f.name], counted.shared[f.name])
    return variants
