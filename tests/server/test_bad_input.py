"""Bad input ends at the API process: the table of faults, case by case, by its numbers.

After every case the server is healthy, answers a canary as before, and no block stays in use.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

COMPLETION = {"model": "pocket", "prompt": "The sea", "max_tokens": 2, "temperature": 0}
CHAT = {"model": "pocket", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}
INVALID = "invalid_request_error"


@pytest.fixture(scope="module")
def http(served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def canary(http) -> dict:
    return ask_canary(http)


def ask_canary(http) -> dict:
    answer = http.post("/v1/completions", json=COMPLETION | {"max_tokens": 12}).json()
    return {name: answer[name] for name in ("choices", "model")}


@pytest.fixture(autouse=True)
def unharmed(http, canary) -> Iterator[None]:
    yield
    assert http.get("/health").status_code == 200
    assert ask_canary(http) == canary


def post(http, path: str, body: bytes | dict | str, **headers) -> httpx.Response:
    content = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return http.post(path, content=content, headers={"content-type": "application/json"} | headers)


def check(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """Assert the status and OpenAI's shape; returns the message."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == (INVALID, param, code)
    for leak in ("Traceback", "0x", "/server/", "msgspec", "site-packages"):
        assert leak not in response.text
    return error["message"]


# 1 to 5: the body as JSON
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"model": "pocket", "prompt"', "invalid_json"),
        (b"", "invalid_json"),
        (b"{} {}", "invalid_json"),
        (b"[]", "invalid_body"),
        (b"3", "invalid_body"),
        (b"null", "invalid_body"),
        (b"[" * 100_000, "invalid_json"),
        (b"[" * (9 * 2**20), "invalid_json"),
        (b'{"a":' * 100_000, "invalid_json"),
        (b'{"model": "pocket", "model": "pocket", "prompt": "x"}', "invalid_json"),
        (b'{"model": "pocket", "mod\\u0065l": "x", "prompt": "x"}', "invalid_json"),
        (b'{"model": "pocket", "prompt": "x", "logit_bias": {"1": 1, "1": 2}}', "invalid_json"),
        (b'{"model": "pocket", "prompt": "x", "temperature": NaN}', "invalid_json"),
        (b'{"model": "pocket", "prompt": "x", "temperature": Infinity}', "invalid_json"),
    ],
)
def test_json(http, body, code):
    response = post(http, "/v1/completions", body)
    assert len(response.content) < 1000
    check(response, 400, None, code)


@pytest.mark.parametrize(
    ("content", "named"), [(b"\xff", True), (b"\xed\xa0\x80", True), (b"\\ud800", False), (b"a\\udc80", False)]
)
def test_text_that_is_not_unicode(http, content, named):
    body = b'{"model": "pocket", "max_tokens": 2, "messages": [{"role": "user", "content": "%b"}]}' % content
    check(post(http, "/v1/chat/completions", body), 400, "messages" if named else None, "invalid_json")
    body = b'{"model": "pocket", "prompt": "%b"}' % content
    check(post(http, "/v1/completions", body), 400, "prompt" if named else None, "invalid_json")


def test_nul_is_legal(http):
    assert post(http, "/v1/completions", COMPLETION | {"prompt": "a\0b"}).status_code == 200


# 6, 7: the body as bytes
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_content_type(http, kind):
    check(post(http, "/v1/completions", COMPLETION, **{"content-type": kind}), 415, None, "unsupported_media_type")


def raw(http, data: bytes) -> bytes:
    """Send bytes, return all that comes until the server closes."""
    url = urlsplit(str(http.base_url))
    with socket.create_connection((url.hostname, url.port), timeout=20) as connection:
        received = b""
        try:
            connection.sendall(data)
            while piece := connection.recv(65536):
                received += piece
        except ConnectionError:  # closed while we were still sending
            pass
        return received


def test_body_too_large(http):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    told = raw(http, head + b"Content-Length: 99999999\r\n\r\n{")
    assert told.startswith(b"HTTP/1.1 413 ")
    assert b"request_too_large" in told
    assert b"connection: close" in told
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    raw(http, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 12)  # ends: the server does not read on


# 8, 10: HTTP itself
@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"X-Large: " + b"a" * 2**20 + b"\r\n", 431),
        (b"".join(b"X-%d: a\r\n" % i for i in range(10_000)), 431),
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"Content-Length: five\r\n", 400),
        (b"no colon\r\n", 400),
    ],
)
def test_broken_heads(http, head, status):
    received = raw(http, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n")
    if received:  # the rest of a megabyte may meet a connection that is closed already
        assert received.startswith(b"HTTP/1.1 %d " % status)
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert b"x-request-id: " in received


def test_bad_chunk_framing(http):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    received = raw(http, head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 400 ") and b"x-request-id: " in received, received


# 12, 13: paths
@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v2/completions", "//v1/models", "/v1/completions/", "/docs", "/openapi.json"]
)
def test_unknown_paths(http, path):
    check(http.get(f"{str(http.base_url).rstrip('/')}{path}"), 404)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", "/v1/completions", "POST"), ("POST", "/v1/models", "GET"), ("DELETE", "/metrics", "GET")],
)
def test_wrong_methods(http, method, path, allow):
    response = http.request(method, path)
    check(response, 405)
    assert response.headers["allow"] == allow


