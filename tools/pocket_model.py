"""The bundled model for training: Qwen3 in plain PyTorch with float32 weights, and the optimiser of its matrices.

Only the trainer uses this; everything else loads the checkpoint as it loads any Qwen3.

Letters in shapes: B rows, T positions, E hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 512,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 3,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": 4095,
    "pad_token_id": 4093,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A product in x's dtype; the weight itself is kept in float32 for the optimiser."""
    return F.linear(x, layer.weight.to(x.dtype))


class Norm(nn.Module):
    """RMSNorm over the last dimension, computed in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] to the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, CONFIG["rms_norm_eps"]).to(x.dtype)


class Attention(nn.Module):
    """Causal attention with normalised queries and keys and rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        size, self.head = CONFIG["hidden_size"], CONFIG["head_dim"]
        queries, keys = CONFIG["num_attention_heads"] * self.head, CONFIG["num_key_value_heads"] * self.head
        self.q_proj = nn.Linear(size, queries, bias=False)
        self.k_proj = nn.Linear(size, keys, bias=False)
        self.v_proj = nn.Linear(size, keys, bias=False)
        self.o_proj = nn.Linear(queries, size, bias=False)
        self.q_norm, self.k_norm = Norm(self.head), Norm(self.head)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, E]; cos, sin [T, D/2] float32."""
        heads = (*x.shape[:2], -1, self.head)
        q = rotate(self.q_norm(linear(x, self.q_proj).view(heads)).transpose(1, 2), cos, sin)  # [B, H, T, D]
        k = rotate(self.k_norm(linear(x, self.k_proj).view(heads)).transpose(1, 2), cos, sin)  # [B, K, T, D]
        v = linear(x, self.v_proj).view(heads).transpose(1, 2)  # [B, K, T, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return linear(out.transpose(1, 2).flatten(2), self.o_proj)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, T, D] in the half-split form of transformers' Qwen3."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Layer(nn.Module):
    """Attention and a gated feed-forward network, each behind a norm and added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        size, wide = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.self_attn = Attention()
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(size, wide, bias=False),
                "up_proj": nn.Linear(size, wide, bias=False),
                "down_proj": nn.Linear(wide, size, bias=False),
            }
        )
        self.input_layernorm, self.post_attention_layernorm = Norm(size), Norm(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, E]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        h = self.post_attention_layernorm(x)
        gate, up, down = (self.mlp[name] for name in ("gate_proj", "up_proj", "down_proj"))
        return x + linear(F.silu(linear(h, gate)) * linear(h, up), down)


class Body(nn.Module):
    """Embedding, layers and the last norm: what a Hugging Face checkpoint calls `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = Norm(CONFIG["hidden_size"])


class Pocket(nn.Module):
    """Qwen3 with tied embeddings; its state dict has the names of a Hugging Face checkpoint."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.model = Body()
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = CONFIG["initializer_range"] / (math.sqrt(2 * CONFIG["num_hidden_layers"]) if deep else 1.0)
                nn.init.normal_(weight, std=std)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """ids, targets [B, T]; gives the loss of each target and whether it was the likeliest token, [B, T] each."""
        half = CONFIG["head_dim"] // 2
        speeds = CONFIG["rope_theta"] ** (-torch.arange(half, device=ids.device, dtype=torch.float32) / half)
        angles = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)[:, None] * speeds  # [T, D/2]
        x = F.embedding(ids, self.model.embed_tokens.weight).to(self.dtype)  # [B, T, E]
        for layer in self.model.layers:
            x = layer(x, angles.cos(), angles.sin())
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight.to(self.dtype)).float()  # [B, T, V]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        return loss, logits.argmax(-1) == targets


def orthogonalise(update: Tensor) -> Tensor:
    """The nearest orthogonal matrices to [n, rows, cols], roughly: five Newton-Schulz steps in bfloat16.

    Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/), which gives the polynomial's coefficients.
    """
    x = update.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum, then an orthogonal step, for all matrices of one shape at once; the embedding and norms use AdamW."""

    def __init__(self, weights: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.1) -> None:
        self.lr, self.momentum, self.decay = lr, momentum, decay
        shapes = sorted({tuple(w.shape) for w in weights})
        self.groups = [[w for w in weights if tuple(w.shape) == shape] for shape in shapes]
        self.averages = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` times the learning rate."""
        for weights, average in zip(self.groups, self.averages, strict=True):
            gradient = torch.stack([w.grad for w in weights if w.grad is not None])  # [n, rows, cols]
            average.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(average, self.momentum))
            scale = self.lr * factor * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            for weight, change in zip(weights, update, strict=True):
                weight.mul_(1 - self.lr * factor * self.decay).add_(change, alpha=-scale)
