"""The endpoints. A route validates, submits, formats."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from engine.messages import AddVariant, EngineInfo, RemoveVariant, Status, VariantInfo
from engine.quant.formats import parse_format
from engine.sequence import ParameterError
from server.compare import compare_variants
from server.engine_client import EngineClient
from server.errors import ApiError, ClientGone
from server.metrics import CONTENT_TYPE, Page
from server.prepared import Services, count_sequences, prepare, resolve_model
from server.responses import Answer, EventStream, whole
from server.schemas import (
    AddVariantRequest,
    ChatRequest,
    CompareRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
)

LARGE_BODY = 32 * 2**10  # a larger request is tokenised and hashed in a thread
BODY_SECONDS = 120.0
MAX_DETOKENIZE = 2**20

router = APIRouter()
Body = TypeVar("Body", bound=msgspec.Struct)


def package_version() -> str:
    try:
        return version("octavo")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0+unknown"


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """OpenAI's text completions."""
    return await _generate(request, CompletionRequest)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """OpenAI's chat completions."""
    return await _generate(request, ChatRequest)


@router.post("/v1/compare")
async def compare(request: Request) -> Response:
    """One prompt through several variants, and where they part."""
    client: EngineClient = request.state.client
    info = client.ready_info()
    body = parse(CompareRequest, await _read_body(request))
    return _json(await compare_variants(request.state.services, client, info, body, request.receive))


async def _generate(request: Request, schema: type[CompletionRequest] | type[ChatRequest]) -> Response:
    client: EngineClient = request.state.client
    services: Services = request.state.services
    info = client.ready_info()
    raw = await _read_body(request)
    body = parse(schema, raw)
    variant = resolve_model(body.model, services.config, info)
    request.scope["state"]["variant"] = variant.name
    with client.admission(count_sequences(body, services.config)):
        if len(raw) > LARGE_BODY:
            prepared = await asyncio.to_thread(prepare, services, body, info)
            client.ready_info()  # it may have died meanwhile
        else:
            prepared = prepare(services, body, info)
        stream = client.submit(prepared, request.scope["state"]["arrival"])
    answer = Answer(prepared, stream, client, services.tokenizer.table)
    request.scope["state"]["usage"] = answer.usage  # for the log, when all is over
    return EventStream(answer) if body.stream else await whole(answer, request.receive)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """One entry for the bare name (the default variant) and one for each loaded variant."""
    return _json({"object": "list", "data": list(_model_cards(request).values())})


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> Response:
    cards = _model_cards(request)
    if model not in cards:
        text = f"The model {model[:200]!r} does not exist. Loaded: {', '.join(cards)}."
        raise ApiError("model_not_found", text, "model")
    return _json(cards[model])


@router.get("/v1/variants")
async def variants(request: Request) -> Response:
    """What is loaded, what is on its way out, and the bytes that others may yet take."""
    info = _engine_info(request)
    cards = [_variant_card(request, info, variant) for variant in info.variants]
    return _json({"object": "list", "data": cards, "headroom_bytes": info.headroom})


@router.post("/v1/variants")
async def add_variant(request: Request) -> Response:
    """Load a variant while serving: 201 when it can be asked, 200 if it could be already, 409 if there is no room."""
    client: EngineClient = request.state.client
    client.ready_info()
    try:
        name = parse_format(parse(AddVariantRequest, await _read_body(request)).name).name
    except ValueError as e:
        raise ApiError("invalid_request", str(e), "name") from None
    answer = await client.change_variants(AddVariant, name)
    info = _engine_info(request)
    variant = next((v for v in info.variants if v.name == name), None)
    if variant is None:
        raise ApiError("variant_conflict", f"{name} was added, and removed again by another request.", "name")
    return _json(_variant_card(request, info, variant), 201 if answer.changed else 200)


