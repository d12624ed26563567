"""What the kernels ask about the GPU they run on."""

from __future__ import annotations

from functools import cache

import torch


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """(8, 9) for sm_89; (0, 0) without a GPU, under the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors; 1 without a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """How a kernel is launched that may begin before the one it depends on has ended (programmatic dependent launch).

    The kernel gets PDL: where it is True, it must call `gdc_wait` before it reads or writes anything that another
    kernel of the step writes or reads, and never return without; what it may do before is fetch weights.
    """
    return {"PDL": True, "launch_pdl": True} if capability(device) >= (9, 0) else {"PDL": False}
