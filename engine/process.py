"""The engine process: commands in, steps, results out. No HTTP, no text, no asyncio.

    stdin                one line of JSON, `ProcessConfig`; it is kept open, and its end means that the parent is gone
    ipc://DIR/engine     ROUTER: commands from every API process and the parent; one StepOutput a step for each of
                         these API processes that has something in it
    ipc://DIR/report     PUSH: EngineReady once, then EngineReport twice a second from a thread of its own, so that a
                         long step is not taken for a hang and a hang is not hidden

A start that fails prints one line and exits with code 1. An error in a step that is not one request's own fault ends
the process: the parent starts it anew with the next epoch.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import Any

import msgspec
import zmq

from engine.config import EngineConfig, ModelError
from engine.core import Engine, StepResult
from engine.logs import set_up_logging
from engine.messages import (
    CLIENT_SHIFT,
    ENGINE_ENDPOINT,
    REPORT_ENDPOINT,
    Abort,
    AddRequest,
    DropClient,
    EngineCommand,
    EngineReady,
    EngineReport,
    Shutdown,
    StepOutput,
)

log = logging.getLogger("octavo.engine")
HEARTBEAT_SECONDS = 0.5
IDLE_POLL_MS = 1000


class ProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the parent tells the engine process on stdin."""

    engine: EngineConfig
    ipc_dir: str
    epoch: int
    log_format: str = "text"
    log_level: str = "info"


class EngineServer:
    """The loop between the ROUTER socket and the engine."""

    def __init__(self, engine: Engine, router: zmq.Socket[bytes], epoch: int) -> None:
        self.engine = engine
        self.router = router
        self.epoch = epoch
        self.stopping = False
        self._decoder = msgspec.msgpack.Decoder(EngineCommand)
        self._encoder = msgspec.msgpack.Encoder()

    def run(self) -> None:
        """Serve until told to shut down."""
        while not self.stopping:
            self._receive(0 if self.engine.has_work else IDLE_POLL_MS)
            if self.engine.has_work and not self.stopping:
                self._send(self.engine.step())

    def _receive(self, timeout_ms: int) -> None:
        """Take every command that has arrived, waiting up to `timeout_ms` for the first."""
        if not self.router.poll(timeout_ms):
            return
        while True:
            try:
                _, frame = self.router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle(self._decoder.decode(frame))

    def _handle(self, command: EngineCommand) -> None:
        engine = self.engine
        match command:
            case AddRequest():
                engine.add(command)
            case Abort():
                engine.abort(command.sequence_ids)
            case DropClient():
                engine.abort([i for i in engine.sequences if i >> CLIENT_SHIFT == command.client_id])
            case Shutdown():
                self.stopping = True

    def _send(self, result: StepResult) -> None:
        """One message for each API process that has something in this step."""
        outputs: dict[int, StepOutput] = {}

        def of(sequence_id: int) -> StepOutput:
            client = sequence_id >> CLIENT_SHIFT
            if client not in outputs:
                outputs[client] = StepOutput(self.epoch, [], [], [], [], [], [])
            return outputs[client]

        any_logprobs = any(entry is not None for entry in result.logprobs)
        for i, sequence_id in enumerate(result.sequence_ids):
            output = of(sequence_id)
            output.sequence_ids.append(sequence_id)
            output.token_ids.append(result.token_ids[i])
            if any_logprobs:
                output.logprobs.append(result.logprobs[i])
        for piece in result.prompt_logprobs:
            of(piece.sequence_id).prompt_logprobs.append(piece)
        for started in result.started:
            of(started.sequence_id).started.append(started)
        for finished in result.finished:
            of(finished.sequence_id).finished.append(finished)
        for client, output in outputs.items():
            self.router.send_multipart([client.to_bytes(4, "big"), self._encoder.encode(output)])


def main() -> None:
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=ProcessConfig)
    set_up_logging(config.log_format, config.log_level)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        engine = Engine(config.engine)
    except (ModelError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.set_hwm(0)  # nothing is dropped: what is queued is bounded by the sequences in flight
    path = f"{config.ipc_dir}/{ENGINE_ENDPOINT}"
    if os.path.exists(path):  # of the engine before this one
        os.unlink(path)
    router.bind(f"ipc://{path}")
    threading.Thread(target=_report, args=(context, engine, config), daemon=True).start()
    EngineServer(engine, router, config.epoch).run()
    router.close(linger=200)
    os._exit(0)  # not waiting for the daemon threads' sockets


def _report(context: zmq.Context[Any], engine: Engine, config: ProcessConfig) -> None:
    push = context.socket(zmq.PUSH)
    push.connect(f"ipc://{config.ipc_dir}/{REPORT_ENDPOINT}")
    push.send(msgspec.msgpack.encode(EngineReady(config.epoch, engine.info)))
    while True:
        push.send(msgspec.msgpack.encode(EngineReport(config.epoch, engine.stats())))
        time.sleep(HEARTBEAT_SECONDS)


def _exit_with_parent() -> None:
    # The raw descriptor: a daemon thread blocked inside a buffered reader would hold its lock at exit.
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
