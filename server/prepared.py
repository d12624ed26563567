"""A validated request, ready for the engine: which variant, which token ids, what the response must look like.

`prepare_completion` and `prepare_chat` tokenise, check and hash; they touch no event loop, so that large requests can
be prepared in a thread.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.block_manager import hash_blocks, prefix_seed
from engine.messages import EngineInfo, VariantInfo
from engine.sequence import MAX_SEQUENCES, ParameterError, SamplingParams, check_params
from server.api_config import ApiConfig
from server.errors import ApiError
from server.schemas import (
    ChatRequest,
    CompletionRequest,
    Generation,
    check_cache_salt,
    check_messages,
    check_stream,
    sampling_params,
)
from server.tokenizer import ServerTokenizer

MAX_COMPOSED = 3  # characters that normalisation may turn into one (NFC: a Hangul syllable)


@dataclass(frozen=True)
class Services:
    """What handlers work with; made once by the lifespan."""

    config: ApiConfig
    tokenizer: ServerTokenizer
    defaults: dict[str, float]  # the model's own sampling parameters
    longest_token: int  # in bytes
    started: int  # Unix time


@dataclass(frozen=True)
class Prepared:
    """One request: `prompts` x `params.n` choices. logprobs: top-n the client asked for, None for none; likewise
    prompt_logprobs, from `prompt_logprobs_start`. echo: the prompts' texts, to stand before the generated text.
    stop_ids: tokens that end a sequence and are no part of its text."""

    id: str
    created: int
    model: str
    variant: VariantInfo
    chat: bool
    prompts: list[list[int]]
    cache_seed: bytes
    hashes: list[list[bytes]]
    params: SamplingParams
    stop_ids: frozenset[int]
    skip_special_tokens: bool
    echo: list[str] | None
    logprobs: int | None
    prompt_logprobs: int | None
    prompt_logprobs_start: int
    include_usage: bool
    continuous_usage: bool


def resolve_model(name: str, config: ApiConfig, info: EngineInfo) -> VariantInfo:
    """The variant that a model name means: `served` (the default variant) or `served:variant`."""
    served = config.served_model_name
    variants = [v for v in info.variants if not v.removing]
    for variant in variants:
        if name == f"{served}:{variant.name}" or (name == served and variant.name == info.default_variant):
            return variant
    loaded = ", ".join([served, *(f"{served}:{v.name}" for v in variants)])
    raise ApiError("model_not_found", f"The model {name[:200]!r} does not exist. Loaded: {loaded}.", "model")


def prompt_list(request: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts of a completion request as a list, whichever of the four ways they were sent."""
    prompt: Any = request.prompt
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [prompt]
    assert isinstance(prompt, list)
    return prompt


def count_sequences(request: Generation, config: ApiConfig) -> int:
    """How many sequences a request wants. Raises ApiError beyond the cap, before any of them costs anything."""
    prompts = len(prompt_list(request)) if isinstance(request, CompletionRequest) else 1
    n = 1 if request.n is None else request.n
    if not 1 <= n <= MAX_SEQUENCES:
        raise ApiError("invalid_request", f"n must be between 1 and {MAX_SEQUENCES}, got {n}.", "n")
    if prompts * n > config.max_prompts:
        text = (
            f"The request asks for {prompts} prompts times n {n}; at most {config.max_prompts} sequences are allowed."
        )
        raise ApiError("too_many_prompts", text, "n" if prompts == 1 else "prompt")
    return prompts * n


