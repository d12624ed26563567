"""Client processes: each sends its share of a run's requests and hands back what it saw.

A closed loop has slots that send, read to the end and send again. An open loop sends each request when it is due,
whatever became of those before it, and times count from when it was due: a slow server, or a slow client, cannot make
its own figures look better (no coordinated omission).

Parent and worker talk over a pipe: "ready" when the first requests are built and the server is warm, the common start
time, progress once a second, then the tally. Ctrl-C becomes a "stop", which ends the run early; what was measured is
kept.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import signal
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

import aiohttp

from loadtest.settings import LoadError, Settings
from loadtest.stream import Record, send
from loadtest.workload import Planned, Point, models_of, plan

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
HEAD_START = 0.2  # seconds from the word to start until the start, for all workers to have heard it
PROGRESS_SECONDS = 1.0
WARM_UP_SEED = 10**6  # added to the seed: prompts of their own
FAILED_PAUSE = 0.1  # seconds a slot waits after a failure: a server that refuses at once must not be hammered


@dataclass
class Tally:
    """What one worker saw. `gaps` by model, in seconds; `cpu_seconds` of the worker from start to end."""

    records: list[Record] = field(default_factory=list)
    gaps: list[array[float]] = field(default_factory=list)
    begin: float = 0.0
    end: float = 0.0
    cpu_seconds: float = 0.0
    stopped: bool = False


@dataclass(frozen=True)
class Progress:
    """The whole run so far."""

    seconds: float
    sent: int
    done: int
    failed: int
    output_tokens: int


@dataclass(frozen=True)
class Share:
    """One worker's part: the `index`-th of `count`."""

    settings: Settings
    point: Point
    seed: int
    index: int
    count: int
    api_key: str | None = field(default=None, repr=False)


def drive(s: Settings, point: Point, seed: int, key: str | None, tell: Callable[[Progress], None]) -> list[Tally]:
    """One run over `s.processes` workers. Raises LoadError. Ctrl-C ends the run early, a second one the command."""
    count = min(s.processes, point.concurrency) if s.arrivals == "closed" else s.processes
    context = multiprocessing.get_context("forkserver")  # imports once, however many runs there are
    context.set_forkserver_preload([__name__])
    pairs = [context.Pipe() for _ in range(count)]
    shares = [Share(s, point, seed, i, count, key) for i in range(count)]
    workers = [
        context.Process(target=work, args=(share, theirs)) for share, (_, theirs) in zip(shares, pairs, strict=True)
    ]
    try:
        for worker, (_, theirs) in zip(workers, pairs, strict=True):
            worker.start()
            theirs.close()  # so that a worker's death is an EOF here
        ours = [pipe for pipe, _ in pairs]
        for pipe in ours:
            _expect(pipe)
        start = time.monotonic() + HEAD_START
        for pipe in ours:
            pipe.send(start)
        with Interrupts() as interrupts:
            return _collect(ours, start, tell, interrupts)
    except EOFError:
        raise LoadError("a client process died") from None
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()


def _expect(pipe: Connection) -> None:
    word = pipe.recv()
    if word != "ready":
        raise LoadError(word)


class Interrupts:
    """Inside, the first Ctrl-C is only noted in `noted`; the second raises KeyboardInterrupt."""

    def __enter__(self) -> Interrupts:
        self.noted = False
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


def _collect(
    pipes: list[Connection], start: float, tell: Callable[[Progress], None], interrupts: Interrupts
) -> list[Tally]:
    tallies: dict[Connection, Tally] = {}
    counts: dict[Connection, tuple[int, ...]] = {}
    stopping = False
    while len(tallies) < len(pipes):
        for pipe in wait([p for p in pipes if p not in tallies], PROGRESS_SECONDS):
            assert isinstance(pipe, Connection)
            message = pipe.recv()
            if isinstance(message, Tally):
                tallies[pipe] = message
            else:
                counts[pipe] = message
        if interrupts.noted and not stopping:
            stopping = True
            for pipe in (p for p in pipes if p not in tallies):
                pipe.send("stop")
        sums = [sum(column) for column in zip(*counts.values(), strict=True)] or [0] * 4
        tell(Progress(time.monotonic() - start, *sums))
    return [tallies[pipe] for pipe in pipes]


