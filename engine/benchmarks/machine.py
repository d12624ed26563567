"""What this machine is, and how fast it copies and multiplies: the two rates that every limit is made of.

The rates are measured once, on large tensors: a copy counts the bytes read and those written, a product 2 M N K. On a
GPU also in 8 bits where it has such products. On a CPU the copy is longer than the caches, so a small model that fits
them may beat a limit by bytes.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROUNDS = 3
_SECONDS = 0.05  # that one round should take at least


@dataclass(frozen=True)
class Rates:
    """copy: bytes/s. products: FLOP/s by the dtype of the operands ("bfloat16", "int8", "float8_e4m3fn")."""

    copy: float
    products: dict[str, float]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.partition(":")[2].strip() for line in f if line.startswith("model name")), "")
    except OSError:
        name = ""
    return name or platform.processor() or platform.machine()


def facts(device: torch.device) -> dict[str, str]:
    """The machine in words, for a report."""
    found = {"device": device_name(device)}
    if device.type == "cuda":
        p: Any = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors",
            "memory": f"{p.total_memory / 2**30:.1f} GiB",
            "shared memory": f"{p.shared_memory_per_block_optin / 1024:.0f} KiB a block",
            "L2": f"{p.L2_cache_size / 2**20:.0f} MiB",
            "driver": _driver(),
            "CUDA": torch.version.cuda or "none",
        }
    else:
        cores = os.cpu_count() or 1
        found |= {"cores": f"{cores}, {torch.get_num_threads()} torch threads"}
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    found["torch"] = torch.__version__
    found["triton"] = _triton()
    found["Python"] = f"{platform.python_version()} on {platform.platform(terse=True)}"
    return found


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as f:
            words = f.readline().split()
    except OSError:
        return "unknown"
    return next((w for w in words if w.replace(".", "").isdecimal() and "." in w), "unknown")


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def time_of(work: Callable[[], object], device: torch.device, least: float = _SECONDS) -> float:
    """Seconds of one call, the best of three rounds of as many calls as take `least` seconds."""
    work()
    runs, best = 1, float("inf")
    while True:
        seconds = _run(work, runs, device)
        if seconds >= least:
            break
        runs = max(2 * runs, int(runs * least / max(seconds, 1e-6)) + 1)
    for _ in range(_ROUNDS):
        best = min(best, _run(work, runs, device) / runs)
    return best


def _run(work: Callable[[], object], runs: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(runs):
            work()
        return time.perf_counter() - start
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(runs):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


@torch.inference_mode()
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """dtype: the computing one. A GPU's 8-bit products are measured where it has them."""
    on_gpu = device.type == "cuda"
    copy = _copy_rate((1 << 30) if on_gpu else (1 << 28), device)
    side = 8192 if on_gpu else 1024
    x, w = (torch.randn(side, side, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    products = {name_of(dtype): _flops(lambda: torch.nn.functional.linear(x, w), side, device)}
    if on_gpu:
        products["int8"] = _flops(_int8_product(side, device), side, device)
        if torch.cuda.get_device_capability(device) >= (8, 9):
            products["float8_e4m3fn"] = _flops(_fp8_product(side, device), side, device)
    return Rates(copy, products)


def _copy_rate(nbytes: int, device: torch.device) -> float:
    source, target = torch.zeros(2, nbytes, dtype=torch.uint8, device=device)
    return 2 * nbytes / time_of(lambda: target.copy_(source), device)


def _flops(product: Callable[[], Tensor], side: int, device: torch.device) -> float:
    return 2 * side**3 / time_of(product, device)


def _int8_product(side: int, device: torch.device) -> Callable[[], Tensor]:
    a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())


def _fp8_product(side: int, device: torch.device) -> Callable[[], Tensor]:
    a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)  # one scale a tensor: every chip that has FP8 takes it
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