# 14, 15: model
@pytest.mark.parametrize("name", ["gpt-4", "pocket:int3", "bf16", "pocket:", "", "x" * 10_000, "../pocket"])
def test_unknown_model(http, name):
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        message = check(post(http, path, body | {"model": name}), 404, "model", "model_not_found")
        assert "pocket:fp8-row" in message
        assert len(message) < 1000


def test_model_missing_or_wrong(http):
    check(post(http, "/v1/completions", {"prompt": "x"}), 400, "model", "missing_required_parameter")
    check(post(http, "/v1/completions", COMPLETION | {"model": 3}), 400, "model")
    check(post(http, "/v1/completions", COMPLETION | {"model": None}), 400, "model", "missing_required_parameter")


# 16, 17: messages
@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        [{"role": "king", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
        [{"content": "x"}],
        ["x"],
        [{"role": "user", "content": "x"}] * 5000,
    ],
)
def test_messages(http, messages):
    check(post(http, "/v1/chat/completions", CHAT | {"messages": messages}), 400, "messages")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "text"},
    ],
)
def test_content_parts_that_are_no_text(http, part):
    messages = [{"role": "user", "content": [{"type": "text", "text": "see"}, part]}]
    check(post(http, "/v1/chat/completions", CHAT | {"messages": messages}), 400, "messages", "unsupported_content")


# 18 to 20: prompt
@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [""], ["x", 1], [1, "x"], [[1], "x"], [[1], 2], None, 3, {"a": 1}, [1.5], [True], [[1, True]]]
    + [[i] for i in (-1, 10**6, 2**31, 2**63, 2**64, -(2**63), 10**30)]
    + [[[1, i]] for i in (-1, 10**6, 2**31)],
)
def test_prompts(http, prompt):
    check(post(http, "/v1/completions", COMPLETION | {"prompt": prompt}), 400, "prompt")


def test_too_many_prompts(http):
    body = COMPLETION | {"prompt": ["x"] * 100_000}
    check(post(http, "/v1/completions", body), 400, "prompt", "too_many_prompts")
    body = COMPLETION | {"prompt": ["x"] * 200, "n": 2}
    check(post(http, "/v1/completions", body), 400, "prompt", "too_many_prompts")


# 21, 22: lengths
def test_context_length(http):
    message = check(
        post(http, "/v1/completions", COMPLETION | {"prompt": [5] * 5000}), 400, "prompt", "context_length_exceeded"
    )
    assert "5000" in message
    messages = [{"role": "user", "content": "word " * 20_000}]
    for limit in ({}, {"max_tokens": 5}):
        body = {"model": "pocket", "messages": messages} | limit
        check(post(http, "/v1/chat/completions", body), 400, "messages", "context_length_exceeded")


@pytest.mark.parametrize("value", [0, -1, "5", 1.5, True, 2**64])
def test_max_tokens(http, value):
    response = post(http, "/v1/completions", COMPLETION | {"max_tokens": value})
    assert response.status_code == 400
    if value != 2**64:
        check(response, 400, "max_tokens")
        check(post(http, "/v1/chat/completions", CHAT | {"max_tokens": value}), 400, "max_tokens")


def test_both_max_tokens(http):
    body = CHAT | {"max_completion_tokens": 3}
    check(post(http, "/v1/chat/completions", body), 400, "max_tokens")
    assert post(http, "/v1/chat/completions", CHAT | {"max_completion_tokens": 2}).status_code == 200


# 23 to 32: everything with a range
HUGE = [-(2**63) - 1, 2**63, 2**64, 10**40]
CASES = {
    "temperature": [-1, 2.1, "hot", [], True, 10**40],
    "top_p": [0, 1.1, -1, "x"],
    "top_k": [-2, 1.5, "x", 2**31, *HUGE],
    "min_p": [2, -0.1],
    "presence_penalty": [2.1, -2.1],
    "frequency_penalty": [2.1, -2.1],
    "repetition_penalty": [0, -1, 10**40, 1e300],
    "n": [0, -1, 129, 10**9, 1.5, "2", *HUGE],
    "logprobs": [21, -1, "x", *HUGE],
    "prompt_logprobs": [21, -1, *HUGE],
    "prompt_logprobs_start": [-1, "x", *HUGE[:1]],
    "logprob_token_ids": [[-1], [10**6], [2**31], ["x"], [1.5], list(range(100)), 3],
    "logit_bias": [
        {"abc": 1},
        {"-1": 1},
        {"1000000": 1},
        {"1": 10**9},
        {"1": "x"},
        {str(i): 1 for i in range(100_000)},
        [],
    ],
    "stop": [[""], "", ["a"] * 17, "x" * 2**20, [1], 3],
    "stop_token_ids": [[-1], [10**6], [2**31], [2**63], ["x"], [1] * 100, 3],
    "min_tokens": [-1, 3, "x", *HUGE],
    "seed": [-1, 2**64, 2**63, "x", 1.5],
    "ignore_eos": [1, "yes"],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, [], "x"],
    "cache_salt": ["x" * 129, "x" * 2**20, "a/b", "", "ä", 3],
    "echo": ["yes", 1],
    "skip_special_tokens": ["no"],
}


