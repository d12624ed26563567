"""Multiple-choice accuracy, five-shot, over HTTP: MMLU and the bundled exam.

Prompt and worked examples as in the original evaluation (Hendrycks et al., 2021, arXiv:2009.03300; hendrycks/test,
evaluate.py), with one space before the subject where the original has two. Two methods:

    direct     the logprobs of " A" to " D" after the prompt; the largest is the answer, the earlier on a tie
    generate   the greedy continuation, of which the first letter standing alone is the answer, or none

A direct question is one request, by the first of these ways that the server knows: `named` (Octavo's
logprob_token_ids: all four, exactly), `top` (the letters among the most likely tokens; a question with a letter missing
is asked by `echo`), `echo` (four prompts ending in the four letters, with the logprob of their last token). Each row
says its way. Questions are asked subject by subject, so that the worked examples are in the server's prefix cache.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from client.api import BadAnswer, BadRequest, NotFound, OctavoClient
from client.eval.categories import CATEGORIES
from client.eval.data import LETTERS, EvalError, Exam, Question
from client.eval.stats import proportion

JSON = dict[str, Any]
METHODS = ("direct", "generate")
MAX_ANSWER_TOKENS = 8  # of the generate method; it also ends at the end of the line
PROBE = "The answer to this question is one of A, B, C and D.\nAnswer:"
TOPS = (20, 5)  # how many logprobs to ask for by `top`: Octavo's and vLLM's bound, OpenAI's


@dataclass(frozen=True)
class MMLU:
    """One task of the suite. `limit` questions are a seeded sample, each subject with its share."""

    exam: Exam
    method: str = "direct"
    limit: int | None = None
    shots: int = 5
    seed: int = 0

    name = "mmlu"

    @property
    def settings(self) -> JSON:
        """What two results must share to be compared."""
        data = {"source": self.exam.source, "sha256": self.exam.checksum}
        return {"data": data, "limit": self.limit, "shots": self.shots, "seed": self.seed}

    async def items(self, client: OctavoClient, model: str) -> list[tuple[str, Question]]:
        """(id, question) in the order to ask them. Raises EvalError where a subject has too few worked examples."""
        chosen = choose(self.exam.test, self.limit, self.seed)
        for subject in {q.subject for q in chosen}:
            shots(self.exam.dev, subject, self.shots)
        return [(q.id, q) for q in chosen]

    async def asker(self, client: OctavoClient, model: str) -> Callable[[Question], Awaitable[JSON]]:
        """The function that puts one question to `model` and gives its row. Raises EvalError and the client's."""
        ask = generated(client, model) if self.method == "generate" else await direct(client, model)

        async def row(question: Question) -> JSON:
            fields = await ask(format_prompt(question, self.exam.dev, self.shots))
            return {"subject": question.subject, "answer": question.answer} | fields

        return row

    def figures(self, rows: Sequence[JSON]) -> JSON:
        """Accuracy in total, by category and by subject; n counts the questions that were answered at all."""
        done = [row for row in rows if "error" not in row]
        by_subject = {s: score([r for r in done if r["subject"] == s]) for s in sorted({r["subject"] for r in done})}
        categories = sorted({CATEGORIES[s] for s in by_subject}) if set(by_subject) <= set(CATEGORIES) else []
        by_category = {c: score([r for r in done if CATEGORIES[r["subject"]] == c]) for c in categories}
        prompt, cached = (sum(r[name] for r in done) for name in ("prompt_tokens", "cached_tokens"))
        return score(done) | {
            "failed": len(rows) - len(done),
            "unparsed": sum(r["picked"] is None for r in done),
            "ways": dict(Counter(r["way"] for r in done)),
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "hit_rate": cached / prompt if prompt else 0.0,
            "by_category": by_category,
            "by_subject": by_subject,
        }


def score(rows: Sequence[JSON]) -> JSON:
    """n, correct, accuracy, standard error and 95 % interval of some rows (at least one)."""
    correct = sum(r["picked"] == r["answer"] for r in rows)
    found = proportion(correct, len(rows))
    values = {"accuracy": found.value, "stderr": found.stderr, "low": found.low, "high": found.high}
    return {"n": len(rows), "correct": correct, **values}


def format_question(question: Question) -> str:
    """A question up to and including "Answer:"."""
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.question}{choices}\nAnswer:"


def shots(dev: list[Question], subject: str, num_shots: int) -> list[Question]:
    """The first `num_shots` worked examples of a subject. Raises EvalError where there are fewer."""
    found = [q for q in dev if q.subject == subject][:num_shots]
    if len(found) < num_shots:
        raise EvalError(f"the dev split has {len(found)} questions on {subject}, not {num_shots}: lower --shots")
    return found


def format_prompt(question: Question, dev: list[Question], num_shots: int = 5) -> str:
    """The whole prompt: the heading, the worked examples with their answers, the question."""
    heading = f"The following are multiple choice questions (with answers) about {question.subject.replace('_', ' ')}."
    examples = shots(dev, question.subject, num_shots)
    worked = "".join(f"{format_question(shot)} {LETTERS[shot.answer]}\n\n" for shot in examples)
    return f"{heading}\n\n{worked}{format_question(question)}"


