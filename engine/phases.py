"""Phase time: how many seconds of device time went to prefill and how many to decode.

A step that only decodes charges decode. A mixed step charges decode what a pure decode step of its size took lately,
and prefill the rest, so that tokens over seconds is true for each phase. Where that would leave prefill nothing (the
device was slower lately), and before any pure step, both get their share by tokens.
"""

from __future__ import annotations

_WEIGHT = 0.2  # of the newest pure decode step in the running mean


class PhaseClock:
    """Running totals of one variant: tokens and device seconds of prefill and decode."""

    def __init__(self) -> None:
        self.prefill_tokens = self.decode_tokens = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self._pure: dict[int, float] = {}  # sequences, rounded up to a power of two -> seconds of a pure decode step

    def add(self, prefill_tokens: int, decode_tokens: int, seconds: float) -> None:
        """Charge one step's device time to its phases."""
        self.prefill_tokens += prefill_tokens
        self.decode_tokens += decode_tokens
        decode = seconds
        if prefill_tokens:
            expected = self._expected(decode_tokens)
            by_tokens = seconds * decode_tokens / (prefill_tokens + decode_tokens)
            decode = by_tokens if expected is None or expected >= seconds else expected
        elif decode_tokens:
            size = _size(decode_tokens)
            self._pure[size] = self._pure.get(size, seconds) * (1 - _WEIGHT) + seconds * _WEIGHT
        self.decode_seconds += decode
        self.prefill_seconds += seconds - decode

    def _expected(self, decode_tokens: int) -> float | None:
        """Seconds of a pure decode step of this size, or of the nearest size seen; None before any was."""
        if not decode_tokens:
            return 0.0
        if not self._pure:
            return None
        size = _size(decode_tokens)
        return self._pure[min(self._pure, key=lambda seen: abs(seen.bit_length() - size.bit_length()))]


def _size(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()
