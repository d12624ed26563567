"""Adding and removing variants over HTTP, under load: who may, what streams notice (nothing), what is refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

PROMPT = {"prompt": "The old house stood", "temperature": 0, "ignore_eos": True}
INT8_BYTES = 7_127_040  # own bytes of int8-row in the bundled model
HEADROOM = 10_000_000


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Any]) -> Any:
    keys = ("--api-key", "user", "--admin-key", "boss")
    return start_server(*keys, "--variant-headroom", "10MB", "--threads", "1", api_processes=2)


@pytest.fixture(scope="module")
def user(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, headers={"Authorization": "Bearer user"}) as client:
        yield client


@pytest.fixture(scope="module")
def admin(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, headers={"Authorization": "Bearer boss"}) as client:
        yield client


def post(client: httpx.Client, name: Any) -> httpx.Response:
    return client.post("/v1/variants", json={"name": name})


def text(client: httpx.Client, model: str, max_tokens: int) -> str:
    response = client.post("/v1/completions", json=PROMPT | {"model": model, "max_tokens": max_tokens})
    assert response.status_code == 200, response.text
    answer: str = response.json()["choices"][0]["text"]
    return answer


def streamed(client: httpx.Client, model: str, max_tokens: int, begun: threading.Event) -> int:
    """The tokens of a stream that ended well. begun: set with its first bytes."""
    body = PROMPT | {
        "model": model,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = []
        for line in response.iter_lines():
            begun.set()
            lines += [line.removeprefix("data: ")] if line else []
    assert lines[-1] == "[DONE]"
    tokens: int = json.loads(lines[-2])["usage"]["completion_tokens"]
    return tokens


def error(response: httpx.Response) -> tuple[int, str | None]:
    return response.status_code, response.json()["error"]["code"]


def listed(client: httpx.Client) -> dict[str, str]:
    return {card["name"]: card["state"] for card in client.get("/v1/variants").json()["data"]}


def on_new_connections(server: Any, model: str) -> set[int]:
    """Statuses of requests that each API process gets some of."""
    body, found = PROMPT | {"model": model, "max_tokens": 1}, set()
    for _ in range(8):
        with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer user"}, timeout=60) as client:
            found.add(client.post("/v1/completions", json=body).status_code)
    return found


def test_only_the_admin_key_changes_variants(server: Any, user: httpx.Client, admin: httpx.Client) -> None:
    with httpx.Client(base_url=server.url) as nobody:
        assert error(post(nobody, "int8-row")) == (401, "invalid_api_key")
        assert error(nobody.delete("/v1/variants/bf16")) == (401, "invalid_api_key")
        assert nobody.get("/v1/variants").status_code == 401
        wrong = {"Authorization": "Bearer boß".encode()}
        assert error(nobody.post("/v1/variants", json={"name": "int8-row"}, headers=wrong)) == (401, "invalid_api_key")
    assert error(post(user, "int8-row")) == (403, "admin_key_required")
    assert error(user.delete("/v1/variants/int8-row")) == (403, "admin_key_required")
    assert error(user.put("/v1/variants/int8-row")) == (403, "admin_key_required")
    assert listed(user) == listed(admin) == {"bf16": "loaded"}
    assert admin.get("/v1/models").status_code == 200  # the admin key opens all else


def test_without_an_admin_key_nobody_may(served: Any) -> None:
    with served.client() as client:
        for response in (post(client, "fp8-g64"), client.delete("/v1/variants/int8-row")):
            assert error(response) == (403, "admin_key_not_set")
            assert "--admin-key" in response.json()["error"]["message"]
        cards = {card["name"]: card for card in client.get("/v1/variants").json()["data"]}
        assert cards["int8-row"]["own_bytes"] == INT8_BYTES and cards["int8-row"]["format"]["weight"] == "int8"
        models = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert models["pocket:fp8-row"]["format"]["granularity"] == "row" and models["pocket"]["own_bytes"] > 0


def test_variants_come_and_go_under_load(server: Any, user: httpx.Client, admin: httpx.Client) -> None:
    alone = text(user, "pocket", 150)
    stopped = threading.Event()

    def loop() -> list[str]:
        texts = []
        while not stopped.is_set():
            texts.append(text(user, "pocket", 150))
        return texts

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(loop) for _ in range(3)]
        try:
            added = post(admin, "INT8_Per_Row")
            assert added.status_code == 201
            assert (added.json()["name"], added.json()["own_bytes"]) == ("int8-row", INT8_BYTES)
            assert added.json()["model"] == "pocket:int8-row"
            assert on_new_connections(server, "pocket:int8-row") == {200}
            assert admin.get("/v1/variants").json()["headroom_bytes"] == HEADROOM - INT8_BYTES
            assert post(admin, "int8-row").status_code == 200  # it is there
            once = text(user, "pocket:int8-row", 50)
            begun = threading.Event()
            last = pool.submit(streamed, user, "pocket:int8-row", 150, begun)
            assert begun.wait(20)
            remove_in_use(server, user, admin)
            assert last.result() == 150  # it was let finish
            assert post(admin, "int8-row").status_code == 201
            assert text(user, "pocket:int8-row", 50) == once
            assert admin.delete("/v1/variants/int8-row").json() == {
                "name": "int8-row",
                "object": "variant",
                "deleted": True,
            }
        finally:
            stopped.set()
        texts = [t for future in running for t in future.result()]
    assert len(texts) >= 3 and set(texts) == {alone}
    page = user.get("/metrics").text
    assert 'octavo_weights_bytes{kind="own",variant="bf16"}' in page and "int8-row" not in _gauges(page)
    assert admin.get("/v1/variants").json()["headroom_bytes"] == HEADROOM


def remove_in_use(server: Any, user: httpx.Client, admin: httpx.Client) -> None:
    """Remove int8-row while a stream uses it, for as long as we look."""
    body = PROMPT | {"model": "pocket:int8-row", "max_tokens": 2000, "stream": True}
    with ThreadPoolExecutor(1) as pool:
        with user.stream("POST", "/v1/completions", json=body) as held:
            next(held.iter_lines())
            removal = pool.submit(admin.delete, "/v1/variants/int8-row")
            end = time.monotonic() + 20
            while listed(user).get("int8-row") != "removing":
                assert time.monotonic() < end
            refused = post(admin, "fp8-row")
            assert error(refused) == (409, "change_under_way")
            assert refused.headers["x-should-retry"] == "false"
            assert error(post(admin, "int8-row")) == (409, "change_under_way")
            while on_new_connections(server, "pocket:int8-row") != {404}:  # until each process has heard of it
                assert time.monotonic() < end
            assert "pocket:int8-row" not in {card["id"] for card in user.get("/v1/models").json()["data"]}
            assert not removal.done()
        assert removal.result().status_code == 200  # our client has left
    assert "int8-row" not in listed(user)


def _gauges(page: str) -> str:
    """What is told of the variants that there are; counters of requests stay."""
    return "\n".join(line for line in page.splitlines() if not line.startswith("octavo_requests_total"))


@pytest.mark.parametrize(
    ("name", "status", "code", "said"),
    [
        ("int8-row-fake", 409, "not_enough_memory", "28,311,552 bytes, and 10,000,000 are free"),
        ("bf16+kv8", 409, "kv_format_unavailable", "+kv8"),
        ("w8a8-int8-row-smooth+kvint8", 409, "kv_format_unavailable", "scales"),
        ("int3", 400, None, "supported: bf16"),
        (7, 400, None, "name: expected"),
        (None, 400, None, "name is required"),
    ],
)
def test_what_cannot_be_added_says_why(
    admin: httpx.Client, name: Any, status: int, code: str | None, said: str
) -> None:
    response = post(admin, name)
    assert error(response) == (status, code) and said in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "name"
    assert listed(admin) == {"bf16": "loaded"}


def test_what_cannot_be_removed_says_why(admin: httpx.Client) -> None:
    assert error(admin.delete("/v1/variants/bf16")) == (409, "default_variant")
    assert error(admin.delete("/v1/variants/int8-row")) == (404, "model_not_found")
    assert error(admin.delete("/v1/variants/int3")) == (404, "model_not_found")
    assert admin.get("/v1/variants/bf16").status_code == 405
