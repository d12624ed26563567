"""The rotary table of a model: plain or YaRN, computed once at start."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.config import ModelConfig, YarnScaling


def rotary_table(config: ModelConfig, max_len: int, device: torch.device) -> Tensor:
    """[max_len, head_dim] float32: cos in the first half, sin in the second, YaRN's attention factor folded in."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inverse = 1.0 / config.rope_theta**half  # [D/2]
    factor = 1.0
    if config.yarn is not None:
        inverse, factor = _yarn(inverse, config, config.yarn)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * inverse[None, :]
    return (torch.cat([angles.cos(), angles.sin()], dim=-1) * factor).to(device)


def _yarn(inverse: Tensor, config: ModelConfig, yarn: YarnScaling) -> tuple[Tensor, float]:
    """YaRN's blend of interpolated and original frequencies and its attention factor.

    Source: Peng et al., 2023 (arXiv:2309.00071), section 3.2 and appendix A.2; parameters as in transformers.
    """
    dim, base, original = config.head_dim, config.rope_theta, yarn.original_max_position_embeddings

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    blended = inverse / yarn.factor * ramp + inverse * (1 - ramp)

    def magnitude(mscale: float = 1.0) -> float:
        return 1.0 if yarn.factor <= 1 else 0.1 * mscale * math.log(yarn.factor) + 1.0

    if yarn.attention_factor is not None:
        return blended, yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return blended, magnitude(yarn.mscale) / magnitude(yarn.mscale_all_dim)
    return blended, magnitude()