def choose(questions: list[Question], limit: int | None, seed: int = 0) -> list[Question]:
    """All questions, or a sample of `limit`, the same for the same seed: each subject's share is its share of all,
    rounded by largest remainders. Subjects come one after another."""
    subjects: dict[str, list[Question]] = {}
    for question in questions:
        subjects.setdefault(question.subject, []).append(question)
    if limit is None or limit >= len(questions):
        return [q for group in subjects.values() for q in group]
    exact = {s: limit * len(group) / len(questions) for s, group in subjects.items()}
    counts = {s: int(share) for s, share in exact.items()}
    by_remainder = sorted(exact, key=lambda s: (counts[s] - exact[s], s))
    for subject in by_remainder[: limit - sum(counts.values())]:
        counts[subject] += 1
    result = []
    for subject, group in subjects.items():
        picked = random.Random(f"{seed} {subject}").sample(range(len(group)), counts[subject])
        result += [group[i] for i in sorted(picked)]
    return result


def parse_letter(text: str) -> int | None:
    """Index of the letter that an answer begins with: " B", "(B)", "B. since". None: there is none."""
    found = re.match(r"\s*\(?([ABCD])(?![A-Za-z0-9'])", text)
    return LETTERS.index(found[1]) if found else None


Ask = Callable[[str], Awaitable[JSON]]


def generated(client: OctavoClient, model: str) -> Ask:
    """Asks by the generate method."""

    async def ask(prompt: str) -> JSON:
        answer = await client.completions(
            model, prompt, max_tokens=MAX_ANSWER_TOKENS, temperature=0, stop=["\n"], n=1, stream=False
        )
        try:
            text = str(answer["choices"][0]["text"])
        except (KeyError, IndexError, TypeError) as e:
            raise BadAnswer(f"no text in the answer: {type(e).__name__}: {e}") from None
        return {"picked": parse_letter(text), "text": text, "way": "generate"} | usage(answer)

    return ask


async def direct(client: OctavoClient, model: str) -> Ask:
    """Asks by the direct method, in the first way that the server knows. Raises EvalError where it knows none."""
    letters = await letter_ids(client)
    ways: list[Ask] = [named(client, model, letters)] if letters else []
    ways += [top(client, model, count) for count in TOPS]
    ways.append(echo(client, model))
    for ask in ways:
        try:
            await ask(PROBE)
        except (BadRequest, BadAnswer):
            continue
        return ask
    raise EvalError(f"{model} gives no logprobs of a completion's tokens: use --method generate")


async def letter_ids(client: OctavoClient) -> list[int] | None:
    """The ids of " A" to " D"; None from a server that does not tell. Raises EvalError where one is several tokens."""
    ids = []
    for letter in LETTERS:
        try:
            tokens = await client.tokenize(f" {letter}", add_special_tokens=False)
        except (NotFound, BadRequest, BadAnswer):
            return None
        if len(tokens) != 1:
            raise EvalError(f'the tokenizer makes {len(tokens)} tokens of " {letter}"; use --method generate')
        ids.append(tokens[0])
    return ids


def named(client: OctavoClient, model: str, letters: list[int]) -> Ask:
    """Asks for the logprobs of four token ids. The answer raises BadAnswer where one is missing."""

    async def ask(prompt: str) -> JSON:
        answer = await client.completions(
            model, prompt, max_tokens=1, temperature=0, logprobs=0, logprob_token_ids=letters
        )
        try:
            found = answer["choices"][0]["logprobs"]["named_logprobs"][0]
            values = [float(found[str(i)]) for i in letters]
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise BadAnswer(f"no logprobs of the letters in the answer: {type(e).__name__}: {e}") from None
        return picked(values, "named") | usage(answer)

    return ask


def top(client: OctavoClient, model: str, count: int) -> Ask:
    """Asks for the `count` most likely tokens; where a letter is not among them, by `echo`."""
    by_echo = echo(client, model)

    async def ask(prompt: str) -> JSON:
        answer = await client.completions(model, prompt, max_tokens=1, temperature=0, logprobs=count)
        try:
            found = answer["choices"][0]["logprobs"]["top_logprobs"][0]
            values = [float(found[f" {letter}"]) for letter in LETTERS if f" {letter}" in found]
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise BadAnswer(f"no top logprobs in the answer: {type(e).__name__}: {e}") from None
        return picked(values, "top") | usage(answer) if len(values) == len(LETTERS) else await by_echo(prompt)

    return ask


def echo(client: OctavoClient, model: str) -> Ask:
    """Asks for the logprob of the last token of four prompts, which end in the four letters."""

    async def ask(prompt: str) -> JSON:
        prompts = [f"{prompt} {letter}" for letter in LETTERS]
        answer = await client.completions(model, prompts, max_tokens=0, temperature=0, logprobs=0, echo=True)
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            values = [float(choice["logprobs"]["token_logprobs"][-1]) for choice in choices]
            ends = [choice["logprobs"]["tokens"][-1] for choice in choices]
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise BadAnswer(f"no logprobs of the echoed prompt: {type(e).__name__}: {e}") from None
        if ends != [f" {letter}" for letter in LETTERS]:
            raise BadAnswer(f'the echoed prompts end in {ends}, not in " A" to " D"')
        return picked(values, "echo") | usage(answer)

    return ask


def picked(values: list[float], way: str) -> JSON:
    return {"picked": values.index(max(values)), "logprobs": values, "way": way}


def usage(answer: JSON) -> JSON:
    """Prompt tokens and how many of them came from the prefix cache; 0 where the server does not tell."""
    told = answer.get("usage") or {}
    details = told.get("prompt_tokens_details") or {}
    return {"prompt_tokens": told.get("prompt_tokens") or 0, "cached_tokens": details.get("cached_tokens") or 0}