@pytest.mark.parametrize("param", CASES)
def test_ranges_and_types(http, param):
    for value in CASES[param]:
        check(post(http, "/v1/completions", COMPLETION | {param: value}), 400, param)


def test_chat_logprobs_ranges(http):
    for value in (21, -1, "x"):
        check(post(http, "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": value}), 400, "top_logprobs")
    check(post(http, "/v1/chat/completions", CHAT | {"top_logprobs": 2}), 400, "top_logprobs")
    check(post(http, "/v1/chat/completions", CHAT | {"logprobs": 2}), 400, "logprobs")


def test_nearly_zero_temperature_is_greedy(http, canary):
    body = COMPLETION | {"max_tokens": 12, "temperature": 1e-30}
    assert post(http, "/v1/completions", body).json()["choices"] == canary["choices"]


def test_null_means_absent(http, canary):
    nulls = dict.fromkeys([*CASES, "suffix", "best_of", "user", "response_format"])
    body = nulls | COMPLETION | {"max_tokens": 12}
    assert post(http, "/v1/completions", body).json()["choices"] == canary["choices"]


# 33 to 36: what is not supported, and what is not known
@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("completions", "best_of", 2),
        ("completions", "suffix", "end"),
        ("completions", "prompt_embeds", "gASVAAAA"),
        ("completions", "logits_processors", ["os.system"]),
        ("completions", "custom_logit_processor", "x"),
        ("completions", "guided_regex", "(a+)+b"),
        ("completions", "use_beam_search", True),
        ("chat/completions", "chat_template", "{{ 1 }}"),
        ("chat/completions", "chat_template_kwargs", {"tokenize": True}),
        ("chat/completions", "chat_template_kwargs", {"enable_thinking": True, "chat_template": "x"}),
        ("chat/completions", "chat_template_kwargs", {"enable_thinking": "yes"}),
        ("chat/completions", "response_format", {"type": "json_schema", "json_schema": {"$ref": "#"}}),
        ("chat/completions", "tools", [{"type": "function", "function": {"name": "f"}}]),
        ("chat/completions", "tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("chat/completions", "structured_outputs", {"regex": "(a+)+b"}),
    ],
)
def test_unsupported(http, path, field, value):
    body = (COMPLETION if path == "completions" else CHAT) | {field: value}
    check(post(http, f"/v1/{path}", body), 400, field, "unsupported_parameter")


def test_what_asks_for_nothing_passes(http):
    nothing = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "n": 1, "user": "me"}
    assert post(http, "/v1/chat/completions", CHAT | nothing | {"made_up_field": [1]}).status_code == 200


# 39: request ids
@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-1.2_3", True), ("x" * 64, True), ("x" * 65, False), ("x" * 50_000, False), ("a b", False), ("ä", False)],
)
def test_request_ids(http, sent, kept):
    response = http.get("/version", headers={"x-request-id": sent.encode()})
    ids = response.headers.get_list("x-request-id")
    assert len(ids) == 1
    assert (ids[0] == sent) is kept


# the other endpoints
def test_tokenize_and_detokenize(http):
    check(post(http, "/tokenize", {"prompt": 3}), 400, "prompt")
    check(post(http, "/tokenize", {}), 400, "prompt")
    for tokens in ([-1], [10**6], [2**31], [2**63], ["x"], [1.5], 3):
        check(post(http, "/detokenize", {"tokens": tokens}), 400, "tokens")
    text = "naïve 日本語 🙂"
    tokens = post(http, "/tokenize", {"prompt": text}).json()["tokens"]
    assert post(http, "/detokenize", {"tokens": tokens}).json() == {"prompt": text}


# 53: nothing a client sends makes the metrics page grow
def test_metrics_page_has_a_bounded_size(http):
    for i in range(60):
        http.request(f"M{i}X", f"/path{i}")
        post(http, "/v1/completions", COMPLETION | {"model": f"m{i}"})
    page = http.get("/metrics").text
    assert "path1" not in page
    assert "M1X" not in page
    assert "m1" not in page
    assert len(page) < 200_000  # eight histograms for each variant
