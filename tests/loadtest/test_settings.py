"""Settings, scenarios and traces: what is wrong ends in one line and exit code 2."""

from __future__ import annotations

import json
import lzma
import socket
import threading
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from loadtest.measure import main
from loadtest.settings import Limit, LoadError, Settings, Span, parse_slo, settings_from
from loadtest.traces import Row, read_trace
from loadtest.workload import Point, plan

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = sorted((ROOT / "loadtest" / "scenarios").glob("*.toml"))
BASE = Settings(url="http://h", model="m")


def bodies(s: Settings, seed: int = 0) -> list[dict]:
    return [json.loads(p.body) for p in plan(s, Point(concurrency=4), seed)]


def test_an_slo_is_read():
    slo = parse_slo("ttft_p99=500ms, itl_p50=50us,e2e_max=2s,errors=5%")
    assert slo.limits == (Limit("ttft", "p99", 500.0), Limit("itl", "p50", 0.05), Limit("e2e", "max", 2000.0))
    assert slo.errors == 0.05
    assert parse_slo("ttft_p99=500ms").errors == 0.01


WRONG = [
    ("--slo", "ttft=500ms"),
    ("--slo", "ttft_p99=fast"),
    ("--slo", "ttft_p98=1ms"),
    ("--mix", "bf16=x"),
    ("--mix", "bf16=0"),
    ("--input-tokens", "0"),
    ("--input-tokens", "9-3"),
    ("--concurrency", "1,x"),
    ("--rate", "-1"),
    ("--arrivals", "sometimes"),
    ("--prefix-share", "1.5"),
    ("--timeout", "nan"),
    ("--seed", "0x"),
    ("--sweep", "4:2"),
    ("--no-such-option", "1"),
    ("--scenario", "/nowhere.toml"),
    ("--arrivals", "trace"),
    ("--out", "/nowhere/at/all"),
    ("--png", "--json"),
]


@pytest.mark.parametrize(("option", "word"), WRONG)
def test_a_wrong_word_is_one_line(option: str, word: str, capsys: pytest.CaptureFixture[str]):
    try:
        code = main(["http://127.0.0.1:9", option, word])
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and err.startswith("octavo-load: ")
    assert option in err or word in err


@pytest.mark.parametrize("argv", [["compare"], ["compare", "a", "b"], ["compare", __file__, __file__], [], ["ftp://x"]])
def test_other_wrong_commands(argv: list[str], capsys: pytest.CaptureFixture[str]):
    try:
        code = main(argv)
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1


def test_a_scenario_is_checked_and_the_command_line_wins(tmp_path: Path):
    file = tmp_path / "s.toml"
    file.write_text('arrivals = "poisson"\nrate = [2, 4]\nrequests = 10\ninput_tokens = "8-16"\nignore_eos = false\n')
    s = settings_from({"url": "http://h", "requests": "3"}, str(file))
    assert (s.rate, s.requests, s.input_tokens, s.ignore_eos) == ((2.0, 4.0), 3, Span(8, 16), False)
    wrong = {
        "sped = 1": "no such key: sped",
        "rate = -1": "rate: must be",
        "[a]\nb=1": "no such key: a",
        "x": "cannot read",
    }
    for text, said in wrong.items():
        file.write_text(text)
        with pytest.raises(LoadError, match=said):
            settings_from({"url": "http://h"}, str(file))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_every_scenario_makes_requests(path: Path):
    s = settings_from({"url": "http://h", "model": "m", "longest": "100000"}, str(path))
    point = Point(concurrency=s.concurrency[0]) if s.arrivals == "closed" else Point(rate=s.rate[0])
    made = list(islice(plan(s, point, 0), 5))
    assert len(made) >= 4
    assert all(json.loads(p.body)["stream"] for p in made)


def test_the_seven_scenarios_are_there():
    assert {p.stem for p in SCENARIOS} == {
        "chat",
        "generate",
        "mixed-variants",
        "mmlu-like",
        "overload",
        "shared-prefix",
        "summarise",
    }


# requests


def test_synthetic_prompts_are_new_and_reproducible():
    s = replace(BASE, input_tokens=Span(5, 9), output_tokens=Span(3, 3), requests=40)
    made = bodies(s)
    lengths = [len(b["prompt"]) for b in made]
    assert set(lengths) <= set(range(5, 10)) and len(set(lengths)) > 1
    assert all(3 <= i <= 999 for b in made for i in b["prompt"])
    assert len({tuple(b["prompt"]) for b in made}) == 40
    assert made == bodies(s) and made != bodies(s, seed=1)
    assert all((b["max_tokens"], b["ignore_eos"], b["temperature"]) == (3, True, 0.0) for b in made)


def test_a_mix_has_its_weights():
    made = bodies(replace(BASE, mix=(("bf16", 1.0), ("int8-row", 3.0)), requests=2000))
    share = sum(b["model"] == "m:int8-row" for b in made) / 2000
    assert 0.70 < share < 0.80
    assert {b["model"] for b in made} == {"m:bf16", "m:int8-row"}


def test_common_prefixes():
    made = bodies(replace(BASE, prefix_tokens=50, prefixes=2, prefix_share=0.5, requests=400))
    long = [b["prompt"] for b in made if len(b["prompt"]) == 178]
    assert 150 < len(long) < 250
    assert len({tuple(p[:50]) for p in long}) == 2 and len({tuple(p[50:]) for p in long}) == len(long)


