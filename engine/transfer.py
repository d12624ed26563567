"""Host to device and back without waiting: pinned memory and non-blocking copies; on a CPU, plain views."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGN = 4  # elements: every piece starts on 16 bytes, so that Triton compiles one version of a kernel for it


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A numpy array as a tensor on `device`; the copy is queued on the current stream."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def upload(pieces: list[npt.NDArray[np.int32]], device: torch.device) -> list[Tensor]:
    """Several int32 arrays in one copy; views of it, each in its own shape."""
    offsets, total = [], 0
    for piece in pieces:
        offsets.append(total)
        total += -(-piece.size // _ALIGN) * _ALIGN
    buffer = np.empty(total, dtype=np.int32)
    for offset, piece in zip(offsets, pieces, strict=True):
        buffer[offset : offset + piece.size] = piece.ravel()
    flat = to_device(buffer, device)
    return [flat[offset : offset + piece.size].view(piece.shape) for offset, piece in zip(offsets, pieces, strict=True)]


def to_host(tensor: Tensor) -> Tensor:
    """Start copying to the host. On a GPU the values are there once an event recorded afterwards has passed."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host
