"""Throughput of a variant by the server's own clock: device time of prefill and of decode, over a fixed load.

The load is one request of random ids that no cache knows, `sequences` prompts at once, each continued greedily by
`output_tokens`. Octavo's /metrics counts each phase's tokens and device seconds by variant; what they grew by over the
measured rounds gives the two rates. So network, tokenising and JSON are not in them, and neither is what the load did
not use: the figures are of this load, and of a server that does nothing else meanwhile.
"""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from client.api import BadAnswer, NotFound, OctavoClient, Unauthorized
from client.eval.data import EvalError

JSON = dict[str, Any]
COUNTERS = ("prefill_tokens", "prefill_seconds", "decode_tokens", "decode_seconds")
SETTLE_SECONDS = 10.0  # the page is about a second behind
POLL_SECONDS = 0.1
FIRST_ID = 4  # some tokenizers' first ids are control tokens


@dataclass(frozen=True)
class Throughput:
    """One task of the suite: `rounds` measured after one that warms up."""

    sequences: int = 16
    prompt_tokens: int = 128
    output_tokens: int = 64
    rounds: int = 2

    name = "throughput"
    method = "phases"

    @property
    def settings(self) -> JSON:
        """What two results must share to be compared."""
        names = ("sequences", "prompt_tokens", "output_tokens", "rounds")
        return {name: getattr(self, name) for name in names}

    async def items(self, client: OctavoClient, model: str) -> list[tuple[str, None]]:
        """One, since rounds must not overlap."""
        return [("load", None)]

    async def asker(self, client: OctavoClient, model: str) -> Callable[[None], Awaitable[JSON]]:
        """The function that puts the load on `model` and gives its rounds. Raises BadAnswer for counters that do not
        grow as the load does, and EvalError where they do without taking time."""
        vocabulary = await vocabulary_size(client)
        rng = random.Random(0)

        async def load() -> None:
            prompts = [
                [rng.randrange(FIRST_ID, vocabulary) for _ in range(self.prompt_tokens)] for _ in range(self.sequences)
            ]
            # a salt of its own: a run that goes on after a kill draws the same ids, and must not find them cached
            await client.completions(
                model,
                prompts,
                max_tokens=self.output_tokens,
                temperature=0,
                ignore_eos=True,
                cache_salt=secrets.token_hex(8),
            )

        async def row(_: None) -> JSON:
            rounds = []
            before = await counters(client, variant_of(model))
            for _round in range(self.rounds + 1):
                await load()
                after = await self._grown(client, model, before)
                rounds.append([b - a for a, b in zip(before, after, strict=True)])
                before = after
            if not all(seconds > 0 for r in rounds[1:] for seconds in (r[1], r[3])):
                raise EvalError(
                    "the throughput load was too small to time beside what else the server did: repeat it on a server "
                    "that does nothing else, or give a larger --load"
                )
            return {"rounds": rounds[1:]}

        return row

    async def _grown(self, client: OctavoClient, model: str, before: list[float]) -> list[float]:
        """The counters, once they hold all of a round's tokens."""
        prefill, decode = self.sequences * self.prompt_tokens, self.sequences * (self.output_tokens - 1)
        end = time.monotonic() + SETTLE_SECONDS
        while True:
            after = await counters(client, variant_of(model))
            if after[0] - before[0] >= prefill and after[2] - before[2] >= decode:
                return after
            if time.monotonic() > end:
                raise BadAnswer(
                    f"/metrics counts {after[0] - before[0]:.0f} prefill and {after[2] - before[2]:.0f} decode tokens "
                    f"for a load of {prefill} and {decode}"
                )
            await asyncio.sleep(POLL_SECONDS)

    def figures(self, rows: Sequence[JSON]) -> JSON:
        """Rates in all, and the least and largest of a round."""
        done = [row for row in rows if "error" not in row]
        rounds = [values for row in done for values in row["rounds"]]
        prefill, prefill_seconds, decode, decode_seconds = map(sum, zip(*rounds, strict=True))
        speeds = [r[2] / r[3] for r in rounds]
        return {
            "n": len(rounds),
            "failed": len(rows) - len(done),
            "prefill_tok_s": prefill / prefill_seconds,
            "prefill_samples_s": prefill / prefill_seconds / self.prompt_tokens,
            "decode_tok_s": decode / decode_seconds,
            "low": min(speeds),
            "high": max(speeds),
        }


def parse_load(text: str) -> Throughput:
    """A load as "16x128x64": sequences, prompt tokens, output tokens. Raises ValueError."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None or min(map(int, found.groups())) < 1 or int(found[3]) < 2:
        raise ValueError(text)
    return Throughput(*map(int, found.groups()))


def variant_of(model: str) -> str:
    return model.rpartition(":")[2]


async def counts_phases(client: OctavoClient, model: str) -> bool:
    """Whether the server tells the device time of each phase of this model, as Octavo does."""
    try:
        await counters(client, variant_of(model))
    except (BadAnswer, NotFound, Unauthorized):
        return False
    return True


async def counters(client: OctavoClient, variant: str) -> list[float]:
    """The values of COUNTERS for a variant. Raises BadAnswer where the page has none."""
    page = await client.metrics()
    found = dict(re.findall(rf'^octavo_(\w+)_total\{{variant="{re.escape(variant)}"\}} (\S+)$', page, re.MULTILINE))
    try:
        return [float(found[name]) for name in COUNTERS]
    except (KeyError, ValueError):
        raise BadAnswer(f"/metrics has no octavo_prefill_seconds_total and the like of {variant}") from None


async def vocabulary_size(client: OctavoClient) -> int:
    info = await client.tokenizer_info()
    size = info.get("vocab_size")
    if not isinstance(size, int) or size <= FIRST_ID:
        raise EvalError("the server's /tokenizer_info tells no vocab_size, which the throughput load needs")
    return size
