"""Variants side by side: one model tree each over shared tensors, built while the checkpoint streams by.

Embedding, norms, biases and the head exist once. A stored matrix is keyed by (matrix, stored format) and shared by
every variant that uses it. Each checkpoint matrix is quantised by itself, from the checkpoint's own dtype, and then
fused (q, k, v; gate, up), so that the stored numbers are torchao's. Peak memory is what remains plus one fused matrix.

A matrix that the checkpoint holds in 8 bits is stored as it is by the format that it is in, w8a8-fp8-block; the other
formats are made of what it stands for, in fp32. What such a checkpoint leaves unquantised stays so in every variant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from engine.config import ModelConfig, ModelError
from engine.kernels import chip
from engine.models.layers import rotary_table
from engine.models.qwen import Layer, Qwen
from engine.quant.formats import FORMATS, HEAD, Format, Stored
from engine.quant.linear import Linear, PlainLinear, W8A8Linear, WeightOnlyLinear
from engine.quant.memory import all_finite, count_bytes
from engine.quant.quantize import dequantize, quantize
from engine.weights import Blocks, Checkpoint

_UNQUANTISED, _BLOCK_FORMAT = FORMATS["bf16"], FORMATS["w8a8-fp8-block"]
_ROWS = 16384  # of a matrix that are quantised at one time: whole blocks

Numbers = TypeVar("Numbers", Tensor, Blocks)


@dataclass(frozen=True)
class Smoothing:
    """SmoothQuant's factors by matrix (`formats.kept_matrices` tells the names), [K] fp32, all positive, and what tells
    them from others.
    """

    fingerprint: bytes
    factors: dict[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """One named set of weights. own_bytes are of tensors that no other loaded variant uses."""

    format: Format
    model: Qwen
    fingerprint: bytes
    own_bytes: int
    shared_bytes: int


def build_linears(
    parts: Sequence[Tensor | Blocks],
    bias: Tensor | None,
    formats: list[Format],
    dtype: torch.dtype,
    factor: Tensor | None = None,
) -> dict[str, Linear]:
    """By format name, checkpoint matrices [N_i, K] stacked along N, each quantised by itself. Formats that store the
    same bytes share them. `dtype` is what formats without scales compute in. factor: [K] fp32, of smoothed formats;
    None is all ones.
    """
    stored: dict[Stored, tuple[Tensor, Tensor | None]] = {}
    linears: dict[str, Linear] = {}
    pre_scale = None
    if any(f.smooth for f in formats):
        first = parts[0].qdata if isinstance(parts[0], Blocks) else parts[0]
        factor = first.new_ones(first.shape[1], dtype=torch.float32) if factor is None else factor
        pre_scale = 1.0 / factor
    for f in formats:
        if f.stored not in stored:
            stored[f.stored] = _store(parts, f, dtype, factor)
        weight, scale = stored[f.stored]
        if scale is None:
            linears[f.name] = PlainLinear(weight, bias)
        elif f.activation:
            linears[f.name] = W8A8Linear(weight, scale, bias, f.group_size, pre_scale if f.smooth else None)
        else:
            linears[f.name] = WeightOnlyLinear(weight, scale, bias, f.group_size)
    return linears


def _store(
    parts: Sequence[Tensor | Blocks], fmt: Format, dtype: torch.dtype, factor: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A weight in `dtype` and None, or codes and their scales."""
    if fmt.weight is None:
        return torch.cat([_numbers(p).to(dtype) for p in parts]), None
    quantised = [piece for p in parts for piece in _quantize(p, fmt, factor)]
    if fmt.fake:
        return torch.cat([dequantize(q, s, fmt.group_size, dtype) for q, s in quantised]), None
    return torch.cat([q for q, _ in quantised]), torch.cat([s for _, s in quantised])


