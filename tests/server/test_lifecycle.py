"""A server with a key, from its first request to its last: who may call, the engine's death, the drain.

One server serves all tests of this file, in the order they stand here.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

KEY = "sekret-1"
KEYED = {"authorization": f"Bearer {KEY}"}
BODY = {"model": "pocket", "prompt": "The sea", "max_tokens": 1500, "ignore_eos": True}


@pytest.fixture(scope="module")
def guarded(start_server):
    return start_server("--api-key", KEY, "--api-key", "other-2", "--allowed-hosts", "127.0.0.1,octavo.test")


@pytest.fixture
def http(guarded) -> Iterator[httpx.Client]:
    with guarded.client() as client:
        yield client


PATHS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/pocket"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/nowhere"),
    ("GET", "/health/../metrics"),
    ("GET", "//health"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_everything_is_closed_without_a_key(http, method, path):
    response = http.request(method, f"{str(http.base_url).rstrip('/')}{path}")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("value", ["Bearer", "Bearer wrong", KEY, f"Basic {KEY}", "Bearer ключ", f"Bearer {KEY}x"])
def test_wrong_keys(http, value):
    assert http.get("/v1/models", headers={"authorization": value.encode()}).status_code == 401


def test_right_keys_and_open_probes(http):
    for key in (KEY, "other-2"):
        assert http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert http.get("/health").status_code == 200
    assert http.get("/ready").status_code == 200


@pytest.mark.parametrize("host", ["evil.test", "a/?x", "127.0.0.1.evil.test", ""])
def test_other_hosts_are_refused(http, host):
    response = http.get("/v1/models", headers=KEYED | {"host": host})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_host")


def test_allowed_hosts(http):
    for host in ("127.0.0.1:8000", "octavo.test", "OCTAVO.test:80"):
        assert http.get("/v1/models", headers=KEYED | {"host": host}).status_code == 200


def test_refused_callers_are_counted(guarded, http):
    def refused(reason: str) -> float:
        page = http.get("/metrics", headers=KEYED).text
        return float(page.partition(f'octavo_rejected_total{{reason="{reason}"}} ')[2].split()[0])

    wanted = {"invalid_api_key": len(PATHS) + 6, "invalid_host": 4}  # by the tests above
    end = time.monotonic() + 10
    while {reason: refused(reason) for reason in wanted} != wanted:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_no_other_port_listens(guarded):
    """The processes talk over ipc://, in a folder that is only ours."""
    tree = [guarded.process.pid, *children(guarded.process.pid)]
    inodes = set()
    for pid in tree:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(fd)
            except FileNotFoundError:  # closed since it was listed: it listens to nobody
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1])
    port = int(guarded.url.rpartition(":")[2])
    assert listening == [f"0100007F:{port:04X}"]


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def engine_pid(guarded) -> int:
    (pid,) = (p for p in children(guarded.process.pid) if b"engine.process" in Path(f"/proc/{p}/cmdline").read_bytes())
    return pid


def wait_until_ready(http) -> None:
    end = time.monotonic() + 60
    while http.get("/ready").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_engines_death_ends_requests_with_errors_and_a_new_one_comes(guarded, http):
    answers = []

    def plain() -> None:
        with guarded.client() as client:
            answers.append(client.post("/v1/completions", json=BODY, headers=KEYED))

    waiting = threading.Thread(target=plain)
    waiting.start()
    with http.stream("POST", "/v1/completions", json=BODY | {"stream": True}, headers=KEYED) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(engine_pid(guarded), signal.SIGKILL)
        rest = [line for line in lines if line]
    waiting.join()
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_dead")
    assert answers[0].status_code == 500
    assert answers[0].headers["x-should-retry"] == "false"
    assert answers[0].json()["error"]["code"] == "engine_dead"
    refused = http.post("/v1/completions", json=BODY, headers=KEYED)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert http.get("/health").status_code == 503
    wait_until_ready(http)
    answer = http.post("/v1/completions", json=BODY | {"max_tokens": 3}, headers=KEYED)
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_drain_finishes_what_runs_and_refuses_the_rest(guarded, http):
    body = BODY | {"stream": True, "max_tokens": 600}  # a second and more, on a fast machine
    with guarded.client() as other, http.stream("POST", "/v1/completions", json=body, headers=KEYED) as stream:
        lines = stream.iter_lines()
        next(lines)
        guarded.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 10
        while other.get("/ready").status_code == 200 and time.monotonic() < until:
            time.sleep(0.01)
        refused = other.post("/v1/completions", json=BODY, headers=KEYED)
        unready = other.get("/ready")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert refused.status_code == unready.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert refused.headers["retry-after"]
    assert guarded.process.wait(timeout=20) == 0
    with guarded.client() as late, pytest.raises(httpx.ConnectError):
        late.get("/health")
