"""Kernels chosen as on another chip: an older one can be named, a newer or unknown one is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.config import ModelError
from engine.kernels import chip


def test_an_older_chip_can_be_named() -> None:
    assert chip.chosen("", (9, 0)) == (9, 0)
    assert chip.chosen("sm_89", (9, 0)) == (8, 9) and chip.chosen("sm_89", (12, 0)) == (8, 9)


@pytest.mark.parametrize(
    ("name", "present"), [("sm_90", (8, 9)), ("sm_91", (9, 0)), ("8.9", (9, 0)), ("SM_89", (9, 0))]
)
def test_another_is_refused(name: str, present: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match="kernels_for"):
        chip.chosen(name, present)


@pytest.mark.parametrize(("value", "fuses"), [("0", False), ("1", True), (None, True)])
def test_fusing_can_be_turned_off(value: str | None, fuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(chip.FUSE, raising=False)
    if value is not None:
        monkeypatch.setenv(chip.FUSE, value)
    assert chip.fuses.__wrapped__() == fuses  # what is under the cache


def test_gluon_is_for_one_chip_and_the_versions_of_triton_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed (Linux only)")
    cpu = torch.device("cpu")
    assert not chip.runs_gluon(cpu)
    for capability, version, runs in (
        ((9, 0), "3.6.0", True),
        ((9, 0), "3.7.1+git", True),
        ((9, 0), "3.9.0", True),
        ((9, 0), "3.8.1", False),
        ((9, 0), "3.5.1", False),
        ((9, 0), "3.60.0", False),
        ((8, 9), "3.6.0", False),
        ((10, 0), "3.6.0", False),
    ):
        monkeypatch.setattr(chip, "capability", lambda device, capability=capability: capability)
        monkeypatch.setattr(triton, "__version__", version)
        chip._can_run_gluon.cache_clear()
        assert chip.runs_gluon(cpu) == runs, (capability, version)
    chip._can_run_gluon.cache_clear()


@pytest.mark.parametrize("given", [None, "0"])
def test_triton_may_fuse_products_and_sums_unless_the_environment_says_otherwise(given: str | None) -> None:
    name = "TRITON_DEFAULT_FP_FUSION"
    env = {key: value for key, value in os.environ.items() if key != name} | ({name: given} if given else {})
    command = [sys.executable, "-c", f"import os, engine.kernels; print(os.environ[{name!r}])"]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (given or "1")
