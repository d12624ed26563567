"""The engine process: commands in, steps, results out. No HTTP, no text, no asyncio.

    stdin                one line of JSON, `ProcessConfig`; it is kept open, and its end means that the parent is gone
    ipc://DIR/engine     ROUTER: commands from every API process and the parent; one StepOutput a step for each of
                         these API processes that has something in it
    ipc://DIR/report     PUSH: EngineReady at start and when the variants have changed; EngineReport twice a second,
                         from a thread of its own, so that a long step is not taken for a hang and a hang is not hidden

Variants come and go between steps. Loading one gives a turn to the engine before each matrix; one that goes takes no
new requests, and is freed when those in flight have finished. One change at a time; CUDA graphs of an added variant are
captured one by one when nothing runs, or every so many steps.

A start that fails prints one line and exits with code 1. An error in a step that is not one request's own fault ends
the process: the parent starts it anew with the next epoch.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
from queue import Empty, SimpleQueue
from typing import Any

import msgspec
import zmq

from engine.config import EngineConfig, ModelError, VariantRefused
from engine.core import Engine, StepResult
from engine.logs import set_up_logging
from engine.messages import (
    CLIENT_SHIFT,
    ENGINE_ENDPOINT,
    REPORT_ENDPOINT,
    Abort,
    AddRequest,
    AddVariant,
    DropClient,
    EngineCommand,
    EngineInfo,
    EngineReady,
    EngineReport,
    Finished,
    RemoveVariant,
    Shutdown,
    StepOutput,
    VariantChanged,
)

log = logging.getLogger("octavo.engine")
HEARTBEAT_SECONDS = 0.5
IDLE_POLL_MS = 1000
CAPTURE_STEPS = 32  # from one CUDA graph of an added variant to the next, while requests run


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
        self.changed: SimpleQueue[EngineInfo] = SimpleQueue()  # for the reporting thread
        self._change: tuple[bytes, AddVariant | RemoveVariant] | None = None  # under way, and who asked for it
        self._captured_at = 0  # step
        self._decoder = msgspec.msgpack.Decoder(EngineCommand)
        self._encoder = msgspec.msgpack.Encoder()

    def run(self) -> None:
        """Serve until told to shut down."""
        engine = self.engine
        while not self.stopping:
            self._turn(0 if engine.has_work or engine.changes.has_captures else IDLE_POLL_MS)
            if self._change is not None:
                self._go_on_changing(*self._change)
            busy = engine.has_work and engine.num_steps - self._captured_at < CAPTURE_STEPS
            if engine.changes.has_captures and not busy and not self.stopping:
                engine.changes.capture_next()
                self._captured_at = engine.num_steps

    def _turn(self, timeout_ms: int = 0) -> None:
        """Take what commands there are, and do one step if there is work."""
        self._receive(timeout_ms)
        if self.engine.has_work and not self.stopping:
            self._send(self.engine.step())

    def _turn_while_loading(self) -> None:
        self._turn()
        if self.stopping:
            raise VariantRefused("shutting_down", "the server is shutting down")

    def _receive(self, timeout_ms: int) -> None:
        """Take every command that has arrived, waiting up to `timeout_ms` for the first."""
        if not self.router.poll(timeout_ms):
            return
        while True:
            try:
                client, frame = self.router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle(client, self._decoder.decode(frame))

    def _handle(self, client: bytes, command: EngineCommand) -> None:
        engine = self.engine
        match command:
            case AddRequest():
                if engine.takes(command.variant):
                    engine.add(command)
                else:  # sent before its API process knew
                    ids = range(command.request_id, command.request_id + command.params.n)
                    self._send(StepResult(finished=[Finished(i, "removed") for i in ids]))
            case AddVariant() | RemoveVariant():
                self._begin_change(client, command)
            case Abort():
                engine.abort(command.sequence_ids)
            case DropClient():
                engine.abort([i for i in engine.sequences if i >> CLIENT_SHIFT == command.client_id])
            case Shutdown():
                self.stopping = True

    def _begin_change(self, client: bytes, command: AddVariant | RemoveVariant) -> None:
        """Answer what needs no work, or begin: `run` goes on with it between steps."""
        engine, name = self.engine, command.name
        loaded, taken = name in engine.runner.variants, engine.takes(name)
        if isinstance(command, AddVariant) and taken:
            self._answer(client, command, changed=False)
        elif self._change is not None:
            what = "added" if isinstance(self._change[1], AddVariant) else "removed"
            message = f"{self._change[1].name} is being {what}: ask again when that is done"
            self._answer(client, command, VariantRefused("change_under_way", message))
        elif isinstance(command, RemoveVariant) and not loaded:
            names = ", ".join(engine.runner.variants)
            self._answer(client, command, VariantRefused("model_not_found", f"{name} is not loaded; loaded: {names}"))
        elif isinstance(command, RemoveVariant) and name == engine.info.default_variant:
            message = f"{name} is the default variant, which stays: start the server with another one first"
            self._answer(client, command, VariantRefused("default_variant", message))
        else:
            self._change = (client, command)
            if isinstance(command, RemoveVariant):
                engine.begin_removal(name)
                self.changed.put(engine.info)

    def _go_on_changing(self, client: bytes, command: AddVariant | RemoveVariant) -> None:
        """Add the variant, which takes many turns; or end its removal, once nothing uses it."""
        engine, name, refused = self.engine, command.name, None
        if isinstance(command, AddVariant):
            started = time.monotonic()
            try:
                engine.add_variant(name, self._turn_while_loading)
                log.info("variant %s added in %.1f s", name, time.monotonic() - started)
            except VariantRefused as e:
                refused = e
                log.warning("variant %s not added: %s", name, e)
        elif engine.uses(name):
            return
        else:
            engine.end_removal()
            log.info("variant %s removed", name)
        self._change = None
        if refused is None:
            self.changed.put(engine.info)
        self._answer(client, command, refused)

    def _answer(
        self,
        client: bytes,
        command: AddVariant | RemoveVariant,
        refused: VariantRefused | None = None,
        changed: bool = True,
    ) -> None:
        code, message = (refused.code, str(refused)) if refused is not None else (None, "")
        answer = VariantChanged(command.change_id, self.engine.revision, changed, code, message)
        self.router.send_multipart([client, self._encoder.encode(answer)])

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
    server = EngineServer(engine, router, config.epoch)
    server.changed.put(engine.info)
    gc.collect()
    gc.freeze()  # what is here stays: a full collection walks through it for 60 ms, and a step would wait
    threading.Thread(target=_report, args=(context, engine, config, server.changed), daemon=True).start()
    server.run()
    router.close(linger=200)
    os._exit(0)  # not waiting for the daemon threads' sockets


def _report(context: zmq.Context[Any], engine: Engine, config: ProcessConfig, changed: SimpleQueue[EngineInfo]) -> None:
    push = context.socket(zmq.PUSH)
    push.connect(f"ipc://{config.ipc_dir}/{REPORT_ENDPOINT}")
    while True:
        try:
            info = changed.get(timeout=HEARTBEAT_SECONDS)
            push.send(msgspec.msgpack.encode(EngineReady(config.epoch, info)))
        except Empty:
            pass  # nothing has changed: a heartbeat is due
        push.send(msgspec.msgpack.encode(EngineReport(config.epoch, engine.stats())))


def _exit_with_parent() -> None:
    # The raw descriptor: a daemon thread blocked inside a buffered reader would hold its lock at exit.
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
