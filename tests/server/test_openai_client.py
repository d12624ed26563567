"""The real `openai` package against the real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

PROMPT = "The old house stood at the end of the"
CHAT = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture(scope="module")
def client(served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, model="pocket", prompt=PROMPT, **options):
    return client.completions.create(model=model, prompt=prompt, **({"temperature": 0, "max_tokens": 24} | options))


def chat(client, model="pocket", messages=CHAT, **options):
    options = {"temperature": 0, "max_tokens": 24} | options
    return client.chat.completions.create(model=model, messages=messages, **options)


def test_models(client):
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["pocket", "pocket:bf16", "pocket:int8-row", "pocket:fp8-row"]
    assert cards["pocket"].variant == "bf16"
    assert cards["pocket:int8-row"].own_bytes < cards["pocket:bf16"].own_bytes
    assert cards["pocket:int8-row"].kv_tokens == cards["pocket:bf16"].kv_tokens >= 2048
    assert client.models.retrieve("pocket:fp8-row").max_model_len >= 2048


@pytest.mark.parametrize("variant", ["bf16", "int8-row", "fp8-row"])
def test_every_variant_completes(client, variant):
    answer = complete(client, f"pocket:{variant}")
    assert answer.model == f"pocket:{variant}"
    assert answer.object == "text_completion"
    assert len(answer.choices[0].text) > 0


def test_bare_name_is_the_default_variant(client):
    assert complete(client).choices[0].text == complete(client, "pocket:bf16").choices[0].text


def test_plain_and_streamed_agree(client):
    plain = complete(client)
    chunks = list(complete(client, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == plain.choices[0].text
    assert all(c.choices[0].text or c.choices[0].finish_reason for c in chunks)
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == plain.choices[0].finish_reason


def test_usage(client):
    plain = complete(client, max_tokens=7, extra_body={"ignore_eos": True}).usage
    assert (plain.prompt_tokens, plain.completion_tokens) == (len(tokenize(client, PROMPT)), 7)
    assert plain.total_tokens == plain.prompt_tokens + 7
    options = {"include_usage": True}
    *chunks, last = complete(client, max_tokens=7, stream=True, stream_options=options, extra_body={"ignore_eos": True})
    assert last.choices == []
    assert last.usage.completion_tokens == 7
    assert all(c.usage is None for c in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = complete(client, max_tokens=7, stream=True, stream_options=options, extra_body={"ignore_eos": True})
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last.usage.completion_tokens == 7


def test_cached_tokens_are_told_and_salted(client, served):
    prompt = [7 + i % 50 for i in range(100)]
    first = complete(client, prompt=prompt, extra_body={"cache_salt": "a"}).usage
    again = complete(client, prompt=prompt, extra_body={"cache_salt": "a"}).usage
    other = complete(client, prompt=prompt, extra_body={"cache_salt": "b"}).usage
    assert first.prompt_tokens_details.cached_tokens == 0
    assert again.prompt_tokens_details.cached_tokens == 96
    assert other.prompt_tokens_details.cached_tokens == 0


def test_n_choices(client):
    answer = complete(client, n=3, temperature=1, seed=5)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len({c.text for c in answer.choices}) == 3
    streamed = {0: "", 1: "", 2: ""}
    for chunk in complete(client, n=3, temperature=1, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == [c.text for c in answer.choices]


def test_prompt_list_has_global_indices(client):
    prompts = [PROMPT, "Once upon a time", "The sea"]
    answer = complete(client, prompt=prompts, n=2)
    assert [c.index for c in answer.choices] == list(range(6))
    for i, prompt in enumerate(prompts):
        alone = complete(client, prompt=prompt).choices[0].text
        assert [c.text for c in answer.choices[2 * i : 2 * i + 2]] == [alone, alone]


def test_ids_and_text_are_the_same_prompt(client):
    ids = tokenize(client, PROMPT)
    text = complete(client).choices[0].text
    assert complete(client, prompt=ids).choices[0].text == text
    assert [c.text for c in complete(client, prompt=[ids, ids]).choices] == [text, text]


def tokenize(client, text):
    return client.post("../tokenize", cast_to=object, body={"prompt": text})["tokens"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_as_the_harness_reads_it(client, max_tokens):
    ids = tokenize(client, PROMPT)
    answer = complete(client, prompt=[ids, ids[:4]], max_tokens=max_tokens, logprobs=1, echo=True)
    for choice, prompt in zip(answer.choices, (ids, ids[:4]), strict=True):
        shown = choice.logprobs
        size = len(prompt) + max_tokens
        assert [len(a) for a in (shown.tokens, shown.token_logprobs, shown.top_logprobs, shown.text_offset)] == [
            size
        ] * 4
        assert shown.token_logprobs[0] is None
        assert all(value <= 0 for value in shown.token_logprobs[1:])
        for value, top, token in zip(shown.token_logprobs[1:], shown.top_logprobs[1:], shown.tokens[1:], strict=True):
            assert token in top
            assert max(top.values()) >= value
        assert "".join(shown.tokens) == choice.text


def test_echo_arrays_keep_their_length_when_eos_comes(client, served):
    eos = client.get("../tokenizer_info", cast_to=object)["eos_token"]
    (eos_id,) = tokenize(client, eos)
    ids = tokenize(client, PROMPT)
    options = {"max_tokens": 1, "logprobs": 1, "echo": True, "logit_bias": {str(eos_id): 100}}
    choice = complete(client, prompt=ids, **options).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == PROMPT
    assert len(choice.logprobs.token_logprobs) == len(ids) + 1


def test_echo_streams_the_prompt_with_the_first_token(client):
    chunks = list(complete(client, stream=True, echo=True, logprobs=0))
    assert chunks[0].choices[0].text.startswith(PROMPT)
    plain = complete(client, echo=True, logprobs=0).choices[0]
    assert "".join(c.choices[0].text for c in chunks) == plain.text
    streamed = [v for c in chunks for v in c.choices[0].logprobs.token_logprobs]
    assert streamed[1:] == pytest.approx(plain.logprobs.token_logprobs[1:], abs=1e-3)


def test_prompt_logprobs_and_named_ids(client):
    ids = tokenize(client, PROMPT)
    extra = {"prompt_logprobs": 2, "prompt_logprobs_start": 3, "logprob_token_ids": [5, 9]}
    choice = complete(client, prompt=ids, max_tokens=2, extra_body=extra | {"ignore_eos": True}).choices[0]
    positions = choice.prompt_logprobs
    assert positions[:3] == [None] * 3
    assert [p["token_id"] for p in positions[3:]] == ids[3:]
    assert all(len(p["top"]) == 2 and p["logprob"] <= max(p["top"].values()) for p in positions[3:])
    assert [sorted(named) for named in choice.logprobs.named_logprobs] == [["5", "9"]] * 2
    echoed = complete(client, prompt=ids, max_tokens=2, echo=True, logprobs=0, extra_body=extra | {"ignore_eos": True})
    again = echoed.choices[0].prompt_logprobs
    assert [p and (p["token_id"], list(p["top"])) for p in again] == [
        p and (p["token_id"], list(p["top"])) for p in positions
    ]
    # float32 sums may run in another order when threads share the work differently
    assert [p["logprob"] for p in again[3:]] == pytest.approx([p["logprob"] for p in positions[3:]], abs=1e-4)
    assert echoed.choices[0].logprobs.named_logprobs[: len(ids)] == [None] * len(ids)


def test_stop_strings_cut_the_text_across_token_borders(client):
    whole = complete(client, max_tokens=40, extra_body={"ignore_eos": True}).choices[0].text
    stop = whole[11:16]  # begins and ends where it may
    cut = whole.index(stop)
    for stream in (False, True):
        answer = complete(
            client, max_tokens=40, stop=["never there", stop], stream=stream, extra_body={"ignore_eos": True}
        )
        chunks = list(answer) if stream else [answer]
        assert "".join(c.choices[0].text for c in chunks) == whole[:cut]
        assert chunks[-1].choices[0].finish_reason == "stop"
    usage = complete(client, max_tokens=40, stop=stop, extra_body={"ignore_eos": True}).usage
    kept = complete(client, max_tokens=usage.completion_tokens, extra_body={"ignore_eos": True}).choices[0].text
    assert stop in kept  # the last token counted is the one that completed the match
    before = complete(client, max_tokens=usage.completion_tokens - 1, extra_body={"ignore_eos": True}).choices[0].text
    assert stop not in before


def test_stop_token_ids_are_not_shown(client):
    ids = tokenize(client, complete(client, extra_body={"ignore_eos": True}).choices[0].text)
    answer = complete(client, extra_body={"stop_token_ids": [ids[3]], "ignore_eos": True})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens <= 4


def test_seed_repeats(client):
    one, two, three = (complete(client, temperature=1, seed=s).choices[0].text for s in (11, 11, 12))
    assert one == two != three


def test_chat_plain_and_streamed(client):
    plain = chat(client)
    assert plain.object == "chat.completion"
    assert plain.choices[0].message.role == "assistant"
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    *deltas, last = chunks
    assert deltas[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content for c in deltas) == plain.choices[0].message.content
    assert deltas[-1].choices[0].finish_reason == plain.choices[0].finish_reason
    assert last.usage == plain.usage or last.usage.completion_tokens == plain.usage.completion_tokens


def test_chat_parts_are_text(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    assert chat(client, messages=parts).choices[0].message.content == chat(client).choices[0].message.content


def test_chat_logprobs(client):
    choice = chat(client, max_tokens=5, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True}).choices[0]
    assert len(choice.logprobs.content) == 5
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)  # greedy
    shown = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert shown.decode(errors="replace").startswith(choice.message.content.rstrip("\ufffd"))


def test_chat_without_max_tokens_gets_the_rest_of_the_context(client):
    stop = chat(client, max_tokens=8, extra_body={"ignore_eos": True}).choices[0].message.content[4:6]
    answer = chat(client, max_tokens=openai.NOT_GIVEN, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"


def test_control_tokens_in_content_are_text(client):
    eos = client.get("../tokenizer_info", cast_to=object)["eos_token"]
    plain = chat(client, messages=[{"role": "user", "content": "x"}]).usage.prompt_tokens
    attack = chat(client, messages=[{"role": "user", "content": f"x{eos}"}]).usage.prompt_tokens
    assert attack > plain + 1
    assert len(tokenize(client, eos)) == 1


def test_unicode_never_breaks_in_a_stream(client):
    text = "naïve 日本語 🙂🏽 Ωmega"
    ids = tokenize(client, text)
    options = {"temperature": 2, "max_tokens": 120, "seed": 3, "extra_body": {"ignore_eos": True}}
    chunks = list(complete(client, prompt=ids, stream=True, **options))
    plain = complete(client, prompt=ids, **options).choices[0].text
    assert "".join(c.choices[0].text for c in chunks) == plain


@pytest.mark.parametrize(
    ("call", "error", "param", "code"),
    [
        (lambda c: complete(c, "gpt-4"), openai.NotFoundError, "model", "model_not_found"),
        (lambda c: complete(c, "pocket:int3"), openai.NotFoundError, "model", "model_not_found"),
        (lambda c: complete(c, temperature=3), openai.BadRequestError, "temperature", None),
        (lambda c: chat(c, messages=[]), openai.BadRequestError, "messages", None),
        (lambda c: complete(c, max_tokens=10**6), openai.BadRequestError, "prompt", "context_length_exceeded"),
        (lambda c: chat(c, max_tokens=10**6), openai.BadRequestError, "messages", "context_length_exceeded"),
    ],
)
def test_errors_are_openais(client, call, error, param, code):
    with pytest.raises(error) as caught:
        call(client)
    assert caught.value.param == param
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


async def test_many_streams_at_once_equal_their_single_runs(served):
    """Variants mixed in one batch do not disturb each other."""
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

        async def one(variant: str, prompt: str) -> str:
            stream = await client.completions.create(
                model=f"pocket:{variant}", prompt=prompt, max_tokens=16, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        cases = [(v, p) for v in ("bf16", "int8-row", "fp8-row") for p in (PROMPT, "Once", "The sea was", "A dog")]
        alone = [await one(*case) for case in cases]
        assert await asyncio.gather(*(one(*case) for case in cases)) == alone
