"""Variants side by side: one model tree each over shared tensors, built while the checkpoint streams by.

Embedding, norms, biases and the head exist once. A stored matrix is keyed by (matrix, stored format) and shared by
every variant that uses it. Each checkpoint matrix is quantised by itself, from the checkpoint's own dtype, and then
fused (q, k, v; gate, up), so that the stored numbers are torchao's. Peak memory is what remains plus one fused matrix.

A matrix that the checkpoint holds in 8 bits is stored as it is by the format that it is in, w8a8-fp8-block; the other
formats are made of what it stands for, in fp32. What such a checkpoint leaves unquantised stays so in every variant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from engine.config import ModelConfig, ModelError
from engine.kernels import chip
from engine.models.layers import rotary_table
from engine.models.qwen import Layer, Qwen
from engine.quant.formats import BLOCK, FORMATS, HEAD, Format, Stored
from engine.quant.linear import Linear, PlainLinear, W8A8Linear, WeightOnlyLinear
from engine.quant.memory import all_finite, count_bytes
from engine.quant.quantize import dequantize, quantize, smoothed, stack
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
    there: Mapping[Stored, Linear] = MappingProxyType({}),
) -> dict[str, Linear]:
    """By format name, checkpoint matrices [N_i, K] stacked along N, each quantised by itself. Formats that store the
    same bytes share them. `dtype` is what formats without scales compute in. factor: [K] fp32, of smoothed formats;
    None is all ones. there: this matrix as it is stored already; `parts` is not looked at if that is all.
    """
    stored = {key: _stored_in(linear) for key, linear in there.items()}
    linears: dict[str, Linear] = {}
    smooth = [f for f in formats if f.smooth]
    if factor is None and any(f.stored not in stored for f in smooth):
        first = parts[0].qdata if isinstance(parts[0], Blocks) else parts[0]
        factor = first.new_ones(first.shape[1], dtype=torch.float32)
    known = [x.pre_scale for x in there.values() if isinstance(x, W8A8Linear) and x.pre_scale is not None]
    pre_scale = known[0] if known else None
    if smooth and pre_scale is None:
        assert factor is not None
        pre_scale = factor if factor.is_meta else 1.0 / factor
    block_scale = next((x.block_scale for x in there.values() if isinstance(x, W8A8Linear) and x.group_size), None)
    for f in formats:
        fresh = f.stored not in stored
        if fresh:
            stored[f.stored] = _store(parts, f, dtype, factor)
        weight, scale = stored[f.stored]
        if fresh and scale is not None and f.granularity == "block" and all(_height(p) % BLOCK == 0 for p in parts):
            block_scale = scale[::BLOCK].contiguous()
        if scale is None:
            linears[f.name] = PlainLinear(weight, bias)
        elif f.activation:
            of_blocks = block_scale if f.group_size else None
            linears[f.name] = W8A8Linear(weight, scale, bias, f.group_size, pre_scale if f.smooth else None, of_blocks)
        else:
            linears[f.name] = WeightOnlyLinear(weight, scale, bias, f.group_size)
    return linears


def _stored_in(linear: Linear) -> tuple[Tensor, Tensor | None]:
    return (linear.weight, None) if isinstance(linear, PlainLinear) else (linear.qdata, linear.scale)


def _store(
    parts: Sequence[Tensor | Blocks], fmt: Format, dtype: torch.dtype, factor: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A weight in `dtype` and None, or codes and their scales."""
    if fmt.weight is None:
        return stack([_numbers(p).to(dtype) for p in parts]), None
    quantised = [piece for p in parts for piece in _quantize(p, fmt, factor)]
    if fmt.fake:
        return stack([dequantize(q, s, fmt.group_size, dtype) for q, s in quantised]), None
    return stack([q for q, _ in quantised]), stack([s for _, s in quantised])


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
            piece = smoothed(piece, factor)
        yield quantize(piece, getattr(torch, fmt.weight), fmt.granularity)


def _height(part: Tensor | Blocks) -> int:
    return len(part.qdata if isinstance(part, Blocks) else part)


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
    loaded: Mapping[str, Variant] = MappingProxyType({}),
    between: Callable[[], None] = lambda: None,
) -> dict[str, Variant]:
    """Build every format's model tree in one pass over the checkpoint. Raises ModelError for a checkpoint that lacks a
    part or holds NaN or infinity, and for a format that the device cannot multiply in. On the meta device, from a
    checkpoint of shapes, it builds the shapes alone.

    kept: `formats.kept_matrices`, what stays unquantised. smoothing: of smoothed formats; None: all factors are 1.
    loaded: variants of the same checkpoint, built with the same settings; what they hold is shared instead of read.
    between: called before each matrix, so that other work can go on.
    """
    check_device(formats, device)
    factors = {} if smoothing is None else smoothing.factors
    build = _Build(config, checkpoint, formats, device, dtype, kept, factors, loaded, between)
    embedding = build.embedding()
    heads = build.heads(embedding)
    layers = [build.layer(i) for i in range(config.num_layers)]  # each by format name
    norm = build.shared("model.norm.weight", config.hidden_size, of=lambda model: model.norm)
    rotary = rotary_table(config, max_len, device) if build.base is None else build.base.rotary
    models = {
        f.name: Qwen(config, embedding, [layer[f.name] for layer in layers], norm, heads[f.name], rotary)
        for f in formats
    }
    return _account(formats, models, checkpoint.identity(), dtype, kept, smoothing)