def prepare(services: Services, request: CompletionRequest | ChatRequest, info: EngineInfo) -> Prepared:
    """Raises ApiError or ParameterError for whatever is wrong with the request."""
    check_stream(request)
    variant = resolve_model(request.model, services.config, info)
    salt = check_cache_salt(request.cache_salt)
    params = sampling_params(request, services.defaults)
    if isinstance(request, ChatRequest):
        prompts, params = _chat_prompt(services, request, params, info)
    else:
        prompts = _completion_prompts(services, request, info)
    for ids in prompts:
        try:
            check_params(params, ids, info.max_model_len, info.vocab_size)
        except ParameterError as e:
            param = _public_name(e.param, request, params)
            raise ApiError("invalid_request", str(e).replace(e.param, param, 1), param, e.code) from None
    seed = prefix_seed(variant.fingerprint, salt) if info.enable_prefix_caching else b""
    echo = request.echo if isinstance(request, CompletionRequest) else None
    options = request.stream_options
    return Prepared(
        id=("chatcmpl-" if isinstance(request, ChatRequest) else "cmpl-") + secrets.token_hex(12),
        created=int(time.time()),
        model=f"{services.config.served_model_name}:{variant.name}",
        variant=variant,
        chat=isinstance(request, ChatRequest),
        prompts=prompts,
        cache_seed=seed,
        hashes=[hash_blocks(seed, ids, variant.block_size) if seed else [] for ids in prompts],
        params=params,
        stop_ids=frozenset(params.stop_token_ids).union([] if params.ignore_eos else info.eos_token_ids),
        skip_special_tokens=request.skip_special_tokens is not False,
        echo=_echo_texts(services, request, prompts) if echo else None,
        logprobs=params.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        prompt_logprobs_start=request.prompt_logprobs_start or 0,
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )


def _completion_prompts(services: Services, request: CompletionRequest, info: EngineInfo) -> list[list[int]]:
    prompts: list[Any] = prompt_list(request)
    for prompt in prompts:
        if isinstance(prompt, str):
            _check_size(services, len(prompt), info, "prompt")
    encode, special = services.tokenizer.encode, request.add_special_tokens is not False
    return [encode(p, add_special_tokens=special) if isinstance(p, str) else p for p in prompts]


def _check_size(services: Services, num_characters: int, info: EngineInfo, param: str) -> None:
    """Refuse text that no tokenising could fit into the context, before it costs seconds of tokenising."""
    limit = MAX_COMPOSED * info.max_model_len * services.longest_token
    if num_characters > limit:
        text = f"this model's context is {info.max_model_len} tokens; a text of {num_characters} characters is more."
        raise ApiError("invalid_request", text, param, "context_length_exceeded")


def _chat_prompt(
    services: Services, request: ChatRequest, params: SamplingParams, info: EngineInfo
) -> tuple[list[list[int]], SamplingParams]:
    """The rendered conversation's ids, and the rest of the context as max_tokens where the request names none."""
    last = request.continue_final_message is True
    if last and request.add_generation_prompt:
        text = "continue_final_message and add_generation_prompt exclude each other."
        raise ApiError("invalid_request", text, "continue_final_message")
    messages = check_messages(request.messages)
    _check_size(services, sum(len(m["content"]) for m in messages), info, "messages")
    ids = services.tokenizer.encode_chat(
        messages,
        enable_thinking=request.chat_template_kwargs.enable_thinking if request.chat_template_kwargs else None,
        add_generation_prompt=not last and request.add_generation_prompt is not False,
        continue_final_message=last,
        parse_special_in_content=services.config.parse_special_in_content,
    )
    if request.max_tokens is None and request.max_completion_tokens is None:
        params = msgspec.structs.replace(params, max_tokens=max(1, info.max_model_len - len(ids)))
    return [ids], params


def _echo_texts(services: Services, request: CompletionRequest | ChatRequest, prompts: list[list[int]]) -> list[str]:
    assert isinstance(request, CompletionRequest)
    return [
        p if isinstance(p, str) else services.tokenizer.decode(p, skip_special_tokens=False)
        for p in prompt_list(request)
    ]


def _public_name(param: str, request: Generation, params: SamplingParams) -> str:
    """The request's own name of an engine parameter."""
    if isinstance(request, ChatRequest):
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        if request.max_tokens is None and request.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names.get(param, param)
    assert isinstance(request, CompletionRequest)
    # with echo, logprobs asks for the prompt's too
    return "logprobs" if param == "prompt_logprobs" and request.prompt_logprobs != params.prompt_logprobs else param