@pytest.mark.parametrize(
    ("kind", "burstiness", "variation"), [("fixed", 1, 0.0), ("poisson", 1, 1.0), ("gamma", 0.25, 2.0)]
)
def test_arrivals_have_their_rate_and_spread(kind: str, burstiness: float, variation: float):
    s = replace(BASE, arrivals=kind, burstiness=burstiness, requests=4000, input_tokens=Span(1, 1))
    times = [p.at for p in plan(s, Point(rate=50), 7)]
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 0 and fmean(gaps) == pytest.approx(0.02, rel=0.15)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(variation, abs=0.25)
    limited = list(plan(replace(s, requests=0, duration=2.0), Point(rate=50), 7))
    assert limited and limited[-1].at <= 2.0


def test_chat_and_files(tmp_path: Path):
    spoken = bodies(replace(BASE, api="chat", requests=3, input_tokens=Span(6, 6)))
    assert all(len(b["messages"][0]["content"].split()) == 6 for b in spoken)
    text = tmp_path / "t.txt"
    text.write_text("one two three four five six seven")
    assert all(len(b["prompt"].split()) == 128 for b in bodies(replace(BASE, prompts=str(text))))
    rows = tmp_path / "c.jsonl"
    rows.write_text('{"prompt": "a\u2028b"}\n{"turns": ["b", "c"]}\n\n{"messages": [{"content": "d"}]}\n')
    s = replace(BASE, prompts=str(rows), requests=4)
    assert [b["prompt"] for b in bodies(s)] == ["a\u2028b", "b", "d", "a\u2028b"]
    assert bodies(replace(s, api="chat"))[2]["messages"] == [{"content": "d"}]
    for bad in ('{"text": 1}', "[]", "no", ""):
        rows.write_text(bad)
        with pytest.raises(LoadError):
            bodies(s)


# traces


def test_azure(tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,48,10\n2023-11-16 18:17:05.9799600,30,8"
    )
    assert read_trace(str(file)) == [Row(0.0, 48, 10), Row(2.0, 30, 8)]
    s = replace(BASE, arrivals="trace", trace=str(file), trace_speed=4.0, length_scale=0.5)
    planned = list(plan(s, Point(), 0))
    assert [p.at for p in planned] == [0.0, 0.5]
    assert [(len(json.loads(p.body)["prompt"]), json.loads(p.body)["max_tokens"]) for p in planned] == [
        (24, 5),
        (15, 4),
    ]
    assert len(list(plan(replace(s, longest=20), Point(), 0))) == 1


def test_mooncake_shares_prefixes(tmp_path: Path):
    rows = [
        {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
        {"timestamp": 1500, "input_length": 1030, "output_length": 6, "hash_ids": [7, 8, 10]},
    ]
    file = tmp_path / "m.jsonl.xz"
    file.write_bytes(lzma.compress("\n".join(map(json.dumps, rows)).encode()))
    s = replace(BASE, arrivals="trace", trace=str(file), length_scale=0.5)
    (a, b) = (json.loads(p.body)["prompt"] for p in plan(s, Point(), 0))
    assert (len(a), len(b)) == (550, 515)
    assert a[:512] == b[:512] and a[512:515] != b[512:515]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens\n2023-11-16 18:17:03,5\n", "no column GeneratedTokens"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,5,5\n", "line 2"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "empty"),
        ("m.jsonl", '{"timestamp": 1, "input_length": 2}\n', "no column output_length"),
        ("m.jsonl", "nothing\n", "line 1"),
        ("m.jsonl", '{"timestamp": NaN, "input_length": 2, "output_length": 2}\n', "not a number"),
        ("m.jsonl", "[1]\n", "no column"),
        ("m.txt", "", "a trace is"),
        ("m.jsonl.xz", "not xz", "cannot read"),
    ],
)
def test_broken_traces(tmp_path: Path, name: str, text: str, said: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(LoadError, match=said):
        read_trace(str(tmp_path / name))


# servers


def test_a_dead_server(capsys: pytest.CaptureFixture[str]):
    assert main(["http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err == "octavo-load: http://127.0.0.1:9/v1/models: [Errno 111] Connection refused\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n<html/>", "not an OpenAI-style answer"),
        (b'HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n{"data": 5}', "not an OpenAI-style answer"),
        (b'HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n{"data": []}', "serves no model"),
        (b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n", "HTTP 401: give its key by"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not an OpenAI-style answer"),
        (b"", "closed connection"),
    ],
)
def test_a_server_of_something_else(capsys: pytest.CaptureFixture[str], answer: bytes, said: str):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reply() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        assert main([f"http://127.0.0.1:{listener.getsockname()[1]}"]) == 2
        thread.join()
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1, err


def test_a_model_that_is_not_served(stub, capsys: pytest.CaptureFixture[str]):
    assert main([stub.url, "--model", "other"]) == 2
    assert "does not serve other; it serves stub," in capsys.readouterr().err
    assert main([stub.url + "/wrong"]) == 2
    assert "answered HTTP 404" in capsys.readouterr().err
