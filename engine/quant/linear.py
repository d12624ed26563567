"""A stored matrix and its product: one class for each way of multiplying. Callable, immutable, no tensor subclass.

M rows of activations, K inputs, N outputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine import kernels


@dataclass(frozen=True)
class PlainLinear:
    """weight [N, K] in the compute dtype; bias [N] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N] in x's dtype."""
        return kernels.linear(x, self.weight, self.bias)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.weight, self.bias) if t is not None]


@dataclass(frozen=True)
class WeightOnlyLinear:
    """qdata [N, K] int8 or float8_e4m3fn; scale [N, G] float32, each of group_size inputs (0: all, G = 1); bias [N] or
    None. Activations stay in the compute dtype.
    """

    qdata: Tensor
    scale: Tensor
    bias: Tensor | None = None
    group_size: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N] in x's dtype."""
        return kernels.weight_only_matmul(x, self.qdata, self.scale, self.bias, self.group_size)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.qdata, self.scale, self.bias) if t is not None]


@dataclass(frozen=True)
class W8A8Linear:
    """As WeightOnlyLinear, but each token is quantised to the weight's dtype first, with a scale of its own (one of
    each group_size inputs), and the product is of 8-bit numbers. pre_scale: [K] float32, what tokens are multiplied by
    (in fp32, and so quantised from fp32) before they are quantised, or None.
    """

    qdata: Tensor
    scale: Tensor
    bias: Tensor | None = None
    group_size: int = 0
    pre_scale: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N] in x's dtype."""
        tokens = x if self.pre_scale is None else x * self.pre_scale
        x_qdata, x_scale = kernels.quantize_tokens(tokens, self.qdata.dtype, self.group_size)
        return kernels.w8a8_matmul(x_qdata, x_scale, self.qdata, self.scale, self.bias, x.dtype, self.group_size)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.qdata, self.scale, self.bias, self.pre_scale) if t is not None]


Linear = PlainLinear | WeightOnlyLinear | W8A8Linear
