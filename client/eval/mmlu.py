"""Multiple-choice accuracy, five-shot, over HTTP: MMLU and the bundled exam.

Prompt and worked examples as in the original evaluation (Hendrycks et al., 2021, arXiv:2009.03300; hendrycks/test,
evaluate.py), with one space before the subject where the original has two. A question is one request for one token;
the answer is the letter whose token (with its leading space) has the largest logprob, the earlier on a tie.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from client.api import BadAnswer, OctavoClient
from client.eval.data import EvalError, Exam, Question

LETTERS = "ABCD"


@dataclass(frozen=True)
class Score:
    """n questions, of which `correct` were answered rightly."""

    n: int
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def stderr(self) -> float | None:
        """Standard error of the accuracy (sample deviation over the root of n); None for a single question."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / (self.n - 1)) if self.n > 1 else None


@dataclass(frozen=True)
class ExamResult:
    """One model's answers: choice indices parallel to `questions`."""

    model: str
    questions: list[Question]
    answers: list[int]

    @property
    def total(self) -> Score:
        return self._score(None)

    @property
    def by_subject(self) -> dict[str, Score]:
        return {subject: self._score(subject) for subject in sorted({q.subject for q in self.questions})}

    def _score(self, subject: str | None) -> Score:
        rows = [
            (q, a) for q, a in zip(self.questions, self.answers, strict=True) if subject is None or q.subject == subject
        ]
        return Score(len(rows), sum(q.answer == a for q, a in rows))


def format_question(question: Question) -> str:
    """A question up to and including "Answer:"."""
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.question}{choices}\nAnswer:"


def format_prompt(question: Question, dev: list[Question], num_shots: int = 5) -> str:
    """The whole prompt: the heading, the first `num_shots` dev questions of the subject with answers, the question."""
    subject = question.subject.replace("_", " ")
    shots = [q for q in dev if q.subject == question.subject][:num_shots]
    if len(shots) < num_shots:
        raise EvalError(f"the dev split has {len(shots)} questions on {question.subject}, not {num_shots}")
    heading = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    worked = "".join(f"{format_question(shot)} {LETTERS[shot.answer]}\n\n" for shot in shots)
    return heading + worked + format_question(question)


def choose(questions: list[Question], limit: int | None) -> list[Question]:
    """All questions, or a sample of `limit` over all subjects, the same every time, in the exam's order."""
    if limit is None or limit >= len(questions):
        return questions
    return [questions[i] for i in sorted(random.Random(0).sample(range(len(questions)), limit))]


async def letter_ids(client: OctavoClient) -> list[int]:
    """The ids of " A" to " D". Raises EvalError where one is not a single token."""
    ids = []
    for letter in LETTERS:
        tokens = await client.tokenize(f" {letter}", add_special_tokens=False)
        if len(tokens) != 1:
            raise EvalError(f'the tokenizer makes {len(tokens)} tokens of " {letter}"; this exam needs one')
        ids.append(tokens[0])
    return ids


async def evaluate(
    client: OctavoClient,
    model: str,
    exam: Exam,
    *,
    limit: int | None = None,
    num_shots: int = 5,
    on_done: Callable[[], None] = lambda: None,
) -> ExamResult:
    """Put the exam to one model. on_done is called after each question. Raises EvalError and the client's errors."""
    letters = await letter_ids(client)

    async def answer(question: Question) -> int:
        prompt = format_prompt(question, exam.dev, num_shots)
        completion = await client.completions(
            model, prompt, max_tokens=1, temperature=0, logprobs=0, logprob_token_ids=letters
        )
        try:
            named = completion["choices"][0]["logprobs"]["named_logprobs"][0]
            values = [float(named[str(i)]) for i in letters]
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise BadAnswer(f"no logprobs of the letters in the answer: {type(e).__name__}: {e}") from None
        on_done()
        return values.index(max(values))

    questions = choose(exam.test, limit)
    return ExamResult(model, questions, await client.map(answer, questions))
