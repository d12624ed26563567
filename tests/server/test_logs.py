"""Logs: JSON lines with request ids and tokens on demand, readable and quiet by default, never a key."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx

from engine.logs import JsonFormatter
from server.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]


def serve_and_log(tmp_path: Path, *options: str) -> tuple[list[str], str]:
    """Start a server, send it three requests, end it: its stderr's lines and its stdout."""
    command = [sys.executable, "-m", "server.supervisor", "models/pocket", "--device", "cpu", "--port", "0", *options]
    out, err = tmp_path / "out", tmp_path / "err"
    environment = os.environ | {"OCTAVO_API_KEY": "sekret"}
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=stderr, env=environment)
    try:
        url = None
        while url is None:
            assert process.poll() is None, err.read_text()
            url = next(
                (word.strip('",') for word in (out.read_text() + err.read_text()).split() if "http://" in word), None
            )
        with httpx.Client(base_url=url, headers={"authorization": "Bearer sekret"}, timeout=60) as client:
            body = {"model": "pocket", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
            while client.get("/ready").status_code != 200:
                pass
            client.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"}).raise_for_status()
            client.post("/v1/completions", json=body | {"stream": True}, headers={"x-request-id": "mine-2"})
            assert client.post("/v1/chat/completions", json={"model": "x"}).status_code == 400
            with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
                connection.sendall(b"BROKEN\r\n\r\n")  # is counted, not logged
                assert connection.recv(99).startswith(b"HTTP/1.1 400 ")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    return err.read_text().splitlines(), out.read_text()


def test_json_lines_tell_each_request(tmp_path: Path):
    lines, out = serve_and_log(tmp_path, "--log-format", "json", "--api-processes", "2")
    records = [json.loads(line) for line in lines]
    assert out == ""
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    (ready,) = (r for r in records if r["message"] == "ready")
    assert ready["own_bytes"].keys() == {"bf16"} and ready["kv_tokens"] > 0
    assert any(r["message"].startswith("settings: ") and "api_processes=2" in r["message"] for r in records)
    access = {r["request_id"]: r for r in records if r["logger"] == "octavo.access"}
    assert len(access) == 3, "probes are not logged"
    for name in ("mine-1", "mine-2"):
        record = access.pop(name)
        assert (record["endpoint"], record["status"], record["variant"]) == ("completions", 200, "bf16")
        assert (record["prompt_tokens"], record["completion_tokens"]) == (3, 4)
        assert 0 < record["seconds"] < 30
    (refused,) = access.values()
    assert (refused["endpoint"], refused["status"]) == ("chat", 400) and refused["rejected"]
    assert "sekret" not in "\n".join(lines)


def test_text_is_the_default_and_quiet(tmp_path: Path):
    lines, out = serve_and_log(tmp_path)
    assert out.startswith("READY ") and "curl" in out
    assert any("settings: model=models/pocket" in line for line in lines)
    assert not any("mine-1" in line or "Invalid HTTP" in line for line in lines)
    assert "sekret" not in out + "\n".join(lines)


def test_an_exception_stays_on_one_line():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("octavo", logging.ERROR, "f", 1, "bad %s", ("é",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert told["message"] == "bad é" and told["exception"].endswith("two\nlines") and told["time"].endswith("Z")


def test_settings_at_the_start_name_what_was_changed():
    settings = load_settings(["m", "--api-key", "k", "--variants", "bf16,int8-row", "--port", "9"])
    assert settings.changed() == "model=m variants=bf16,int8-row port=9"
