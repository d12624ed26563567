"""For all tests: skips those marked `gpu` where there is no CUDA device, fixes hypothesis' examples in CI, lets SIGINT
through.
"""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

# By hand hypothesis looks at new examples each time; a gate must say the same of the same commit.
settings.register_profile("gate", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("gate")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; the servers of tests would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # here, because a run without GPU tests should not pay for it

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
