"""What one sequence's life adds to the metrics: its waits, its gaps, its lengths, how it ended.

The engine client calls `token` for each token, so that is two list operations and no more; everything else happens
once a sequence. Times are of this process's monotonic clock, in seconds.
"""

from __future__ import annotations

from engine.messages import Started
from server.metrics import FINISHED, PROMPT_TOKENS, Counters

ENDED_WELL = ("stop", "length")  # how long the others took says nothing about the server


class SequenceMeter:
    """Watches one sequence. `arrival` is when its HTTP request came, `sent` when the engine was asked."""

    __slots__ = (
        "_arrival",
        "_counters",
        "_first_at",
        "_gaps",
        "_last_at",
        "_prompt_tokens",
        "_sent",
        "_variant",
        "num_tokens",
    )

    def __init__(self, counters: Counters, variant: str, prompt_tokens: int, arrival: float, sent: float) -> None:
        self._counters = counters
        self._variant = variant
        self._prompt_tokens = prompt_tokens
        self._arrival = arrival
        self._sent = sent
        self._first_at = self._last_at = 0.0
        self._gaps = counters.series("inter_token_latency", variant)
        self.num_tokens = 0

    def token(self, now: float) -> None:
        """One more token has come from the engine."""
        if self.num_tokens:
            self._gaps.append(now - self._last_at)
        else:
            self._first_at = now
            self._observe("time_to_first_token", now - self._arrival)
        self._last_at = now
        self.num_tokens += 1

    def started(self, started: Started, now: float) -> None:
        """The prompt is computed."""
        self._counters.add(PROMPT_TOKENS, self._variant, value=self._prompt_tokens)
        self._observe("request_queue_time", started.queue_seconds)
        self._observe("request_prefill_time", max(0.0, now - self._sent - started.queue_seconds))

    def ended(self, reason: str, now: float) -> None:
        """The sequence is over: "stop", "length", "abort" (the client left) or "error"."""
        self._counters.add(FINISHED, self._variant, reason)
        if reason in ENDED_WELL:
            self._observe("e2e_request_latency", now - self._arrival)
            self._observe("request_decode_time", self._last_at - self._first_at)
            self._observe("request_prompt_tokens", self._prompt_tokens)
            self._observe("request_generation_tokens", self.num_tokens)

    def _observe(self, name: str, value: float) -> None:
        self._counters.series(name, self._variant).append(value)
