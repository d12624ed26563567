"""The parent process of octavo-serve: owns the socket, starts the engine and the API processes, and watches them.

    bind the socket -> find and check the model -> start engine and API processes -> loop -> drain -> exit

Children get their settings as one line of JSON on stdin. That pipe stays open: its end is how a child learns that the
parent is gone. The loop waits on ZeroMQ reports and on signals (SIGCHLD among them), brings back what died, and
publishes a Status twice a second and at once on a change. `engine.messages` has the whole protocol.

An engine that dies while first loading ends the start (it has said why); later deaths bring a new one with the next
epoch, until three in a minute. An API process that dies is replaced under a new client id, and the engine drops what
the old one had. No torch and no asyncio here.
"""

from __future__ import annotations

import logging
import shutil
import signal
import socket
import sys
import time
from collections import deque
from pathlib import Path

import msgspec
import zmq

from engine.config import ModelError
from engine.logs import set_up_logging
from engine.messages import (
    ENGINE_ENDPOINT,
    REPORT_ENDPOINT,
    STATUS_ENDPOINT,
    ApiReport,
    CanaryReport,
    DropClient,
    EngineInfo,
    EngineReady,
    EngineStats,
    Report,
    Shutdown,
    Status,
)
from server.api_config import ApiConfig
from server.checkpoint import check_checkpoint, resolve_model
from server.child import Child
from server.ready import ready_fields, ready_text, server_url
from server.settings import PROG, ServerSettings, load_settings
from server.start import StartError, check_variants, dry_run, listen, private_folder

log = logging.getLogger("octavo")

TICK_SECONDS = 0.5  # between two Status messages
PROGRESS_SECONDS = 10.0  # between two words while loading
SETTLE_SECONDS = 0.4  # for API processes to connect to an engine that became ready: ZeroMQ tries every 0.1 s
STALLED_SECONDS = 5.0  # without a heartbeat
KILL_SECONDS = 60.0  # stalled that long, the engine is killed and started anew
DEATH_WINDOW_SECONDS = 60.0
MAX_DEATHS = 3  # within the window; of the engine, and for each API process's place
MARGIN_SECONDS = 5.0  # what children get beyond the time they were asked to end in


