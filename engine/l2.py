"""What the kernels of a decode step hand to one another stays in L2, while weights, keys and values stream through it.

A layer of a large batch reads several times what L2 holds, each byte once. What passes from kernel to kernel, some MB,
is pushed out meanwhile: written to memory, and read again. CUDA can keep what is accessed in a window of addresses in a
part of L2 ("L2 cache persistence", CUDA programming guide), and a stream's window is copied into every kernel that is
captured from it.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

log = logging.getLogger(__name__)

_PERSISTING_SIZE, _WINDOW_SIZE = 108, 109  # CUdevice_attribute: bytes of L2 that can be that part, and of a window
_LIMIT = 6  # CU_LIMIT_PERSISTING_L2_CACHE_SIZE
_WINDOW = 1  # CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW
_NORMAL, _PERSISTING = 0, 2  # CUaccessProperty
_LEAST = 2 << 20  # bytes that are worth it
_MOST = 1 / 3  # of L2, to be set aside: more slows down what streams


class _Window(ctypes.Structure):
    """CUaccessPolicyWindow."""

    _fields_ = [
        ("address", ctypes.c_void_p),
        ("num_bytes", ctypes.c_size_t),
        ("hit_ratio", ctypes.c_float),
        ("hit", ctypes.c_int),
        ("miss", ctypes.c_int),
    ]


class _Attribute(ctypes.Union):
    """CUlaunchAttributeValue."""

    _fields_ = [("window", _Window), ("room", ctypes.c_char * 64)]


class KeptMemory:
    """Memory of which L2 keeps what it can, for what captured graphs allocate.

    Their tensors of more than 1 MiB are in it as long as they fit: torch has the smaller ones elsewhere. num_bytes: 0
    where this device keeps nothing, or so little is asked for that it would not be worth it.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._driver = ctypes.CDLL("libcuda.so.1")
        largest = self._ask(_WINDOW_SIZE) if self._ask(_PERSISTING_SIZE) else 0
        self.num_bytes = min(num_bytes, largest) if num_bytes >= _LEAST else 0
        if not self.num_bytes:
            return
        self._set_aside(int(_MOST * torch.cuda.get_device_properties(device).L2_cache_size))
        with torch.cuda.stream(self._stream):  # which gets the library's workspace now: it is not to be in this memory
            square = torch.zeros(16, 16, device=device)
            torch.mm(square, square)
        self._owner = torch.cuda.CUDAGraph()  # a pool has its memory as long as one of its graphs lives
        with torch.cuda.graph(self._owner, pool=self._pool, stream=self._stream):
            memory = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
            square.zero_()  # torch warns of a graph without a kernel
        self.address = memory.data_ptr()

    @contextmanager
    def capture(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Capture the block."""
        if self.num_bytes:
            self._set(_Window(self.address, self.num_bytes, 1.0, _PERSISTING, _NORMAL))
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                yield
        finally:
            if self.num_bytes:
                self._set(_Window())  # torch hands out the same streams again

    def _set_aside(self, most: int) -> None:
        """So much of L2 that the memory fits, or `most`; what is set aside already stays so."""
        present = ctypes.c_size_t()
        self._driver.cuCtxGetLimit(ctypes.byref(present), _LIMIT)
        wanted = min(self.num_bytes, most, self._ask(_PERSISTING_SIZE))
        if wanted > present.value:
            self._driver.cuCtxSetLimit(_LIMIT, ctypes.c_size_t(wanted))

    def _set(self, window: _Window) -> None:
        stream, attribute = ctypes.c_void_p(self._stream.cuda_stream), _Attribute(window=window)
        status = self._driver.cuStreamSetAttribute(stream, _WINDOW, ctypes.byref(attribute))
        if status:
            log.warning("what decode's kernels hand on is not kept in L2: CUDA error %d", status)
            self.num_bytes = 0

    def _ask(self, attribute: int) -> int:
        """Of the current device; 0 where the driver does not know."""
        value = ctypes.c_int(0)
        self._driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, torch.cuda.current_device())
        return value.value
