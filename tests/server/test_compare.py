"""/v1/compare: logprobs are those of completions, and a divergence is where greedy texts part."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.messages import Logprobs
from server.compare import divergence
from tests.server.conftest import VARIANTS, Served

PROMPT = "The old lighthouse stood"


def post(served: Served, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    with served.client() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_greedy_continuation(served: Served) -> None:
    found = post(served, "/v1/compare", {"prompt": PROMPT, "max_tokens": 40})
    assert found["object"] == "comparison" and found["baseline"] == "bf16" and len(found["tokens"]) == 40
    assert [v["variant"] for v in found["variants"]] == list(VARIANTS)
    ids = [token["id"] for token in found["tokens"]]
    assert found["continuation"].startswith(found["tokens"][0]["text"])
    prompt = post(served, "/tokenize", {"prompt": PROMPT})["tokens"]
    assert found["prompt_tokens"] == len(prompt)
    by_name = {v["variant"]: v for v in found["variants"]}
    base = by_name["bf16"]
    assert base["top_token_ids"] == ids and base["top1_flips"] == 0 and base["first_divergence"] is None
    assert base["kl"] == [0.0] * 40
    for name, v in by_name.items():
        body = {"model": f"pocket:{name}", "prompt": prompt + ids, "max_tokens": 0, "echo": True, "prompt_logprobs": 1}
        told = post(served, "/v1/completions", body)["choices"][0]["prompt_logprobs"][len(prompt) :]
        for token, entry in zip(found["tokens"], told, strict=True):
            assert token["logprobs"][name] == pytest.approx(entry["logprob"], abs=1e-4)
        assert v["logprob"] == pytest.approx(sum(token["logprobs"][name] for token in found["tokens"]), abs=1e-3)
        flips = [i for i, top in enumerate(v["top_token_ids"]) if top != ids[i]]
        assert v["top1_flips"] == len(flips) and v["first_divergence"] == (flips[0] if flips else None)
        assert v["mean_kl"] == pytest.approx(sum(v["kl"]) / 40)
    assert 0 < by_name["int8-row"]["mean_kl"] < by_name["fp8-row"]["mean_kl"] < 0.1


def test_a_given_continuation(served: Served) -> None:
    """Baseline and order as asked for; ids and text say the same."""
    body = {"prompt": PROMPT, "continuation": " by the sea", "variants": ["fp8-row", "pocket:int8-row"]}
    found = post(served, "/v1/compare", body)
    assert found["baseline"] == "fp8-row" and found["continuation"] == " by the sea"
    assert [v["variant"] for v in found["variants"]] == ["fp8-row", "int8-row"]
    again = body | {"continuation": [token["id"] for token in found["tokens"]]}
    assert post(served, "/v1/compare", again)["tokens"] == found["tokens"]
    only = post(served, "/v1/compare", body | {"variants": ["bf16"]})
    assert len(only["variants"]) == 1 and only["variants"][0]["mean_kl"] == 0


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"variants": ["nope"]}, 404, "variants", "model_not_found"),
        ({"variants": []}, 400, "variants", None),
        ({"prompt": None}, 400, "prompt", None),
        ({"prompt": ""}, 400, "prompt", None),
        ({"prompt": ["a"]}, 400, "prompt", None),
        ({"prompt": [10**6]}, 400, "prompt", None),
        ({"continuation": ""}, 400, "continuation", None),
        ({"continuation": "a", "max_tokens": 3}, 400, "max_tokens", None),
        ({"max_tokens": 0}, 400, "max_tokens", None),
        ({"max_tokens": 5000}, 400, "prompt", "context_length_exceeded"),
        ({"cache_salt": "a/b"}, 400, "cache_salt", None),
    ],
)
def test_bad_input(served: Served, change: dict[str, Any], status: int, param: str, code: str | None) -> None:
    error = post(served, "/v1/compare", {"prompt": PROMPT} | change, status)["error"]
    assert (error["param"], error["code"]) == (param, code), error


def test_divergence() -> None:
    """Exact where the likeliest tokens are all there are; from below where they are not."""
    p, q = [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]
    exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    def entry(values: list[float], top: int) -> Logprobs:
        order = sorted(range(3), key=lambda i: -values[i])[:top]
        return Logprobs([0, *order], [math.log(values[i]) for i in (0, *order)])

    assert divergence(entry(p, 3), entry(q, 3)) == pytest.approx(exact)
    assert 0 < divergence(entry(p, 1), entry(q, 1)) <= exact
    assert divergence(entry(p, 2), entry(p, 2)) == 0
