"""Exams and texts in every format, their checksums, and what is wrong with a file."""

from __future__ import annotations

import csv
import json
import lzma
import sys
from pathlib import Path

import pytest

from client.eval import data
from client.eval.data import BUNDLED, EvalError, Exam, Question, load_exam, load_text

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
DEV = [
    Question("law", 'Who "said", so?', ("a", "b,\u2028", "c", "d"), 1, 0),
    Question("law", "Why?", ("w", "x", "y", "z"), 0, 1),
]
TEST = [Question("law", "When?", ("1", "2", "3", "4"), 3, 0)]


def write_jsonl(folder: Path, exam: Exam) -> Path:
    folder.mkdir(exist_ok=True)
    for name, questions in (("dev", exam.dev), ("test", exam.test)):
        lines = [json.dumps(vars(q), ensure_ascii=False) for q in questions]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_csv(path: Path, rows: list[list[object]]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def test_every_format_holds_the_same_exam(tmp_path: Path) -> None:
    exam = Exam(DEV, TEST)
    loaded = {"jsonl": load_exam(write_jsonl(tmp_path / "jsonl", exam))}
    (tmp_path / "xz").mkdir()
    for split in ("dev", "test"):
        packed = lzma.compress((tmp_path / "jsonl" / f"{split}.jsonl").read_bytes())
        (tmp_path / "xz" / f"mmlu_{split}.jsonl.xz").write_bytes(packed)
    loaded["xz"] = load_exam(tmp_path / "xz")
    heading: list[object] = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
    for split, questions in (("dev", DEV), ("test", TEST)):
        bare: list[list[object]] = [[q.question, *q.choices, "ABCD"[q.answer]] for q in questions]
        write_csv(tmp_path / "original" / split / f"law_{split}.csv", bare)
        numbered: list[list[object]] = [[q.question, *q.choices, q.answer] for q in questions]
        write_csv(tmp_path / "headed" / split / f"law_{split}.csv", [heading, *numbered])
        write_csv(tmp_path / "one" / f"{split}.csv", [["subject", *heading], *[["law", *row] for row in numbered]])
    loaded |= {name: load_exam(tmp_path / name) for name in ("original", "headed", "one")}
    for name, found in loaded.items():
        assert (found.dev, found.test, found.checksum) == (DEV, TEST, exam.checksum), name
        assert found.source == str(tmp_path / name)
    assert Exam(DEV, [*TEST, TEST[0]]).checksum != exam.checksum
    assert TEST[0].id == "law/0"


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'octavo[eval]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    for split, questions in (("dev", DEV), ("test", TEST)):
        rows = [{**vars(q), "choices": list(q.choices)} for q in questions]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    assert load_exam(tmp_path).checksum == Exam(DEV, TEST).checksum
    parquet.write_table(pyarrow.table({"text": [" = A = \n", "", " b \n"]}), tmp_path / "text.parquet")
    assert load_text(tmp_path / "text.parquet").raw == " = A = \n \n b \n"
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(EvalError, match="cannot read"):
        load_exam(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"test\.jsonl:2 is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"subject": "s", "question": "q", "answer": 0}', "row 2 lacks one of the columns"),
        ('{"subject": "s", "question": "q", "choices": ["a"], "answer": 0}', "four choices"),
        ('{"subject": "s", "question": "q", "choices": ["a", "b", "c", 4], "answer": 0}', "all text"),
        ('{"subject": "s", "question": "q", "choices": ["a", "b", "c", "d"], "answer": 4}', "answer 4 is not"),
        ('{"subject": "s", "question": "q", "choices": ["a", "b", "c", "d"], "answer": "E"}', "answer 'E' is not"),
        ('{"subject": "s", "question": "q", "choices": ["a", "b", "c", "d"], "answer": true}', "answer True is not"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    write_jsonl(tmp_path, Exam(DEV, TEST))
    with (tmp_path / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(EvalError, match=message):
        load_exam(tmp_path)


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"has none of dev\.jsonl"):
        load_exam(tmp_path)
    write_jsonl(tmp_path, Exam(DEV, TEST))
    (tmp_path / "test.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(EvalError, match="holds no questions"):
        load_exam(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "test.csv").write_text("subject,question\na,b,c\n", encoding="utf-8")
    with pytest.raises(EvalError, match="row 2 has 3 columns, not 2"):
        load_exam(tmp_path)


def test_texts(tmp_path: Path) -> None:
    raw = " \n = A = \n \n One\u2028two . \n"
    (tmp_path / "wiki.test.raw").write_bytes(raw.encode())
    text = load_text(tmp_path / "wiki.test.raw")
    assert text.raw == raw and text.rows == ("", " = A = \n", "", " One\u2028two . \n")
    lines = [json.dumps({"text": row}) for row in text.rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    write_csv(tmp_path / "rows.csv", [["text"], *[[row] for row in text.rows if row]])
    again = load_text(tmp_path / "rows.jsonl")
    assert (again.raw, again.rows, again.checksum) == (text.raw, text.rows, text.checksum)
    assert load_text(tmp_path / "rows.csv").rows == (" = A = \n", " One\u2028two . \n")
    (tmp_path / "bad.raw").write_bytes(b"\xff")
    (tmp_path / "empty.raw").write_bytes(b" \n")
    (tmp_path / "other.jsonl").write_text('{"page": "x"}\n', encoding="utf-8")
    messages = {
        "bad.raw": "cannot read",
        "empty.raw": "no text",
        "other.jsonl": "no column text",
        "none": "cannot read",
    }
    for name, message in messages.items():
        with pytest.raises(EvalError, match=message):
            load_text(tmp_path / name)


def test_bundled() -> None:
    exam, text = data.bundled_exam(), data.bundled_text()
    assert len(exam.test) == 504 and len({q.subject for q in exam.test}) == 9 and exam.source == "pocket exam"
    assert text.raw == (BUNDLED / "prose.txt").read_text(encoding="utf-8")


def test_the_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import finds where it is not installed
    for load in (data.hub_exam, data.hub_text):
        with pytest.raises(EvalError, match=r"not installed: pip install 'octavo\[eval\]', or give --mmlu-dir"):
            load()


@pytest.mark.skipif(not SHARED.is_dir(), reason="MMLU (shared data) is not here")
def test_the_real_files() -> None:
    exam = load_exam(SHARED / "mmlu")
    assert len(exam.dev) == 285 and len(exam.test) == 14042
    text = load_text(SHARED / "wikitext-2-raw" / "wiki.test.raw")
    assert len(text.rows) == 4358 and len("\n\n".join(text.rows)) == 1_294_336
    assert text.checksum == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
