"""A stored matrix and its product: one class for each way of storing. Callable, immutable, no tensor subclass.

M rows of activations, K inputs, N outputs.
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
    """qdata [N, K] int8 or float8_e4m3fn; scale [N, 1] float32; bias [N] or None. Activations stay in the compute
    dtype.
    """

    qdata: Tensor
    scale: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N] in x's dtype."""
        return kernels.weight_only_matmul(x, self.qdata, self.scale, self.bias)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.qdata, self.scale, self.bias) if t is not None]


Linear = PlainLinear | WeightOnlyLinear
