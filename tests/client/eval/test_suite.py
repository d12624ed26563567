"""`octavo-eval` end to end: a real server, real files, kills, failures, and a planted fault."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import api
from client.eval import results
from client.eval.compare import compare
from client.eval.run import main
from client.eval.study import STUDY
from client.eval.suite import Progress
from tests.client.conftest import Reply, Stub
from tests.client.eval.test_data import write_jsonl
from tests.client.eval.test_mmlu import EXAM
from tests.server.conftest import VARIANTS, Served, start_faulty, stop

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "FIRST_PAUSE", 0.01)


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a failing command says (after progress lines); its exit code must be 2."""
    assert main(list(words)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("octavo-eval: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("octavo-eval: ")


def test_suite(pocket: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    bench = tmp_path / "matmul.json"
    line = {"shape": [16, 512], "error": "element", "granularity": "block", "int8": None, "fp8": [0.0225, 0.0001]}
    bench.write_text(json.dumps({"seeds": 3, "rows": [line]}), encoding="utf-8")
    words = ["suite", "--preset", "study", "--url", pocket.url, "--out", str(out), "--variants", "bf16,int8-row"]
    words += ["--limit", "18", "--text-limit", "4", "--window", "512", "--load", "2x8x4", "--bench", str(bench)]
    assert main([*words, "--fail-if", "mmlu<bf16-30"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("int8-row against bf16") == 4 and "bf16 mmlu-direct" in printed.err
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*.json"))
    kinds = ("mmlu-direct", "mmlu-generate", "throughput-phases", "wikitext-documents", "wikitext-windows")
    assert names == [f"pocket/{v}/{kind}.json" for v in ("bf16", "int8-row") for kind in kinds]
    loaded = results.load(out / "pocket" / "int8-row" / "mmlu-direct.json")
    assert loaded["figures"]["n"] == 18 == len(loaded["rows"]) and loaded["figures"]["failed"] == 0
    assert len(loaded["settings"]["data"]["sha256"]) == 64 and loaded["server"]["bytes"] > 1e6
    text = (out / "report.md").read_text(encoding="utf-8")
    missing = text.partition("## Not measured")[2].partition("##")[0]
    assert "fp8-g128-fake" in missing and "w8a8-fp8-row-smooth: not among --variants" in missing
    assert missing.count(",") == 26 and "bf16" not in missing
    assert "| int8-row | 15.5 MB | 42 | " in text and "| 16x512, element | block |  | 0.022500 ± 0.000100 |  |" in text
    speeds = results.load(out / "pocket" / "int8-row" / "throughput-phases.json")
    assert [round(r[0]) for r in speeds["rows"][0]["rounds"]] == [16, 16]  # no prompt was found in the cache
    assert speeds["figures"]["decode_tok_s"] > 0 and speeds["settings"]["sequences"] == 2
    assert (out / "report.html").read_text(encoding="utf-8").count("<svg") == 2

    before = {p: p.read_bytes() for p in out.rglob("*.json*")}
    assert main(words) == 0  # all is there: nothing is asked, nothing changes
    assert {p: p.read_bytes() for p in out.rglob("*.json*")} == before
    a, b = (str(out / "pocket" / v / "mmlu-direct.json") for v in ("bf16", "int8-row"))
    capsys.readouterr()
    assert main(["compare", a, b, "--fail-if", "mmlu<bf16-30"]) == 0
    assert "int8-row against bf16" in capsys.readouterr().out
    assert main(["compare", a, b, "--fail-if", "mmlu<bf16+30"]) == 1
    assert "octavo-eval: failed: int8-row: mmlu-direct" in capsys.readouterr().err

    assert "is of a run with other settings" in error_of(capsys, *words, "--seed", "1")
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "new"), "--dry-run"]) == 0
    planned = capsys.readouterr().out.splitlines()
    assert planned[0] == "Held by the server: bf16, int8-row, fp8-row." and "mmlu-direct" in planned[2]
    assert planned[2].split()[1] == "36" and not (tmp_path / "new").exists()
    assert "no mmlu-generate was compared" in error_of(capsys, "compare", a, b, "--fail-if", "mmlu-generate<bf16")
    assert "their method differ" in error_of(capsys, "compare", a, b.replace("direct", "generate"))
    Path(b).write_bytes(before[Path(b)][:1000])
    assert "is not whole" in error_of(capsys, "compare", a, b)


def test_the_study_has_29_variants() -> None:
    assert len(STUDY) == len(set(STUDY)) == 1 + 12 + 12 + 4


def test_a_killed_run_goes_on(pocket: Served, tmp_path: Path) -> None:
    """Only what was in flight is asked again."""
    words = ["mmlu", "--url", pocket.url, "--out", str(tmp_path), "--variants", "bf16", "--limit", "120"]
    words += ["--seed", "3", "--concurrency", "2"]
    journal = tmp_path / "pocket" / "bf16" / "mmlu-direct.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "client.eval.run", *words], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = journal.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 20 <= kept.count(b"\n") < 121
    journal.write_bytes(kept + b'{"id": "arithm')
    assert main(words) == 0
    whole = journal.read_bytes()
    assert whole.startswith(kept) and whole.count(b"\n") == 121
    assert results.load(journal.with_suffix(".json"))["figures"]["n"] == 120


def scripted(fails: int) -> Any:
    """A server of two variants whose answer to test question `fails` is an error 500."""

    def answer(method: str, path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return Reply({"data": [{"id": "m"}, {"id": "m:bf16", "variant": "bf16"}, {"id": "m:q", "variant": "q"}]})
        if path == "/tokenize":
            return Reply({"tokens": [11 + "ABCD".index(body["prompt"][1])]})
        if body["prompt"].rpartition("test ")[2].startswith(f"{fails}?"):
            return Reply({"error": {"message": "the engine fell over"}}, 500)
        named = {str(i): -0.1 if i == 11 else -3.0 for i in body["logprob_token_ids"]}
        return Reply({"choices": [{"index": 0, "text": " A", "logprobs": {"named_logprobs": [named]}}]})

    return answer


def test_failures_are_counted_and_asked_again(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub.answer = scripted(3)
    folder = write_jsonl(tmp_path / "exam", EXAM)
    words = ["mmlu", "--url", stub.url, "--out", str(tmp_path / "r"), "--mmlu-dir", str(folder)]
    assert main(words) == 0
    header, first, second, *_ = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header[:4] == ["variant", "figure", "n", "failed"]
    assert first[:4] == ["bf16", "mmlu-direct", "7", "1"] and second[:4] == ["q", "mmlu-direct", "7", "1"]
    stub.answer, asked = scripted(-1), len(stub.seen)
    assert main(words) == 0
    assert "bf16     mmlu-direct  8       0" in capsys.readouterr().out
    prompts = [body["prompt"] for _, path, body in stub.seen[asked:] if path == "/v1/completions"]
    assert sum("test 3?" in prompt for prompt in prompts) == 2 and len(prompts) == 4  # and two probes
    assert main([*words, "--fresh", "--variants", "q"]) == 0
    prompts = [body["prompt"] for _, path, body in stub.seen[asked:] if path == "/v1/completions"]
    assert len(prompts) == 4 + 9
    result = results.load(tmp_path / "r" / "m" / "q" / "mmlu-direct.json")
    assert result["rows"][3] | {"logprobs": 0} == {
        "id": "high_school_physics/3",
        "subject": "high_school_physics",
        "answer": 3,
        "picked": 0,
        "logprobs": 0,
        "way": "named",
        "prompt_tokens": 0,
        "cached_tokens": 0,
    }


def test_bad_input(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub.answer = scripted(-1)
    folder = str(write_jsonl(tmp_path / "exam", EXAM))
    where = ["--out", str(tmp_path / "r"), "--url"]
    gone = "http://127.0.0.1:9"
    assert f"is octavo-serve running at {gone}?" in error_of(capsys, "mmlu", *where, gone)
    exam = [*where, stub.url, "--mmlu-dir", folder]
    assert "nope is not loaded; the server has m:bf16, m:q" in error_of(capsys, "mmlu", *exam, "--variants", "nope")
    assert "has none of dev.jsonl" in error_of(capsys, "mmlu", *where, stub.url, "--mmlu-dir", str(tmp_path))
    assert "no such file" in error_of(capsys, "wikitext", *where, stub.url, "--wikitext-file", "none").lower()
    assert "is not like 'mmlu<bf16-1.0'" in error_of(capsys, "suite", *exam, "--fail-if", "mmlu")
    (tmp_path / "speeds").write_text("{}")
    assert "is not from octavo-bench" in error_of(capsys, "suite", *exam, "--bench", str(tmp_path / "speeds"))
    stub.answer = lambda method, path, body: Reply({"detail": "Not Found"}, 404)
    assert "404" in (said := error_of(capsys, "mmlu", *exam)) and "an OpenAI-style server" in said
    stub.answer = lambda method, path, body: Reply({"error": {"message": "no key"}}, 401)
    assert "401: no key; give --api-key" in error_of(capsys, "mmlu", *exam)
    stub.answer = lambda method, path, body: Reply({"data": []})
    assert "no model loaded" in error_of(capsys, "mmlu", *exam)
    for words in (
        ["mmlu", "--limit", "0"],
        ["mmlu", "--method", "guess"],
        ["suite", "--load", "0x1x1"],
        ["compare", "a"],
        [],
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_when_every_question_fails(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(method: str, path: str, body: Any) -> Reply:
        if path == "/v1/completions" and "test " in body["prompt"]:
            return Reply({"error": {"message": "too long"}}, 400)
        return Reply(scripted(-1)(method, path, body).body)

    stub.answer = answer
    folder = str(write_jsonl(tmp_path / "exam", EXAM))
    said = error_of(capsys, "mmlu", "--url", stub.url, "--out", str(tmp_path / "r"), "--mmlu-dir", folder)
    assert said.startswith("m:bf16: every mmlu-direct request failed, the first with: 400: too long")
    assert "the same command goes on" in said


def test_time_left_follows_each_task() -> None:
    progress = Progress({"slow": 4, "fast": 100}, num_variants=2)
    progress._seconds = {"slow": (8.0, 4)}
    progress._left = {"slow": 4, "fast": 200}
    assert progress.seconds_left() == 2.0 * 204  # nothing is known of fast yet
    progress._seconds["fast"] = (1.0, 100)
    progress._left = {"slow": 4, "fast": 100}
    assert progress.seconds_left() == 4 * 2.0 + 100 * 0.01


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Served]:
    server = start_faulty(tmp_path)
    yield server
    stop(server)


def test_a_planted_fault_is_caught(faulty: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By perplexity; on the exam its mark is small, but hundreds of times that of int8-row."""
    words = [
        "suite",
        "--limit",
        "90",
        "--join",
        "as-is",
        "--load",
        "2x8x4",
        "--out",
        str(tmp_path),
        "--url",
        faulty.url,
    ]
    assert main([*words, "--fail-if", "wikitext>bf16+2", "--fail-if", "wikitext-documents>bf16+5"]) == 1
    said = capsys.readouterr()
    assert said.err.count("failed: fp8-row: wikitext-") == 2 and "failed: int8-row" not in said.err
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "\n- Not fp8-row: worse than bf16 beyond noise and tolerance in wikitext-windows" in report
    assert "- int8-row: the smallest without a loss beyond noise" in report
    base, row, fault = (str(tmp_path / "pocket" / v / "wikitext-windows.json") for v in VARIANTS)
    for other, verdict in ((base, "noise"), (row, "noise"), (fault, "worse")):
        assert main(["compare", base, other]) == 0
        assert capsys.readouterr().out.splitlines()[1].endswith(verdict)
    exams = [results.load(tmp_path / "pocket" / v / "mmlu-direct.json") for v in VARIANTS]
    same, fault = (compare(exams[0], other) for other in exams[1:])
    assert same.kl is not None and fault.kl is not None and fault.kl > 100 * same.kl


@pytest.mark.skipif(not SHARED.is_dir(), reason="MMLU and WikiText-2 (shared data) are not here")
def test_real_files(pocket: Served, tmp_path: Path) -> None:
    """All 57 subjects; the questions that are too long for the bundled model's 2,048 tokens are counted as failed."""
    words = ["suite", "--url", pocket.url, "--out", str(tmp_path), "--variants", "bf16", "--limit", "57"]
    words += ["--shots", "2", "--text-limit", "3", "--window", "512", "--load", "2x8x4"]
    words += ["--mmlu-dir", str(SHARED / "mmlu")]
    words += ["--wikitext-file", str(SHARED / "wikitext-2-raw" / "wiki.test.raw")]
    assert main(words) == 0
    exam = results.load(tmp_path / "pocket" / "bf16" / "mmlu-direct.json")["figures"]
    assert exam["n"] + exam["failed"] == 57 and exam["n"] > 40 and len(exam["by_category"]) == 4
    for method, count in (("windows", 3 * 511), ("documents", None)):
        prose = results.load(tmp_path / "pocket" / "bf16" / f"wikitext-{method}.json")["figures"]
        assert 50 < prose["perplexity"] < 1e5 and count in (None, prose["n"])
