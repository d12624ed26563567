"""The bridge from HTTP handlers to the engine process: `engine.messages` over ZeroMQ, on the event loop.

`submit` sends the prompts of one HTTP request and returns its `RequestStream`. Each `StepOutput` is spread over the
sequences' pending lists in one loop, and each waiting handler is woken once, however many of its tokens came. A
handler that is slower than the engine finds all that has come since in one piece.

Sockets are read by the loop's reader on ZeroMQ's edge-triggered descriptor, without zmq.asyncio's future per message:
whoever touches a socket must afterwards drain it, because the touch may have eaten the edge.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import zmq

from engine.messages import (
    CLIENT_SHIFT,
    ENGINE_ENDPOINT,
    REPORT_ENDPOINT,
    STATUS_ENDPOINT,
    Abort,
    AddRequest,
    AddVariant,
    ApiReport,
    EngineInfo,
    Finished,
    Logprobs,
    RemoveVariant,
    Status,
    StepOutput,
    VariantChanged,
    pack_ids,
)
from server.api_config import ApiConfig
from server.errors import ApiError, ClientGone
from server.meter import SequenceMeter
from server.metrics import Counters
from server.prepared import Prepared
from server.variant_changes import VariantChanges

HEARTBEAT_SECONDS = 5.0  # silence of the parent or the engine that counts as death
REPORT_SECONDS = 1.0
MAX_PENDING = 4096  # tokens of one sequence that wait for a client that does not read

logger = logging.getLogger("octavo.api")


class SequenceStream:
    """What the engine has sent for one sequence and its handler has not taken yet."""

    __slots__ = (
        "finished",
        "index",
        "meter",
        "num_cached_tokens",
        "pending_ids",
        "pending_logprobs",
        "request",
        "sequence_id",
        "touched",
    )

    def __init__(self, request: RequestStream, index: int, sequence_id: int, meter: SequenceMeter) -> None:
        self.request = request
        self.meter = meter
        self.index = index  # of its choice in the response
        self.sequence_id = sequence_id
        self.pending_ids: list[int] = []
        self.pending_logprobs: list[Logprobs | None] = []
        self.num_cached_tokens = 0
        self.finished: Finished | None = None
        self.touched = False

    def take(self) -> tuple[list[int], list[Logprobs | None]]:
        ids, logprobs = self.pending_ids, self.pending_logprobs
        self.pending_ids, self.pending_logprobs = [], []
        return ids, logprobs


class RequestStream:
    """The sequences of one HTTP request, in the order of its choices: prompt by prompt, n of each.

    `next` waits for and returns the sequences that have something new. It raises what ended the request early.
    """

    def __init__(self, num_prompts: int, n: int) -> None:
        self.n = n
        self.sequences: list[SequenceStream] = []
        self.prompt_logprobs: list[dict[int, Logprobs]] = [{} for _ in range(num_prompts)]  # by position
        self.error: Exception | None = None
        self.writer: asyncio.Task[Any] | None = None  # who may be blocked by a client that does not read
        self._touched: list[SequenceStream] = []
        self._waiter: asyncio.Future[None] | None = None

    def touch(self, sequence: SequenceStream) -> None:
        if not sequence.touched:
            sequence.touched = True
            self._touched.append(sequence)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.wake()

    async def next(self) -> list[SequenceStream]:
        while not self._touched and self.error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.error is not None:
            raise self.error
        touched, self._touched = self._touched, []
        for sequence in touched:
            sequence.touched = False
        return touched


class EngineClient:
    """One per API process. `open` and `close` bracket its life on the running event loop."""

    def __init__(self, config: ApiConfig, counters: Counters) -> None:
        self.config = config
        self.counters = counters
        self.status: Status | None = None
        self.draining = False
        self.listening = False
        self._status_at = 0.0
        self._stalled_at: float | None = None
        self._sequences: dict[int, SequenceStream] = {}
        self._changes = VariantChanges()
        self._num_admitted = 0
        self._next_id = config.client_id << CLIENT_SHIFT
        self._encoder = msgspec.msgpack.Encoder()
        self._step_decoder = msgspec.msgpack.Decoder(StepOutput | VariantChanged)
        self._status_decoder = msgspec.msgpack.Decoder(Status)

    # life

    def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        identity = self.config.client_id.to_bytes(4, "big")
        self._engine = self._connect(zmq.DEALER, ENGINE_ENDPOINT, {zmq.IDENTITY: identity, zmq.IMMEDIATE: 1})
        self._report = self._connect(zmq.PUSH, REPORT_ENDPOINT, {})
        self._status = self._connect(zmq.SUB, STATUS_ENDPOINT, {zmq.SUBSCRIBE: b"", zmq.CONFLATE: 1})
        self._loop.add_reader(self._engine.FD, self._drain_engine)
        self._loop.add_reader(self._status.FD, self._drain_status)
        self._clock = self._loop.create_task(self._tick())

    async def close(self) -> None:
        self._clock.cancel()
        await asyncio.gather(self._clock, return_exceptions=True)
        self.report()
        self._loop.remove_reader(self._engine.FD)
        self._loop.remove_reader(self._status.FD)
        self._context.destroy(linger=200)

    def _connect(self, kind: int, endpoint: str, options: dict[int, bytes | int]) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        for option, value in ({zmq.SNDHWM: 0, zmq.RCVHWM: 0} | options).items():
            socket.setsockopt(option, value)
        socket.connect(f"ipc://{self.config.ipc_dir}/{endpoint}")
        return socket

    async def _tick(self) -> None:
        while True:
            self.report()
            self._drain_status()
            self._drain_engine()
            error = self._check_health()
            if error is not None:
                self._fail_all(error)
            await asyncio.sleep(REPORT_SECONDS)

    def report(self) -> None:
        """Send the parent what was counted since the last time."""
        deltas = self.counters.take()
        try:
            report = ApiReport(self.config.client_id, self.listening, deltas, *_set_of_variants(self.status))
            self._report.send(self._encoder.encode(report), zmq.NOBLOCK)
        except zmq.Again:  # the parent is not there at the moment: the counts go with the next report
            self.counters.put_back(deltas)

    # what is known of the engine

    @property
    def num_in_flight(self) -> int:
        """Sequences being prepared or run."""
        return len(self._sequences) + self._num_admitted

    @contextmanager
    def admission(self, num_sequences: int) -> Iterator[None]:
        """Hold places for sequences while they are prepared. Raises ApiError when the queue is full."""
        busy = self.num_in_flight
        if busy and busy + num_sequences > self.config.max_queued_requests:
            raise ApiError("queue_full")
        self._num_admitted += num_sequences
        try:
            yield
        finally:
            self._num_admitted -= num_sequences

    def ready_info(self) -> EngineInfo:
        """What the engine is. Raises ApiError unless a request could be sent now."""
        if self.draining:
            raise ApiError("shutting_down")
        error = self.unhealthy()
        if error is not None:
            raise error
        assert self.status is not None and self.status.info is not None
        return self.status.info

    def unhealthy(self) -> ApiError | None:
        """Why the engine cannot serve at the moment: loading, dead, silent or stuck in one step. None if it can."""
        if self.status is None or (self.status.state == "ready" and self.status.info is None):
            return ApiError("engine_loading")
        if self.status.state in ("loading", "dead"):
            return ApiError("engine_loading")
        stats = self.status.stats
        stuck = stats is not None and stats.busy_seconds > self.config.step_timeout
        silent = time.monotonic() - self._status_at > HEARTBEAT_SECONDS
        return ApiError("unhealthy") if stuck or silent or self.status.state == "stalled" else None

    def connected(self) -> bool:
        """Whether a message could be sent to the engine now."""
        events = self._engine.getsockopt(zmq.EVENTS)
        self._loop.call_soon(self._drain_engine)
        return bool(int(events) & zmq.POLLOUT)

    def _check_health(self) -> ApiError | None:
        """What to fail all requests in flight with, if anything."""
        now = time.monotonic()
        if self.status is None:
            return None
        if self.status.state == "dead" or now - self._status_at > HEARTBEAT_SECONDS:
            return ApiError("engine_dead")
        if self.status.state != "stalled":
            self._stalled_at = None
        elif self._stalled_at is None:
            self._stalled_at = now
        stats = self.status.stats
        stuck = stats is not None and stats.busy_seconds > self.config.step_timeout
        stalled = self._stalled_at is not None and now - self._stalled_at > self.config.step_timeout
        return ApiError("timeout") if stuck or stalled else None

    # requests

    def submit(self, prepared: Prepared, arrival: float | None = None) -> RequestStream:
        """Start `params.n` sequences of each prompt. Raises ApiError when the engine cannot be reached.

        `arrival` is when the HTTP request came, by the monotonic clock; without it, now.
        """
        params, variant, now = prepared.params, prepared.variant.name, time.monotonic()
        arrival = now if arrival is None else arrival
        stream = RequestStream(len(prepared.prompts), params.n)
        try:
            for ids, hashes in zip(prepared.prompts, prepared.hashes, strict=True):
                first, self._next_id = self._next_id, self._next_id + params.n
                for sequence_id in range(first, first + params.n):
                    meter = SequenceMeter(self.counters, variant, len(ids), arrival, now)
                    sequence = SequenceStream(stream, len(stream.sequences), sequence_id, meter)
                    stream.sequences.append(sequence)
                    self._sequences[sequence_id] = sequence
                self._send(AddRequest(first, variant, pack_ids(ids), params, prepared.cache_seed, hashes))
        except zmq.Again:
            self.abort(stream, "error")
            raise ApiError("engine_loading") from None
        self._loop.call_soon(self._drain_engine)
        return stream

    async def change_variants(self, kind: type[AddVariant] | type[RemoveVariant], name: str) -> VariantChanged:
        """Add or remove a variant; returns when that is done and all API processes know. Raises ApiError if refused."""
        command = self._changes.ask(kind, name)
        try:
            self._send(command)
        except zmq.Again:
            self._changes.fail_all(ApiError("engine_loading"))
        self._loop.call_soon(self._drain_engine)
        return await self._changes.wait(command)

    def finish(self, sequence: SequenceStream) -> None:
        """A stop string ended this sequence. Nothing more arrives for it."""
        if self._sequences.pop(sequence.sequence_id, None) is not None and sequence.finished is None:
            sequence.meter.ended("stop", time.monotonic())
            self._tell(Abort([sequence.sequence_id]))

    def abort(self, stream: RequestStream, reason: str = "abort") -> None:
        """Free what is still running of a request. Harmless when nothing is. `reason` is for the metrics."""
        live = [s for s in stream.sequences if self._sequences.pop(s.sequence_id, None) is not None]
        for sequence in live:
            sequence.meter.ended(reason, time.monotonic())
        if live:
            self._tell(Abort([s.sequence_id for s in live]))

    def disconnected(self, stream: RequestStream) -> None:
        """The client is gone: free the sequences at once and end the handler's wait."""
        self.abort(stream)
        stream.fail(ClientGone())

    def _drop_reader(self, stream: RequestStream) -> None:
        """The client has not read for MAX_PENDING tokens: free the sequences and unblock the handler."""
        self.abort(stream)
        stream.fail(ClientGone())
        if stream.writer is not None:
            stream.writer.cancel()

    def fail_all(self, kind: str) -> None:
        """End every request in flight with an error of the table."""
        self._fail_all(ApiError(kind))

    def _fail_all(self, error: ApiError) -> None:
        for stream in {id(s.request): s.request for s in self._sequences.values()}.values():
            self.abort(stream, "error")
            stream.fail(error)
        self._changes.fail_all(error)

    def _send(self, message: AddRequest | Abort | AddVariant | RemoveVariant) -> None:
        self._engine.send(self._encoder.encode(message), zmq.NOBLOCK)

    def _tell(self, message: Abort) -> None:
        try:
            self._send(message)
        except zmq.Again:
            logger.debug("no engine to tell: it has nothing of ours to free")
        self._loop.call_soon(self._drain_engine)

    # arrivals

    def _drain_status(self) -> None:
        for frame in _frames(self._status):
            status = self._status_decoder.decode(frame)
            previous, self.status = self.status, status
            self._status_at = time.monotonic()
            if status.state == "dead" or (previous is not None and previous.epoch != status.epoch):
                self._fail_all(ApiError("engine_dead"))
            if _set_of_variants(status) != _set_of_variants(previous):
                self.report()  # others wait for it
            self._changes.seen(status)

    def _drain_engine(self) -> None:
        for frame in _frames(self._engine):
            output = self._step_decoder.decode(frame)
            if isinstance(output, VariantChanged):
                self._changes.answered(output, self.status)
            elif self.status is not None and output.epoch == self.status.epoch:
                self._deliver(output)

    def _deliver(self, output: StepOutput) -> None:
        """Spread one step's output. Sequences no longer known were aborted or finished here: theirs is dropped."""
        known, now = self._sequences, time.monotonic()
        touched: list[SequenceStream] = []
        for i, (sequence_id, token_id) in enumerate(zip(output.sequence_ids, output.token_ids, strict=True)):
            sequence = known.get(sequence_id)
            if sequence is None:
                continue
            sequence.pending_ids.append(token_id)
            sequence.meter.token(now)
            if output.logprobs:
                sequence.pending_logprobs.append(output.logprobs[i])
            if not sequence.touched:
                sequence.request.touch(sequence)
                touched.append(sequence)
            elif len(sequence.pending_ids) > MAX_PENDING:
                self._drop_reader(sequence.request)
        for prompt in output.prompt_logprobs:
            sequence = known.get(prompt.sequence_id)
            if sequence is not None:
                known_positions = sequence.request.prompt_logprobs[sequence.index // sequence.request.n]
                known_positions.update(enumerate(prompt.positions, prompt.start))
        for started in output.started:
            sequence = known.get(started.sequence_id)
            if sequence is not None:
                sequence.num_cached_tokens = started.num_cached_tokens
                sequence.meter.started(started, now)
        for finished in output.finished:
            sequence = known.pop(finished.sequence_id, None)
            if sequence is not None:
                sequence.finished = finished
                sequence.meter.ended(finished.reason, now)
                sequence.request.touch(sequence)
                touched.append(sequence)
        for sequence in touched:
            sequence.request.wake()


def _frames(socket: zmq.Socket[bytes]) -> Iterable[bytes]:
    """All messages that have come, until none is left."""
    while True:
        try:
            yield socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return


def _set_of_variants(status: Status | None) -> tuple[int, int]:
    """Epoch and revision of the set that a process goes by which has this status."""
    return (-1, -1) if status is None or status.info is None else (status.epoch, status.info.revision)
