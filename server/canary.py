"""The canary: `python -m server.canary`, started by `server.supervisor` once the server is ready, where asked for.

Each variant answers a small exam and reads a short text (`canary.json`), through the server's own HTTP port like any
other client: at once, and then every `interval` seconds, or sooner where the engine or its variants are new. One
request at a time, and each first lets sequences that wait for their turn go before it. What a variant answers is held
against what `bf16` answers, question by question and window by window, with the evaluation's own statistics:

    accuracy, perplexity    of the exam and the text
    kl                      mean divergence from bf16's distribution over the four letters, in nats
    worse                   1 where it reads worse than bf16 by more than LIMITS and beyond chance (Holm, all variants)
    failed                  requests without an answer; worse says nothing of them

The parent gets the figures of a whole round (`CanaryReport`) and puts them on /metrics. A process of its own: whatever
happens here, no request waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import msgspec
import zmq

from client.api import OctavoClient, OctavoError
from client.eval.data import EvalError, Exam, Text, questions, text_of_lines
from client.eval.mmlu import MMLU
from client.eval.stats import holm, kl_divergence, mcnemar, paired_perplexity
from client.eval.wikitext import Wikitext
from engine.logs import set_up_logging
from engine.messages import REPORT_ENDPOINT, STATUS_ENDPOINT, CanaryReport, Status

BASELINE = "bf16"
WINDOW = 128  # tokens: short, so that there are enough of them to tell a difference from chance
ALPHA = 0.05
# A share of the questions, of bf16's perplexity. Of the bundled model's formats fp8-tensor costs most, 1.4 % of
# perplexity; doubled scales in one middle down_proj cost 10 %.
LIMITS = {"accuracy": 0.1, "perplexity": 0.05}
HOPELESS = 20.0  # nats a token more than bf16: no statistics needed, and none would be finite
PATIENCE_SECONDS = 10.0  # that long a request of ours lets others go first
POLL_SECONDS = 0.25
NICE = 10

log = logging.getLogger("octavo.canary")


class CanaryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """url: of the server, on this machine. host: what to send as Host; empty: the url's. interval: seconds."""

    url: str
    api_key: str
    host: str
    ipc_dir: str
    interval: float
    log_format: str
    log_level: str


@dataclass
class Answers:
    """What one variant said: rows of the exam by question, (loss in nats, tokens) by window, requests that failed."""

    exam: dict[str, dict[str, Any]] = field(default_factory=dict)
    text: dict[str, tuple[float, int]] = field(default_factory=dict)
    failed: int = 0


def load() -> tuple[Exam, Text]:
    """The bundled exam and text: a few of the pocket model's exam questions, some of its prose."""
    content = msgspec.json.decode(files("server").joinpath("canary.json").read_bytes())
    dev, test = (questions(enumerate(content[split]), f"canary {split}") for split in ("dev", "test"))
    return Exam(dev, test, "canary"), text_of_lines(content["text"], "canary")


class Watch:
    """The parent's Status, as it comes."""

    def __init__(self, context: zmq.Context[Any], ipc_dir: str) -> None:
        self._socket = context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.CONFLATE, 1)
        self._socket.connect(f"ipc://{ipc_dir}/{STATUS_ENDPOINT}")
        self._decoder = msgspec.msgpack.Decoder(Status)
        self._last: Status | None = None

    @property
    def status(self) -> Status | None:
        while self._socket.poll(0):
            self._last = self._decoder.decode(self._socket.recv())
        return self._last

    @property
    def served(self) -> tuple[int, tuple[str, ...]] | None:
        """The engine's epoch and variants; None unless it is ready."""
        status = self.status
        if status is None or status.state != "ready" or status.info is None:
            return None
        return status.epoch, tuple(v.name for v in status.info.variants if not v.removing)

    async def turn(self) -> None:
        """Wait while sequences of others wait, but not for ever."""
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            status = self.status
            if status is None or status.stats is None:
                return
            if not any(sum(v.waiting.values()) for v in status.stats.variants.values()):
                return
            await asyncio.sleep(POLL_SECONDS)


async def ask(client: OctavoClient, watch: Watch, model: str, exam: MMLU, text: Wikitext) -> Answers:
    """Everything of one variant, with what failed counted. Raises OctavoError where the server is gone."""
    answers = Answers()
    for task in (exam, text):
        items = await task.items(client, model)
        try:
            asker: Any = await task.asker(client, model)
        except EvalError as e:  # it gives no logprobs, whatever is tried
            answers.failed += len(items)
            log.warning("canary: %s", e)
            continue
        for key, item in items:
            await watch.turn()
            try:
                row = await asker(item)
            except OctavoError as e:
                answers.failed += 1
                log.warning("canary: %s, %s: %s", model, key, e)
                continue
            if task is exam:
                answers.exam[key] = row
            else:
                parts = row["parts"]
                answers.text[key] = (math.fsum(p[1] for p in parts), sum(p[2] for p in parts))
    return answers


