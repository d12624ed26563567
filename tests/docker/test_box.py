"""The box around the server: container files say what they should, Prometheus accepts its files, and every expression
of the board and of the alert rules finds data when a real Prometheus scrapes a live server under load.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
BOARD = json.loads((DOCKER / "grafana" / "boards" / "octavo.json").read_text())
RULES = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")), reason="needs promtool and prometheus on the PATH"
)


def board_expressions() -> list[str]:
    return [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", [])]


@needs_prometheus
@pytest.mark.parametrize(
    "words",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts.test.yml")],
)
def test_promtool(words: tuple[str, ...]):
    done = subprocess.run(["promtool", *words], cwd=DOCKER / "prometheus", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_explained():
    names = {rule["alert"] for rule in RULES}
    tests = yaml.safe_load((DOCKER / "prometheus" / "alerts.test.yml").read_text())["tests"]
    assert {case["alertname"] for group in tests for case in group["alert_rule_test"]} == names
    runbook = (ROOT / "docs" / "operations.md").read_text()
    assert all(f"### {name}" in runbook for name in names)


def test_compose():
    services = COMPOSE["services"]
    assert {name: s.get("profiles") for name, s in services.items()} == {
        "octavo-4090": ["4090"],
        "octavo-cpu": ["cpu"],
        "prometheus": None,
        "grafana": None,
    }
    for service in services.values():
        assert all(port.startswith(("127.0.0.1:", "${OCTAVO_BIND:-127.0.0.1}:")) for port in service["ports"])
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert source in COMPOSE["volumes"] or (DOCKER / source).is_dir(), volume
        if "image" in service and "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "pinned"


def test_compose_settings_are_the_servers():
    """Each OCTAVO_ variable in the files is an option of octavo-serve."""
    text = subprocess.run(
        [sys.executable, "-m", "server.supervisor", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    files = [DOCKER / "compose.yaml", DOCKER / "kubernetes" / "octavo.yaml", DOCKER / "systemd" / "octavo.service"]
    files += [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"]
    names = {name for file in files for name in re.findall(r"OCTAVO_([A-Z_]+)", file.read_text())} - {"BIND"}
    assert len(names) >= 8
    for name in names:
        assert f"--{name.lower().replace('_', '-')}" in text.stdout, name


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_dockerfiles(name: str):
    text = (DOCKER / name).read_text()
    stages = re.split(r"^FROM ", text, flags=re.M)[1:]
    assert len(stages) == 2 and "AS build" in stages[0]
    last = stages[1]
    assert re.search(r"^USER 10001$", last, re.M) and last.index("USER 10001") < last.index("ENTRYPOINT")
    assert "/ready" in last[last.index("HEALTHCHECK") :] and "VOLUME /cache" in last
    assert re.search(r"^ARG BASE=\S+:[\d.]+\S*$", text, re.M), "pinned"
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M):
        assert all((ROOT / word).exists() for word in source.split() if word != "README.md")
    ignore = (DOCKER / f"{name}.dockerignore").read_text().split()
    copied = {word for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M) for word in source.split()}
    assert {word.removeprefix("!") for word in ignore if word.startswith("!")} == copied


def test_other_manifests_parse():
    documents = list(yaml.safe_load_all((DOCKER / "kubernetes" / "octavo.yaml").read_text()))
    (container,) = documents[2]["spec"]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    for file in (DOCKER / "grafana" / "provisioning").rglob("*.yml"):
        assert yaml.safe_load(file.read_text())["apiVersion"] == 1
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids)) and len(board_expressions()) > 30


# A real Prometheus and a live server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    command = [sys.executable, "-m", "server.supervisor", "models/pocket", "--variants", "bf16,int8-row", "--port", "0"]
    command += ["--device", "cpu", "--threads", "1", "--kv-cache-tokens", "2048"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("READY "), line
        yield line.split()[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def prometheus(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Prometheus on loopback with the shipped configuration, but scraping the live server once a second."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = (DOCKER / "prometheus" / "prometheus.yml").read_text()
    config = config.replace("octavo:8000", server.removeprefix("http://"))
    config = re.sub(r"_interval: \d+s", "_interval: 1s", config)
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(DOCKER / "prometheus" / "alerts.yml", folder)
    url = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={url}"], stderr=log)
        try:
            wait_for(lambda: query(f"http://{url}", "up == 1"), 30)
            yield f"http://{url}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def query(prometheus: str, expression: str) -> list[dict[str, Any]]:
    """An instant query's samples; none while Prometheus does not answer, or only to say that it starts."""
    try:
        url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=10) as response:
            found: list[dict[str, Any]] = json.load(response)["data"]["result"]
            return found
    except urllib.error.HTTPError as e:
        with e:
            if e.code == 503:
                return []
            raise AssertionError(f"{expression}: {e.read().decode()}") from None
    except OSError:
        return []


def wait_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@needs_prometheus
def test_every_expression_returns_data_under_load(server: str, prometheus: str):
    argv = [sys.executable, "-m", "loadtest.measure", server, "--mix", "bf16=1,int8-row=1", "--concurrency", "6"]
    argv += ["--duration", "10", "--prefix-tokens", "64", "--input-tokens", "20-60", "--output-tokens", "40", "--json"]
    load = subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        wait_for(lambda: query(prometheus, "sum(increase(vllm:generation_tokens_total[8s])) > 200"), 60)
        time.sleep(3)  # more scrapes, for the rates of rates
        expressions = [e.replace("$__rate_interval", "10s") for e in board_expressions()]
        # a rule's expression without its threshold, which a healthy server does not pass
        expressions += [
            re.sub(r"\s(==|>|<)\s[\d.]+\s*$", "", rule["expr"].strip())
            for rule in RULES
            if "canary" not in rule["expr"]
        ]  # tests/server/test_canary.py has that
        empty = []
        for expression in expressions:
            values = [float(sample["value"][1]) for sample in query(prometheus, expression)]
            if not any(value == value for value in values):  # not NaN
                empty.append(expression)
        assert not empty, "\n".join(empty)
        firing = {s["metric"]["alertname"] for s in query(prometheus, 'ALERTS{alertstate="firing"}')}
        assert not firing
    finally:
        out, _ = load.communicate(timeout=60)
    result = json.loads(out)
    assert result["errors"] == 0
    wait_for(lambda: close(prometheus, "vllm:request_success_total", 'finished_reason="length"', result), 15)


def close(prometheus: str, name: str, labels: str, result: dict[str, Any]) -> bool:
    """Whether Prometheus has counted exactly what the load generator did (and its two requests to warm up)."""
    (sample,) = query(prometheus, f"sum({name}{{{labels}}})")
    return float(sample["value"][1]) == result["done"] + 2
