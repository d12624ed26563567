"""Columns of the sampling parameters' tables: one row a running sequence, floats in one table, integers in another."""

from __future__ import annotations

TEMPERATURE, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION = range(6)
TOP_K, SEED_LOW, SEED_HIGH, PROMPT_LEN, NUM_LOGPROBS = range(5)  # TOP_K 0: off. NUM_LOGPROBS -1: none wanted
NUM_FLOATS, NUM_INTS = 6, 5
