"""The bundled exam: four-choice questions in MMLU's schema, from a seeded generator.

Nine subjects that a model of nine million parameters can learn, each with easy and hard questions, so that a
healthy model scores well above chance and below 100 %, and a damaged one visibly lower. A question belongs to the
split `train`, `dev` or `test` by a hash of its content, never by chance: whoever draws training questions
(`tools/train_pocket.py`) cannot meet a test question, whatever the seed.

    python tools/exam.py --out models/pocket/exam        # writes dev.jsonl and test.jsonl, always the same bytes

A row is {"subject", "question", "choices" (4 strings), "answer" (0 to 3)}. The prompt is the usual MMLU one
(hendrycks/test, evaluate.py): a heading, five solved dev questions, the question, "Answer:"; the model's choice is the
largest of the four logits of " A", " B", " C", " D".
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import TypedDict

SEED = 20261123
TEST_ROWS = 56  # a subject; a multiple of 4, so that the four answers are equally frequent
DEV_ROWS = 5
LETTERS = "ABCD"


class Row(TypedDict):
    """One question, as MMLU has it: `choices` has four different strings, `answer` is the index of the right one."""

    subject: str
    question: str
    choices: list[str]
    answer: int


Draft = tuple[str, str, list[str]]  # question, right answer, three wrong answers


def listed(words: str) -> list[str]:
    """The words of a string, for lists of words that are kinder to the eye without quotes and commas."""
    return words.split()


CATEGORIES: dict[str, str] = {
    "a mammal": "horse cow sheep goat dog cat lion tiger wolf bear rabbit mouse whale deer camel elephant monkey pig",
    "a bird": "robin eagle sparrow owl hawk swan goose duck crow raven pigeon parrot ostrich stork lark hen gull",
    "an insect": "ant bee wasp beetle moth butterfly cricket locust mosquito flea gnat hornet grasshopper",
    "a tree": "oak elm pine ash beech maple willow birch cedar poplar fir yew larch chestnut",
    "a flower": "rose lily daisy tulip violet poppy primrose daffodil bluebell marigold pansy",
    "a fruit": "apple pear plum cherry grape lemon banana peach fig melon strawberry apricot",
    "a vegetable": "carrot cabbage onion potato turnip bean pea lettuce spinach celery leek",
    "a tool": "hammer saw chisel spade axe drill plough needle shovel rake scissors screwdriver",
    "a colour": "red blue green yellow purple brown black white grey pink scarlet crimson",
    "a metal": "iron gold silver copper tin lead zinc brass steel nickel platinum bronze",
    "a part of the body": "arm leg hand foot knee elbow shoulder neck nose ear mouth finger thumb ankle",
    "a piece of furniture": "table chair desk sofa bed stool bench cupboard wardrobe bookcase cradle",
    "a piece of clothing": "coat shirt hat glove sock shoe skirt trousers cloak scarf bonnet waistcoat apron",
    "a musical instrument": "violin piano flute drum trumpet harp guitar organ fiddle clarinet horn cello",
    "a vehicle": "cart wagon train carriage ship boat bicycle sledge coach canoe aeroplane lorry",
    "a drink": "tea coffee milk wine beer water brandy cider lemonade cocoa ale",
    "a building": "church castle house barn school hospital prison palace cottage factory theatre temple",
    "a trade": "baker carpenter farmer tailor teacher doctor sailor soldier lawyer blacksmith miller painter",
}
WORDS_OF: dict[str, list[str]] = {name: listed(words) for name, words in CATEGORIES.items()}
ALL_WORDS: list[str] = sorted(word for words in WORDS_OF.values() for word in words)

# a word, its opposite, and a word near the first one's meaning
MEANINGS: list[tuple[str, str, str]] = [
    (first, second, near)
    for first, second, near in (
        entry.split("/")
        for entry in listed(
            "hot/cold/burning big/small/huge rich/poor/wealthy happy/sad/glad fast/slow/quick old/young/aged "
            "hard/soft/stony strong/weak/powerful light/dark/bright high/low/lofty long/short/lengthy wet/dry/damp "
            "clean/dirty/spotless loud/quiet/noisy brave/cowardly/courageous early/late/prompt easy/difficult/simple "
            "full/empty/filled good/bad/excellent heavy/weightless/weighty kind/cruel/gentle love/hate/affection "
            "near/far/close new/ancient/modern open/shut/unlocked polite/rude/courteous rough/smooth/uneven "
            "safe/dangerous/secure sharp/blunt/keen sick/healthy/ill thick/thin/dense true/false/correct "
            "wide/narrow/broad wise/foolish/clever begin/finish/start arrive/depart/reach buy/sell/purchase "
            "build/destroy/construct give/take/grant hide/reveal/conceal laugh/weep/chuckle lift/drop/raise "
            "lose/find/mislay praise/blame/applaud push/pull/shove remember/forget/recall rise/fall/ascend "
            "shout/whisper/yell sink/float/founder sit/stand/perch win/fail/triumph accept/refuse/receive "
            "attack/defend/assault beautiful/ugly/lovely calm/stormy/peaceful cheap/expensive/inexpensive "
            "lazy/industrious/idle proud/humble/haughty public/private/common rare/frequent/scarce "
            "straight/crooked/direct sweet/bitter/sugary tame/wild/gentled victory/defeat/conquest "
            "peace/war/harmony friend/enemy/companion hope/despair/expectation joy/sorrow/delight "
            "truth/falsehood/fact wealth/poverty/riches birth/death/nativity day/night/daytime "
            "entrance/exit/doorway top/bottom/summit front/back/forefront"
        )
    )
]
NAMES = listed("Anna Peter Ruth John Mary Tom Alice George Emma Henry Jane Robert Lucy Edward Grace Philip")
OBJECTS = listed("lamp key map book cup rope ring bell candle basket letter mirror knife bottle pencil lantern ball")
COLOURS = listed("red blue green yellow white black brown grey")
MONTHS = listed("January February March April May June July August September October November December")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
STEPS = {1: "one", 2: "two", 3: "three"}


def others(rng: Random, right: int, offsets: Sequence[int], low: int = 0) -> list[str]:
    """Three different wrong numbers, `right` plus one of `offsets` each, none below `low`."""
    return [str(n) for n in rng.sample([right + o for o in offsets if o and right + o >= low], 3)]


def number_comparison(rng: Random) -> Draft:
    """The largest or the smallest of four; hard ones share their first digits."""
    level = rng.randrange(4)
    if level == 0:
        numbers = [rng.randrange(10**digits, 10 ** (digits + 1)) for digits in range(4)]
    elif level == 1:
        numbers = rng.sample(range(10, 100), 4)
    elif level == 2:
        numbers = rng.sample(range(100, 1000), 4)
    else:
        base = rng.randrange(10, 100) * 100
        numbers = [base + n for n in rng.sample(range(100), 4)]
    largest = rng.random() < 0.5
    right = max(numbers) if largest else min(numbers)
    wrong = [str(n) for n in numbers if n != right]
    return f"Which of these numbers is the {'largest' if largest else 'smallest'}?", str(right), wrong


def number_sequences(rng: Random) -> Draft:
    """The fifth term of an arithmetic progression."""
    step = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 20))
    down = rng.random() < 0.4
    first = rng.randrange(4 * step, 4 * step + 50) if down else rng.randrange(1, 50)
    terms = [first + (-step if down else step) * i for i in range(5)]
    wrong = others(rng, terms[4], (-10, -step, -3, -2, -1, 1, 2, 3, step + 1, 10) if step > 3 else range(-6, 7))
    return f"Which number comes next: {', '.join(map(str, terms[:4]))}?", str(terms[4]), wrong


def arithmetic(rng: Random) -> Draft:
    """Sums and differences of numbers below 100."""
    level = rng.randrange(4)
    if level == 0:
        a, b = rng.randrange(10, 100), rng.randrange(1, 10)
        sign, right = "+", a + b
    elif level == 1:
        a, b = rng.randrange(10, 100), rng.randrange(1, 10)
        sign, right = "-", a - b
    elif level == 2:
        a, b = rng.randrange(10, 90), rng.randrange(10, 90)
        sign, right = "+", a + b
    else:
        a, b = sorted(rng.sample(range(10, 100), 2), reverse=True)
        sign, right = "-", a - b
    return f"What is {a} {sign} {b}?", str(right), others(rng, right, (-10, -2, -1, 1, 2, 10, 11, -9, 9, -11))


def word_categories(rng: Random) -> Draft:
    """Membership; a member among strangers, a stranger among members, or the odd one out without the name."""
    here, *elsewhere = rng.sample(list(WORDS_OF), 4)
    level = rng.randrange(4)
    if level < 2:
        return f"Which of these is {here}?", rng.choice(WORDS_OF[here]), [rng.choice(WORDS_OF[c]) for c in elsewhere]
    members, stranger = rng.sample(WORDS_OF[here], 3), rng.choice(WORDS_OF[elsewhere[0]])
    if level == 2:
        return f"Which of these is not {here}?", stranger, members
    return "Which word does not belong with the others?", stranger, members


def word_meanings(rng: Random) -> Draft:
    """Opposites and near synonyms; hard ones offer the synonym where the opposite is asked, or the reverse."""
    entry, *rest = rng.sample(MEANINGS, 5)
    first, second, near = entry
    kind = rng.randrange(3)
    if kind == 0:
        question, right, trap = f"What is the opposite of {first}?", second, near
    elif kind == 1:
        question, right, trap = f"What is the opposite of {second}?", first, rng.choice(rest[3])
    else:
        question, right, trap = f"Which word is nearest in meaning to {first}?", near, second
    return question, right, [trap, *(rng.choice(words) for words in rest[:2])]


def spelling(rng: Random) -> Draft:
    """First letters, last letters, and alphabetical order."""
    kind = rng.randrange(4)
    words = rng.sample(ALL_WORDS, 60)
    right = words[0]
    if kind == 3:
        four = words[:4]
        if rng.random() < 0.5:
            return "Which of these words comes first in the alphabet?", min(four), sorted(four)[1:]
        return "Which of these words comes last in the alphabet?", max(four), sorted(four)[:3]
    place, verb = (-1, "ends") if kind == 2 else (0, "begins")
    wrong = [word for word in words if word[place] != right[place]]
    return f"Which word {verb} with the letter {right[place]}?", right, wrong[:3]


def reading(rng: Random) -> Draft:
    """Two to four facts in one sentence; who has what, which colour what is, what occurs at all and what does not."""
    count, kind = rng.randrange(2, 5), rng.randrange(6)
    names, objects, colours = rng.sample(NAMES, 4), rng.sample(OBJECTS, 8), rng.sample(COLOURS, 4)
    if kind == 2:
        facts = [f"the {thing} is {colour}" for thing, colour in zip(objects, colours[:count], strict=False)]
    else:
        count = 3 if kind == 5 else count
        facts = [f"{name} has the {thing}" for name, thing in zip(names[:count], objects, strict=False)]
    text = f"{', '.join(facts[:-1])} and {facts[-1]}."
    text = text[0].upper() + text[1:]
    pick = rng.randrange(count)
    if kind == 0:
        return f"{text} Who has the {objects[pick]}?", names[pick], [n for n in names if n != names[pick]]
    if kind == 1:
        return f"{text} What does {names[pick]} have?", objects[pick], [o for o in objects[:4] if o != objects[pick]]
    if kind == 2:
        wrong = [colour for colour in colours if colour != colours[pick]]
        return f"{text} What colour is the {objects[pick]}?", colours[pick], wrong
    if kind == 5:
        return f"{text} Which of these things does none of them have?", objects[7], objects[:3]
    return f"{text} Which of these things does one of them have?", objects[pick], objects[5:8]


def calendar(rng: Random) -> Draft:
    """Months and days after and before one another, and the first or last of four months."""
    kind = rng.randrange(4)
    if kind == 3:
        four = sorted(rng.sample(range(12), 4))
        first = rng.random() < 0.5
        right = MONTHS[four[0] if first else four[3]]
        wrong = [MONTHS[i] for i in (four[1:] if first else four[:3])]
        return f"Which of these months comes {'first' if first else 'last'} in the year?", right, wrong
    cycle, unit = (DAYS, "day") if kind == 0 else (MONTHS, "month")
    start, step, after = rng.randrange(len(cycle)), rng.randrange(1, 4), rng.random() < 0.5
    right = cycle[(start + (step if after else -step)) % len(cycle)]
    wrong = rng.sample([name for name in cycle if name not in (right, cycle[start])], 3)
    relation = f"{STEPS[step]} {unit}{'s' if step > 1 else ''} {'after' if after else 'before'}"
    return f"Which {unit} comes {relation} {cycle[start]}?", right, wrong


def counting(rng: Random) -> Draft:
    """How long a list is, or how often a word stands in it."""
    if rng.random() < 0.5:
        right = rng.randrange(2, 10)
        question = f"How many words are in this list: {', '.join(rng.sample(ALL_WORDS, right))}?"
    else:
        right = rng.randrange(1, 7)
        word, *rest = rng.sample(ALL_WORDS, 4)
        words = [word] * right + [rng.choice(rest) for _ in range(rng.randrange(2, 6))]
        rng.shuffle(words)
        question = f"How many times does {word} stand in this list: {', '.join(words)}?"
    return question, str(right), others(rng, right, (-3, -2, -1, 1, 2, 3), low=1)


SUBJECTS: dict[str, Callable[[Random], Draft]] = {
    "arithmetic": arithmetic,
    "calendar": calendar,
    "counting": counting,
    "number_comparison": number_comparison,
    "number_sequences": number_sequences,
    "reading": reading,
    "spelling": spelling,
    "word_categories": word_categories,
    "word_meanings": word_meanings,
}
# Here the question alone, whatever its choices, decides the split: no sum of the test occurs in training at all.
SPLIT_BY_QUESTION = {"arithmetic", "counting", "number_sequences", "reading"}


def split_of(subject: str, question: str, choices: Iterable[str]) -> str:
    """`test` (1/16 of all questions), `dev` (1/32) or `train`, by a hash of the question and its set of choices."""
    parts = [subject, question, *([] if subject in SPLIT_BY_QUESTION else sorted(choices))]
    bucket = hashlib.blake2b("\n".join(parts).encode(), digest_size=1).digest()[0]
    return "test" if bucket < 16 else "dev" if bucket < 24 else "train"


def make_row(subject: str, split: str, rng: Random, answer: int | None = None) -> Row:
    """Draw one question of a split; `answer` fixes the place of the right choice, else it is drawn too."""
    while True:
        question, right, wrong = SUBJECTS[subject](rng)
        if len({right, *wrong}) == 4 and split_of(subject, question, [right, *wrong]) == split:
            break
    place = rng.randrange(4) if answer is None else answer
    rng.shuffle(wrong)
    return Row(subject=subject, question=question, choices=[*wrong[:place], right, *wrong[place:]], answer=place)


def make_split(split: str, rows_a_subject: int, seed: int = SEED) -> list[Row]:
    """The exam's `dev` or `test` rows, subject by subject, without repeats; the four answers as even as they can be."""
    rows: list[Row] = []
    for subject in SUBJECTS:
        rng = Random(f"{seed} {split} {subject}")
        answers = [i % 4 for i in range(rows_a_subject)]
        rng.shuffle(answers)
        seen: set[tuple[str, ...]] = set()
        while answers:
            row = make_row(subject, split, rng, answers[-1])
            content = (row["question"], *sorted(row["choices"]))
            if content not in seen:
                seen.add(content)
                rows.append(row)
                answers.pop()
    return rows


def heading(subject: str) -> str:
    """The first line of an MMLU prompt, with the blank line after it."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def question_text(row: Row) -> str:
    """The question, its lettered choices, and "Answer:" without the answer."""
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question']}\n{choices}Answer:"


def prompt(row: Row, shots: Sequence[Row]) -> str:
    """The few-shot prompt whose next token is the answer's letter."""
    solved = "".join(f"{question_text(shot)} {LETTERS[shot['answer']]}\n\n" for shot in shots)
    return heading(row["subject"]) + solved + question_text(row)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Write dev.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/pocket/exam"), help="folder to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for split, count in (("dev", DEV_ROWS), ("test", TEST_ROWS)):
        rows = make_split(split, count)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{split}: {len(rows)} questions")


if __name__ == "__main__":
    main()
