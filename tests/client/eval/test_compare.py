"""Pairs, verdicts and gates, from results made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from client.eval.compare import Gate, against_baseline, compare, correct, parse_gate
from client.eval.data import EvalError
from client.eval.stats import kl_divergence, paired_proportions


def exam(variant: str, picked: str, method: str = "direct", **more: Any) -> dict[str, Any]:
    """One letter a question: its number; "-" unparsed, "x" failed. 0 is right. First law, then history."""
    rows: list[dict[str, Any]] = []
    for i, letter in enumerate(picked):
        if letter == "x":
            rows.append({"id": str(i), "error": "500"})
            continue
        choice = None if letter == "-" else int(letter)
        logprobs = [-0.1 if j == choice else -3.0 for j in range(4)]
        subject = "law" if i < len(picked) / 2 else "history"
        rows.append({"id": str(i), "subject": subject, "answer": 0, "picked": choice, "logprobs": logprobs})
    head = {"model": "m", "variant": variant, "task": "mmlu", "method": method, "settings": {"seed": 0}}
    return head | {"figures": {}, "rows": rows} | more


def prose(variant: str, losses: list[float], method: str = "windows") -> dict[str, Any]:
    rows = [{"id": f"{i}/0", "parts": [[i, loss, 100, 80, 400]]} for i, loss in enumerate(losses)]
    head = {"model": "m", "variant": variant, "task": "wikitext", "method": method, "settings": {}}
    return head | {"figures": {}, "rows": rows}


def test_answers_in_pairs() -> None:
    found = compare(exam("bf16", "0001020x0-"), exam("q", "00100210-0"))
    assert found.pairs == 9 and found.flips is not None
    # 2: lost; 3: won; 5: the same wrong one; 6: lost; 8: lost, unparsed; 9: won
    assert (found.flips.lost, found.flips.won, found.flips.moved) == (3, 2, 0)
    assert found.flips.by_subject == {"law": (1, 1), "history": (2, 1)}
    expected = paired_proportions(3, 2, 9)
    assert (found.difference, found.low, found.high, found.p) == (
        expected.value,
        expected.low,
        expected.high,
        expected.p,
    )
    assert found.agreement == pytest.approx(4 / 9) and found.p_holm is None and found.verdict == "unknown"
    moved = compare(exam("bf16", "12"), exam("q", "21"))
    assert moved.flips is not None and moved.flips.moved == 2 and moved.flips.total == 2
    one = compare(exam("bf16", "0"), exam("q", "1"))
    assert one.kl == pytest.approx(kl_divergence([-0.1, -3, -3, -3], [-3, -0.1, -3, -3]))
    generated = compare(exam("bf16", "01", "generate"), exam("q", "01", "generate"))
    assert generated.kl is None and generated.agreement is None and generated.p == 1


def test_documents_in_pairs() -> None:
    first, second = prose("bf16", [300.0, 310.0, 290.0]), prose("q", [303.0, 313.0, 294.0])
    found = compare(first, second)
    assert found.pairs == 3
    assert found.difference == pytest.approx(math.exp(910 / 300) - math.exp(900 / 300))
    by_word = compare(prose("bf16", [300.0, 310.0], "documents"), prose("q", [303.0, 313.0], "documents"))
    assert by_word.difference == pytest.approx(math.exp(616 / 160) - math.exp(610 / 160))
    second["rows"][1] = {"id": "1/0", "error": "500"}
    assert compare(first, second).pairs == 2
    alone = compare(prose("bf16", [300.0]), prose("q", [301.0]))
    assert alone.p is None and correct([alone])[0].verdict == "unknown"


def test_what_cannot_be_compared() -> None:
    with pytest.raises(EvalError, match="their settings differ"):
        compare(exam("bf16", "01"), exam("q", "01", settings={"seed": 1}))
    with pytest.raises(EvalError, match="their task differ"):
        compare(exam("bf16", "01"), prose("q", [1.0]))
    with pytest.raises(EvalError, match="no answered question in common"):
        compare(exam("bf16", "0x"), exam("q", "x0"))
    with pytest.raises(EvalError, match="no document in common"):
        compare(prose("bf16", [1.0]), prose("q", []))
    broken = exam("q", "01")
    del broken["rows"][0]["picked"]
    with pytest.raises(EvalError, match="not as it was written: KeyError"):
        compare(exam("bf16", "01"), broken)


def test_verdicts_are_corrected_for_how_many_there_are() -> None:
    base = exam("bf16", "0" * 200)
    bad = exam("bad", "1" * 8 + "0" * 192)  # p = 2 / 2**8
    results = [base, bad, *(exam(f"same{i}", "0" * 200) for i in range(9))]
    alone = against_baseline([base, bad])[0]
    assert alone.p == alone.p_holm == 2 / 256 and alone.verdict == "worse"
    many = against_baseline(results)
    assert many[0].p_holm == pytest.approx(10 * 2 / 256) and many[0].verdict == "noise"
    assert all(c.verdict == "noise" and c.p_holm == 1 for c in many[1:])
    better = against_baseline([bad | {"variant": "bf16"}, base | {"variant": "good"}])[0]
    assert better.verdict == "better"
    assert against_baseline([bad]) == []
    lower = [prose("bf16", [300.0 + i for i in range(30)]), prose("q", [297.0 + i for i in range(30)])]
    assert against_baseline(lower)[0].verdict == "better"  # a smaller perplexity
    assert against_baseline([lower[1] | {"variant": "bf16"}, lower[0] | {"variant": "q"}])[0].verdict == "worse"


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("mmlu<bf16-1.0", ("mmlu", "direct", True, "bf16", -0.01)),
        ("mmlu-generate < bf16 - 0.5", ("mmlu", "generate", True, "bf16", -0.005)),
        ("wikitext>bf16+0.2", ("wikitext", "windows", False, "bf16", 0.2)),
        ("wikitext-documents>int8-g128", ("wikitext", "documents", False, "int8-g128", 0)),
        ("mmlu<w8a8-int8-row-2", ("mmlu", "direct", True, "w8a8-int8-row", -0.02)),
    ],
)
def test_gates_are_read(text: str, gate: tuple[Any, ...]) -> None:
    found = parse_gate(text)
    assert (found.task, found.method, found.below, found.baseline, found.margin) == gate


@pytest.mark.parametrize(
    "text", ["", "mmlu", "mmlu=bf16", "speed<bf16", "mmlu-windows<bf16", "mmlu<bf16-", "mmlu<-1.0"]
)
def test_gates_that_are_wrong(text: str) -> None:
    with pytest.raises(EvalError, match="--fail-if"):
        parse_gate(text)


def test_gates_judge_the_interval() -> None:
    comparisons = against_baseline([exam("bf16", "0" * 400), exam("q", "1" * 12 + "0" * 388)])  # -3 points
    assert comparisons[0].high is not None and -0.02 < comparisons[0].high < -0.01

    def failures(text: str, strict: bool = False) -> list[str]:
        return parse_gate(text).failures(comparisons, strict)

    assert len(failures("mmlu<bf16-1.0")) == 1 and "q: mmlu-direct -3.00 points [" in failures("mmlu<bf16-1.0")[0]
    assert failures("mmlu<bf16-2.0") == [] and len(failures("mmlu<bf16-2.0", strict=True)) == 1
    assert failures("mmlu<bf16-3.5", strict=True) == []
    assert failures("mmlu>bf16") == []
    with pytest.raises(EvalError, match="no wikitext-windows was compared with bf16"):
        failures("wikitext>bf16")
    with pytest.raises(EvalError, match="no mmlu-direct was compared with int8-row"):
        failures("mmlu<int8-row")
    ppl = against_baseline([prose("bf16", [300.0] * 9), prose("q", [310.0] * 9)])
    assert len(parse_gate("wikitext>bf16+0.5").failures(ppl, False)) == 1
    assert parse_gate("wikitext>bf16+5").failures(ppl, False) == []
    alone: list[Any] = against_baseline([prose("bf16", [300.0]), prose("q", [310.0])])
    gate: Gate = parse_gate("wikitext>bf16+0.5")
    assert len(gate.failures(alone, True)) == 1
    with pytest.raises(EvalError, match="too few documents to judge q"):
        gate.failures(alone, False)
