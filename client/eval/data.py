"""Rows to evaluate on: exams in MMLU's schema, and running text in rows like WikiText's.

Three sources: the bundled pocket exam and prose, local files, and Hugging Face's hub (pinned revisions, through the
`datasets` package, which reads HF_ENDPOINT). Local exams are a folder with

    dev.jsonl, test.jsonl       subject, question, choices (four strings), answer (0 to 3 or a letter)
    dev.csv, test.csv           columns subject, question, four choices, answer
    dev/SUBJECT_dev.csv, …      the original's files, with or without a heading
    dev.parquet, test.parquet   as jsonl; needs pyarrow

(jsonl also as `.jsonl.xz` and with `mmlu_` before the name). A text is a raw file, or rows of a column `text` in jsonl,
CSV or parquet. A checksum is of the content, so the same rows from another format have the same one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import lzma
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "pocket"
MMLU_HUB = ("cais/mmlu", "all", "c30699e8356da336a370243923dbaf21066bb9fe")
WIKITEXT_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1", "b08601e04326c79dfdd32d625aee71d232d685c3")

LETTERS = "ABCD"
CHOICE_COLUMNS = (tuple(f"choice{i}" for i in range(4)), tuple("ABCD"), tuple(f"choice_{c}" for c in "abcd"))


class EvalError(ValueError):
    """The data, the options, or the server cannot be used for this. One line for the user, with the fix."""


@dataclass(frozen=True)
class Question:
    """`number` counts within the subject, from 0, in the order of the source."""

    subject: str
    question: str
    choices: tuple[str, ...]  # 4
    answer: int  # index of the right choice
    number: int = 0

    @property
    def id(self) -> str:
        return f"{self.subject}/{self.number}"


@dataclass(frozen=True)
class Exam:
    """Worked examples and questions. `source` says where they came from."""

    dev: list[Question]
    test: list[Question]
    source: str = ""
    checksum: str = field(init=False)

    def __post_init__(self) -> None:
        rows = [[[q.subject, q.question, q.choices, q.answer] for q in split] for split in (self.dev, self.test)]
        object.__setattr__(self, "checksum", sha256(json.dumps(rows, ensure_ascii=False)))


@dataclass(frozen=True)
class Text:
    """A running text: the file as it is, and its rows as WikiText on the hub has them (a blank line is "")."""

    raw: str
    rows: tuple[str, ...]
    source: str = ""

    @property
    def checksum(self) -> str:
        return sha256(self.raw)


def sha256(text: str) -> str:
    """Of the text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def text_of_lines(raw: str, source: str) -> Text:
    """A raw file's text. Only "\\n" ends a line."""
    lines = raw.split("\n")
    if not lines[-1]:
        lines.pop()
    return Text(raw, tuple(line + "\n" if line.strip() else "" for line in lines), source)


def text_of_rows(rows: Iterable[Any], source: str) -> Text:
    """A text given as rows; in the raw file a blank row is a line of one space."""
    kept = tuple(rows)
    if not all(isinstance(row, str) for row in kept) or not any(row.strip() for row in kept):
        raise EvalError(f"{source}: the column text holds no text")
    return Text("".join(row or " \n" for row in kept), kept, source)


def load_exam(folder: Path) -> Exam:
    """Read an exam from a folder. Raises EvalError naming the file and row that is wrong."""
    dev, test = (_exam_split(folder, split) for split in ("dev", "test"))
    return Exam(dev, test, str(folder))


def load_text(path: Path) -> Text:
    """Read a text; the suffix tells the format. Raises EvalError."""
    if path.suffix in (".jsonl", ".csv", ".parquet") or path.name.endswith(".jsonl.xz"):
        rows = [row for _, row in _rows(path)]
        if not rows or "text" not in rows[0]:
            raise EvalError(f"{path} has no column text")
        return text_of_rows((row.get("text") for row in rows), str(path))
    try:
        raw = _bytes(path).decode()
    except UnicodeDecodeError as e:
        raise EvalError(f"cannot read {path}: {e}") from None
    if not raw.strip():
        raise EvalError(f"{path} holds no text")
    return text_of_lines(raw, str(path))


def bundled_exam() -> Exam:
    """The pocket exam. Raises EvalError where the checkout's models/ is not at hand (an installed client)."""
    dev, test = (_exam_split(_bundled("exam"), split) for split in ("dev", "test"))
    return Exam(dev, test, "pocket exam")


def bundled_text() -> Text:
    """The pocket prose, likewise."""
    return text_of_lines(load_text(_bundled("prose.txt")).raw, "pocket prose")


def _bundled(name: str) -> Path:
    if not (BUNDLED / name).exists():
        raise EvalError(
            f"{BUNDLED / name} is not here: run from a checkout, or give --mmlu-dir and --wikitext-file, or --data hub"
        )
    return BUNDLED / name


