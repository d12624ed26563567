"""Perplexity of a running text, over HTTP: WikiText and the bundled prose. Two methods:

    windows    token perplexity. The text is encoded once, as one run of ids, and read in windows of `window` ids that
               begin every `stride` ids. A window scores the ids that no window before it has scored. An id without any
               context (the text's first; with stride = window, each window's first) is not scored. `join` says what the
               text is: "blank-lines" joins the rows with a blank line (the GPTQ convention: Frantar et al., 2022,
               arXiv:2210.17323, datautils.py), "as-is" is the raw file
    documents  word and byte perplexity as lm-evaluation-harness's task `wikitext` has them: each article by itself, put
               into ordinary English first (preprocess_wikitext.py), every id scored, with a prefix token before the
               first; an article longer than the window is read in windows of which the last is full. Words and bytes
               are those of the article before that

A row is one window: `parts` are [document, loss in nats, tokens, words, bytes]. A document's words and bytes stand in
the row of its first window. In `windows` a part's document serves only to resample by, and its boundaries may be off by
a token or two, because documents are also encoded one by one to find them.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from client.api import BadAnswer, BadRequest, NotFound, OctavoClient
from client.eval.data import EvalError, Text
from client.eval.stats import perplexity

JSON = dict[str, Any]
METHODS = ("windows", "documents")
JOINS = ("blank-lines", "as-is")

# preprocess_wikitext.py of lm-evaluation-harness (MIT), step by step: plain replacements, then patterns, and so on. Its
# second step looks for slashes, which was hardly meant; the numbers of others were made with it, so it stays.
_DETOKENIZE: tuple[tuple[str, str] | tuple[re.Pattern[str], str], ...] = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), r"/'[0-9]/"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


@dataclass(frozen=True)
class Window:
    """One request: `ids`, of which those from `first` on are scored; counts are (document, ids, words, bytes) in turn,
    and their ids add up to len(ids) - first."""

    ids: tuple[int, ...]
    first: int
    counts: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Wikitext:
    """One task of the suite. limit: that many windows or documents, from the start. prefix: one token's text."""

    text: Text
    method: str = "windows"
    limit: int | None = None
    window: int = 2048
    stride: int | None = None  # of the windows method; None: the window
    join: str = "blank-lines"  # of the windows method
    prefix: str = "<|endoftext|>"  # of the documents method

    name = "wikitext"

    @property
    def settings(self) -> JSON:
        """What two results must share to be compared."""
        data = {"source": self.text.source, "sha256": self.text.checksum}
        shared = {"data": data, "limit": self.limit, "window": self.window}
        if self.method == "documents":
            return shared | {"prefix": self.prefix}
        return shared | {"stride": self.stride or self.window, "join": self.join}

    async def items(self, client: OctavoClient, model: str) -> list[tuple[str, Window]]:
        """(id, window) for every request, by the server's tokenizer. Raises EvalError and the client's errors."""
        try:
            windows = self._documents(client) if self.method == "documents" else self._windows(client)
            found = await windows
        except NotFound:
            raise EvalError("the server has no /tokenize, which perplexity needs") from None
        if not found:
            raise EvalError("the text has nothing to score")
        return found

    async def asker(self, client: OctavoClient, model: str) -> Callable[[Window], Awaitable[JSON]]:
        """The function that scores one window under `model` and gives its row. Raises EvalError and the client's."""
        for way in (prompt_logprobs, echoed_logprobs):
            try:
                await way(client, model, [1, 2], 1)
            except (BadRequest, BadAnswer):
                continue
            break
        else:
            raise EvalError(f"{model} gives no logprobs of a prompt: perplexity cannot be had from this server")

        async def row(window: Window) -> JSON:
            values = await way(client, model, list(window.ids), window.first)
            ends = [0, *accumulate(count for _, count, _, _ in window.counts)]
            parts = [
                [document, -math.fsum(values[begin:end]), count, words, size]
                for (document, count, words, size), begin, end in zip(window.counts, ends[:-1], ends[1:], strict=True)
            ]
            return {"parts": parts}

        return row

    def figures(self, rows: Sequence[JSON]) -> JSON:
        """Perplexity over what was scored, with its error by document; n counts tokens, or words."""
        done = [row for row in rows if "error" not in row]
        documents = by_document(rows, self.method)
        if not documents:
            raise EvalError("no document was scored whole; lower --window or give a larger --limit")
        nll, tokens, words, size = (math.fsum(d[i] for d in documents.values()) for i in range(4))
        weights = [d[weight_index(self.method)] for d in documents.values()]
        found = perplexity([d[0] for d in documents.values()], weights)
        figures = {
            "n": int(sum(weights)),
            "failed": len(rows) - len(done),
            "perplexity": found.value,
            "stderr": found.stderr,
            "low": found.low,
            "high": found.high,
            "nll": nll,
            "tokens": int(tokens),
            "documents": len(documents),
        }
        if self.method == "windows":
            return figures
        byte = {"byte_perplexity": math.exp(nll / size), "bits_per_byte": nll / size / math.log(2)}
        return figures | {"words": int(words), "bytes": int(size)} | byte

    async def _windows(self, client: OctavoClient) -> list[tuple[str, Window]]:
        """Raises EvalError unless 2 <= window and 1 <= stride <= window."""
        rows = self.text.rows if self.join == "blank-lines" else tuple(_lines(self.text.raw))
        glue = "\n\n" if self.join == "blank-lines" else ""
        ids = await client.tokenize(glue.join(rows), add_special_tokens=False)
        apart = [glue.join(article) for article in articles(rows)]
        encoded = await client.map(lambda article: client.tokenize(article, add_special_tokens=False), apart)
        ends = list(accumulate(map(len, encoded)))[:-1]
        found = []
        for begin, first, end in spans(len(ids), self.window, self.stride or self.window)[: self.limit]:
            counts: dict[int, int] = {}
            for i in range(first, end):
                document = bisect_right(ends, i)
                counts[document] = counts.get(document, 0) + 1
            parts = tuple((document, count, 0, 0) for document, count in counts.items())
            found.append((f"{begin}-{end}", Window(tuple(ids[begin:end]), first - begin, parts)))
        return found

    async def _documents(self, client: OctavoClient) -> list[tuple[str, Window]]:
        texts = pages(self.text.raw)[: self.limit]
        prefix = await client.tokenize(self.prefix, add_special_tokens=False)
        if len(prefix) != 1:
            raise EvalError(
                f"{self.prefix!r} is {len(prefix)} tokens, not one: give the model's end-of-text as --prefix"
            )
        encoded = await client.map(lambda page: client.tokenize(detokenize(page), add_special_tokens=False), texts)
        found = []
        for i, (page, ids) in enumerate(zip(texts, encoded, strict=True)):
            words, size = len(re.split(r"\s+", page)), len(page.encode())
            for k, (begin, first, end) in enumerate(rolling(len(ids), self.window)):
                run = (*(prefix if begin < 0 else ()), *ids[max(begin, 0) : end])
                counts = (i, end - first, *((words, size) if k == 0 else (0, 0)))
                found.append((f"{i}/{k}", Window(run, first - begin, (counts,))))
        return found


