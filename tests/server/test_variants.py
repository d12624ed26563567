"""Eleven variants behind one port, all in one load: each answers as it does alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

STEADY = ["bf16", "int8-tensor", "int8-row", "int8-g64", "int8-g128", "fp8-tensor", "fp8-row", "fp8-g64-fake"]
VARIANTS = [*STEADY, "bf16+kvint8", "w8a8-int8-row", "w8a8-fp8-block+kv8"]
PROMPTS = ["The sea was calm, and", "The sea was calm, and the sun was shining. The sea was calm, and the sun"]
NUM_TOKENS = 12
# Where activations or keys are cut to 8 bits, a sum whose last bit depends on the shape of the batch may fall on the
# other side of a boundary, which moves logprobs by 0.01 to 0.07 on average (tests/engine/quant/test_variants.py): two
# tokens closer than this may change places, and what follows them is another text.
CLOSE = 0.3

Answer = tuple[list[str], list[float]]


def ask(client: httpx.Client, variant: str, prompt: str, salt: str) -> Answer:
    """Greedy tokens, and how much more likely each was than the next."""
    body: dict[str, Any] = {"model": f"pocket:{variant}", "prompt": prompt, "max_tokens": NUM_TOKENS, "logprobs": 2}
    body |= {"temperature": 0, "ignore_eos": True, "cache_salt": salt}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    logprobs = response.json()["choices"][0]["logprobs"]
    best = [sorted(top.values(), reverse=True)[:2] for top in logprobs["top_logprobs"]]
    return logprobs["tokens"], [first - second for first, second in best]


def test_eleven_variants_in_one_load_answer_as_alone(start_server: Callable[..., Any]) -> None:
    served = start_server("--dtype", "float32", "--kv-cache-tokens", "8192", variants=",".join(VARIANTS))
    asked = [(variant, prompt) for prompt in PROMPTS for variant in VARIANTS]
    with served.client() as client:
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == ["pocket", *(f"pocket:{variant}" for variant in VARIANTS)]
        alone = {key: ask(client, *key, "alone") for key in asked}
        with ThreadPoolExecutor(len(asked)) as threads:
            answers = threads.map(lambda key: ask(client, *key, "mixed"), asked)
            mixed = dict(zip(asked, answers, strict=True))
        time.sleep(1.2)  # what /metrics may be behind
        steps = served.metric("octavo_step_seconds_count") - NUM_TOKENS * len(asked)  # each alone takes one a token
    assert NUM_TOKENS <= steps < NUM_TOKENS * len(asked) / 3  # many sequences a step
    for (variant, prompt), (tokens, margins) in alone.items():
        clear = NUM_TOKENS
        if variant not in STEADY:
            clear = next((i for i, margin in enumerate(margins) if margin < CLOSE), NUM_TOKENS)
            assert clear >= 3
        assert mixed[variant, prompt][0][:clear] == tokens[:clear], (variant, prompt)
        assert len(mixed[variant, prompt][0]) == NUM_TOKENS
