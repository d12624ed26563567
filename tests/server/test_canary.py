"""The canary: a planted fault is flagged, a sound variant is not, and the server never waits for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from client.eval.data import bundled_exam, bundled_text
from engine.messages import CanaryReport, Status
from server.canary import Answers, judge, load
from server.errors import REJECT_REASONS
from server.metrics import Page
from tests.server.conftest import Served, start_faulty, stop
from tests.server.test_metrics import INFO, STATS, parse, value

KEY = "k-17"


def answers(picked: str, losses: list[float], letters: list[float] | None = None) -> Answers:
    found = Answers(failed=0)
    for i, letter in enumerate(picked):
        found.exam[str(i)] = {"picked": int(letter), "answer": 0, "logprobs": letters or [-0.1, -3.0, -3.0, -3.0]}
    found.text = {str(i): (loss, 128) for i, loss in enumerate(losses)}
    return found


LOSSES = [500.0 + 10 * i for i in range(20)]
BASE = answers("0" * 30 + "1" * 6, LOSSES)


def test_the_exam_is_of_the_bundled_one() -> None:
    exam, text = load()
    assert set(exam.dev) == set(bundled_exam().dev)
    known = {(q.subject, q.question, q.choices, q.answer) for q in bundled_exam().test}
    assert len(exam.test) == 36 and {(q.subject, q.question, q.choices, q.answer) for q in exam.test} <= known
    assert text.raw in bundled_text().raw and len(text.raw) > 10_000


def test_what_is_worse() -> None:
    """Only a loss past its limit and beyond chance; noise, gains and small losses are none."""
    found = {
        "bf16": BASE,
        "same": answers("0" * 30 + "1" * 6, LOSSES),
        "noisy": answers("0" * 29 + "1" * 7, [x + 20 * (-1) ** i for i, x in enumerate(LOSSES)]),
        "small": answers("0" * 30 + "1" * 6, [x + 2 for x in LOSSES]),  # 1.6 % of perplexity, and certain
        "better": answers("0" * 36, [x - 50 for x in LOSSES]),
        "reads-badly": answers("0" * 30 + "1" * 6, [x + 13 + i % 3 for i, x in enumerate(LOSSES)]),
        "answers-badly": answers("1" * 20 + "0" * 10 + "1" * 6, LOSSES, [-2.0, -1.0, -3.0, -3.0]),
        "garbage": answers("1" * 36, [9999.0 * 128] * 20),
        "nan": answers("0" * 30 + "1" * 6, [float("nan")] * 20),
    }
    figures = judge(found)
    worse = {name for name, f in figures.items() if f["worse"]}
    assert worse == {"reads-badly", "answers-badly", "garbage", "nan"}
    assert figures["bf16"]["accuracy"] == 30 / 36 and figures["same"] == figures["bf16"]
    assert figures["bf16"]["kl"] == 0 < figures["answers-badly"]["kl"]
    assert 40 < figures["bf16"]["perplexity"] < figures["reads-badly"]["perplexity"] < figures["garbage"]["perplexity"]


def test_without_a_baseline_or_without_answers() -> None:
    assert judge({"int8-row": BASE})["int8-row"].keys() == {"failed", "accuracy", "perplexity"}
    nothing = judge({"bf16": BASE, "int8-row": Answers(failed=59)})["int8-row"]
    assert nothing == {"failed": 59.0, "worse": 0.0}


def test_the_page_has_what_is_known() -> None:
    figures = {"int8-row": {"accuracy": 0.9, "worse": 1.0, "failed": 0.0}, "gone": {"accuracy": 1.0}}
    status = Status(0, "ready", INFO, STATS, {}, CanaryReport(figures, 1795.0))
    samples = parse(Page("1.0", "m", REJECT_REASONS).render(status).decode())
    assert value(samples, "octavo_canary_accuracy", variant="int8-row") == 0.9
    assert value(samples, "octavo_canary_worse", variant="int8-row") == 1
    assert value(samples, "octavo_canary_timestamp_seconds") == 1795
    assert not any("gone" in str(labels) for _, labels in samples)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a key, an allow-list of hosts, and a fault in fp8-row."""
    options = ["--canary", "--api-key", KEY, "--allowed-hosts", "box.example,127.0.0.1"]
    server = start_faulty(tmp_path_factory.mktemp("fault"), *options)
    yield server
    stop(server)


def page(served: Served) -> dict[str, float]:
    """The canary's samples."""
    answer = httpx.get(f"{served.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    lines = [line.rpartition(" ") for line in answer.raise_for_status().text.splitlines()]
    return {name: float(number) for name, _, number in lines if name.startswith("octavo_canary")}


def wait_for_page(served: Served, wanted: bool) -> dict[str, float]:
    end = time.monotonic() + 100
    while bool(found := page(served)) != wanted:
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def children(served: Served) -> list[int]:
    """Process ids of the canary, by the command line."""
    found = []
    for task in Path(f"/proc/{served.process.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"server.canary" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the canary through /proc")
def test_a_planted_fault_is_flagged(watched: Served) -> None:
    """int8-row is not, and the server serves on without its canary."""
    found = wait_for_page(watched, True)
    worse = {name: number for name, number in found.items() if name.startswith("octavo_canary_worse")}
    assert worse == {
        f'octavo_canary_worse{{variant="{v}"}}': float(v == "fp8-row") for v in ("bf16", "int8-row", "fp8-row")
    }
    kl = {v: found[f'octavo_canary_kl{{variant="{v}"}}'] for v in ("int8-row", "fp8-row")}
    assert kl["fp8-row"] > 50 * kl["int8-row"]
    assert found['octavo_canary_failed{variant="bf16"}'] == 0

    (pid,) = children(watched)
    os.kill(pid, signal.SIGKILL)  # the server serves on, and old figures go with it
    assert wait_for_page(watched, False) == {} and not children(watched)
    assert httpx.get(f"{watched.url}/ready").status_code == 200