def spans(num_tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first scored, end) of each window over `num_tokens` ids. Raises EvalError for a wrong size."""
    if window < 2 or not 1 <= stride <= window:
        raise EvalError(f"a window of {window} with a stride of {stride}: window must be 2 or more, stride 1 to window")
    result = []
    scored_to = begin = 0
    while scored_to < num_tokens:
        end = min(begin + window, num_tokens)
        first = max(scored_to, begin + 1)
        if first < end:
            result.append((begin, first, end))
        scored_to, begin = end, begin + stride
    return result


def rolling(num_tokens: int, window: int) -> list[tuple[int, int, int]]:
    """Likewise for one document; begin -1 stands for the prefix token. Each request has at most `window` ids.

    lm-evaluation-harness's get_rolling_token_windows with max_seq_len = window - 1 and context_len = 1: every window
    but the last scores window - 1 ids after one of context, the last is as full of context as fits.
    """
    if window < 2:
        raise EvalError(f"a window of {window}: it must be 2 or more")
    result, done = [], 0
    while done < num_tokens:
        end = min(done + window - 1, num_tokens)
        result.append((end - window if done else -1, done, end))
        done = end
    return result


def articles(lines: Sequence[str]) -> list[list[str]]:
    """Lines (or rows) in groups, a new one at each title (` = Title = `): the harness's wikitext_document_level."""
    groups: list[list[str]] = [[]]
    for line in lines:
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if any(kept.strip() for kept in groups[-1]):
                groups.append([])
            groups[-1].clear()  # of blank lines before the first title
        groups[-1].append(line)
    return groups


