"""The exam over HTTP: the prompt to the letter, the sample, and answers equal to the model's own."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from client.api import OctavoClient
from client.eval import mmlu
from client.eval.categories import CATEGORIES
from client.eval.data import BUNDLED, EvalError, Exam, Question, bundled_exam, load_exam
from client.eval.mmlu import MMLU, choose, format_prompt, parse_letter
from tests.client.conftest import Reply, Stub
from tests.server.conftest import Served

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def rows(split: str, n: int, subject: str = "high_school_physics") -> list[Question]:
    return [Question(subject, f"{split} {i}?", ("w", "x", "y", "z"), i % 4, i) for i in range(n)]


EXAM = Exam(rows("dev", 5), rows("test", 8), "made up")


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


@pytest.mark.skipif(not SHARED.is_dir(), reason="MMLU (shared data) is not here")
def test_prompts_of_mmlu_itself() -> None:
    """The first question of each subject, against lm-evaluation-harness's template written out, and by hash.

    The harness strips white space around a question; the original and this project do not.
    """
    exam = load_exam(SHARED / "mmlu")
    first = {q.subject: q for q in reversed(exam.test)}
    assert first.keys() == CATEGORIES.keys() and len(first) == 57

    def doc_to_text(q: Question) -> str:
        a, b, c, d = q.choices
        return q.question.strip() + "\nA. " + a + "\nB. " + b + "\nC. " + c + "\nD. " + d + "\nAnswer:"

    digest, stripped = hashlib.sha256(), 0
    for subject in sorted(first):
        prompt = format_prompt(first[subject], exam.dev)
        digest.update(prompt.encode())
        shots = [q for q in exam.dev if q.subject == subject]
        heading = (
            f"The following are multiple choice questions (with answers) about {' '.join(subject.split('_'))}.\n\n"
        )
        harness = heading + "".join(doc_to_text(q) + " " + "ABCD"[q.answer] + "\n\n" for q in shots)
        harness += doc_to_text(first[subject])
        asked = [*shots, first[subject]]
        if all(q.question == q.question.strip() for q in asked):
            assert prompt == harness, subject
        else:
            stripped += 1
    assert stripped == 8
    assert digest.hexdigest() == "48b270c0db4920abe8a49422f79570ad702fe11d0097ba3b11c6c22ff9e7043a"


def test_a_sample_is_stratified_and_the_same_every_time() -> None:
    questions = [*rows("a", 70, "a"), *rows("b", 20, "b"), *rows("c", 10, "c")]
    assert choose(questions, None) == choose(questions, 100) == questions
    sample = choose(questions, 21)
    assert Counter(q.subject for q in sample) == {"a": 15, "b": 4, "c": 2}  # 14.7, 4.2, 2.1
    assert sample == choose(questions, 21) != choose(questions, 21, seed=1)
    assert len(choose(questions, 2)) == 2 and len(set(choose(questions, 50))) == 50
    mixed = [q for pair in zip(rows("a", 3, "a"), rows("b", 3, "b"), strict=True) for q in pair]
    assert [q.subject for q in choose(mixed, None)] == ["a"] * 3 + ["b"] * 3  # for the prefix cache


def test_letters() -> None:
    parsed = {" B": 1, "C": 2, " (D) because": 3, "A.": 0, "\n A": 0, "B, or": 1, "": None, " Because": None, "E": None}
    assert {text: parse_letter(text) for text in parsed} == parsed
    assert parse_letter("A's") is None and parse_letter("the answer is B") is None


async def ask_all(client: OctavoClient, model: str, task: MMLU) -> list[dict[str, Any]]:
    items = await task.items(client, model)
    ask = await task.asker(client, model)

    async def row(item: tuple[str, Question]) -> dict[str, Any]:
        return {"id": item[0]} | await ask(item[1])

    return await client.map(row, items)


def logits_of(prompt: str) -> Any:
    """Log-probabilities after `prompt`, computed with transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(BUNDLED)(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.inference_mode():
        return torch.log_softmax(model(ids).logits[0, -1], dim=-1)


async def test_letter_logprobs_equal_transformers(pocket: Served) -> None:
    task = MMLU(bundled_exam(), limit=18)
    async with OctavoClient(pocket.url) as client:
        letters = await mmlu.letter_ids(client)
        found = await ask_all(client, "pocket:bf16", task)
        assert letters is not None
        for (_, question), row in list(zip(await task.items(client, "pocket"), found, strict=True))[::6]:
            prompt = format_prompt(question, task.exam.dev)
            expected = logits_of(prompt)[letters].tolist()
            assert row["logprobs"] == pytest.approx(expected, abs=1e-3)
            assert row["picked"] == expected.index(max(expected)) and row["way"] == "named"
            for way in (mmlu.top(client, "pocket:bf16", 20), mmlu.echo(client, "pocket:bf16")):
                other = await way(prompt)
                assert other["logprobs"] == pytest.approx(expected, abs=1e-3) and other["picked"] == row["picked"]
    figures = task.figures(found)
    assert figures["n"] == 18 and figures["ways"] == {"named": 18} and figures["failed"] == 0
    assert set(figures["by_subject"]) == {q.subject for q in task.exam.test} and figures["by_category"] == {}
    assert all(score["n"] == 2 for score in figures["by_subject"].values())


async def test_generated_answers_are_the_likeliest_letters(pocket: Served) -> None:
    async with OctavoClient(pocket.url) as client:
        direct = await ask_all(client, "pocket:int8-row", MMLU(bundled_exam(), "direct", limit=27))
        task = MMLU(bundled_exam(), "generate", limit=27)
        generated = await ask_all(client, "pocket:int8-row", task)
    assert [r["picked"] for r in direct] == [r["picked"] for r in generated]
    figures = task.figures(generated)
    assert figures["unparsed"] == 0 and figures["ways"] == {"generate": 27}
    assert figures["hit_rate"] > 0.8  # the direct method left its prompts in the cache


async def test_the_prefix_cache_is_reused(pocket: Served) -> None:
    exam = bundled_exam()
    fresh = Exam(exam.dev, [q for q in exam.test if q.subject == "calendar"][:20])
    async with OctavoClient(pocket.url, concurrency=4) as client:
        task = MMLU(fresh)
        figures = task.figures(await ask_all(client, "pocket:fp8-row", task))
    assert figures["hit_rate"] > 0.6 and figures["cached_tokens"] < figures["prompt_tokens"]


LOGPROBS = [-1.5, -0.5, -2.5, -3.5]


def scripted(*known: str) -> Any:
    """A server whose letters have LOGPROBS, and which knows some of tokenize, named, top, few (top 5 alone), echo."""

    def answer(method: str, path: str, body: Any) -> Reply:
        bad = Reply({"error": {"message": "not supported"}}, 400)
        if path == "/tokenize":
            return Reply({"tokens": [11 + "ABCD".index(body["prompt"][1])]}) if "tokenize" in known else Reply({}, 404)
        if body.get("echo"):
            if "echo" not in known:
                return bad
            ends = [prompt[-1] for prompt in body["prompt"]]
            logprobs = [{"tokens": ["x", f" {e}"], "token_logprobs": [None, LOGPROBS["ABCD".index(e)]]} for e in ends]
            choices = [{"index": i, "text": "", "logprobs": entry} for i, entry in enumerate(logprobs)]
            return Reply({"choices": choices[::-1], "usage": {"prompt_tokens": 40}})
        logprobs: dict[str, Any] = {"tokens": [" B"], "token_logprobs": [-0.5]}
        if "named" in known and "logprob_token_ids" in body:
            logprobs["named_logprobs"] = [{str(i): LOGPROBS[i - 11] for i in body["logprob_token_ids"]}]
        if body["logprobs"] > (20 if "top" in known else 5 if "few" in known else 0):
            return bad
        if body["logprobs"]:
            shown = "ABCD" if "top" in known else "ABC"
            logprobs["top_logprobs"] = [{f" {x}": LOGPROBS["ABCD".index(x)] for x in shown}]
        return Reply({"choices": [{"index": 0, "text": " B", "logprobs": logprobs}]})

    return answer


@pytest.mark.parametrize(
    ("known", "way"),
    [
        (("tokenize", "named", "top", "echo"), "named"),
        (("named", "top", "echo"), "top"),  # no ids without /tokenize
        (("tokenize", "top"), "top"),
        (("few", "echo"), "echo"),  # a letter is missing among the five
        (("echo",), "echo"),
    ],
)
async def test_the_way_that_a_server_knows(stub: Stub, known: tuple[str, ...], way: str) -> None:
    stub.answer = scripted(*known)
    async with OctavoClient(stub.url) as client:
        found = await ask_all(client, "m", MMLU(EXAM))
    assert all(row["picked"] == 1 and row["logprobs"] == LOGPROBS and row["way"] == way for row in found)
    figures = MMLU(EXAM).figures(found)
    assert figures["ways"] == {way: 8} and figures["correct"] == 2
    if way == "echo":
        assert figures["prompt_tokens"] == 320 and figures["hit_rate"] == 0


async def test_a_server_without_logprobs(stub: Stub) -> None:
    stub.answer = scripted("tokenize")
    async with OctavoClient(stub.url) as client:
        with pytest.raises(EvalError, match="use --method generate"):
            await ask_all(client, "m", MMLU(EXAM))
        stub.answer = lambda method, path, body: Reply({"tokens": [1, 2]})
        with pytest.raises(EvalError, match='2 tokens of " A"; use --method generate'):
            await ask_all(client, "m", MMLU(EXAM))


def test_figures() -> None:
    rows = [
        {
            "id": str(i),
            "subject": s,
            "answer": 0,
            "picked": p,
            "way": "generate",
            "prompt_tokens": 10,
            "cached_tokens": 5,
        }
        for i, (s, p) in enumerate([("law", 0), ("law", None), ("anatomy", 1), ("virology", 0)])
    ]
    rows = [row | {"subject": "jurisprudence"} if row["subject"] == "law" else row for row in rows]
    figures = MMLU(EXAM).figures([*rows, {"id": "9", "error": "500"}])
    assert (figures["n"], figures["failed"], figures["unparsed"], figures["correct"]) == (4, 1, 1, 2)
    assert figures["accuracy"] == 0.5 and figures["stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    assert figures["hit_rate"] == 0.5
    assert {name: score["n"] for name, score in figures["by_category"].items()} == {"humanities": 2, "other": 2}
    assert {name: score["correct"] for name, score in figures["by_subject"].items()} == {
        "jurisprudence": 1,
        "anatomy": 0,
        "virology": 1,
    }
