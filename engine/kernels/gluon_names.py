"""What Triton 3.9 calls otherwise than 3.6 and 3.7, of the Gluon that the kernels for sm_90 use, under one name."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
fetch_each = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # by pointers
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@builtin  # type: ignore[untyped-decorator]
def view(buffer: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The same bytes of shared memory as another shape and type."""
    reinterpret = getattr(buffer, "reinterpret", None) or buffer._reinterpret
    return reinterpret(dtype, shape, layout, _semantic=_semantic)