def pages(raw: str) -> list[str]:
    """A raw file's articles as the harness has them: the newline between two is in neither."""
    found = ["".join(article) for article in articles(_lines(raw))]
    return [*(page.removesuffix("\n") for page in found[:-1]), found[-1]]


def _lines(raw: str) -> list[str]:
    """Each with its "\\n"."""
    lines = [line + "\n" for line in raw.split("\n")]
    lines[-1] = lines[-1][:-1]
    return [line for line in lines if line]


def detokenize(page: str) -> str:
    """WikiText's tokenised English as ordinary English, the harness's way."""
    for what, by in _DETOKENIZE:
        page = page.replace(what, by) if isinstance(what, str) else what.sub(by, page)
    return page


def weight_index(method: str) -> int:
    """Where a document's weight stands in `by_document`: perplexity is a token's, or a word's."""
    return 2 if method == "documents" else 1


def by_document(rows: Sequence[JSON], method: str) -> dict[int, list[float]]:
    """Loss, tokens, words and bytes of each document. In `documents`, one with a failed window is left out."""
    failed = {int(row["id"].partition("/")[0]) for row in rows if "error" in row} if method == "documents" else set()
    sums: dict[int, list[float]] = {}
    for row in rows:
        for document, *values in row.get("parts", ()):
            if document not in failed:
                sums[document] = [a + b for a, b in zip(sums.get(document, [0.0] * 4), values, strict=True)]
    return dict(sorted(sums.items()))


async def prompt_logprobs(client: OctavoClient, model: str, ids: list[int], first: int) -> list[float]:
    """Logprobs of ids[first:], by Octavo's fields: none but the prompt's own, from `first` on."""
    answer = await client.completions(
        model, ids, max_tokens=0, temperature=0, echo=True, prompt_logprobs=0, prompt_logprobs_start=first
    )
    try:
        positions = answer["choices"][0]["prompt_logprobs"][first:]
        values = [float(position["logprob"]) for position in positions]
        same = [position["token_id"] for position in positions] == ids[first:]
    except (KeyError, IndexError, TypeError, ValueError) as e:
        raise BadAnswer(f"no prompt logprobs in the answer: {type(e).__name__}: {e}") from None
    if not same:
        raise BadAnswer("the prompt logprobs are not of the prompt that was sent")
    return values


async def echoed_logprobs(client: OctavoClient, model: str, ids: list[int], first: int) -> list[float]:
    """Likewise by OpenAI's fields: the logprobs of the whole echoed prompt."""
    answer = await client.completions(model, ids, max_tokens=0, temperature=0, echo=True, logprobs=0)
    try:
        found = answer["choices"][0]["logprobs"]["token_logprobs"]
        values = [float(value) for value in found[first : len(ids)]]
    except (KeyError, IndexError, TypeError, ValueError) as e:
        raise BadAnswer(f"no logprobs of the echoed prompt: {type(e).__name__}: {e}") from None
    if len(values) != len(ids) - first:
        raise BadAnswer(f"{len(values)} logprobs for {len(ids) - first} tokens of the echoed prompt")
    return values
