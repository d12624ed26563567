"""Perplexity of a running text, over HTTP: WikiText and the bundled prose.

The text is encoded once, as one run of ids, and read in windows of `window` ids that begin every `stride` ids. A window
scores the ids that no window before it has scored; those before them are context. An id without any context (the
text's first; with stride = window, each window's first) is not scored. stride = window is the GPTQ convention
(Frantar et al., 2022, arXiv:2210.17323), a smaller stride the sliding window of Hugging Face's documentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from client.api import BadAnswer, OctavoClient
from client.eval.data import EvalError


@dataclass(frozen=True)
class Window:
    """Ids `begin` to `end` (exclusive) of the text, of which those from `first` on are scored."""

    begin: int
    end: int
    first: int


@dataclass(frozen=True)
class Perplexity:
    """nll: the sum, in nats, over `num_scored` of the text's `num_tokens` ids.

    Words (between white space) and bytes are the whole text's; their perplexities take the ids that were not scored to
    be as likely as the average one that was.
    """

    model: str
    window: int
    stride: int
    nll: float
    num_scored: int
    num_tokens: int
    num_words: int
    num_bytes: int

    @property
    def token_perplexity(self) -> float:
        return math.exp(self.nll / self.num_scored)

    @property
    def word_perplexity(self) -> float:
        return math.exp(self.nll / self.num_scored * self.num_tokens / self.num_words)

    @property
    def byte_perplexity(self) -> float:
        return math.exp(self.nll / self.num_scored * self.num_tokens / self.num_bytes)


def windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """The windows over a text of `num_tokens` ids. Raises EvalError unless 2 <= window and 1 <= stride <= window."""
    if window < 2 or not 1 <= stride <= window:
        raise EvalError(f"a window of {window} with a stride of {stride}: window must be 2 or more, stride 1 to window")
    result: list[Window] = []
    scored_to = begin = 0
    while scored_to < num_tokens:
        end = min(begin + window, num_tokens)
        first = max(scored_to, begin + 1)
        if first < end:
            result.append(Window(begin, end, first))
        scored_to, begin = end, begin + stride
    return result


async def evaluate(
    client: OctavoClient,
    model: str,
    text: str,
    *,
    window: int = 2048,
    stride: int | None = None,
    limit: int | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> Perplexity:
    """Perplexity of `text` under one model. stride defaults to window; limit is a number of windows, from the start.

    on_done is called after each window. Raises EvalError and the client's errors.
    """
    stride = window if stride is None else stride
    ids = await client.tokenize(text, add_special_tokens=False)
    chosen = windows(len(ids), window, stride)[:limit]
    if not chosen:
        raise EvalError(f"a text of {len(ids)} tokens has nothing to score")

    async def score(w: Window) -> float:
        completion = await client.completions(
            model,
            ids[w.begin : w.end],
            max_tokens=0,
            temperature=0,
            echo=True,
            prompt_logprobs=0,
            prompt_logprobs_start=w.first - w.begin,
        )
        try:
            positions = completion["choices"][0]["prompt_logprobs"][w.first - w.begin :]
            values = [float(position["logprob"]) for position in positions]
            same = [position["token_id"] for position in positions] == ids[w.first : w.end]
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise BadAnswer(f"no prompt logprobs in the answer: {type(e).__name__}: {e}") from None
        if not same:
            raise BadAnswer("the prompt logprobs are not of the prompt that was sent")
        on_done()
        return -math.fsum(values)

    losses = await client.map(score, chosen)
    num_scored = sum(w.end - w.first for w in chosen)
    return Perplexity(
        model, window, stride, math.fsum(losses), num_scored, len(ids), len(text.split()), len(text.encode())
    )
