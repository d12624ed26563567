"""Which Triton kernels were compiled in this process: after the start none should be, as a step would wait for it.

Triton tells a listener of every version of a kernel (a set of types, alignments and constants) the first time it is
launched. A version read from Triton's cache on disk counts too: on a machine that has none it would be a compilation.
"""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def watch() -> list[str]:
    """Begin to listen, once a process: the kernels' names in the order of compilation, in a list that grows."""
    import triton

    names: list[str] = []
    before = triton.knobs.compilation.listener

    def note(*, src: Any, **rest: Any) -> None:
        names.append(src.name)
        if before is not None:
            before(src=src, **rest)

    triton.knobs.compilation.listener = note
    return names