def work(share: Share, pipe: Connection) -> None:
    """A worker process's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which says "stop"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # an overloaded server holds a connection a request
    try:
        requests = _requests(share)
        if share.index == 0:
            asyncio.run(_warm_up(share))
    except LoadError as e:
        pipe.send(str(e))
        return
    pipe.send("ready")
    start = pipe.recv()
    tally = Tally(gaps=[array("d") for _ in models_of(share.settings)])
    cpu = time.process_time()
    tally.begin = start
    asyncio.run(Worker(share, pipe, tally, start).run(requests))
    tally.end = time.monotonic()
    tally.cpu_seconds = time.process_time() - cpu
    pipe.send(tally)


def _requests(share: Share) -> Iterator[Planned]:
    """This worker's requests, built before the clock runs unless their number is open."""
    s = share.settings
    mine = islice(plan(s, share.point, share.seed), share.index, None, share.count)
    endless = s.arrivals == "closed" and s.duration and not s.requests
    return mine if endless else iter(list(mine))


async def _warm_up(share: Share) -> None:
    """A few requests to each model, one after the other. What comes of them is not looked at."""
    s = share.settings
    async with _session(share) as session:
        for name in models_of(s) if s.warmup else []:
            one = replace(s, model=name, mix=(), arrivals="closed", requests=s.warmup, duration=0.0, trace="")
            for request in plan(one, Point(concurrency=1), s.seed + WARM_UP_SEED):
                await send(session, s.url + PATHS[s.api], request.body, 0, 0.0, 0.0, array("d"))


def _session(share: Share) -> aiohttp.ClientSession:
    headers = {"Content-Type": "application/json"}
    if share.api_key:
        headers["Authorization"] = f"Bearer {share.api_key}"
    timeout = aiohttp.ClientTimeout(total=share.settings.timeout, connect=None)
    return aiohttp.ClientSession(headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0))


class Worker:
    """One process's event loop."""

    def __init__(self, share: Share, pipe: Connection, tally: Tally, start: float) -> None:
        self.share = share
        self.settings = share.settings
        self.pipe = pipe
        self.tally = tally
        self.start = start
        self.url = self.settings.url + PATHS[self.settings.api]
        self.sent = self.failed = self.output_tokens = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.main: asyncio.Task[Any] | None = None

    async def run(self, requests: Iterator[Planned]) -> None:
        loop = asyncio.get_running_loop()
        async with _session(self.share) as session:
            loop.add_reader(self.pipe.fileno(), self._stop)
            reporter = loop.create_task(self._report())
            self.main = loop.create_task(self._all(session, requests))
            await asyncio.wait([self.main])
            if self.tasks:
                await asyncio.wait(self.tasks)
            reporter.cancel()
            loop.remove_reader(self.pipe.fileno())
        if not self.main.cancelled():
            self.main.result()

    def _stop(self) -> None:
        self.pipe.recv()
        self.tally.stopped = True
        assert self.main is not None
        self.main.cancel()
        for task in self.tasks:
            task.cancel()

    async def _all(self, session: aiohttp.ClientSession, requests: Iterator[Planned]) -> None:
        await asyncio.sleep(self.start - time.monotonic())
        if self.settings.arrivals == "closed":
            mine = range(self.share.index, self.share.point.concurrency, self.share.count)
            for _ in mine:
                self._spawn(self._slot(session, requests))
            return
        for request in requests:
            due = self.start + request.at
            wait_for = due - time.monotonic()
            if wait_for > 0:
                await asyncio.sleep(wait_for)
            self._spawn(self._one(session, request, due))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _slot(self, session: aiohttp.ClientSession, requests: Iterator[Planned]) -> None:
        end = self.start + self.settings.duration if self.settings.duration else float("inf")
        while not self.tally.stopped and time.monotonic() < end:
            request = next(requests, None)
            if request is None:
                return
            failed = self.failed
            await self._one(session, request, time.monotonic())
            if self.failed > failed:
                await asyncio.sleep(FAILED_PAUSE)

    async def _one(self, session: aiohttp.ClientSession, request: Planned, due: float) -> None:
        self.sent += 1
        gaps = self.tally.gaps[request.model]
        record = await send(session, self.url, request.body, request.model, self.start, due, gaps)
        self.tally.records.append(record)
        self.failed += record.error != ""
        self.output_tokens += record.output_tokens

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            self.pipe.send((self.sent, len(self.tally.records) - self.failed, self.failed, self.output_tokens))
