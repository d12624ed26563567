"""What the report says, and the page it draws."""

from __future__ import annotations

import itertools
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from client.eval import report
from client.eval.compare import against_baseline
from client.eval.data import Exam, Text
from client.eval.mmlu import MMLU
from client.eval.page import chart, page, pareto, ticks
from client.eval.report import Bullets, Chart, Findings, Heading, Paragraph, Point, Table, build, markdown, recommend
from client.eval.wikitext import Wikitext
from tests.client.eval.test_compare import exam, prose

ROWS = {"prompt_tokens": 100, "cached_tokens": 90, "way": "named"}


def measured(variant: str, picked: str, losses: list[float], size: int) -> list[dict[str, Any]]:
    """Two results as the suite makes them."""
    settings = {"data": {"source": "made | up", "sha256": "0" * 64}, "limit": None}
    found = [exam(variant, picked), prose(variant, losses)]
    for result, figures in zip(found, (MMLU(Exam([], [])).figures, Wikitext(Text("", ())).figures), strict=True):
        result["rows"] = [r | ROWS if "picked" in r else r for r in result["rows"]]
        result |= {"settings": settings, "url": "http://h", "date": "2026-11-23T00:00:00+00:00"}
        result |= {"server": {"own_bytes": size, "shared_bytes": 10_000_000}, "figures": figures(result["rows"])}
    return found


LOSSES = [300.0 + i for i in range(12)]


def findings(*more: list[dict[str, Any]], **fields: Any) -> Findings:
    results = [r for pair in (measured("bf16", "0" * 90 + "1" * 10, LOSSES, 90_000_000), *more) for r in pair]
    return Findings(results, against_baseline(results), **{"speeds": {}, "missing": [], "gates": []} | fields)


SAME = measured("int8-row", "0" * 89 + "1" * 10 + "0", [x + 0.1 * (-1) ** i for i, x in enumerate(LOSSES)], 40_000_000)
WORSE = measured("bad", "1" * 30 + "0" * 60 + "1" * 10, [x + 20 for x in LOSSES], 20_000_000)


def test_the_smallest_without_a_loss_is_recommended() -> None:
    said = recommend(findings(SAME, WORSE))
    assert said[0] == (
        "int8-row: the smallest without a loss beyond noise and more than 1 point of accuracy or 1 % of perplexity. "
        "Its weights take 50.0 MB, 50 % of bf16's 100.0 MB."
    )
    assert "Against bf16: mmlu-direct +0.00 points [" in said[1] and said[1].endswith(": noise.")
    assert any(re.match(r"A loss of up to \d\.\d points of accuracy would not have been seen here\.", s) for s in said)
    assert said[-1].startswith("Not bad: worse than bf16 beyond noise and tolerance in mmlu-direct -30.00 points")
    assert "wikitext-windows +" in said[-1]


def test_a_recommendation_needs_evidence() -> None:
    assert recommend(findings(WORSE))[0].startswith("bf16: every smaller variant has a loss")
    assert recommend(findings())[0].startswith("None: without bf16 and another variant")
    untold = measured("int8-row", "0" * 100, LOSSES, 0)
    for result in untold:
        result["server"]["own_bytes"] = None
    assert recommend(findings(untold))[0].startswith("None by size")
    twin = measured("int8-twin", "0" * 80 + "1" * 10 + "0" * 10, LOSSES, 40_000_000)
    said = recommend(findings(SAME, twin))
    assert said[0].startswith("int8-row") and "int8-twin is as small; its answers are farther from bf16's." in said
    fast = findings(SAME, twin, speeds={"int8-twin": 50.0, "int8-row": 40.0, "bf16": 20.0})
    said = recommend(fast)
    assert said[0].startswith("int8-twin") and said[1] == "It makes 50 tokens/s, 2.50 times as many as bf16."
    assert "int8-row is as small; it is slower." in said


def test_a_certain_but_small_loss_is_tolerable() -> None:
    small = measured("int8-row", "0" * 90 + "1" * 10, [x + 0.5 for x in LOSSES], 40_000_000)
    found = findings(small, WORSE)
    assert found.compared("int8-row", "wikitext")[0].verdict == "worse"
    said = recommend(found)
    assert said[0].startswith("int8-row: the smallest")
    assert any("wikitext-windows +" in line and line.endswith(": worse, but tolerable.") for line in said)
    large = measured("int8-row", "0" * 90 + "1" * 10, [x + 1.5 for x in LOSSES], 40_000_000)
    assert recommend(findings(large))[0].startswith("bf16")


