"""The parent and real children: starts that fail, deaths, hangs, draining. The bundled shape, random weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "models" / "pocket"
ADMIN = {"Authorization": "Bearer boss"}
DUMMY = [str(POCKET), "--load-format", "dummy", "--threads", "1"]

LOADING = ["--admin-key", "boss", "--variant-headroom", "20MB"]

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds children through /proc")


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `condition`, asked until `seconds` have passed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Server:
    """One octavo-serve process, its output in files, and its children by module."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.out, self.err = folder / "out", folder / "err"
        env = {k: v for k, v in os.environ.items() if not k.startswith("OCTAVO_")} | {"OMP_NUM_THREADS": "1"}
        env["TMPDIR"] = str(folder)
        with self.out.open("w") as out, self.err.open("w") as err:
            argv = [sys.executable, "-m", "server.supervisor", *options, "--port", "0"]
            self.process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=out, stderr=err)
        self.url = ""

    def wait_ready(self) -> None:
        def line() -> str | None:
            assert self.process.poll() is None, self.err.read_text()
            text = self.out.read_text()
            return text if "curl" in text and text.endswith("\n") else None

        self.url = until(line, 60, "READY").split()[1]

    def children(self, module: str) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and alive(int(entry.name)):
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it ended while we looked
                if parent == self.process.pid and module.encode() in words:
                    found.append(int(entry.name))
        return found

    def health(self) -> int:
        try:
            return httpx.get(f"{self.url}/health").status_code
        except httpx.TransportError:
            return 0  # no API process at this moment

    def metric(self, name: str) -> float:
        try:
            page = httpx.get(f"{self.url}/metrics").text
        except httpx.TransportError:
            return float("nan")
        return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(name))

    def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": "pocket", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0} | fields
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def steady(self) -> bool:
        """Several connections in a row are served, so that every API process has had its chance to fail."""
        return all(self.complete().status_code == 200 for _ in range(6))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


class Stream(threading.Thread):
    """A streamed completion being read beside the test: its bytes so far, and whether it has begun."""

    def __init__(self, server: Server, **fields: Any) -> None:
        super().__init__()
        body = {"model": "pocket", "prompt": [9, 8, 7], "temperature": 0, "ignore_eos": True, "stream": True} | fields
        self.body, self.url = body, f"{server.url}/v1/completions"
        self.begun = threading.Event()
        self.data = b""
        self.broken = False
        self.start()
        assert self.begun.wait(30)

    def run(self) -> None:
        try:
            with httpx.stream("POST", self.url, json=self.body, timeout=60) as response:
                for chunk in response.iter_raw():
                    self.data += chunk
                    self.begun.set()
        except httpx.TransportError:
            self.broken = True


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers and makes sure that none outlives the test."""
    servers: list[Server] = []

    def started(*options: str) -> Server:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Server(folder, *options))
        return servers[-1]

    yield started
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with two API processes for the tests that leave it as they found it."""
    server = Server(
        tmp_path_factory.mktemp("server"), *DUMMY, "--variants", "bf16,int8-row", "--api-processes", "2", *LOADING
    )
    try:
        server.wait_ready()
        yield server
        assert server.stop() == 0, server.err.read_text()
        assert not list(server.out.parent.glob("octavo-*")), "the IPC folder stays"
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


# Starts that fail


def failed(start: Callable[..., Server], *options: str) -> str:
    """The last line on stderr of a server that must end with exit code 1; no traceback, nothing on stdout."""
    server = start(*options)
    assert server.process.wait(60) == 1
    err = server.err.read_text()
    assert server.out.read_text() == "" and "Traceback" not in err
    assert not list(server.err.parent.glob("octavo-*"))
    lines = [line for line in err.splitlines() if " INFO " not in line]
    assert len(lines) == 1, err
    return lines[0]


def test_a_missing_folder(start: Callable[..., Server]) -> None:
    assert "no/such/model does not exist" in failed(start, "/no/such/model")