@router.delete("/v1/variants/{name:path}")
async def remove_variant(request: Request, name: str) -> Response:
    """Free a variant: 200 when its memory is free. It takes no new requests, and those in flight finish first."""
    client: EngineClient = request.state.client
    client.ready_info()
    try:
        name = parse_format(name).name
    except ValueError as e:
        raise ApiError("model_not_found", str(e)) from None
    await client.change_variants(RemoveVariant, name)
    return _json({"name": name, "object": "variant", "deleted": True})


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Ids of a text; control tokens in it are control tokens."""
    services: Services = request.state.services
    raw = await _read_body(request)
    body = parse(TokenizeRequest, raw)
    encode, special = services.tokenizer.encode, body.add_special_tokens is not False
    if len(raw) > LARGE_BODY:
        ids = await asyncio.to_thread(encode, body.prompt, add_special_tokens=special)
    else:
        ids = encode(body.prompt, add_special_tokens=special)
    status = request.state.client.status
    info = status.info if status is not None else None
    return _json({"tokens": ids, "count": len(ids), "max_model_len": info.max_model_len if info else None})


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """Text of ids, control tokens included."""
    services: Services = request.state.services
    tokens = parse(DetokenizeRequest, await _read_body(request)).tokens
    if len(tokens) > MAX_DETOKENIZE:
        raise ParameterError("tokens", f"tokens holds more than {MAX_DETOKENIZE} ids")
    if tokens and not 0 <= min(tokens) <= max(tokens) < services.tokenizer.num_ids:
        raise ParameterError("tokens", f"tokens: ids must be in [0, {services.tokenizer.num_ids})")
    text = await asyncio.to_thread(services.tokenizer.decode, tokens, skip_special_tokens=False)
    return _json({"prompt": text})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    tokenizer = request.state.services.tokenizer
    names = ("eos_token", "bos_token", "pad_token", "chat_template")
    return _json({name: getattr(tokenizer, name) for name in names} | {"vocab_size": tokenizer.num_ids})


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the engine is alive and makes progress, else 503."""
    error = request.state.client.unhealthy()
    if error is not None:
        raise error
    return _json({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 while requests are taken: not before the engine is ready, not while draining."""
    client: EngineClient = request.state.client
    client.ready_info()
    if not client.connected():
        raise ApiError("engine_loading")
    return _json({"status": "ready"})


@router.get("/version")
async def get_version(request: Request) -> Response:
    return _json({"version": package_version()})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format, of the whole server."""
    page: Page = request.state.page
    return Response(page.render(request.state.client.status), media_type=CONTENT_TYPE)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _engine_info(request: Request) -> EngineInfo:
    status: Status | None = request.state.client.status
    if status is None or status.info is None:
        raise ApiError("engine_loading")
    return status.info


def _variant_card(request: Request, info: EngineInfo, variant: VariantInfo) -> dict[str, Any]:
    return {
        "name": variant.name,
        "object": "variant",
        "model": f"{request.state.services.config.served_model_name}:{variant.name}",
        "default": variant.name == info.default_variant,
        "state": "removing" if variant.removing else "loaded",
        "format": _format(variant.name),
        "own_bytes": variant.own_bytes,
        "shared_bytes": variant.shared_bytes,
        "kv_tokens": info.num_blocks * variant.block_size,
    }


def _format(name: str) -> dict[str, Any]:
    """How a variant stores and multiplies its matrices, and its KV; see `engine.quant.formats.Format`."""
    return {key: value for key, value in asdict(parse_format(name)).items() if key != "name"}


def _model_cards(request: Request) -> dict[str, dict[str, Any]]:
    services: Services = request.state.services
    info, served = _engine_info(request), services.config.served_model_name
    by_name = {variant.name: variant for variant in info.variants if not variant.removing}
    ids = {served: info.default_variant} | {f"{served}:{name}": name for name in by_name}
    return {
        model_id: {
            "id": model_id,
            "object": "model",
            "created": services.started,
            "owned_by": "octavo",
            "root": services.config.model_root,
            "parent": None,
            "max_model_len": info.max_model_len,
            "variant": name,
            "format": _format(name),
            "own_bytes": by_name[name].own_bytes,
            "shared_bytes": by_name[name].shared_bytes,
            "kv_tokens": info.num_blocks * by_name[name].block_size,
        }
        for model_id, name in ids.items()
    }


async def _read_body(request: Request) -> bytes:
    """The body, counted while it arrives. Raises ApiError when it is not JSON by name, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError("unsupported_media_type")
    limit: int = request.state.services.config.max_body_bytes
    length = request.headers.get("content-length", "0")
    chunks, size = [], int(length) if length.isdigit() else 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if size <= limit:
                size = 0
                async for chunk in request.stream():
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > limit:
                        break
    except TimeoutError:
        raise ApiError("request_timeout") from None
    except ClientDisconnect:
        raise ClientGone from None
    if size > limit:
        raise ApiError("request_too_large", f"The body must not exceed {limit} bytes.")
    return b"".join(chunks)
