"""One stub server in a process of its own, so that it does not share the interpreter with what is measured."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@dataclass(frozen=True)
class StubServer:
    url: str

    def seen(self) -> dict[str, Any]:
        """The bodies of all requests so far, their paths, and how many ran at once."""
        with urllib.request.urlopen(f"{self.url}/seen") as response:
            found: dict[str, Any] = json.load(response)
            return found


@pytest.fixture
def stub() -> Iterator[StubServer]:
    process = subprocess.Popen([sys.executable, str(HERE / "stub.py")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield StubServer(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.kill()
        process.communicate()
