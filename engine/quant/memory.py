"""Bytes of stored weights: what each variant holds alone, what it shares, and what all hold together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.qwen import Qwen

_CHECKED = 1 << 24  # elements that `all_finite` looks at in one go


@dataclass(frozen=True)
class WeightBytes:
    """own and shared, by variant: of tensors that no other variant uses, and of the rest. total: each tensor once."""

    own: dict[str, int]
    shared: dict[str, int]
    total: int


def weight_tensors(model: Qwen) -> list[Tensor]:
    """Every weight of one model tree (a tied head's tensor appears twice)."""
    tensors = [model.embedding, model.norm, *model.head.tensors]
    for layer in model.layers:
        tensors += [t for t in (layer.input_norm, layer.q_norm, layer.k_norm, layer.post_norm) if t is not None]
        tensors += [t for m in (layer.qkv, layer.out, layer.gate_up, layer.down) for t in m.tensors]
    return tensors


def count_bytes(models: Mapping[str, Qwen]) -> WeightBytes:
    """The bytes of model trees that share tensors, by variant. A tensor is known by its object, so shapes alone will
    do.
    """
    tensors = {name: {id(t): t.nbytes for t in weight_tensors(model)} for name, model in models.items()}
    users = Counter(key for sizes in tensors.values() for key in sizes)
    own = {name: sum(size for key, size in sizes.items() if users[key] == 1) for name, sizes in tensors.items()}
    shared = {name: sum(sizes.values()) - own[name] for name, sizes in tensors.items()}
    once = {key: size for sizes in tensors.values() for key, size in sizes.items()}
    return WeightBytes(own, shared, sum(once.values()))


def all_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity (a shape without values does not). Piece by piece: at one go the check
    takes several times the memory of the tensor.
    """
    return tensor.is_meta or all(bool(piece.isfinite().all()) for piece in torch.split(tensor.view(-1), _CHECKED))