def hub_exam() -> Exam:
    """MMLU of the hub at a pinned revision. Raises EvalError where `datasets` is missing or the hub out of reach."""
    dev, test = (_hub(MMLU_HUB, split) for split in ("dev", "test"))
    source = f"{MMLU_HUB[0]}@{MMLU_HUB[2][:12]}"
    return Exam(questions(enumerate(dev), f"{source} dev"), questions(enumerate(test), f"{source} test"), source)


def hub_text() -> Text:
    """WikiText-2 raw, test, of the hub, likewise."""
    source = f"{WIKITEXT_HUB[0]}@{WIKITEXT_HUB[2][:12]}"
    return text_of_rows((row["text"] for row in _hub(WIKITEXT_HUB, "test")), source)


def _hub(which: tuple[str, str, str], split: str) -> Iterable[Mapping[str, Any]]:
    name, config, revision = which
    try:
        import datasets
    except ImportError:
        raise EvalError(
            f"{name} comes through the package datasets, which is not installed: pip install 'octavo[eval]', "
            "or give --mmlu-dir and --wikitext-file, or --data pocket"
        ) from None
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError) as e:  # requests' and the hub's errors are OSErrors, the package's own ValueErrors
        reason = " ".join(str(e).split())[:200]
        raise EvalError(f"cannot load {name} from the hub: {reason}; give local files, or --data pocket") from None
    return rows


def _exam_split(folder: Path, split: str) -> list[Question]:
    names = [f"{prefix}{split}{end}" for prefix in ("", "mmlu_") for end in (".jsonl", ".jsonl.xz", ".csv", ".parquet")]
    for name in names:
        if (folder / name).is_file():
            return questions(_rows(folder / name), str(folder / name))
    found = sorted((folder / split).glob(f"*_{split}.csv")) if (folder / split).is_dir() else []
    if not found:
        raise EvalError(f"{folder} has none of {', '.join(names)}, {split}/SUBJECT_{split}.csv")
    result: list[Question] = []
    for path in found:
        subject = path.name.removesuffix(f"_{split}.csv")
        result += questions(((i, {"subject": subject, **row}) for i, row in _rows(path)), str(path))
    return result


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data
    except (OSError, lzma.LZMAError) as e:
        raise EvalError(f"cannot read {path}: {e}") from None


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Rows of a table, each with its line (or row) number, from 1."""
    if path.suffix == ".parquet":
        return enumerate(_parquet(path), 1)
    try:
        text = _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise EvalError(f"cannot read {path}: {e}") from None
    if path.suffix == ".csv":
        return _csv(text, path)
    # not splitlines(): a question may hold U+2028
    return [(i, _json(line, f"{path}:{i}")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise EvalError(f"{where} is not JSON: {e}") from None
    if not isinstance(row, dict):
        raise EvalError(f"{where} is not a JSON object")
    return row


def _csv(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        table = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as e:
        raise EvalError(f"{path} is not CSV: {e}") from None
    if not table:
        raise EvalError(f"{path} is empty")
    names, first = table[0], 1
    if "question" not in names and "text" not in names and len(names) == 6:  # the original's: no heading
        names, first = ["question", *CHOICE_COLUMNS[0], "answer"], 0
    for i, cells in enumerate(table[first:], first + 1):
        if len(cells) != len(names):
            raise EvalError(f"{path} row {i} has {len(cells)} columns, not {len(names)}")
    return [(i, dict(zip(names, cells, strict=True))) for i, cells in enumerate(table[first:], first + 1)]


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise EvalError(f"{path}: parquet needs pyarrow: pip install 'octavo[eval]'") from None
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as e:
        raise EvalError(f"cannot read {path}: {e}") from None
    return rows


def questions(rows: Iterable[tuple[int, Mapping[str, Any]]], where: str) -> list[Question]:
    """Numbered rows as questions. Raises EvalError for missing columns or a wrong answer, naming the row."""
    seen: Counter[str] = Counter()
    result = []
    for i, row in rows:
        subject, question, answer = (row.get(name) for name in ("subject", "question", "answer"))
        choices = row.get("choices") or next(
            ([row[c] for c in columns] for columns in CHOICE_COLUMNS if all(c in row for c in columns)), None
        )
        if subject is None or question is None or answer is None or choices is None:
            raise EvalError(f"{where} row {i} lacks one of the columns subject, question, choices, answer")
        if isinstance(answer, str) and answer in (*"ABCD", *"0123"):
            answer = LETTERS.index(answer) if answer in LETTERS else int(answer)
        choices = tuple(choices)
        if len(choices) != 4 or not all(isinstance(s, str) for s in (subject, question, *choices)):
            raise EvalError(f"{where} row {i} is not a question of four choices, all text")
        if isinstance(answer, bool) or answer not in range(4):
            raise EvalError(f"{where} row {i}: the answer {row['answer']!r} is not 0 to 3 or A to D")
        result.append(Question(subject, question, choices, answer, seen[subject]))
        seen[subject] += 1
    if not result:
        raise EvalError(f"{where} holds no questions")
    return result
