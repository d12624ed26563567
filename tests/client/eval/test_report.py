"""What the report says, and the page it draws."""

from __future__ import annotations

import itertools
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from client.eval.bench import Bench, MatmulError, Offline
from client.eval.blocks import Bullets, Chart, Heading, Paragraph, Point, Table, markdown
from client.eval.compare import ALPHA, against_baseline
from client.eval.data import Exam, Text
from client.eval.findings import Findings
from client.eval.mmlu import MMLU
from client.eval.page import chart, page, pareto, ticks
from client.eval.recommend import recommend
from client.eval.report import build
from client.eval.study import STUDY, spelling
from client.eval.study_tables import study_tables
from client.eval.throughput import Throughput
from client.eval.wikitext import Wikitext
from tests.client.eval.test_compare import exam, prose

ROWS = {"prompt_tokens": 100, "cached_tokens": 90, "way": "named"}


def measured(variant: str, picked: str, losses: list[float], size: int | None) -> list[dict[str, Any]]:
    """Two results as the suite makes them."""
    settings = {"data": {"source": "made | up", "sha256": "0" * 64}, "limit": None}
    found = [exam(variant, picked), prose(variant, losses)]
    for result, figures in zip(found, (MMLU(Exam([], [])).figures, Wikitext(Text("", ())).figures), strict=True):
        result["rows"] = [r | ROWS if "picked" in r else r for r in result["rows"]]
        result |= {"settings": settings, "url": "http://h", "date": "2026-11-23T00:00:00+00:00"}
        size_of_all = None if size is None else size + 10_000_000
        result |= {"server": {"root": None, "bytes": size_of_all}, "figures": figures(result["rows"])}
    return found


def throughput(variant: str, speed: float) -> dict[str, Any]:
    task = Throughput()
    rows = [{"id": "load", "rounds": [[2048, 1.0, 10 * speed, 10.0], [2048, 1.0, 10 * speed, 10.0]]}]
    found = {"model": "m", "variant": variant, "task": task.name, "method": task.method, "settings": task.settings}
    found |= {"url": "http://h", "date": "2026-11-23T00:00:00+00:00", "server": {"root": None, "bytes": None}}
    return found | {"figures": task.figures(rows), "rows": rows}


LOSSES = [300.0 + i for i in range(12)]


def findings(*more: list[dict[str, Any]], **fields: Any) -> Findings:
    results = [r for pair in (measured("bf16", "0" * 90 + "1" * 10, LOSSES, 90_000_000), *more) for r in pair]
    results += [throughput(name, speed) for name, speed in fields.pop("speeds", {}).items()]
    return Findings(results, against_baseline(results), **fields)


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
    untold = measured("int8-row", "0" * 100, LOSSES, None)
    assert recommend(findings(untold))[0].startswith("None by size")
    twin = measured("int8-twin", "0" * 80 + "1" * 10 + "0" * 10, LOSSES, 40_000_000)
    said = recommend(findings(SAME, twin))
    assert said[0].startswith("int8-row") and "As small, but with answers farther from bf16's: int8-twin." in said
    fast = findings(SAME, twin, speeds={"int8-twin": 50.0, "int8-row": 40.0, "bf16": 20.0})
    said = recommend(fast)
    assert said[0].startswith("int8-twin") and said[1] == "It decodes 50 tokens/s, 2.50 times bf16's."
    assert "As small, but slower: int8-row." in said
    large = measured("fp8-fake", "0" * 89 + "1" * 10 + "0", LOSSES, 90_000_000)
    said = recommend(findings(SAME, large, speeds={"fp8-fake": 50.0, "int8-row": 40.0, "bf16": 20.0}))
    assert said[0].startswith("int8-row")
    assert said[2] == "For speed alone: fp8-fake decodes 50 tokens/s, 2.50 times bf16's, without such a loss either."


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
    blocks = build(
        findings(
            SAME,
            WORSE,
            missing={"fp8-g64": "no room", "fp8-g128": "no room"},
            gates=["bad: …"],
            speeds={"bf16": 20.0, "bad": 90.0},
        )
    )
    headings = [b.text for b in blocks if isinstance(b, Heading)]
    assert headings == [
        "Recommendation",
        "Gates that failed",
        "Not measured",
        "What was measured",
        "Accuracy against cost",
        "Accuracy, direct, against bf16",
        "Perplexity a token, against bf16",
        "Flips by subject, direct",
        "How to read this",
    ]
    assert Bullets(["fp8-g64, fp8-g128: no room"]) in blocks
    tables = [b for b in blocks if isinstance(b, Table)]
    for table in tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}
    accuracy = {row[0]: dict(zip(tables[2].columns, row, strict=True)) for row in tables[2].rows}
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
    said = next(b for b in reversed(build(findings(SAME))) if isinstance(b, Bullets))
    assert str(ALPHA) in " ".join(said.items)


def table_after(blocks: list[Any], heading: str) -> Table:
    i = next(i for i, b in enumerate(blocks) if isinstance(b, Heading) and b.text == heading)
    return next(b for b in blocks[i:] if isinstance(b, Table))


def test_the_studys_tables() -> None:
    """Every one of its variants has its place, measured or not; its figures stand beside ours."""
    lower = measured("int8-row-fake", "0" * 90 + "1" * 10, [x - 6 * (i == 3) for i, x in enumerate(LOSSES)], 90_000_000)
    bench = Bench(
        [MatmulError("16x512", "element", "tensor", (0.0101, 0.0005), (0.0226, 0.0001))],
        5,
        [Offline("int8-g64", 9.0, 1152.0, 200.0, "16 x 128 in, 64 out, CPU")],
    )
    found = findings(SAME, lower, speeds={"bf16": 20.0}, bench=bench, study=True)
    blocks = study_tables(found)
    grid = table_after(blocks, "As in the study: accuracy, direct, %")
    assert grid.columns == ["weights alone", "INT8", "INT8, fake", "FP8", "FP8, fake"]
    assert grid.rows[1] == ["Per row", "90.00 ~", "90.00 ~", "not measured", "not measured"]
    assert len(grid.rows) * 4 + 5 == len(STUDY)
    speeds = table_after(blocks, "As in the study: throughput")
    assert speeds.rows[0] == ["the study, BF16", "9.35", "", "177.52", "its own"]
    assert [row[0] for row in speeds.rows[3:]] == ["BF16", "INT8_Per_Group_64"]
    errors = table_after(blocks, "As in the study: matrix errors")
    assert errors.rows[0] == ["16x512, the study", "", "0.009608", "0.022184", "2.31"]
    assert errors.rows[1] == ["16x512, element", "tensor", "0.010100 ± 0.000500", "0.022600 ± 0.000100", "2.24"]
    claims = next(b for b in blocks if isinstance(b, Bullets)).items
    assert "lowered perplexity by 17 %" in claims[0] and claims[1].startswith("Of 1 fake formats none")
    assert claims[2].startswith("No interval reaches down to -17 %; the lowest is int8-row-fake's")
    assert set(map(len, (row for b in blocks if isinstance(b, Table) for row in [*b.rows, b.columns]))) <= {2, 5}
    assert "As in the study" in markdown("T", build(found)) and "As in the study" not in markdown(
        "T", build(findings())
    )


def test_the_studys_spelling() -> None:
    names = {"int8-row": "INT8_Per_Row", "fp8-g128-fake": "FP8_Per_Group_128_Fake", "bf16": "BF16"}
    names |= {"int8-tensor-fake": "INT8_Per_Tensor_Fake", "w8a8-int8-row-smooth": "w8a8-int8-row-smooth"}
    assert {name: spelling(name) for name in names} == names