def test_lower_perplexity_within_noise_is_no_gain() -> None:
    """The claim that a coarser precision reads better needs more than a lower number."""
    lower = measured("fp8", "0" * 90 + "1" * 10, [x - 6 * (i == 3) for i, x in enumerate(LOSSES)], 40_000_000)
    found = findings(lower)
    assert found.compared("fp8", "wikitext")[0].difference < 0
    assert not any("is better than" in line for line in recommend(found))
    assert any("wikitext-windows -" in line and line.endswith("noise.") for line in recommend(found))
    truly = findings(measured("fp8", "0" * 90 + "1" * 10, [x - 6 for x in LOSSES], 40_000_000))
    assert any(
        line.startswith("fp8 is better than bf16 beyond noise in wikitext-windows -") for line in recommend(truly)
    )


def test_blocks() -> None:
    blocks = build(findings(SAME, WORSE, missing=["fp8-g64"], gates=["bad: …"], speeds={"bf16": 20.0, "bad": 90.0}))
    headings = [b.text for b in blocks if isinstance(b, Heading)]
    assert headings == [
        "Recommendation",
        "Gates that failed",
        "What was measured",
        "Accuracy, direct",
        "Perplexity a token",
        "Accuracy against cost",
        "Flips by subject, direct",
        "Not loaded",
        "How to read this",
    ]
    tables = [b for b in blocks if isinstance(b, Table)]
    for table in tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}
    accuracy = {row[0]: dict(zip(tables[1].columns, row, strict=True)) for row in tables[1].rows}
    assert accuracy["bad"]["lost, won, moved"] == "30, 0, 0" and accuracy["bad"]["verdict"] == "worse"
    assert accuracy["bf16"]["right, %"] == "90.00 ± 3.02" and accuracy["bf16"]["verdict"] == ""
    assert tables[-1].rows == [["history", "50", "80.0", "-1 +1", "·"], ["law", "50", "100.0", "·", "-30"]]
    assert [c.title for c in blocks if isinstance(c, Chart)] == ["Accuracy against bytes", "Accuracy against speed"]


def test_failures_are_shown() -> None:
    some = measured("int8-row", "0" * 97 + "xxx", LOSSES, 40_000_000)
    table = next(b for b in build(findings(some)) if isinstance(b, Table) and "verdict" in b.columns)
    assert table.rows[1][1] == "97 (3 requests failed)"


def test_markdown() -> None:
    text = markdown("T", build(findings(SAME)))
    assert text.startswith("# T\n\n## Recommendation\n\n- int8-row: the smallest")
    assert "| mmlu-direct | made \\| up | 0000000000000000 |" in text
    assert "*Accuracy against bytes: drawn in report.html.*" in text
    assert markdown("T", [Paragraph("p"), Bullets(["a", "b"])]) == "# T\n\np\n\n- a\n- b\n"


def test_the_page_holds_everything() -> None:
    text = page("a < b", build(findings(SAME, WORSE)))
    assert "<title>a &lt; b</title>" in text and '<td class="worse">worse</td>' in text
    assert not re.search(r"(src|href|@import|url\()", text)
    for name in ("bf16", "int8-row", "bad"):
        assert re.search(rf"<text[^>]*>{name}</text>", text)


def test_charts() -> None:
    points = [
        Point("a", 1, 50, 45, 55),
        Point("b", 2, 60, 55, 65),
        Point("c", 3, 58, 50, 66),
        Point("d", 1, 40, 30, 50),
    ]
    assert [p.name for p in pareto(points, better_right=False)] == ["a", "b"]
    assert [p.name for p in pareto(points, better_right=True)] == ["c", "b"]
    root = ElementTree.fromstring(chart(Chart("t & u", "x", "y", False, points)))
    circles = {float(c.attrib["cx"]): float(c.attrib["cy"]) for c in root.iter("circle")}
    assert len(list(root.iter("circle"))) == 4 and len(circles) == 3
    assert all(0 < x < 640 and 0 < y < 360 for x, y in circles.items())
    labels = sorted(float(t.attrib["y"]) for t in root.iter("text") if t.text in "abcd")
    assert len(set(labels)) == 4
    ElementTree.fromstring(chart(Chart("one", "x", "y", False, points[:1])))
    many = [Point(f"v{i}", i, 50 - i, 40, 60) for i in range(9)] + [Point("bf16", 9, 50, 40, 60)]
    root = ElementTree.fromstring(chart(Chart("many", "x", "y", False, many)))
    assert {t.text for t in root.iter("text")} >= {"v0", "bf16"} and "v1" not in {t.text for t in root.iter("text")}
    assert len(list(root.iter("title"))) == 10


@pytest.mark.parametrize(("low", "high"), [(0, 1), (15.5, 36.7), (89.1, 94.1), (5, 5), (0, 0), (-3, 1e6), (1e-4, 2e-4)])
def test_ticks(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 9 and found[0] <= low and found[-1] >= high
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in itertools.pairwise(found)}
    assert steps == {1.0}


def test_verdicts_in_the_notes_agree() -> None:
    assert str(report.ALPHA) in " ".join(report._notes())
