"""One real server for the tests of this folder: the bundled model in three variants, two API processes, a free port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "pocket"
VARIANTS = ("bf16", "int8-row", "fp8-row")
START_SECONDS = 90


# Runs in the engine process alone: once the engine is built, the scales of one variant's middle down_proj are doubled.
FAULT = """
import sys
if "engine.process" in sys.orig_argv:
    from engine.core import Engine
    built = Engine.__init__
    def init(self, *args, **kwargs):
        built(self, *args, **kwargs)
        self.runner.variants["fp8-row"].model.layers[1].down.scale.mul_(2)
    Engine.__init__ = init
"""


@dataclass(frozen=True)
class Served:
    """A running octavo-serve. `name` is the bare model name."""

    url: str
    name: str
    process: subprocess.Popen[str]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    def metric(self, line: str) -> float:
        """The value of one line of /metrics, named as it stands there."""
        with self.client() as client:
            for found in client.get("/metrics").text.splitlines():
                if found.startswith(line + " "):
                    return float(found.rpartition(" ")[2])
        raise KeyError(line)

    def wait_for_metric(self, line: str, value: float, seconds: float = 10) -> None:
        """Poll until a metric has a value; the page is at most a second behind."""
        end = time.monotonic() + seconds
        while self.metric(line) != value:
            assert time.monotonic() < end, f"{line} is {self.metric(line)}, not {value}"
            time.sleep(0.1)


def start(*options: str, api_processes: int = 1, variants: str = "bf16", model: Path = MODEL) -> Served:
    """Start a server on a free port and wait until it is ready."""
    command = [sys.executable, "-m", "server.supervisor", str(model), "--variants", variants, "--port", "0"]
    command += ["--device", "cpu", "--api-processes", str(api_processes), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()  # "READY http://127.0.0.1:PORT after …", or nothing if it could not start
    if not line.startswith("READY "):
        process.kill()
        process.communicate()
        raise RuntimeError(f"octavo-serve did not start: {line!r}, exit code {process.returncode}")
    served = Served(line.split()[1], "pocket", process)
    end = time.monotonic() + START_SECONDS
    with served.client() as client:
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < end, "not ready in time"
            time.sleep(0.05)
    return served


def start_faulty(folder: Path, *options: str) -> Served:
    """A server of VARIANTS with FAULT in fp8-row. `folder` is for the file that plants it."""
    (folder / "sitecustomize.py").write_text(FAULT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        return start(*options, variants=",".join(VARIANTS))


def stop(served: Served) -> int:
    """End a server the way a user does; its exit code."""
    if served.process.poll() is None:
        served.process.send_signal(signal.SIGINT)
    try:
        served.process.communicate(timeout=20)
    finally:
        served.process.kill()
        served.process.wait()
    return served.process.returncode


@pytest.fixture(scope="module")
def start_server() -> Iterator[Callable[..., Served]]:
    """`start`, for tests that need a server of their own; it ends with the module."""
    started: list[Served] = []

    def keep(*options: str, **settings: Any) -> Served:
        started.append(start(*options, **settings))
        return started[-1]

    yield keep
    for server in started:
        stop(server)


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    server = start(api_processes=2, variants=",".join(VARIANTS))
    yield server
    stop(server)