@dataclass(frozen=True)
class _Build:
    """One pass over a checkpoint; see `build_variants` for the fields."""

    config: ModelConfig
    checkpoint: Checkpoint
    formats: list[Format]
    device: torch.device
    dtype: torch.dtype
    kept: frozenset[str]
    factors: dict[str, Tensor]
    loaded: Mapping[str, Variant]
    between: Callable[[], None]

    @property
    def base(self) -> Qwen | None:
        """A tree that is there already, for what all share."""
        return next((variant.model for variant in self.loaded.values()), None)

    def load(self, name: str, *shape: int) -> Tensor:
        return _checked(name, self.checkpoint.load(name, shape).to(self.device))

    def shared(self, name: str, *shape: int, of: Callable[[Qwen], Tensor | None]) -> Tensor:
        """A tensor that all variants share. of: where in a tree it is."""
        there = of(self.base) if self.base is not None else None
        return self.load(name, *shape).to(self.dtype) if there is None else there

    def embedding(self) -> Tensor:
        c = self.config
        return self.shared("model.embed_tokens.weight", c.vocab_size, c.hidden_size, of=lambda model: model.embedding)

    def heads(self, embedding: Tensor) -> dict[str, Linear]:
        """By format name."""
        c = self.config
        tied = c.tie_word_embeddings or "lm_head.weight" not in self.checkpoint
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        quantised = [f for f in self.formats if f.weight is not None and HEAD not in self.kept]
        plain = [f for f in self.formats if f not in quantised]
        there = {v.format.stored: v.model.head for v in self.loaded.values()}
        unquantised = [v.model.head for v in self.loaded.values() if v.format.weight is None or HEAD in self.kept]
        known = [x.weight for x in unquantised if isinstance(x, PlainLinear)] + ([embedding] if tied else [])
        stored = None
        if any(f.stored not in there for f in quantised) or (plain and not known):
            self.between()
            stored = self.load(name, c.vocab_size, c.hidden_size)
        if plain and not known:
            assert stored is not None
            known = [stored.to(self.dtype)]
        heads: dict[str, Linear] = dict.fromkeys([f.name for f in plain], PlainLinear(known[0])) if plain else {}
        parts = [] if stored is None else [stored]
        return heads | build_linears(parts, None, quantised, self.dtype, self.factors.get(HEAD), there)

    def layer(self, i: int) -> dict[str, Layer]:
        """One layer, by format name."""
        c = self.config
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"

        def shared(name: str, size: int, of: Callable[[Layer], Tensor | None]) -> Tensor:
            return self.shared(f"model.layers.{i}.{name}.weight", size, of=lambda model: of(model.layers[i]))

        input_norm = shared("input_layernorm", c.hidden_size, lambda layer: layer.input_norm)
        post_norm = shared("post_attention_layernorm", c.hidden_size, lambda layer: layer.post_norm)
        q_norm = shared("self_attn.q_norm", c.head_dim, lambda layer: layer.q_norm) if c.qk_norm else None
        k_norm = shared("self_attn.k_norm", c.head_dim, lambda layer: layer.k_norm) if c.qk_norm else None
        qkv_rows = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        bias = self.base.layers[i].qkv.bias if self.base is not None else None
        if c.qkv_bias and bias is None:
            parts = [self.load(f"{attention}.{part}.bias", rows) for part, rows in qkv_rows.items()]
            bias = stack([part.to(self.dtype) for part in parts])
        gate_up_rows = {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}
        qkv = self.matrices(i, "qkv_proj", attention, qkv_rows, c.hidden_size, lambda layer: layer.qkv, bias)
        out = self.matrices(i, "o_proj", attention, {"o_proj": c.hidden_size}, q_size, lambda layer: layer.out)
        gate_up = self.matrices(i, "gate_up_proj", mlp, gate_up_rows, c.hidden_size, lambda layer: layer.gate_up)
        down_rows = {"down_proj": c.hidden_size}
        down = self.matrices(i, "down_proj", mlp, down_rows, c.intermediate_size, lambda layer: layer.down)
        return {
            n: Layer(input_norm, qkv[n], q_norm, k_norm, out[n], post_norm, gate_up[n], down[n])
            for n in (f.name for f in self.formats)
        }

    def matrices(
        self,
        i: int,
        name: str,
        prefix: str,
        rows: dict[str, int],
        inputs: int,
        of: Callable[[Layer], Linear],
        bias: Tensor | None = None,
    ) -> dict[str, Linear]:
        """One fused matrix of layer i, by format name. rows: outputs of the checkpoint's matrices under `prefix`."""
        there = {v.format.stored: of(v.model.layers[i]) for v in self.loaded.values()}
        name = f"layers.{i}.{name}"
        parts: list[Tensor] | list[Blocks] = []
        unquantised = name in self.kept
        if not (unquantised and there) and any(f.stored not in there for f in self.formats):
            self.between()
            names = {f"{prefix}.{part}.weight": num for part, num in rows.items()}
            parts = _load_parts(self.checkpoint, names, inputs, self.device)
            unquantised = unquantised or (self.checkpoint.holds_blocks and not isinstance(parts[0], Blocks))
        if not unquantised:
            return build_linears(parts, bias, self.formats, self.dtype, self.factors.get(name), there)
        plain = next(iter(there.values()), None)  # the same in every variant
        if plain is None:
            plain = build_linears(parts, bias, [_UNQUANTISED], self.dtype)[_UNQUANTISED.name]
        return dict.fromkeys([f.name for f in self.formats], plain)


def recounted(variants: Mapping[str, Variant]) -> dict[str, Variant]:
    """The same variants, counted anew: what one holds alone changes with who else is there."""
    counted = count_bytes({name: variant.model for name, variant in variants.items()})
    return {n: replace(v, own_bytes=counted.own[n], shared_bytes=counted.shared[n]) for n, v in variants.items()}


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
