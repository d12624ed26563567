"""Variants that the suite loads and drops, against a scripted server with room for so many."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from client import api
from client.eval import results
from client.eval.loading import KEPT
from client.eval.plan import groups
from client.eval.run import main
from tests.client.conftest import Reply, Stub
from tests.client.eval.test_data import write_jsonl
from tests.client.eval.test_mmlu import EXAM
from tests.client.eval.test_suite import error_of
from tests.client.eval.test_suite import scripted as answering
from tests.server.conftest import start, stop


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "FIRST_PAUSE", 0.01)


class Room:
    """A server that holds `q` and `bf16` and has room for one more; it knows int8-row and fp8-row."""

    def __init__(self, stub: Stub) -> None:
        self.held = ["q", "bf16"]
        self.most = 3
        self.log: list[str] = []
        self.stub = stub
        stub.answer = self.answer

    def answer(self, method: str, path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return Reply({"data": [self.card(v) for v in self.held]})
        if path.startswith("/v1/variants"):
            return self.change(method, path.rpartition("/")[2], body)
        if path == "/v1/completions" and body["model"].partition(":")[2] not in self.held:
            return Reply({"error": {"message": "no such model"}}, 404)
        return Reply(answering(-1)(method, path, body).body)

    def card(self, variant: str) -> dict[str, Any]:
        size = {"own_bytes": 10, "shared_bytes": len(self.held)}  # what is shared moves as variants come and go
        return {"id": f"m:{variant}", "variant": variant, "root": "/m", **size, "own_bytes": 20 - len(self.held)}

    def change(self, method: str, name: str, body: Any) -> Reply:
        key = self.stub.headers[-1].get("authorization")
        if key != "Bearer boss":
            return Reply({"error": {"message": "not an admin key"}}, 403)
        if method == "DELETE":
            self.log.append(f"drop {name}")
            self.held.remove(name)
            return Reply({"deleted": True})
        name = body["name"]
        if name not in ("int8-row", "fp8-row", "bf16"):
            return Reply({"error": {"message": f"{name} is no variant"}}, 400)
        if len(self.held) == self.most:
            return Reply({"error": {"message": "fp8-row needs 10 bytes, 4 are free"}}, 409)
        self.log.append(f"load {name}")
        self.held.append(name)
        return Reply({"name": name}, 201)


def words(stub: Stub, tmp_path: Path, *more: str) -> list[str]:
    folder = write_jsonl(tmp_path / "exam", EXAM)
    return ["mmlu", "--url", stub.url, "--out", str(tmp_path / "r"), "--mmlu-dir", str(folder), *more]


def test_variants_come_and_go(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bf16 first whatever the order; what was there stays there."""
    room = Room(stub)
    chosen = ["--variants", "fp8-row,int8-row,bf16", "--admin-key", "boss"]
    assert main(words(stub, tmp_path, *chosen)) == 0
    assert room.log == ["load fp8-row", "drop fp8-row", "load int8-row", "drop int8-row"]
    assert room.held == ["q", "bf16"] and not (tmp_path / "r" / KEPT).exists()
    asked = [body["model"] for _, path, body in stub.seen if path == "/v1/completions"]
    assert list(dict.fromkeys(asked)) == ["m:bf16", "m:fp8-row", "m:int8-row"]
    assert "int8-row against bf16" in capsys.readouterr().out

    assert main(words(stub, tmp_path, *chosen)) == 0  # all is known: nothing is loaded again
    assert len(room.log) == 4
    assert "nope is not loaded" in error_of(capsys, *words(stub, tmp_path, "--variants", "nope"))
    said = error_of(capsys, *words(stub, tmp_path, "--variants", "bf16,fp8-g64", "--admin-key", "me"))
    assert "takes no variants from this --admin-key: not an admin key" in said


def test_a_killed_run_knows_what_it_loaded(stub: Stub, tmp_path: Path) -> None:
    room = Room(stub)
    room.held.append("fp8-row")
    results.write(tmp_path / "r" / KEPT, json.dumps(["fp8-row", "gone"]))
    assert main(words(stub, tmp_path, "--variants", "bf16,int8-row", "--admin-key", "boss")) == 0
    assert room.log == ["drop fp8-row", "load int8-row", "drop int8-row"]


