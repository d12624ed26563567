"""The exam over HTTP: the prompt to the letter, the letters' ids, the scores."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest

from client.api import BadAnswer, OctavoClient
from client.eval.data import BUNDLED, EvalError, Exam, Question, load_exam
from client.eval.mmlu import ExamResult, Score, choose, evaluate, format_prompt
from client.eval.run import main
from tests.client.conftest import Reply, Stub

REPO = Path(__file__).resolve().parents[3]
SHARED = REPO.parent / "shared" / "data"


def rows(split: str, n: int, subject: str = "high_school_physics") -> list[Question]:
    return [Question(subject, f"{split} {i}?", ("w", "x", "y", "z"), i % 4) for i in range(n)]


def write(folder: Path, exam: Exam) -> Path:
    for name, questions in (("dev", exam.dev), ("test", exam.test)):
        lines = [json.dumps(vars(q)) for q in questions]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_prompt() -> None:
    dev = [*rows("other", 5, "law"), *rows("dev", 7)]
    assert format_prompt(Question("high_school_physics", "Why?", ("a", "b", "c", "d"), 2), dev, num_shots=2) == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "dev 0?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n"
        "dev 1?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n"
        "Why?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    )
    with pytest.raises(EvalError, match="has 0 questions on history, not 5"):
        format_prompt(Question("history", "Why?", ("a", "b", "c", "d"), 2), dev)


def test_scores() -> None:
    score = Score(100, 80)
    assert score.accuracy == 0.8
    assert score.stderr == pytest.approx(math.sqrt(0.8 * 0.2 / 99))
    assert Score(1, 1).stderr is None
    questions = [*rows("a", 4), *rows("b", 2, "law")]
    result = ExamResult("m", questions, [0, 1, 0, 0, 0, 0])
    assert result.total == Score(6, 3)
    assert result.by_subject == {"high_school_physics": Score(4, 2), "law": Score(2, 1)}


def test_a_sample_is_the_same_every_time() -> None:
    questions = rows("q", 100)
    assert choose(questions, None) == choose(questions, 100) == questions
    sample = choose(questions, 10)
    assert len(sample) == 10 and sample == choose(questions, 10) and sample != questions[:10]


def server(correct: dict[str, int], spoil: Any = None) -> Any:
    """A server that finds `correct[model]` of every four questions; " A" to " D" are ids 11 to 14."""

    def answer(method: str, path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return Reply({"data": [{"id": name} for name in correct]})
        if path == "/tokenize":
            assert body["add_special_tokens"] is False and body["prompt"][0] == " "
            return Reply({"tokens": [11 + "ABCD".index(body["prompt"][1])]})
        number = int(body["prompt"].rpartition("test ")[2].partition("?")[0])
        right = number % 4
        choice = right if right < correct[body["model"]] else (right + 1) % 4
        named = {str(i): -0.1 if i == 11 + choice else -3.0 for i in body["logprob_token_ids"]}
        logprobs = {"tokens": [" A"], "token_logprobs": [-0.1], "named_logprobs": [spoil or named]}
        return Reply({"choices": [{"index": 0, "text": " A", "logprobs": logprobs}]})

    return answer


EXAM = Exam(rows("dev", 5), rows("test", 8))


async def test_evaluate(stub: Stub) -> None:
    stub.answer = server({"m": 3})
    count = []
    async with OctavoClient(stub.url, concurrency=2) as client:
        result = await evaluate(client, "m", EXAM, on_done=lambda: count.append(1))
    assert result.total == Score(8, 6) and len(count) == 8
    body = next(body for _, path, body in stub.seen if path == "/v1/completions")
    assert body == {
        "model": "m",
        "prompt": format_prompt(EXAM.test[0], EXAM.dev),
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 0,
        "logprob_token_ids": [11, 12, 13, 14],
    }


async def test_a_server_without_what_the_exam_needs(stub: Stub) -> None:
    stub.answer = server({"m": 3}, spoil={"11": -1.0})
    async with OctavoClient(stub.url) as client:
        with pytest.raises(BadAnswer, match="letters"):
            await evaluate(client, "m", EXAM)
        stub.answer = lambda method, path, body: Reply({"tokens": [1, 2]})
        with pytest.raises(EvalError, match='2 tokens of " A"'):
            await evaluate(client, "m", EXAM)


def test_command(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub.answer = server({"bf16": 4, "int8-row": 3})
    out = tmp_path / "out.json"
    code = main(["mmlu", "--url", stub.url, "--data", str(write(tmp_path, EXAM)), "--json", str(out)])
    assert code == 0
    printed = capsys.readouterr()
    assert [line.split() for line in printed.out.splitlines()] == [
        ["model", "subject", "n", "accuracy", "stderr"],
        ["bf16", "high_school_physics", "8", "1.0000", "0.0000"],
        ["bf16", "total", "8", "1.0000", "0.0000"],
        ["int8-row", "high_school_physics", "8", "0.7500", "0.1637"],
        ["int8-row", "total", "8", "0.7500", "0.1637"],
    ]
    assert printed.err == ""
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["command"] == "mmlu" and record["url"] == stub.url
    assert record["results"][3]["correct"] == 6


def test_command_says_what_is_wrong(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub.answer = lambda method, path, body: Reply({"error": {"message": "no such variant"}}, 404)
    folder = str(write(tmp_path, EXAM))
    assert main(["mmlu", "--url", stub.url, "--data", folder, "--model", "nope"]) == 1
    assert main(["mmlu", "--url", stub.url, "--data", folder + "/none", "--model", "nope"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == "octavo-eval: 404: no such variant" and "has none of dev.jsonl" in lines[1]


def test_data(tmp_path: Path) -> None:
    write(tmp_path, EXAM)
    assert load_exam(tmp_path) == EXAM
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "mmlu_dev.jsonl").write_bytes((tmp_path / "dev.jsonl").read_bytes())
    (packed / "mmlu_test.jsonl.xz").write_bytes(lzma.compress((tmp_path / "test.jsonl").read_bytes()))
    assert load_exam(packed) == EXAM
    for bad in ("{}", "[]", '{"subject": "s", "question": "q", "choices": ["a"], "answer": 0}', "\n"):
        (tmp_path / "test.jsonl").write_text(bad, encoding="utf-8")
        with pytest.raises(EvalError, match=r"test\.jsonl"):
            load_exam(tmp_path)


def test_the_bundled_exam() -> None:
    exam = load_exam(BUNDLED / "exam")
    subjects = {q.subject for q in exam.test}
    assert len(exam.test) >= 400 and len(subjects) >= 4
    for question in exam.test:
        format_prompt(question, exam.dev)


@pytest.mark.skipif(not SHARED.is_dir(), reason="MMLU (shared data) is not here")
def test_mmlu_itself() -> None:
    exam = load_exam(SHARED / "mmlu")
    assert len(exam.dev) == 285 and len(exam.test) == 14042
    assert format_prompt(exam.test[0], exam.dev).count("Answer:") == 6