def _quantize(part: Tensor | Blocks, fmt: Format, factor: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes and scales of one checkpoint matrix, in pieces to be stacked: what comes between takes more than those."""
    assert fmt.weight is not None and fmt.granularity is not None
    if isinstance(part, Blocks) and fmt.stored == _BLOCK_FORMAT.stored:
        yield part.qdata, part.scale
        return
    weight = _numbers(part)
    for piece in [weight] if fmt.granularity == "tensor" else torch.split(weight, _ROWS):
        if fmt.smooth:
            assert factor is not None
            piece = piece.float() * factor
        yield quantize(piece, getattr(torch, fmt.weight), fmt.granularity)


def _numbers(part: Tensor | Blocks) -> Tensor:
    return part.dequantized() if isinstance(part, Blocks) else part


def check_device(formats: list[Format], device: torch.device) -> None:
    """Raise ModelError, naming the nearest choices, if `device` cannot multiply in a format's types."""
    if device.type != "cuda":
        return
    capability = chip.capability(device)
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
    kept: frozenset[str] = frozenset({HEAD}),
    smoothing: Smoothing | None = None,
) -> dict[str, Variant]:
    """Build every format's model tree in one pass over the checkpoint. Raises ModelError for a checkpoint that lacks a
    part or holds NaN or infinity, and for a format that the device cannot multiply in. On the meta device, from a
    checkpoint of shapes, it builds the shapes alone.

    kept: `formats.kept_matrices`, what stays unquantised. smoothing: of smoothed formats; None: all factors are 1.
    """
    check_device(formats, device)
    c = config
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    names = [f.name for f in formats]
    factors = {} if smoothing is None else smoothing.factors

    def load(name: str, *shape: int) -> Tensor:
        return _checked(name, checkpoint.load(name, shape).to(device))

    def shared(name: str, *shape: int) -> Tensor:
        return load(name, *shape).to(dtype)

    def matrices(
        name: str, prefix: str, rows: dict[str, int], inputs: int, bias: Tensor | None = None
    ) -> dict[str, Linear]:
        parts = _load_parts(checkpoint, {f"{prefix}.{part}.weight": n for part, n in rows.items()}, inputs, device)
        if name in kept or (checkpoint.holds_blocks and not isinstance(parts[0], Blocks)):
            return dict.fromkeys(names, build_linears(parts, bias, [_UNQUANTISED], dtype)[_UNQUANTISED.name])
        return build_linears(parts, bias, formats, dtype, factors.get(name))

    stored = load("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
    embedding = plain = stored.to(dtype)
    if not c.tie_word_embeddings and "lm_head.weight" in checkpoint:
        stored = load("lm_head.weight", c.vocab_size, c.hidden_size)
        plain = stored.to(dtype)
    quantised = [f for f in formats if f.weight is not None and HEAD not in kept]
    heads: dict[str, Linear] = dict.fromkeys(names, PlainLinear(plain))
    heads |= build_linears([stored], None, quantised, dtype, factors.get(HEAD))
    del stored, plain  # may be of another dtype, or in no variant
    layers: dict[str, list[Layer]] = {name: [] for name in names}
    for i in range(c.num_layers):
        layer = f"layers.{i}"
        attention, mlp = f"model.{layer}.self_attn", f"model.{layer}.mlp"
        qkv_rows = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        bias = None
        if c.qkv_bias:
            bias = torch.cat([shared(f"{attention}.{part}.bias", rows) for part, rows in qkv_rows.items()])
        input_norm = shared(f"model.{layer}.input_layernorm.weight", c.hidden_size)
        post_norm = shared(f"model.{layer}.post_attention_layernorm.weight", c.hidden_size)
        q_norm = shared(f"{attention}.q_norm.weight", c.head_dim) if c.qk_norm else None
        k_norm = shared(f"{attention}.k_norm.weight", c.head_dim) if c.qk_norm else None
        gate_up_rows = {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}
        qkv = matrices(f"{layer}.qkv_proj", attention, qkv_rows, c.hidden_size, bias)
        out = matrices(f"{layer}.o_proj", attention, {"o_proj": c.hidden_size}, q_size)
        gate_up = matrices(f"{layer}.gate_up_proj", mlp, gate_up_rows, c.hidden_size)
        down = matrices(f"{layer}.down_proj", mlp, {"down_proj": c.hidden_size}, c.intermediate_size)
        for n in names:
            layers[n].append(Layer(input_norm, qkv[n], q_norm, k_norm, out[n], post_norm, gate_up[n], down[n]))
    norm = shared("model.norm.weight", c.hidden_size)
    rotary = rotary_table(c, max_len, device)
    models = {name: Qwen(c, embedding, layers[name], norm, heads[name], rotary) for name in names}
    return _account(formats, models, checkpoint.identity(), dtype, kept, smoothing)


def _load_parts(
    checkpoint: Checkpoint, rows: dict[str, int], inputs: int, device: torch.device
) -> list[Tensor] | list[Blocks]:
    """The matrices that are stacked into one, by name and number of outputs: all in 8 bits, or none."""
    blocks = {name: checkpoint.load_blocks(name, (num, inputs)) for name, num in rows.items()}
    in_8_bits = [_checked(name, b.to(device)) for name, b in blocks.items() if b is not None]
    if in_8_bits and len(in_8_bits) < len(rows):
        lacking = next(name for name, b in blocks.items() if b is None)
        checkpoint.load(lacking, (rows[lacking], inputs))  # refuses 8 bits without their scales
        raise ModelError(f"{lacking} of the checkpoint is not in 8 bits, but another part of the same product is")
    return in_8_bits or [_checked(name, checkpoint.load(name, (num, inputs)).to(device)) for name, num in rows.items()]


def _checked(name: str, stored: Numbers) -> Numbers:
    finite = all_finite(stored) if isinstance(stored, Tensor) else stored.qdata.is_meta or stored.is_finite()
    if not finite:
        raise ModelError(f"{name} of the checkpoint holds NaN or infinity")
    return stored


def _account(
    formats: list[Format],
    models: dict[str, Qwen],
    identity: bytes,
    dtype: torch.dtype,
    kept: frozenset[str],
    smoothing: Smoothing | None,
) -> dict[str, Variant]:
    counted, variants = count_bytes(models), {}
    for f in formats:
        # What the KV depends on beside the checkpoint.
        numbers = f"{replace(f, name='')} {dtype} {sorted(kept)}".encode()
        if f.smooth and smoothing is not None:
            numbers += smoothing.fingerprint
        fingerprint = hashlib.sha256(identity + numbers).digest()
        variants[f.name] = Variant(f, models[f.name], fingerprint, counted.own[f.name], counted.shared[f.name])
    return variants