def scripted_suite(stub: Stub) -> Any:
    """What the suite asks beside the direct method."""
    stub_answer = stub.answer

    def answer(method: str, path: str, body: Any) -> Reply:
        if path == "/v1/completions" and body.get("echo"):
            ids = body["prompt"]
            return Reply({"choices": [{"prompt_logprobs": [{"logprob": -1.0, "token_id": i} for i in ids]}]})
        if path == "/v1/completions" and "stop" in body:
            return Reply({"choices": [{"text": " A"}]})
        if (method, path) == ("GET", "/v1/variants"):
            return Reply({"data": [{"name": "bf16", "own_bytes": 10}], "headroom_bytes": 10})
        if path == "/metrics":
            return Reply({})
        if path == "/tokenize" and len(body["prompt"]) != 2:
            return Reply({"tokens": [1] if body["prompt"].startswith("<|") else [1, 2, 3, 4]})
        return stub_answer(method, path, body)

    return answer


def test_what_cannot_be_had_is_named(stub: Stub, tmp_path: Path) -> None:
    """No room for anything, or no such variant: the report says so, and the others are measured."""
    room = Room(stub)
    room.most = 2
    options = ["--preset", "study", "--admin-key", "boss", "--limit", "4", "--wikitext-file", str(tmp_path / "t.txt")]
    (tmp_path / "t.txt").write_text("a few words\n")
    _, *suite = words(stub, tmp_path, *options)
    stub.answer = scripted_suite(stub)
    assert main(["suite", *suite]) == 0
    report = (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
    missing = report.partition("## Not measured")[2].partition("##")[0]
    assert "- int8-row, fp8-row: fp8-row needs 10 bytes, 4 are free" in missing
    assert "int8-g64 is no variant" in missing and "- throughput: the server's /metrics does not count" in missing
    assert "| Per row | not measured |" in report and room.held == ["q", "bf16"]


def test_what_is_loaded_together() -> None:
    """Upper bounds: 53 bytes for 8 bits, 100 for a fake one; the oldest go first."""
    names = ["int8-row", "fp8-row", "w8a8-int8-row", "int8-row-fake", "fp8-row-fake"]
    assert groups(170, 100, names) == [
        ["int8-row", "fp8-row", "w8a8-int8-row"],
        ["w8a8-int8-row", "int8-row-fake"],
        ["fp8-row-fake"],
    ]
    assert groups(10, 100, names[:2]) == [["int8-row"], ["fp8-row"]]  # the server will say that there is no room
    assert groups(170, 100, []) == []


def test_a_dry_run_loads_nothing(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    room = Room(stub)
    (tmp_path / "t.txt").write_text("a few words\n")
    _, *suite = words(
        stub, tmp_path, "--preset", "study", "--admin-key", "boss", "--wikitext-file", str(tmp_path / "t.txt")
    )
    stub.answer = scripted_suite(stub)
    assert main(["suite", *suite, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Held by the server: bf16, q." and lines[1].startswith(
        "To be loaded, in this order: int8-tensor,"
    )
    assert lines[2] == "  together: int8-tensor"
    assert re.match(r"About \d+ minutes at the pace of a probe", lines[-1])  # this machine's
    assert any(line.split()[:2] == ["mmlu-direct", str(8 * 30)] for line in lines)
    assert room.log == [] and not (tmp_path / "r").exists()


def test_a_real_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Room for one 8-bit variant of the bundled model, and for no fake one."""
    server = start("--admin-key", "boss", "--variant-headroom", "10MiB")
    try:
        said = error_of(
            capsys,
            *["mmlu", "--url", server.url, "--out", str(tmp_path), "--limit", "9", "--admin-key", "boss"],
            *["--variants", "int8-row,fp8-row,int8-row-fake,bf16"],
        )
        assert said.startswith("int8-row-fake was not measured: ") and "bytes" in said
        for variant in ("bf16", "int8-row", "fp8-row"):
            assert results.load(tmp_path / "pocket" / variant / "mmlu-direct.json")["figures"]["n"] == 9
        with server.client() as client:
            assert [card["variant"] for card in client.get("/v1/models").json()["data"]] == ["bf16", "bf16"]
    finally:
        stop(server)
