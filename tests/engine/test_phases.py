"""Phase time: a mixed step charges decode what decode of its size costs, prefill the rest."""

from __future__ import annotations

import pytest

from engine.phases import PhaseClock


def test_pure_steps_charge_their_phase() -> None:
    clock = PhaseClock()
    clock.add(100, 0, 0.5)
    clock.add(0, 8, 0.01)
    assert (clock.prefill_tokens, clock.prefill_seconds, clock.decode_tokens, clock.decode_seconds) == (
        100,
        0.5,
        8,
        0.01,
    )


def test_a_mixed_step_charges_decode_its_usual_time() -> None:
    clock = PhaseClock()
    for _ in range(5):
        clock.add(0, 8, 0.01)
    clock.add(500, 7, 0.11)
    assert clock.decode_seconds == pytest.approx(0.06) and clock.prefill_seconds == pytest.approx(0.10)
    clock.add(500, 100, 0.11)  # the nearest size seen
    assert clock.decode_seconds == pytest.approx(0.07)


def test_without_a_usable_pure_decode_time_is_shared_by_tokens() -> None:
    clock = PhaseClock()
    clock.add(90, 10, 1.0)
    assert clock.decode_seconds == pytest.approx(0.1) and clock.prefill_seconds == pytest.approx(0.9)
    clock.add(0, 4, 2.0)
    clock.add(12, 4, 0.4)  # faster than the last pure decode step of this size
    assert clock.decode_seconds == pytest.approx(2.2) and clock.prefill_seconds == pytest.approx(1.2)
