"""What the stored numbers are, in plain torch: symmetric int8 and float8_e4m3fn at every granularity.

Weights: equal to torchao 0.18's `qdata` and `scale` wherever it has the format: `Int8WeightOnlyConfig(version=2)` and
`Float8WeightOnlyConfig` with PerTensor, PerRow and PerGroup, and the 128 x 128 blocks of
`Float8DynamicActivationFloat8WeightConfig` (sources: `choose_qparams_affine`, `quantize_affine`,
`_choose_scale_float8`, `_quantize_affine_float8`; its torch path). Groups and blocks that end short are ours: torchao
refuses them. A short one is an ordinary one of fewer weights.

Activations: a token is a row, quantised as a weight's row is: torchao's dynamic PerRow, and its 1 x 128 beside blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.quant.formats import BLOCK, group_size

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448


def quantize(weight: Tensor, dtype: torch.dtype, granularity: str) -> tuple[Tensor, Tensor]:
    """weight[N, K] (fp32, bf16 or fp16) -> qdata[N, K] in `dtype` (int8 or float8_e4m3fn), scale[N, G] fp32.

    G is 1 for "tensor" and "row", else ceil(K / group). The scale is computed in the weight's dtype and then widened,
    as torchao does: a bf16 weight gets a scale of eight significant bits. One difference: where an fp8 scale is 0
    (zeros, or too small for fp16), zeros are stored; torchao stores NaN there (0 / 0).
    """
    rows, depth = weight.shape
    height = {"tensor": rows, "block": BLOCK}.get(granularity, 1)
    width = group_size(granularity) or depth
    padded = F.pad(weight, (0, -depth % width, 0, -rows % height))
    tiles = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    qdata, scale = _quantize_tiles(tiles, dtype)
    scale = scale.view(tiles.shape[0], tiles.shape[2]).repeat_interleave(height, dim=0)
    return qdata.view(padded.shape)[:rows, :depth].contiguous(), scale[:rows].contiguous()


def stack(parts: Sequence[Tensor]) -> Tensor:
    """[N_i, …] stacked along the first axis; of shapes, a shape (torch's own way there begins with slow imports)."""
    if parts[0].is_meta:
        return parts[0].new_empty((sum(len(part) for part in parts), *parts[0].shape[1:]))
    return torch.cat(list(parts))


def smoothed(weight: Tensor, factor: Tensor) -> Tensor:
    """weight[N, K] * factor[K], fp32."""
    return weight.float() if weight.is_meta else weight.float() * factor


def _quantize_tiles(tiles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """tiles[A, height, G, width] -> their codes, and scale[A, 1, G, 1]."""
    if tiles.is_meta:
        shape = (tiles.shape[0], 1, tiles.shape[2], 1)
        return tiles.new_empty(tiles.shape, dtype=dtype), tiles.new_empty(shape, dtype=torch.float32)
    largest = tiles.abs().amax(dim=(1, 3), keepdim=True)
    # Divided by a tensor: on a GPU, division by a number multiplies by its reciprocal, and a scale that is off in its
    # last bit moves weights that lie near a boundary. So the stored numbers are the same on every device.
    if dtype == torch.int8:
        # 127.5, half of the 255 steps: the largest value rounds to 128 and is clamped to 127 (-128 on the other side).
        scale = (largest / torch.full_like(largest, 127.5)).clamp(min=torch.finfo(torch.float32).eps).float()
        return (tiles * (1.0 / scale)).round_().clamp_(-128, 127).to(dtype), scale
    assert dtype == torch.float8_e4m3fn, dtype
    scale = (largest / torch.full_like(largest, _FP8_MAX)).float()
    scaled = tiles.float() / torch.where(scale == 0, 1.0, scale)
    return scaled.clamp_(-_FP8_MAX, _FP8_MAX).to(dtype), scale


def dequantize(qdata: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """qdata[N, K], scale[N, G] -> the [N, K] that they stand for: the fp32 product, rounded to `dtype`.

    group: inputs that share a scale, 0 for all. Exact for every finite code. torch converts e4m3fn on a CPU one element
    at a time: 2.0 ms for 512 x 1024 on an EPYC core with torch 2.13, this 0.17. Shifted into the place of fp16's
    exponent and mantissa, the bits are the value divided by 2^(15 - 7), exactly.
    """
    if qdata.is_meta:
        return qdata.new_empty(qdata.shape, dtype=dtype)
    depth = qdata.shape[1]
    if qdata.dtype == torch.float8_e4m3fn:
        bits = qdata.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
        wide, scale = bits.view(torch.float16).float(), scale * 256
    else:
        wide = qdata.float()
    if scale.shape[1] == 1:
        return wide.mul_(scale).to(dtype)
    whole = depth // group
    wide[:, : whole * group].view(len(wide), whole, group).mul_(scale[:, :whole, None])
    wide[:, whole * group :].mul_(scale[:, whole:])  # a short last group, or nothing
    return wide.to(dtype)
