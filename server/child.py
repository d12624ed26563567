"""One child process of the parent: its start, with settings on a stdin that stays open, and how it ended."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections import deque
from typing import Any

import msgspec

log = logging.getLogger("octavo")


class Child:
    """A running `python -m module`. `client_id` is 0 for the engine; `deaths` are the times its predecessors died.

    `config` goes as one line of JSON to stdin, which stays open until `close`: its end tells the child that the parent
    is gone. `fds` are inherited.
    """

    def __init__(
        self,
        name: str,
        module: str,
        config: Any,
        client_id: int = 0,
        deaths: deque[float] | None = None,
        fds: tuple[int, ...] = (),
    ) -> None:
        self.name = name
        self.client_id = client_id
        self.deaths: deque[float] = deque() if deaths is None else deaths
        self.started = time.monotonic()
        self.listening = False
        self.seen = (-1, -1)  # epoch and revision of the set of variants that an API process goes by
        # -P: no module is taken from the folder that the user happens to be in.
        # A process group of its own: Ctrl-C in a terminal reaches the parent only, which then lets children drain.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module], stdin=subprocess.PIPE, pass_fds=fds, process_group=0
        )
        assert self.process.stdin is not None
        self._stdin = self.process.stdin
        try:
            self._stdin.write(msgspec.json.encode(config) + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            log.debug("%s ended before it read its settings", name)  # the parent sees its exit code

    @property
    def code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self.process.poll()

    def ending(self) -> str:
        """How a process that has ended did so, in words."""
        code = self.process.returncode
        if code >= 0:
            return f"exit code {code}"
        return f"signal {signal.Signals(-code).name}{', perhaps out of memory' if code == -signal.SIGKILL else ''}"

    def close(self) -> None:
        """Kill it if it still runs, and let go of its pipe."""
        if self.code is None:
            self.process.kill()
        self.process.wait()
        try:
            self._stdin.close()
        except BrokenPipeError:
            log.debug("%s left settings unread", self.name)
