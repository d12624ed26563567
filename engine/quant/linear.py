"""A stored matrix and its product: one class for each way of multiplying. Callable, immutable, no tensor subclass.

M rows of activations, K inputs, N outputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine import kernels
from engine.kernels import Codes, Quantised


@dataclass(frozen=True)
class PlainLinear:
    """weight [N, K] in the compute dtype; bias [N] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def takes(self, like: Tensor) -> None:
        """Activations in the compute dtype."""

    def __call__(self, x: Tensor | Quantised, out: Tensor | None = None, planes: bool = False) -> Tensor:
        """[M, K] -> [M, N] in x's dtype, written to `out` where it is given. planes: see `kernels.linear`."""
        assert isinstance(x, Tensor)
        return kernels.linear(x, self.weight, self.bias, out, planes)

    def gated(self, x: Tensor | Quantised, codes: Codes | None) -> Tensor | Quantised:
        """[M, K] -> `silu_mul` of the product [M, N / 2], as the next product takes it."""
        if codes is not None or self.bias is not None:
            return kernels.silu_mul(self(x), codes)
        assert isinstance(x, Tensor)
        return kernels.gated(x, self.weight)

    def added(self, x: Tensor | Quantised, residual: Tensor) -> Tensor | None:
        """residual[M, N] + the product, see `kernels.added`."""
        if self.bias is not None or isinstance(x, Quantised):
            return None
        return kernels.added(x, residual, self.weight)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.weight, self.bias) if t is not None]


@dataclass(frozen=True)
class WeightOnlyLinear:
    """qdata [N, K] int8 or float8_e4m3fn; scale [N, G] float32, each of group_size inputs (0: all, G = 1); bias [N] or
    None. Activations stay in the compute dtype, or come in two digits that stand for it.
    """

    qdata: Tensor
    scale: Tensor
    bias: Tensor | None = None
    group_size: int = 0

    def takes(self, like: Tensor) -> Codes | None:
        """What spares the product a launch: activations split in digits by the operation before it, for as many rows as
        `like` has.
        """
        splits = kernels.takes_digits(like, self.qdata.dtype, self.group_size)
        return Codes(self.qdata.dtype, digits=2) if splits else None

    def __call__(self, x: Tensor | Quantised, out: Tensor | None = None, planes: bool = False) -> Tensor:
        """[M, K] -> [M, N] in x's dtype, written to `out` where it is given. planes: see `kernels.linear`."""
        stored = (self.qdata, self.scale, self.bias)
        if isinstance(x, Tensor):
            return kernels.weight_only_matmul(x, *stored, self.group_size, out, planes)
        return kernels.digits_matmul(x.qdata, x.scale, *stored, x.dtype, self.group_size, out, planes)

    def gated(self, x: Tensor | Quantised, codes: Codes | None) -> Tensor | Quantised:
        """[M, K] -> `silu_mul` of the product [M, N / 2], as the next product takes it."""
        product = _gated_codes(x, self)
        if product is not None:
            return product
        if codes is not None or self.bias is not None or isinstance(x, Quantised):
            return kernels.silu_mul(self(x), codes)
        return kernels.gated(x, self.qdata, self.scale, self.group_size)

    def added(self, x: Tensor | Quantised, residual: Tensor) -> Tensor | None:
        """residual[M, N] + the product, see `kernels.added`."""
        if self.bias is not None or isinstance(x, Quantised):
            return None
        return kernels.added(x, residual, self.qdata, self.scale, self.group_size)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.qdata, self.scale, self.bias) if t is not None]


@dataclass(frozen=True)
class W8A8Linear:
    """As WeightOnlyLinear, but each token is quantised to the weight's dtype first, with a scale of its own (one of
    each group_size inputs), and the product is of 8-bit numbers. pre_scale: [K] float32, what tokens are multiplied by
    before they are quantised (`kernels.quantize_tokens`), or None. block_scale: see `kernels.w8a8_matmul`.
    """

    qdata: Tensor
    scale: Tensor
    bias: Tensor | None = None
    group_size: int = 0
    pre_scale: Tensor | None = None
    block_scale: Tensor | None = None

    def takes(self, like: Tensor) -> Codes:
        """What spares the product a launch: activations quantised by the operation before it."""
        return Codes(self.qdata.dtype, self.group_size, pre_scale=self.pre_scale)

    def __call__(self, x: Tensor | Quantised, out: Tensor | None = None, planes: bool = False) -> Tensor:
        """[M, K] -> [M, N] in x's dtype, written to `out` where it is given. planes: see `kernels.linear`."""
        if isinstance(x, Tensor):
            x = Quantised(*kernels.quantize_tokens(x, self.qdata.dtype, self.group_size, self.pre_scale), x.dtype)
        stored = (self.qdata, self.scale, self.bias)
        return kernels.w8a8_matmul(x.qdata, x.scale, *stored, x.dtype, self.group_size, out, self.block_scale, planes)

    def gated(self, x: Tensor | Quantised, codes: Codes | None) -> Tensor | Quantised:
        """[M, K] -> `silu_mul` of the product [M, N / 2], as the next product takes it."""
        product = _gated_codes(x, self)
        return kernels.silu_mul(self(x), codes) if product is None else product

    def added(self, x: Tensor | Quantised, residual: Tensor) -> Tensor | None:
        """No 8-bit product adds a residual."""

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.qdata, self.scale, self.bias, self.pre_scale, self.block_scale) if t is not None]


Linear = PlainLinear | WeightOnlyLinear | W8A8Linear


def _gated_codes(x: Tensor | Quantised, linear: WeightOnlyLinear | W8A8Linear) -> Tensor | None:
    """`kernels.gated_codes`: what comes out is not in codes, the next product makes them."""
    if not isinstance(x, Quantised) or linear.group_size or linear.bias is not None:
        return None
    return kernels.gated_codes(x, linear.qdata, linear.scale)


def add_rms_norm(
    linear: Linear, x: Tensor | Quantised, residual: Tensor, weight: Tensor, eps: float, codes: Codes | None = None
) -> tuple[Tensor | Quantised, Tensor]:
    """`kernels.add_rms_norm` of the product and residual[M, N], which may be overwritten -> (normed, the sum)."""
    total = linear.added(x, residual)
    if total is None:
        return kernels.add_rms_norm(linear(x, planes=True), residual, weight, eps, codes)
    return kernels.rms_norm(total, weight, eps, codes), total
