"""What the kernels ask about the GPU they run on.

Their choices can be made as on another chip: `choose_as`, or the variable OCTAVO_KERNELS_FOR before the first question.
So the path of a GPU that nobody has at hand runs, and is tested, on a newer one. OCTAVO_FUSE=0, before the first
question, keeps apart what is else one launch, to compare the two: see `fuses`.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

from engine.config import ModelError

VARIABLE = "OCTAVO_KERNELS_FOR"
FUSE = "OCTAVO_FUSE"
# Whether Triton may compute a * b + c as one FMA: 3.9 warns where nobody says so, 3.10 then does not. Ours may.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

_TRITONS_OF_GLUON = ("3.6", "3.7", "3.9")  # 3.8 has no view of a part of shared memory
CHIPS = {"sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90": (9, 0)}


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """(8, 9) for sm_89; (0, 0) without a GPU, under the interpreter."""
    if device.type != "cuda":
        return 0, 0
    return chosen(os.environ.get(VARIABLE, ""), torch.cuda.get_device_capability(device))


def chosen(name: str, present: tuple[int, int]) -> tuple[int, int]:
    """The capability to choose for: of the chip called `name`, or the present one where that is empty.

    Raises ModelError for a chip that is unknown, or that can do what the present one cannot.
    """
    if not name:
        return present
    if name not in CHIPS:
        raise ModelError(f"kernels_for: unknown chip {name!r}; known: {', '.join(CHIPS)}")
    if CHIPS[name] > present:
        here = f"sm_{present[0]}{present[1]}"
        raise ModelError(f"kernels_for: this GPU is {here} and cannot run kernels for {name}; name an older chip")
    return CHIPS[name]


def choose_as(name: str) -> None:
    """From now on, in this process, choose as on the chip called `name`."""
    os.environ[VARIABLE] = name
    capability.cache_clear()


def runs_gluon(device: torch.device) -> bool:
    """Whether the kernels in Gluon are taken: they are written for the tensor cores of sm_90, which no other chip has,
    and in a part of Triton that is experimental, and changes.
    """
    return capability(device) == (9, 0) and _can_run_gluon(device)


@cache
def _can_run_gluon(device: torch.device) -> bool:
    import triton  # not wherever the twins run

    present = device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)
    return present and ".".join(triton.__version__.split(".")[:2]) in _TRITONS_OF_GLUON


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors; 1 without a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program can have; those of sm_89 without a GPU."""
    if device.type != "cuda":
        return 99 << 10
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """How a kernel is launched that may begin before the one it depends on has ended (programmatic dependent launch).

    The kernel gets PDL: where it is True, it must call `gdc_wait` before it reads or writes anything that another
    kernel of the step writes or reads, and never return without. Before that it may fetch weights, and what was written
    before the last ordinary launch: that waited for all before it, while any number of dependent ones since may still
    run. In a forward this is the embedding; so decode attention fetches the plan and the tables early.
    """
    return {"PDL": True, "launch_pdl": True} if capability(device) >= (9, 0) else {"PDL": False}


@cache
def fuses() -> bool:
    """Whether decode attention stores keys and values itself (`rope_and_attend`). Read once a process."""
    return os.environ.get(FUSE, "1") != "0"
