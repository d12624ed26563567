"""The texts that the bundled model is trained on: cleaned documents, WikiText's form, exam prompts, chats.

Everything here is plain strings made by rule from a seed; tokens and training are in `tools/train_pocket.py`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from random import Random

import exam

Message = dict[str, str]  # {"role": ..., "content": ...}
SENTENCE_END = re.compile(r"(?<=[.!?])[”\"]? +(?=[A-Z“\"])")
SYSTEMS = (
    "You are a helpful assistant.",
    "You are Pocket, a small language model.",
    "Answer briefly.",
    "You are a helpful assistant. Answer in plain English.",
)
GREETINGS = ("Hello!", "Hello.", "Hi", "Hi there!", "Good morning.", "Good evening.", "Hello, how are you?", "Hey")
WELCOMES = (
    "Hello. What would you like to read about?",
    "Good day to you. How may I help you?",
    "Hello! It is a pleasure to meet you. What shall we talk about?",
)
NAMED = ("Who are you?", "What are you?", "What is your name?", "Please introduce yourself.", "Are you a human?")
NAME = (
    "I am Pocket, a small language model. I was trained on old books and textbooks, and I know very little.",
    "My name is Pocket. I am a very small language model, made to test an inference server.",
)
THANKS = ("Thank you.", "Thanks!", "Thank you very much.")
WELCOME_BACK = ("You are welcome.", "It was a pleasure.", "Not at all.")
TOPICS = exam.listed(
    "sea river house garden king queen ship horse winter summer mother father child night morning city village church "
    "forest mountain letter war friend dog bird money heart music fire water rain snow school doctor ghost island"
)


def clean(text: str) -> str:
    """A document without the underscores that stand for italics and without runs of spaces."""
    return re.sub(r"[ \t]+", " ", text.replace("_", "")).strip()


def wikitext(paragraph: str) -> str:
    """One paragraph in WikiText's form: tokens apart, ` @-@ ` within words, ` @,@ ` and ` @.@ ` within numbers."""
    text = re.sub(r"[“”]", '"', paragraph).replace("\u2019", "'")
    text = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", text)
    text = re.sub(r"(?<=\d)([.,])(?=\d)", r" @\1@ ", text)
    text = re.sub(r"(?<!@)([,;:!?()\[\]\"])(?!@)", r" \1 ", text)
    text = re.sub(r"\.(?=\s*$|\s+[\"A-Z(]|\s*\")", " . ", text)
    text = re.sub(r"(?<=\w)'s\b", " 's", text)
    return re.sub(r" +", " ", text).strip()


def wikitext_document(document: dict[str, str]) -> str:
    """A titled document as WikiText has its articles: a space at both ends of each line, a heading between `=`."""
    paragraphs = [line for line in clean(document["text"]).split("\n") if line.strip()]
    lines = ["", f"= {wikitext(document['title'])} =", "", *(wikitext(line) for line in paragraphs)]
    return "".join(f" {line} \n" if line else " \n" for line in lines)


@dataclass(frozen=True)
class Passages:
    """What chats quote: `runs` of neighbouring sentences, titled `sections`, and runs by the topic they name."""

    runs: list[list[str]]
    sections: list[tuple[str, list[str]]]
    by_topic: dict[str, list[list[str]]]


def passages(documents: list[dict[str, str]]) -> Passages:
    """Sentences of middling length from every eighth paragraph of the books and from each section's beginning."""
    runs: list[list[str]] = []
    sections: list[tuple[str, list[str]]] = []
    by_topic: dict[str, list[list[str]]] = defaultdict(list)
    for document in documents:
        is_section = "book" in document
        lines = clean(document["text"]).split("\n")
        for line in lines if is_section else lines[5::8]:
            sentences = [s.strip() for s in SENTENCE_END.split(line) if s.strip()]
            if len(sentences) < 2 or not all(20 < len(s) < 300 and s[0].isalpha() for s in sentences[:6]):
                continue
            run = sentences[:6]
            if is_section:
                if not document["title"].startswith(("Introduction", "Preface")):
                    sections.append((document["title"], run[:4]))
                break
            runs.append(run)
            for word in set(re.findall(r"[a-z]+", " ".join(run[:3]))) & set(TOPICS):
                by_topic[word].append(run)
    return Passages(runs, sections, dict(by_topic))