def test_weights_cut_short(start: Callable[..., Server], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(POCKET / name, folder / name)
    header = json.dumps({"x": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(31))
    assert "model.safetensors is cut short" in failed(start, str(folder))


def test_an_unknown_variant(start: Callable[..., Server]) -> None:
    assert "int3-row" in failed(start, *DUMMY, "--variants", "bf16,int3-row")


def test_a_port_in_use(start: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "server.supervisor", *DUMMY, "--port", str(port)],
            cwd=ROOT, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"octavo-serve: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


# A server that runs


def test_the_curl_of_the_ready_block_works(server: Server) -> None:
    text = server.out.read_text()
    assert "pocket:bf16" in text and "pocket:int8-row" in text and "tokens fit" in text
    curl = next(line for line in text.splitlines() if line.strip().startswith("curl"))
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    done = subprocess.run(["bash", "-c", curl + " --silent"], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["usage"]["completion_tokens"] > 0, done.stdout


def test_both_api_processes_answer_with_the_same_totals(server: Server) -> None:
    assert len(server.children("server.app")) == 2 and len(server.children("engine.process")) == 1
    before = server.metric("octavo_requests_total")
    for _ in range(10):  # a connection each, so that both processes take some
        assert server.complete().status_code == 200
    until(lambda: server.metric("octavo_requests_total") >= before + 10, 5, "requests of both processes counted")


def test_nothing_but_the_http_port_listens(server: Server) -> None:
    inodes = set()
    for pid in [server.process.pid, *server.children("server.app"), *server.children("engine.process")]:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(fd)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = {row[1] for row in rows if row[9] in inodes and row[3] == "0A"}
    port = int(server.url.rpartition(":")[2])
    assert listening == {f"0100007F:{port:04X}"}


def test_killed_api_processes_come_back_and_their_blocks_are_freed(server: Server) -> None:
    decoded = server.metric("octavo_decode_tokens_total")
    streams = [Stream(server, n=8, max_tokens=1900) for _ in range(2)]
    until(lambda: server.metric('octavo_kv_blocks{state="used"}') > 0, 5, "blocks in use")
    old = server.children("server.app")
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    for stream in streams:
        stream.join(10)
        assert stream.broken
    until(lambda: len(set(server.children("server.app")) - set(old)) == 2, 10, "two new API processes")
    until(lambda: server.health() == 200, 20, "health")
    until(lambda: server.metric('octavo_kv_blocks{state="used"}') == 0, 5, "blocks freed")
    assert server.metric("octavo_decode_tokens_total") - decoded < 2 * 8 * 1900, "freed only by their own end"
    until(server.steady, 10, "service")


def test_a_killed_engine_comes_back(server: Server) -> None:
    added = httpx.post(f"{server.url}/v1/variants", json={"name": "fp8-row"}, headers=ADMIN, timeout=60)
    assert added.status_code == 201
    variants = httpx.get(f"{server.url}/v1/variants").json()
    wanted = server.complete(model="pocket:int8-row").json()["choices"]
    stream = Stream(server, max_tokens=1900)
    [old] = server.children("engine.process")
    os.kill(old, signal.SIGKILL)
    until(lambda: server.health() == 503, 5, "health 503")
    stream.join(10)
    assert b'"error"' in stream.data and b"[DONE]" not in stream.data
    assert server.complete().status_code in (500, 503)
    until(lambda: server.health() == 200, 40, "health 200")
    until(server.steady, 10, "service")
    assert server.children("engine.process") != [old]
    assert server.complete(model="pocket:int8-row").json()["choices"] == wanted
    assert "epoch 1" in server.err.read_text()
    assert httpx.get(f"{server.url}/v1/variants").json() == variants  # the present set, not that of the start
    assert len(variants["data"]) == 3 and 0 < variants["headroom_bytes"] < 20_000_000
    assert httpx.delete(f"{server.url}/v1/variants/fp8-row", headers=ADMIN, timeout=60).status_code == 200


def test_a_change_of_variants_waits_for_every_api_process(server: Server) -> None:
    stopped, _ = server.children("server.app")
    os.kill(stopped, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        try:
            body, url = {"name": "fp8-row"}, f"{server.url}/v1/variants"
            added = pool.submit(httpx.post, url, json=body, headers=ADMIN, timeout=60)
            until(lambda: "fp8-row" in {card["name"] for card in httpx.get(url).json()["data"]}, 20, "the other one")
            time.sleep(0.3)
            assert not added.done()
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert added.result().status_code == 201
    assert {server.complete(model="pocket:fp8-row").status_code for _ in range(8)} == {200}
    assert httpx.delete(f"{server.url}/v1/variants/fp8-row", headers=ADMIN, timeout=60).status_code == 200


def test_a_stopped_engine_is_reported_and_goes_on(server: Server) -> None:
    [engine] = server.children("engine.process")
    os.kill(engine, signal.SIGSTOP)
    try:
        until(lambda: server.health() == 503, 8, "health 503")
    finally:
        os.kill(engine, signal.SIGCONT)
    until(lambda: server.health() == 200, 5, "health 200")
    until(server.steady, 10, "service")


# Ends


def test_a_signal_drains_and_a_second_one_does_not(start: Callable[..., Server]) -> None:
    server = start(*DUMMY)
    server.wait_ready()
    stream = Stream(server, max_tokens=300)
    server.process.send_signal(signal.SIGTERM)
    refused = until(lambda: (r := server.complete()).status_code != 200 and r, 5, "new requests refused")
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert server.process.wait(30) == 0, server.err.read_text()
    stream.join(10)
    assert stream.data.endswith(b"data: [DONE]\n\n") and b'"error"' not in stream.data

    server = start(*DUMMY)
    server.wait_ready()
    stream = Stream(server, n=8, max_tokens=1900)
    children = server.children("server.app") + server.children("engine.process")
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert server.process.poll() is None
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0 and time.monotonic() - began < 3
    stream.join(10)
    assert b"[DONE]" not in stream.data
    assert not any(alive(pid) for pid in children)


def test_an_engine_that_keeps_dying_ends_the_server(start: Callable[..., Server]) -> None:
    server = start(*DUMMY)
    server.wait_ready()
    killed: set[int] = set()
    for _ in range(3):
        [engine] = until(lambda: set(server.children("engine.process")) - killed, 10, "an engine")
        killed.add(engine)
        os.kill(engine, signal.SIGKILL)
    assert server.process.wait(10) == 1
    assert "octavo-serve: the engine died 3 times within 60 s" in server.err.read_text().splitlines()[-1]


def test_children_end_when_the_parent_is_killed(start: Callable[..., Server]) -> None:
    server = start(*DUMMY)
    until(lambda: server.children("server.app") and server.children("engine.process"), 20, "children")
    children = server.children("server.app") + server.children("engine.process")
    server.process.kill()
    until(lambda: not any(alive(pid) for pid in children), 30, "children gone")
