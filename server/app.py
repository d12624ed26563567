"""One API process: `python -m server.app`, started by `server.supervisor`, which see for the whole.

    stdin           one line of JSON, an ApiConfig; its end means that the parent is gone
    socket_fd       the listening socket, inherited and shared with the other API processes
    SIGTERM         drain: new requests get 503, those in flight finish for up to `drain_seconds`, then exit 0;
                    a second one ends at once

A request passes `protocol` (limits of HTTP) -> `envelope` (id, count) -> `auth` -> `routes` -> `schemas` (validate)
-> `prepared` (tokenise, hash) -> `engine_client` (to the engine and back) -> `choices` (text) -> `responses`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware

from engine.config import ModelError, load_model_config
from engine.logs import set_up_logging
from server.api_config import ApiConfig
from server.auth import Gate
from server.engine_client import EngineClient
from server.envelope import Envelope
from server.errors import HANDLERS, REJECT_REASONS
from server.metrics import Counters, Page
from server.prepared import Services
from server.protocol import LimitedProtocol
from server.routes import package_version, router
from server.tokenizer import load_tokenizer

KEEP_ALIVE_SECONDS = 75  # longer than common clients keep idle connections, so that they close first
ABORT_SECONDS = 2  # for streams to send their last event when the drain has run out

logger = logging.getLogger("octavo.api")


def create_app(config: ApiConfig, client: EngineClient) -> FastAPI:
    """The application. `client` is opened and closed by its lifespan. Raises ModelError for a broken model folder."""
    tokenizer = load_tokenizer(config.model_folder)
    defaults = load_model_config(config.model_folder).generation
    longest = max(len(tokenizer.table.token_bytes(i)) for i in range(tokenizer.num_ids))
    services = Services(config, tokenizer, defaults, longest, started=int(time.time()))

    page = Page(package_version(), config.served_model_name, REJECT_REASONS)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        client.open()
        try:
            yield {"client": client, "services": services, "page": page}
        finally:
            await client.close()

    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers=HANDLERS,
        middleware=[
            Middleware(Envelope, counters=client.counters),
            Middleware(Gate, keys=config.api_keys, admin_keys=config.admin_keys, hosts=config.allowed_hosts),
        ],
    )
    app.include_router(router)
    return app


class ApiServer(uvicorn.Server):
    """uvicorn, but SIGTERM drains while still accepting: whoever connects is told 503 instead of being left waiting."""

    def __init__(self, config: uvicorn.Config, client: EngineClient) -> None:
        super().__init__(config)
        self.client = client
        self._drain_until = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT:
            return  # Ctrl-C reaches the parent too, which decides
        again = self.client.draining
        self.client.draining = True
        self._drain_until = 0.0 if again else time.monotonic() + self.client.config.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if not self.client.listening:
            self.client.listening = True
            self.client.report()
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._stdin_ready)
        if self.client.draining and not self.should_exit:
            if time.monotonic() > self._drain_until:
                self._end_now()
            # tasks outlive their sequences by the time it takes to send the last bytes
            self.should_exit = self.should_exit or not (self.client.num_in_flight or self.server_state.tasks)
        return await super().on_tick(counter)

    def _stdin_ready(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            logger.warning("the parent process is gone")
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self.client.draining = True
            self._end_now()

    def _end_now(self) -> None:
        self.client.fail_all("shutting_down")
        self.should_exit = True


def main() -> None:
    line = sys.stdin.buffer.readline()
    config = msgspec.json.decode(line, type=ApiConfig)
    set_up_logging(config.log_format, config.log_level)
    client = EngineClient(config, Counters())
    try:
        app = create_app(config, client)
    except ModelError as e:
        sys.exit(f"octavo: {e}")
    settings = uvicorn.Config(
        app,
        loop="uvloop",
        http=LimitedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        # uvicorn's info is about itself, its warnings about clients' broken HTTP, which is counted
        log_level=config.log_level if config.log_level != "info" else "error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=ABORT_SECONDS,
    )
    listener = socket.socket(fileno=config.socket_fd)
    gc.collect()
    gc.freeze()  # what is here stays: a full collection walks through it for 15 ms, and all streams would wait
    ApiServer(settings, client).run(sockets=[listener])


if __name__ == "__main__":
    main()
