"""`POST /v1/compare`: one prompt through several variants, and where they part, token by token.

The continuation is the caller's, or the greedy one of the baseline (`bf16` if it is asked for, else the first). Every
variant reads prompt and continuation as they are, so that at each token all have seen the same; each token then has its
logprob under every variant, and each variant against the baseline has

    top1_flips          tokens at which its likeliest next token is another
    first_divergence    the first of them: up to there its greedy text is the baseline's
    kl                  divergence of its distribution from the baseline's at each token, in nats. The outcomes are the
                        tokens that both have among their TOP likeliest, and all others as one, so it is a lower bound
                        (merging outcomes never raises a divergence), close where those tokens hold nearly all
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.types import Receive

from engine.messages import EngineInfo, Logprobs
from server.choices import LOWEST
from server.engine_client import EngineClient, RequestStream
from server.errors import ApiError
from server.prepared import Services, prepare, resolve_model
from server.schemas import CompareRequest, CompletionRequest

BASELINE = "bf16"
TOP = 20
DEFAULT_TOKENS = 16
TINY = 1e-6  # a rest that is smaller is rounding

logger = logging.getLogger("octavo.api")


async def compare_variants(
    services: Services, client: EngineClient, info: EngineInfo, body: CompareRequest, receive: Receive
) -> dict[str, Any]:
    """The answer's document. Raises ApiError or ParameterError for what is wrong with the request, and ClientGone."""
    models = _models(services, info, body.variants)
    baseline = BASELINE if BASELINE in models else next(iter(models))
    if body.continuation is not None and body.max_tokens is not None:
        raise ApiError("invalid_request", "max_tokens is of a greedy continuation: leave it out here.", "max_tokens")
    if body.max_tokens is not None and body.max_tokens < 1:
        raise ApiError("invalid_request", f"max_tokens must be at least 1, got {body.max_tokens}.", "max_tokens")
    prompt = await _ids(services, body.prompt, "prompt", body.add_special_tokens is not False)
    salt = body.cache_salt
    with client.admission(len(models)):
        if body.continuation is not None:
            continuation = await _ids(services, body.continuation, "continuation", False)
        else:
            length = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
            greedy = CompletionRequest(
                model=models[baseline],
                prompt=prompt,
                max_tokens=length,
                temperature=0.0,
                repetition_penalty=1.0,
                cache_salt=salt,
            )
            (stream,) = await _run(services, client, info, [greedy], receive)
            continuation, _ = stream.sequences[0].take()
        reads = [
            CompletionRequest(
                model=model,
                prompt=prompt + continuation,
                max_tokens=0,
                echo=True,
                prompt_logprobs=TOP,
                prompt_logprobs_start=len(prompt),
                cache_salt=salt,
            )
            for model in models.values()
        ]
        streams = await _run(services, client, info, reads, receive)
    positions = range(len(prompt), len(prompt) + len(continuation))
    found = {
        name: [stream.prompt_logprobs[0][i] for i in positions] for name, stream in zip(models, streams, strict=True)
    }
    document = {"object": "comparison", "baseline": baseline, "prompt_tokens": len(prompt)}
    return document | await asyncio.to_thread(_compared, services, models, baseline, continuation, found)


def _models(services: Services, info: EngineInfo, wanted: list[str] | None) -> dict[str, str]:
    """Model names by variant; of all variants where none is named. Raises ApiError for one that is not loaded."""
    served = services.config.served_model_name
    if wanted is not None and not wanted:
        raise ApiError("invalid_request", "variants must name at least one variant.", "variants")
    models = {}
    for name in wanted or [v.name for v in info.variants if not v.removing]:
        try:
            variant = resolve_model(name if ":" in name else f"{served}:{name}", services.config, info)
        except ApiError as e:
            raise ApiError("model_not_found", e.message, "variants") from None
        models[variant.name] = f"{served}:{variant.name}"
    return models


async def _ids(services: Services, text: str | list[int], param: str, special: bool) -> list[int]:
    ids = text
    if isinstance(text, str):
        ids = await asyncio.to_thread(services.tokenizer.encode, text, add_special_tokens=special)
    if not ids:
        raise ApiError("invalid_request", f"{param} must hold at least one token.", param)
    assert isinstance(ids, list)
    return ids


async def _run(
    services: Services, client: EngineClient, info: EngineInfo, requests: list[CompletionRequest], receive: Receive
) -> list[RequestStream]:
    """Run requests of one sequence each, all at once, to their end. Raises what ended one, and ClientGone."""
    prepared = [await asyncio.to_thread(prepare, services, request, info) for request in requests]
    client.ready_info()  # it may have died meanwhile
    streams: list[RequestStream] = []
    watcher = asyncio.create_task(_watch(client, streams, receive))
    try:
        for p in prepared:
            streams.append(client.submit(p))
        for stream in streams:
            (sequence,) = stream.sequences
            while sequence.finished is None:
                await stream.next()
            if sequence.finished.reason == "error":
                logger.error("comparison: the engine ended a sequence: %s", sequence.finished.error)
                raise ApiError("internal_error")
    finally:
        watcher.cancel()
        for stream in streams:
            client.abort(stream)
    return streams


async def _watch(client: EngineClient, streams: list[RequestStream], receive: Receive) -> None:
    """A client that goes away ends its sequences."""
    while (await receive())["type"] != "http.disconnect":
        pass
    for stream in streams:
        client.disconnected(stream)


def _compared(
    services: Services,
    models: Mapping[str, str],
    baseline: str,
    continuation: list[int],
    found: Mapping[str, list[Logprobs]],
) -> dict[str, Any]:
    """What was found of each token and each variant."""
    texts = [services.tokenizer.decode([i], skip_special_tokens=False) for i in continuation]
    tokens = [
        {"id": token, "text": text, "logprobs": {name: max(LOWEST, found[name][i].values[0]) for name in models}}
        for i, (token, text) in enumerate(zip(continuation, texts, strict=True))
    ]
    base = found[baseline]
    variants = []
    for name, model in models.items():
        flips = [i for i, (a, b) in enumerate(zip(base, found[name], strict=True)) if a.ids[1] != b.ids[1]]
        kl = [divergence(a, b) for a, b in zip(base, found[name], strict=True)]
        variants.append(
            {
                "variant": name,
                "model": model,
                "logprob": max(LOWEST, math.fsum(entry.values[0] for entry in found[name])),
                "top_token_ids": [entry.ids[1] for entry in found[name]],
                "top1_flips": len(flips),
                "first_divergence": flips[0] if flips else None,
                "kl": kl,
                "mean_kl": math.fsum(kl) / len(kl),
            }
        )
    text = services.tokenizer.decode(continuation, skip_special_tokens=False)
    return {"continuation": text, "tokens": tokens, "variants": variants}


def divergence(a: Logprobs, b: Logprobs) -> float:
    """KL(a || b) in nats over the tokens that both have among their likeliest, and the rest as one outcome."""
    first, second = (dict(zip(x.ids[1:], x.values[1:], strict=True)) for x in (a, b))
    both = [(first[i], second[i]) for i in first.keys() & second.keys()]
    p_rest, q_rest = (max(0.0, 1.0 - math.fsum(math.exp(pair[k]) for pair in both)) for k in (0, 1))
    total = math.fsum(math.exp(p) * (p - q) for p, q in both)
    if p_rest > TINY:
        total += p_rest * math.log(p_rest / max(q_rest, TINY))
    return max(0.0, total)
