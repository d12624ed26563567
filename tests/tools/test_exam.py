"""The bundled exam: the committed files are what the generator makes, and every answer is right."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from tools import exam

FOLDER = Path(__file__).parents[2] / "models" / "pocket" / "exam"
DEV, TEST = exam.read_rows(FOLDER / "dev.jsonl"), exam.read_rows(FOLDER / "test.jsonl")


def content(row: exam.Row) -> tuple[str, ...]:
    """What makes a question the same question: its text and its set of choices."""
    return (row["question"], *sorted(row["choices"]))


def right_choices(row: exam.Row) -> list[str]:
    """The choices that answer the question, found from its text alone."""
    question, choices = row["question"], row["choices"]
    words = question.rstrip("?").split()
    match row["subject"]:
        case "arithmetic":
            a, sign, b = words[2:]
            return [c for c in choices if int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b))]
        case "calendar":
            if "in the year" in question:
                places = sorted(exam.MONTHS.index(c) for c in choices)
                return [exam.MONTHS[places[0 if "first" in question else 3]]]
            cycle = exam.DAYS if "day" in words[1] else exam.MONTHS
            step = {"one": 1, "two": 2, "three": 3}[words[3]] * (1 if "after" in words else -1)
            return [c for c in choices if (cycle.index(c) - cycle.index(words[-1]) - step) % len(cycle) == 0]
        case "counting":
            items = question.split(": ")[1].rstrip("?").split(", ")
            count = items.count(words[4]) if "times" in question else len(items)
            return [c for c in choices if int(c) == count]
        case "number_comparison":
            return [str((max if "largest" in question else min)(map(int, choices)))]
        case "number_sequences":
            terms = [int(n) for n in re.findall(r"\d+", question)]
            assert len({b - a for a, b in pairwise(terms)}) == 1
            return [c for c in choices if int(c) == 2 * terms[3] - terms[2]]
        case "reading":
            return right_reading(question, choices)
        case "spelling":
            if "alphabet" in question:
                return [(min if "first" in question else max)(choices)]
            return [c for c in choices if (c[-1] if "ends" in words else c[0]) == words[-1]]
        case "word_categories":
            of = {word: name for name, known in exam.WORDS_OF.items() for word in known}
            if "belong" in question:
                return [c for c in choices if sum(of[c] == of[other] for other in choices) == 1]
            name = re.sub("^Which of these is (not )?", "", question).rstrip("?")
            return [c for c in choices if (of[c] == name) != ("is not" in question)]
        case "word_meanings":
            opposites = {pair for first, second, _ in exam.MEANINGS for pair in ((first, second), (second, first))}
            near = {(first, same) for first, _, same in exam.MEANINGS}
            return [c for c in choices if (words[-1], c) in (opposites if "opposite" in words else near)]
    raise AssertionError(row["subject"])


def right_reading(question: str, choices: list[str]) -> list[str]:
    """The same for the subject `reading`: look the fact up, or see what the text names."""
    facts, asked = question.split(". ")
    owner = {thing: name for name, thing in re.findall(r"(\w+) has the (\w+)", facts)}
    colour = dict(re.findall(r"he (\w+) is (\w+)", facts))
    if "none of them" in asked:
        return [c for c in choices if c not in owner]
    if "one of them" in asked:
        return [c for c in choices if c in owner]
    if asked.startswith("What does"):
        return [c for c in choices if owner.get(c) == asked.split()[2]]
    thing = asked.rstrip("?").split()[-1]
    return [owner[thing] if asked.startswith("Who") else colour[thing]]


def test_committed_files_are_what_the_generator_makes() -> None:
    assert exam.make_split("dev", exam.DEV_ROWS) == DEV
    assert exam.make_split("test", exam.TEST_ROWS) == TEST


def test_schema_and_balance() -> None:
    for row in DEV + TEST:
        assert set(row) == {"subject", "question", "choices", "answer"}
        assert len(set(row["choices"])) == 4 and all(row["choices"])
    for subject in exam.SUBJECTS:
        assert sum(row["subject"] == subject for row in DEV) == exam.DEV_ROWS
        answers = Counter(row["answer"] for row in TEST if row["subject"] == subject)
        assert answers == dict.fromkeys(range(4), exam.TEST_ROWS // 4)
    assert len({content(row) for row in TEST}) == len(TEST) >= 400


def test_no_question_of_another_split() -> None:
    rng = Random(7)
    train = [exam.make_row(subject, "train", rng) for subject in exam.SUBJECTS for _ in range(1000)]
    held_out = {content(row) for row in DEV + TEST}
    assert not held_out & {content(row) for row in train}
    assert not {content(row) for row in DEV} & {content(row) for row in TEST}
    alone = {row["question"] for row in DEV + TEST if row["subject"] in exam.SPLIT_BY_QUESTION}
    assert not alone & {row["question"] for row in train}


def test_every_answer_is_right_and_alone() -> None:
    rng = Random(8)
    drawn = [exam.make_row(subject, "train", rng) for subject in exam.SUBJECTS for _ in range(300)]
    for row in DEV + TEST + drawn:
        assert right_choices(row) == [row["choices"][row["answer"]]], row


def test_word_lists_do_not_overlap() -> None:
    assert len(exam.ALL_WORDS) == len(set(exam.ALL_WORDS))
    meanings = [word for entry in exam.MEANINGS for word in entry]
    assert len(meanings) == len(set(meanings))


@pytest.mark.parametrize("shots", [0, 5])
def test_prompt_is_mmlus(shots: int) -> None:
    row, solved = TEST[-1], [r for r in DEV if r["subject"] == TEST[-1]["subject"]][:shots]
    text = exam.prompt(row, solved)
    assert text.startswith("The following are multiple choice questions (with answers) about word meanings.\n\n")
    assert text.endswith(f"\nD. {row['choices'][3]}\nAnswer:")
    assert len(re.findall(r"\nAnswer: [ABCD]\n\n", text)) == shots
