"""What the stored numbers are, in plain torch: row-wise symmetric int8 and float8_e4m3fn, equal to torchao 0.18's.

Sources: torchao `Int8WeightOnlyConfig(version=2, granularity=PerRow())` (`choose_qparams_affine`, `quantize_affine`)
and `Float8WeightOnlyConfig(granularity=PerRow())` (`_choose_scale_float8`, `_quantize_affine_float8`), its torch path.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448


def quantize_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight[N, K] (fp32, bf16 or fp16) -> qdata[N, K] in `dtype` (int8 or float8_e4m3fn), scale[N, 1] fp32.

    The scale is computed in the weight's dtype and then widened, as torchao does: a bf16 weight gets a scale of eight
    significant bits. One difference: an fp8 row whose scale is 0 (zeros, or too small for fp16) is stored as zeros;
    torchao stores NaN there (0 / 0).
    """
    largest = weight.abs().amax(dim=1, keepdim=True)
    # Divided by a tensor: on a GPU, division by a number multiplies by its reciprocal, and a scale that is off in its
    # last bit moves weights that lie near a boundary. So the stored numbers are the same on every device.
    if dtype == torch.int8:
        # 127.5, half of the 255 steps: the largest value rounds to 128 and is clamped to 127 (-128 on the other side).
        scale = (largest / torch.full_like(largest, 127.5)).clamp(min=torch.finfo(torch.float32).eps).float()
        return (weight * (1.0 / scale)).round_().clamp_(-128, 127).to(dtype), scale
    assert dtype == torch.float8_e4m3fn, dtype
    scale = (largest / torch.full_like(largest, _FP8_MAX)).float()
    scaled = weight.float() / torch.where(scale == 0, 1.0, scale)
    return scaled.clamp_(-_FP8_MAX, _FP8_MAX).to(dtype), scale


def dequantize(qdata: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """qdata[N, K], scale[N, 1] -> the weight [N, K] they stand for: the fp32 product, rounded to `dtype`."""
    return (qdata.float() * scale).to(dtype)