class Supervisor:
    """The children, what they reported, and the loop. Use as a context manager: leaving it kills what still runs."""

    def __init__(self, settings: ServerSettings, folder: Path, listener: socket.socket, started: float) -> None:
        self.settings = settings
        self.folder = folder
        self.listener = listener
        self.started = started
        self.epoch = 0
        self.state = "loading"
        self.info: EngineInfo | None = None
        self.stats: EngineStats | None = None
        self.totals: dict[str, float] = {}
        self.engine: Child | None = None
        self.apis: list[Child] = []
        self.canary: Child | None = None
        self.canary_report: CanaryReport | None = None
        self.engine_deaths: deque[float] = deque()
        self.restart_at: float | None = None
        self.last_heartbeat = 0.0
        self.stalled_since = 0.0
        self.announced = False
        self.settled_at: float | None = None
        self.next_client_id = 1
        self.signals: list[int] = []

    def __enter__(self) -> Supervisor:
        self.ipc_dir = private_folder()
        self.context = zmq.Context()
        self.report = self._socket(zmq.PULL)
        self.report.bind(self._endpoint(REPORT_ENDPOINT))
        self.status = self._socket(zmq.XPUB)  # a PUB that tells of each new subscriber, who is then served at once
        self.status.setsockopt(zmq.XPUB_VERBOSE, 1)
        self.status.bind(self._endpoint(STATUS_ENDPOINT))
        self.commands = self._socket(zmq.DEALER)
        self.commands.setsockopt(zmq.IDENTITY, (0).to_bytes(4, "big"))
        self.commands.connect(self._endpoint(ENGINE_ENDPOINT))
        self.wakeup, self._wakeup_writer = socket.socketpair()
        self.wakeup.setblocking(False)
        self._wakeup_writer.setblocking(False)
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP: let it
                signal.signal(number, lambda n, _frame: self.signals.append(n))
        signal.signal(signal.SIGCHLD, lambda _n, _frame: None)  # only to wake the loop
        self.poller = zmq.Poller()
        self.poller.register(self.report, zmq.POLLIN)
        self.poller.register(self.status, zmq.POLLIN)
        self.poller.register(self.wakeup, zmq.POLLIN)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children():
            child.close()
        signal.set_wakeup_fd(-1)
        self.wakeup.close()
        self._wakeup_writer.close()
        self.context.destroy(linger=0)
        shutil.rmtree(self.ipc_dir, ignore_errors=True)

    def run(self) -> int:
        """Serve until a signal; the exit code. Raises StartError when it cannot start or go on."""
        self._start_engine()
        self.apis = [self._start_api(deque()) for _ in range(self.settings.api_processes)]
        next_tick, next_word = 0.0, time.monotonic() + PROGRESS_SECONDS
        while not self.signals:
            now = time.monotonic()
            if now >= next_tick:
                self._publish()
                next_tick = now + TICK_SECONDS
            if not self.announced and now >= next_word:
                log.info("still loading after %.0f s", now - self.started)
                next_word = now + PROGRESS_SECONDS
            self._wait(next_tick - now)
            self._watch_engine()
            self._watch_apis()
            self._watch_canary()
            self._announce()
        return self._shut_down()

    # Children

    def _start_engine(self) -> None:
        # engine.process.ProcessConfig, spelled out: importing it would import torch.
        engine = self.settings.engine_config(self.folder)
        if self.info is not None:  # the variants that there were last, and the room that they left
            names = tuple(v.name for v in self.info.variants if not v.removing)
            engine = msgspec.structs.replace(engine, variants=names, variant_headroom=self.info.headroom)
        config = {
            "engine": engine,
            "ipc_dir": str(self.ipc_dir),
            "epoch": self.epoch,
            "log_format": self.settings.log_format,
            "log_level": self.settings.log_level,
        }
        self.engine = Child("engine", "engine.process", config)

    def _start_api(self, deaths: deque[float]) -> Child:
        s = self.settings
        client_id, self.next_client_id = self.next_client_id, self.next_client_id + 1
        config = ApiConfig(
            client_id=client_id,
            ipc_dir=str(self.ipc_dir),
            socket_fd=self.listener.fileno(),
            model_folder=str(self.folder),
            served_model_name=s.model_name,
            model_root=str(self.folder.resolve()) if Path(s.model).expanduser().is_dir() else s.model,
            api_keys=list(s.api_key),
            admin_keys=list(s.admin_key),
            max_body_bytes=s.max_body_mib * 2**20,
            max_queued_requests=s.max_queued,
            parse_special_in_content=s.parse_special_in_content,
            drain_seconds=s.drain_seconds,
            step_timeout=s.step_timeout,
            log_level=s.log_level,
            log_format=s.log_format,
            allowed_hosts=list(s.allowed_hosts),
        )
        return Child(f"API process {client_id}", "server.app", config, client_id, deaths, (self.listener.fileno(),))

    def _start_canary(self, url: str) -> Child:
        # server.canary.CanaryConfig, spelled out: importing it would import httpx
        s = self.settings
        config = {
            "url": url,
            "api_key": s.api_key[0] if s.api_key else "",
            "host": s.allowed_hosts[0] if s.allowed_hosts else "",
            "ipc_dir": str(self.ipc_dir),
            "interval": s.canary_interval,
            "log_format": s.log_format,
            "log_level": s.log_level,
        }
        return Child("canary", "server.canary", config)

    def _children(self) -> list[Child]:
        return [*self.apis, *(child for child in (self.engine, self.canary) if child)]

    def _watch_engine(self) -> None:
        now = time.monotonic()
        if self.engine is None:
            if self.restart_at is not None and now >= self.restart_at:
                self.restart_at = None
                self._start_engine()
            return
        code = self.engine.code
        if code is None:
            if self.state in ("ready", "stalled"):
                self._watch_pulse(self.engine, now)
            return
        ending = self.engine.ending()
        self.engine.close()
        self.engine = None
        if self.epoch == 0 and self.state == "loading":
            raise StartError("" if code == 1 else f"the engine ended while loading: {ending}")
        self.engine_deaths.append(now)
        self.stats = None
        recent = _recent(self.engine_deaths, now)
        if recent >= MAX_DEATHS:
            raise StartError(f"the engine died {recent} times within {DEATH_WINDOW_SECONDS:.0f} s, last: {ending}")
        self.epoch += 1
        self.restart_at = now + 0.5 * 2 ** (recent - 1)
        log.error("the engine died (%s); starting it anew, epoch %d", ending, self.epoch)
        self._set_state("dead")

    def _watch_pulse(self, engine: Child, now: float) -> None:
        """A silent engine, or one that hangs in a step, is stalled; if that lasts it is killed and so started anew."""
        silent = now - self.last_heartbeat > STALLED_SECONDS
        hanging = self.stats is not None and self.stats.busy_seconds > self.settings.step_timeout
        if not silent and not hanging:
            self.stalled_since = now
        self._set_state("stalled" if silent or hanging else "ready")
        if now - self.stalled_since > KILL_SECONDS:
            log.error("the engine has been stalled for %.0f s: killing it", now - self.stalled_since)
            engine.process.kill()

    def _watch_apis(self) -> None:
        for place, child in enumerate(self.apis):
            code = child.code
            if code is None:
                continue
            child.close()
            if not child.listening and not child.deaths:
                raise StartError("" if code == 1 else f"{child.name} ended while starting: {child.ending()}")
            now = time.monotonic()
            child.deaths.append(now)
            recent = _recent(child.deaths, now)
            if recent > MAX_DEATHS:
                raise StartError(f"API processes died {recent} times within {DEATH_WINDOW_SECONDS:.0f} s")
            self._send(DropClient(child.client_id))
            self.apis[place] = self._start_api(child.deaths)
            log.error("%s died (%s); %s takes its place", child.name, child.ending(), self.apis[place].name)

    def _watch_canary(self) -> None:
        """Without it the server serves on: it stays away, and its figures do not grow old unseen."""
        if self.canary is not None and self.canary.code is not None:
            log.error("the canary ended (%s): no more of its figures until the next start", self.canary.ending())
            self.canary.close()
            self.canary = self.canary_report = None

    # Messages

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        sock = self.context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        return sock

    def _endpoint(self, name: str) -> str:
        return f"ipc://{self.ipc_dir}/{name}"

    def _send(self, command: DropClient | Shutdown) -> None:
        try:
            self.commands.send(msgspec.msgpack.encode(command), zmq.NOBLOCK)
        except zmq.Again:
            log.warning("the engine takes no commands: %s was not sent", type(command).__name__)

    def _wait(self, seconds: float) -> None:
        """Sleep until a report, a signal or `seconds` later, and take in every report that is there."""
        events = dict(self.poller.poll(max(0, int(seconds * 1000) + 1)))
        if self.wakeup.fileno() in events:
            self.wakeup.recv(4096)
        while self.status.poll(0):
            if self.status.recv().startswith(b"\1"):  # a subscription, not the end of one
                self._publish()
        while self.report.poll(0):
            self._take(_DECODER.decode(self.report.recv()))

    def _take(self, report: Report) -> None:
        if isinstance(report, ApiReport):
            for key, delta in report.deltas.items():
                self.totals[key] = self.totals.get(key, 0.0) + delta
            before = self._settled
            for child in self.apis:
                if child.client_id == report.client_id:
                    child.listening = child.listening or report.listening
                    child.seen = report.epoch, report.revision
            if self._settled != before:
                self._publish()
        elif isinstance(report, CanaryReport):
            self.canary_report = report
        elif report.epoch != self.epoch or self.engine is None:
            return  # a last word of an engine that is gone
        elif isinstance(report, EngineReady):
            self.last_heartbeat = self.stalled_since = time.monotonic()
            self.info = report.info
            if self.state in ("loading", "dead"):
                log.info("engine ready %.1f s after its start", self.last_heartbeat - self.engine.started)
                self._set_state("ready")
            else:
                log.info("variants: %s", ", ".join(v.name for v in report.info.variants if not v.removing))
                self._publish()
        else:
            self.last_heartbeat = time.monotonic()
            self.stats = report.stats

    def _set_state(self, state: str) -> None:
        if state == self.state:
            return
        if "stalled" in (state, self.state):
            log.warning("the engine is %s (was %s)", state, self.state)
        self.state = state
        self._publish()

    @property
    def _settled(self) -> bool:
        """Whether all API processes that listen go by the present set of variants."""
        present = self.info is not None and (self.epoch, self.info.revision)
        return all(child.seen == present for child in self.apis if child.listening)

    def _publish(self) -> None:
        status = Status(self.epoch, self.state, self.info, self.stats, self.totals, self.canary_report, self._settled)
        self.status.send(msgspec.msgpack.encode(status))

    def _announce(self) -> None:
        if self.announced:
            return
        now = time.monotonic()
        if self.state != "ready" or not all(child.listening for child in self.apis):
            self.settled_at = None
            return
        self.settled_at = self.settled_at or now + SETTLE_SECONDS
        if now < self.settled_at:
            return
        assert self.info is not None
        self.announced = True
        s = self.settings
        url = server_url(s.host, self.listener.getsockname()[1])
        if s.canary:
            self.canary = self._start_canary(url)
        if s.log_format == "json":
            log.info("ready", extra={"fields": ready_fields(url, s.model_name, self.info, now - self.started)})
        else:
            print(ready_text(url, s.model_name, self.info, bool(s.api_key), now - self.started), flush=True)

    # The end

    def _shut_down(self) -> int:
        """Let API processes finish what they have, then end the engine. A second signal ends all at once."""
        if self.announced:
            log.info("ending: requests may run for %g s more; once more to stop at once", self.settings.drain_seconds)
        if self.canary is not None:
            self.canary.close()  # first, so that it asks nothing of a server that drains
        for child in self.apis:
            if child.code is None:
                child.process.terminate()
        wait = self.settings.drain_seconds + MARGIN_SECONDS if self.announced else MARGIN_SECONDS
        if not self._wait_for(self.apis, wait):
            log.warning("not all API processes ended in time")
        if self.engine is not None and self.state != "loading" and len(self.signals) == 1:
            self._send(Shutdown())
            if not self._wait_for([self.engine], MARGIN_SECONDS):
                log.warning("the engine did not end in time")
        return 0

    def _wait_for(self, children: list[Child], seconds: float) -> bool:
        """Keep publishing until `children` have ended; False when `seconds` pass or a second signal comes first."""
        end = time.monotonic() + seconds
        while any(child.code is None for child in children):
            left = end - time.monotonic()
            if left <= 0 or len(self.signals) > 1:
                return False
            if self.engine is not None and self.engine.code is not None and self.state != "loading":
                self._set_state("dead")  # its streams must end with an error, not wait
            self._publish()
            self._wait(min(left, TICK_SECONDS))
        return True


_DECODER = msgspec.msgpack.Decoder(Report)


def _recent(deaths: deque[float], now: float) -> int:
    while deaths and deaths[0] < now - DEATH_WINDOW_SECONDS:
        deaths.popleft()
    return len(deaths)


def main(argv: list[str] | None = None) -> int:
    """The console script octavo-serve. Exit codes: 0 ended by a signal, 1 cannot start or go on, 2 wrong options."""
    started = time.monotonic()
    settings = load_settings(sys.argv[1:] if argv is None else argv)
    set_up_logging(settings.log_format, settings.log_level)
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the hub's requests, one line each
    try:
        if settings.dry_run:
            return dry_run(settings)
        with listen(settings.host, settings.port) as listener:
            check_variants(settings.variants)
            folder = resolve_model(settings.model, settings.load_format)
            check_checkpoint(folder, settings.load_format)
            log.info("loading %s with %s", settings.model, ", ".join(settings.variants))
            log.info("settings: %s", settings.changed())
            with Supervisor(settings, folder, listener, started) as supervisor:
                return supervisor.run()
    except (StartError, ModelError) as e:
        if str(e):
            print(f"{PROG}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # before the loop took over signals, nothing is running yet


if __name__ == "__main__":
    sys.exit(main())