def judge(found: Mapping[str, Answers]) -> dict[str, dict[str, float]]:
    """The figures of each variant; those that need `bf16` only where it is among them."""
    figures = {name: own_figures(answers) for name, answers in found.items()}
    base = found.get(BASELINE)
    if base is None:
        return figures
    past: list[tuple[str, int]] = []  # (variant, which p) where a loss is past its limit
    ps: list[float] = []
    for name, answers in found.items():
        both = [(base.exam[key], row) for key, row in answers.exam.items() if key in base.exam]
        if both:
            kl = [kl_divergence(a["logprobs"], b["logprobs"]) for a, b in both]
            figures[name]["kl"] = math.fsum(kl) / len(kl)
        figures[name]["worse"] = 0.0
        if name == BASELINE:
            continue
        for loss, limit, p in (exam_loss(both), text_loss(base, answers)):
            ps.append(p)
            if loss > limit:
                past.append((name, len(ps) - 1))
    adjusted = holm(ps)
    for name, index in past:
        if adjusted[index] < ALPHA:
            figures[name]["worse"] = 1.0
    return figures


def own_figures(answers: Answers) -> dict[str, float]:
    figures = {"failed": float(answers.failed)}
    if answers.exam:
        right = sum(row["picked"] == row["answer"] for row in answers.exam.values())
        figures["accuracy"] = right / len(answers.exam)
    if answers.text:
        figures["perplexity"] = math.exp(min(mean_loss(answers.text.values()), 700.0))  # the largest float is e^709
    return figures


def mean_loss(windows: Collection[tuple[float, int]]) -> float:
    """Nats a token."""
    return math.fsum(loss for loss, _ in windows) / sum(tokens for _, tokens in windows)


def exam_loss(both: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[float, float, float]:
    """Share of the questions lost, the limit, and p."""
    right = [(a["picked"] == a["answer"], b["picked"] == b["answer"]) for a, b in both]
    lost, won = right.count((True, False)), right.count((False, True))
    return (lost - won) / max(1, len(both)), LIMITS["accuracy"], mcnemar(lost, won)


def text_loss(base: Answers, other: Answers) -> tuple[float, float, float]:
    """How much larger the perplexity is, as a share, the limit, and p."""
    keys = sorted(base.text.keys() & other.text.keys())
    if len(keys) < 2:
        return 0.0, LIMITS["perplexity"], 1.0
    first, second = ([side.text[key][0] for key in keys] for side in (base, other))
    weights = [float(base.text[key][1]) for key in keys]
    more = (math.fsum(second) - math.fsum(first)) / math.fsum(weights)
    if not more < HOPELESS:  # NaN too
        return math.inf, LIMITS["perplexity"], 0.0
    found = paired_perplexity(first, second, weights)
    assert found is not None
    return math.expm1(more), LIMITS["perplexity"], found.p


async def run(config: CanaryConfig) -> None:
    """Round after round, until the parent is gone."""
    context: zmq.Context[Any] = zmq.Context()
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), gone.set)  # nothing is written there any more, so this is its end
    try:
        watch = Watch(context, config.ipc_dir)
        report: zmq.Socket[bytes] = context.socket(zmq.PUSH)
        report.connect(f"ipc://{config.ipc_dir}/{REPORT_ENDPOINT}")
        rounds = asyncio.create_task(keep_asking(config, watch, report))
        leaving = asyncio.create_task(gone.wait())
        done, pending = await asyncio.wait({rounds, leaving}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        for task in done:
            task.result()
    finally:
        context.destroy(linger=200)


async def keep_asking(config: CanaryConfig, watch: Watch, report: zmq.Socket[bytes]) -> None:
    exam, text = load()
    headers = {"Host": config.host} if config.host else {}
    known, due = None, 0.0
    async with OctavoClient(config.url, config.api_key or None, concurrency=1, headers=headers) as client:
        while True:
            served = watch.served
            if served is None or (served == known and time.monotonic() < due):
                await asyncio.sleep(POLL_SECONDS)
                continue
            known, due = served, time.monotonic() + config.interval
            try:
                figures = await one_round(client, watch, exam, text)
            except OctavoError as e:  # an engine that has just died, a variant that has just gone
                log.warning("canary: no round this time: %s", e)
                continue
            report.send(msgspec.msgpack.encode(CanaryReport(figures, time.time())))
            worse = [name for name, f in figures.items() if f.get("worse")]
            if worse:
                log.error("canary: worse than %s beyond chance: %s", BASELINE, ", ".join(worse))


async def one_round(client: OctavoClient, watch: Watch, exam: Exam, text: Text) -> dict[str, dict[str, float]]:
    """The figures of every variant that the server lists."""
    tasks = MMLU(exam), Wikitext(text, window=WINDOW, join="as-is")
    found = {
        str(card["variant"]): await ask(client, watch, str(card["id"]), *tasks)
        for card in await client.models()
        if str(card["id"]).endswith(f":{card['variant']}")  # not the bare name
    }
    return await asyncio.to_thread(judge, found)


def main() -> None:
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=CanaryConfig)
    set_up_logging(config.log_format, config.log_level)
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)  # each request, one line each
    os.nice(NICE)
    asyncio.run(run(config))


if __name__ == "__main__":
    main()
