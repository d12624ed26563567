"""Rows to evaluate on: exams in MMLU's schema, and running text.

An exam is a folder with `dev.jsonl` (the worked examples) and `test.jsonl`, or `mmlu_dev.jsonl` and `mmlu_test.jsonl`,
any of them also as `.xz`. One object a line: subject, question, choices (four strings), answer (index 0 to 3).
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from pathlib import Path

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "pocket"


class EvalError(ValueError):
    """The data cannot be used, or the server cannot be evaluated with it. One line for the user."""


@dataclass(frozen=True)
class Question:
    subject: str
    question: str
    choices: tuple[str, ...]  # 4
    answer: int  # index of the right choice


@dataclass(frozen=True)
class Exam:
    dev: list[Question]
    test: list[Question]


def load_exam(folder: Path) -> Exam:
    """Read an exam. Raises EvalError with the file and line that is wrong."""
    return Exam(*(_questions(_find(folder, split)) for split in ("dev", "test")))


def load_text(path: Path) -> str:
    """A text file as it is (WikiText's raw files included), line ends untouched. Raises EvalError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as e:
        raise EvalError(f"cannot read {path}: {e}") from None
    if not text.strip():
        raise EvalError(f"{path} holds no text")
    return text


def _find(folder: Path, split: str) -> Path:
    names = [f"{prefix}{split}.jsonl{suffix}" for prefix in ("", "mmlu_") for suffix in ("", ".xz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise EvalError(f"{folder} has none of {', '.join(names)}")


def _questions(path: Path) -> list[Question]:
    try:
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as e:
        raise EvalError(f"cannot read {path}: {e}") from None
    # not splitlines(): a question may hold U+2028
    questions = [_question(line, f"{path}:{i}") for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not questions:
        raise EvalError(f"{path} holds no questions")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
        question = Question(row["subject"], row["question"], tuple(row["choices"]), row["answer"])
    except (ValueError, KeyError, TypeError) as e:
        raise EvalError(f"{where} is not a question: {type(e).__name__}: {e}") from None
    strings = (question.subject, question.question, *question.choices)
    if len(question.choices) != 4 or question.answer not in range(4) or not all(isinstance(s, str) for s in strings):
        raise EvalError(f"{where} is not a question: it needs four choices and an answer from 0 to 3")
    return question
