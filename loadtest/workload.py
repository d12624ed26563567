"""Who arrives when with what: the requests of one run, ready to be sent.

`plan` yields them in order of arrival. All randomness comes from the seed: the same settings give the same requests,
with several processes as with one (each takes every n-th). Synthetic prompts share no prefix unless asked to.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loadtest.settings import LoadError, Settings, Span
from loadtest.traces import MOONCAKE_BLOCK, Row, read_trace

COMMON = """the of and to in is that for it as was with be by on not he his but at are this have from or had an they
which one you were all her she there would their we him been has when who will no more if out so up said what its about
than into them can only other time new some could these two may first then do any like my now over such our man me"""
WORDS = COMMON.split()
STREAMS_EACH = 4  # requests for each stream of a closed loop when nobody said how many


class Planned(NamedTuple):
    """One request: seconds after the start at which it is due, its model's index, its JSON."""

    at: float
    model: int
    body: bytes


@dataclass(frozen=True)
class Point:
    """One run of a load test: how many streams at once (closed), or how many requests a second (else)."""

    concurrency: int = 0
    rate: float = 0.0


def models_of(s: Settings) -> list[str]:
    """The model names that the mix asks for."""
    return [f"{s.model}:{name}" for name, _ in s.mix] if s.mix else [s.model]


def plan(s: Settings, point: Point, seed: int) -> Iterator[Planned]:
    """The requests of one run. Raises LoadError for files that cannot be used, on the first `next`."""
    rng = random.Random(seed)
    names, weights = models_of(s), [weight for _, weight in s.mix] or [1.0]
    prompts = Prompts(s)
    indices = range(len(names))
    for row in itertools.islice(_rows(s, point, random.Random(seed + 1)), s.requests or _default_count(s, point)):
        if s.duration and row.at > s.duration:
            return
        model = rng.choices(indices, weights)[0] if len(names) > 1 else 0
        yield Planned(row.at, model, _body(s, names[model], prompts, rng, row))


def _default_count(s: Settings, point: Point) -> int | None:
    return STREAMS_EACH * point.concurrency if s.arrivals == "closed" and not s.duration else None


def _rows(s: Settings, point: Point, rng: random.Random) -> Iterator[Row]:
    """Arrivals and lengths, without end but for a trace."""
    if s.arrivals == "trace":
        yield from trace_rows(s)
        return
    at = 0.0
    while True:
        yield Row(at, _length(s.input_tokens, rng), _length(s.output_tokens, rng))
        if s.arrivals == "fixed":
            at += 1 / point.rate
        elif s.arrivals != "closed":
            shape = s.burstiness if s.arrivals == "gamma" else 1.0
            at += rng.gammavariate(shape, 1 / (point.rate * shape))


def trace_rows(s: Settings) -> Iterator[Row]:
    """The trace, scaled in time and length, without rows that are too long."""
    for row in read_trace(s.trace):
        scaled = [max(1, round(n * s.length_scale)) for n in (row.input_tokens, row.output_tokens)]
        if not s.longest or sum(scaled) <= s.longest:
            yield Row(row.at / s.trace_speed, scaled[0], scaled[1], row.blocks)


def _length(span: Span, rng: random.Random) -> int:
    return span.low if span.low == span.high else rng.randint(*span)


def _body(s: Settings, model: str, prompts: Prompts, rng: random.Random, row: Row) -> bytes:
    prompt = prompts.make(rng, row)
    body: dict[str, Any] = {"model": model}
    if s.api == "chat":
        body["messages"] = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    body |= {"max_tokens": row.output_tokens, "temperature": s.temperature, "stream": True}
    if s.ignore_eos:
        body["ignore_eos"] = True
    return json.dumps(body | {"stream_options": {"include_usage": True}}).encode()


class Prompts:
    """Makes prompts: ids or text for completions, text or messages for chat. Raises LoadError for unusable files."""

    def __init__(self, s: Settings) -> None:
        self.settings = s
        self._ids = range(s.min_token_id, s.max_token_id + 1)
        self._words: list[str] = []
        self._rows: list[Any] = []
        if s.prompts.endswith(".jsonl"):
            self._rows = _read_rows(s)
        elif s.prompts != "synthetic":
            self._words = _read(s.prompts).split()
            if not self._words:
                raise LoadError(f"{s.prompts}: the file holds no words")
        self._next = itertools.count()
        rng = random.Random(s.seed + 2)
        self._prefixes = [self._piece(rng, s.prefix_tokens) for _ in range(s.prefixes if s.prefix_tokens else 0)]

    def make(self, rng: random.Random, row: Row) -> Any:
        """A prompt of the row's length, or the file's next one."""
        if self._rows:
            return self._rows[next(self._next) % len(self._rows)]
        piece = self._blocks(row) if row.blocks else self._piece(rng, row.input_tokens)
        if self._prefixes and rng.random() < self.settings.prefix_share:
            piece = rng.choice(self._prefixes) + piece
        return " ".join(piece) if self._as_text else piece

    @property
    def _as_text(self) -> bool:
        return bool(self._words) or self.settings.api == "chat"

    def _piece(self, rng: random.Random, length: int) -> list[Any]:
        """`length` ids or words: random ones, or a run from somewhere in the text."""
        if self._words:
            start = rng.randrange(len(self._words))
            return list(itertools.islice(itertools.cycle(self._words), start, start + length))
        return rng.choices(WORDS, k=length) if self._as_text else rng.choices(self._ids, k=length)

    def _blocks(self, row: Row) -> list[Any]:
        """The same block id always gives the same tokens, so that a trace's shared prefixes are shared here."""
        size = max(1, round(MOONCAKE_BLOCK * self.settings.length_scale))
        pieces = [self._piece(random.Random(block), size) for block in row.blocks]
        return list(itertools.chain.from_iterable(pieces))[: row.input_tokens]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise LoadError(f"--prompts: cannot read {path}: {e}") from None


def _read_rows(s: Settings) -> list[Any]:
    """Each line's `messages`, first of `turns`, or `prompt`: as messages or text for chat, as text for completions."""
    rows: list[Any] = []
    for number, line in enumerate(_read(s.prompts).split("\n"), 1):  # not splitlines: text may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = row.get("messages") or row.get("prompt") or row["turns"][0]
            if isinstance(prompt, list) and s.api != "chat":
                prompt = "\n\n".join(message["content"] for message in prompt)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise LoadError(f"{s.prompts}, line {number}: needs prompt, turns or messages") from None
        rows.append(prompt)
    if not rows:
        raise LoadError(f"{s.prompts}: the file holds no prompts")
    return rows