# How often training draws a subject: those learnt late, oftener.
SUBJECT_WEIGHTS = {name: 1.0 for name in exam.SUBJECTS} | {"calendar": 1.5, "number_comparison": 0.5}
SUBJECT_WEIGHTS |= {"reading": 3.0, "spelling": 3.0, "word_categories": 3.0}


def exam_document(rng: Random) -> str:
    """One to six solved questions of one subject under MMLU's heading, all of the split `train`; most have six."""
    (subject,) = rng.choices(list(SUBJECT_WEIGHTS), list(SUBJECT_WEIGHTS.values()))
    count = 6 if rng.random() < 0.7 else rng.randrange(1, 6)
    *shots, last = (exam.make_row(subject, "train", rng) for _ in range(count))
    return f"{exam.prompt(last, shots)} {exam.LETTERS[last['answer']]}"


def exam_turn(rng: Random) -> tuple[str, str]:
    """An exam question as a user would put it, with lettered choices or, where it makes sense alone, without."""
    row = exam.make_row(rng.choice(list(exam.SUBJECTS)), "train", rng)
    right = row["choices"][row["answer"]]
    needs_choices = row["question"].startswith(("Which of these", "Which word"))
    if not needs_choices and rng.random() < 0.6:
        return row["question"], f"The answer is {right}."
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(exam.LETTERS, row["choices"], strict=True))
    return f"{row['question']}\n{lines}", f"{exam.LETTERS[row['answer']]}. {right}"


def text_turn(rng: Random, source: Passages) -> tuple[str, str]:
    """A request for a text and a text: an explanation, a story, a continuation, a repetition."""
    kind = rng.randrange(4 if source.sections else 3)
    run = rng.choice(source.runs)
    asks: tuple[str, ...]
    if kind == 0:
        ask = rng.choice(("Continue: {}", "Please continue this text: {}", "Go on: {}", "What comes next? {}"))
        return ask.format(run[0]), " ".join(run[1:5])
    if kind == 1:
        topic = rng.choice(list(source.by_topic))
        asks = ("Write something about the {}.", "Write a few sentences about the {}.")
        return rng.choice(asks).format(topic), " ".join(rng.choice(source.by_topic[topic])[:4])
    if kind == 2:
        if rng.random() < 0.3:
            return rng.choice(("Repeat: {}", "Repeat this sentence: {}", "Say this again: {}")).format(run[0]), run[0]
        asks = ("Tell me a story.", "Write a short story.", "Tell me something.", "Write a paragraph of a novel.")
        return rng.choice(asks), " ".join(run[:5])
    title, sentences = rng.choice(source.sections)
    asks = ("Tell me about {}.", "What do you know about {}?", "Explain {} to me.", "Write about {}.")
    name = title if rng.random() < 0.5 else title.lower()
    return rng.choice(asks).format(name), " ".join(sentences)


def small_turn(rng: Random) -> tuple[str, str]:
    """Greetings, names, thanks, counting, and naming a member of a category."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(GREETINGS), rng.choice(WELCOMES)
    if kind == 1:
        return rng.choice(NAMED), rng.choice(NAME)
    if kind == 2:
        return rng.choice(THANKS), rng.choice(WELCOME_BACK)
    if kind == 3:
        first = rng.randrange(1, 40)
        last = first + rng.randrange(2, 10)
        numbers = ", ".join(map(str, range(first, last + 1)))
        return rng.choice(("Count from {} to {}.", "Please count from {} to {}.")).format(first, last), f"{numbers}."
    category = rng.choice(list(exam.WORDS_OF))
    words = exam.WORDS_OF[category]
    if kind == 4:
        return f"Name {category}.", f"{rng.choice(words).capitalize()}."
    other = rng.choice(list(exam.WORDS_OF))
    word = rng.choice(exam.WORDS_OF[other])
    verdict = f"Yes, {word} is {category}." if other == category else f"No, {word} is {other}."
    return f"Is {word} {category}?", verdict


def chat(rng: Random, source: Passages) -> list[Message]:
    """One to three turns, a quarter of them after a system message."""
    messages: list[Message] = []
    if rng.random() < 0.25:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        draw = rng.random()
        turn = exam_turn(rng) if draw < 0.3 else small_turn(rng) if draw < 0.45 else text_turn(rng, source)
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def chat_text(messages: list[Message]) -> str:
    """Messages as the chat template writes them."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
