"""What clients may send: OpenAI's request bodies, our extra fields beside theirs at the top level.

A body is decoded in two passes. The first splits the object into names and undecoded values and refuses duplicate
names, NaN, broken nesting: `invalid_json`. The second decodes each known field strictly by its annotation, so that an
error always knows its field. null means absent. Names in UNSUPPORTED are refused when set, because ignoring them would
change what the caller gets; any other unknown name is ignored.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar, get_type_hints

import msgspec

from engine.sequence import SamplingParams
from server.errors import ApiError

MAX_MESSAGES = 4096
MAX_CACHE_SALT = 128
SALT_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Part(msgspec.Struct):
    type: str
    text: str | None = None


class Message(msgspec.Struct, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class ChatTemplateKwargs(msgspec.Struct, forbid_unknown_fields=True):
    enable_thinking: bool | None = None


class Generation(msgspec.Struct, kw_only=True):
    """Fields that completions and chat share; the sampling fields are those of `engine.SamplingParams`."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int | None = None
    logprob_token_ids: list[int] | None = None
    cache_salt: str | None = None
    skip_special_tokens: bool | None = None


class CompletionRequest(Generation, kw_only=True):
    prompt: Any = None  # decoded by `prompt_decoder`: str, list[str], list[int] or list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None
    best_of: int | None = None


class ChatRequest(Generation, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    prompt: str
    add_special_tokens: bool | None = None


class AddVariantRequest(msgspec.Struct, kw_only=True):
    name: str


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[int]


class CompareRequest(msgspec.Struct, kw_only=True):
    """variants: names, or model names; null: all. Without a continuation, `max_tokens` greedy ones of the baseline."""

    prompt: str | list[int]
    continuation: str | list[int] | None = None
    variants: list[str] | None = None
    max_tokens: int | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None


# Name -> why it is refused. Values that ask for nothing (null, and those of HARMLESS) pass.
UNSUPPORTED = {
    "suffix": "suffix is not supported.",
    "prompt_embeds": "prompt_embeds is not supported: send text or token ids.",
    "logits_processors": "logits_processors is not supported.",
    "custom_logit_processor": "custom_logit_processor is not supported.",
    "chat_template": "chat_template cannot be sent with a request: the server uses the model's own.",
    "response_format": "response_format is not supported: only plain text can be asked for.",
    "guided_json": "guided_json is not supported.",
    "guided_regex": "guided_regex is not supported.",
    "guided_grammar": "guided_grammar is not supported.",
    "guided_choice": "guided_choice is not supported.",
    "structured_outputs": "structured_outputs is not supported.",
    "tools": "tools is not supported.",
    "tool_choice": "tool_choice is not supported.",
    "functions": "functions is not supported.",
    "function_call": "function_call is not supported.",
    "use_beam_search": "Beam search is not supported.",
    "audio": "audio is not supported.",
    "modalities": "modalities other than text are not supported.",
    "prediction": "prediction is not supported.",
    "web_search_options": "web_search_options is not supported.",
}
HARMLESS: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "suffix": ("",),
    "use_beam_search": (False,),
    "modalities": (["text"],),
}


class _Key:
    """A JSON name that equals no other, so that duplicates survive decoding into a dict."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


def _hook(kind: type, value: Any) -> Any:
    return kind(value)


_OBJECT = msgspec.json.Decoder(dict[_Key, msgspec.Raw], dec_hook=_hook)
_OBJECTS = msgspec.json.Decoder(list[dict[_Key, msgspec.Raw]], dec_hook=_hook)
_ANY = msgspec.json.Decoder(msgspec.Raw)
_BAD = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

Body = TypeVar("Body", bound=msgspec.Struct)
T = TypeVar("T")


def _decoders(schema: type[msgspec.Struct]) -> dict[str, msgspec.json.Decoder[Any]]:
    return {name: msgspec.json.Decoder(hint) for name, hint in get_type_hints(schema).items()}


DECODERS: dict[type[msgspec.Struct], dict[str, msgspec.json.Decoder[Any]]] = {
    schema: _decoders(schema)
    for schema in (
        CompletionRequest,
        ChatRequest,
        TokenizeRequest,
        DetokenizeRequest,
        CompareRequest,
        AddVariantRequest,
    )
}
REQUIRED = {  # listing a schema's fields takes longer than decoding 512 ids
    schema: [f.name for f in msgspec.structs.fields(schema) if f.required or f.name == "prompt"] for schema in DECODERS
}
_PROMPTS = {b"s": msgspec.json.Decoder(str)} | {
    b"[" + first: msgspec.json.Decoder(kind)
    for first, kind in ((b'"', list[str]), (b"[", list[list[int]]), (b"", list[int]))
}


def prompt_decoder(raw: bytes) -> msgspec.json.Decoder[Any]:
    """The decoder for the one of the four kinds of prompt that `raw` begins like."""
    if not raw.startswith(b"["):
        return _PROMPTS[b"s"]
    return _PROMPTS.get(b"[" + raw[1:64].lstrip()[:1], _PROMPTS[b"["])


def parse(schema: type[Body], body: bytes) -> Body:
    """Decode a request body. Raises ApiError naming the field at fault, or null for the body as a whole."""
    decoders = DECODERS[schema]
    values: dict[str, Any] = {}
    for name, raw in _split(body).items():
        if name in UNSUPPORTED:
            _refuse(name, raw)
        decoder = prompt_decoder(raw) if (name, schema) == ("prompt", CompletionRequest) else decoders.get(name)
        if decoder is None:
            continue
        try:
            value = decoder.decode(raw) if raw != b"null" else None
        except msgspec.ValidationError as e:
            raise ApiError(*_refusal(name, str(e)), name) from None
        except _BAD:
            raise ApiError(
                "invalid_json", f"{name} is not valid JSON text (UTF-8, nesting, surrogates).", name
            ) from None
        if value is not None:
            values[name] = value
            if name in ("messages", "logit_bias", "stream_options", "chat_template_kwargs"):
                _check_names(name, raw)
    for name in REQUIRED[schema]:
        if name not in values:
            kind = "missing_required_parameter" if name == "model" else "invalid_request"
            raise ApiError(kind, f"{name} is required.", name)
    return schema(**values)


def _split(body: bytes) -> dict[str, bytes]:
    try:
        pairs = _checked(_OBJECT, body)
    except msgspec.ValidationError:
        _checked(_ANY, body)
        raise ApiError("invalid_body") from None
    fields = {key.name: bytes(raw) for key, raw in pairs.items()}
    if len(fields) != len(pairs):
        raise ApiError("invalid_json", "The body has a duplicate name.")
    return fields


def _checked(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError:
        raise
    except _BAD as e:
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise ApiError("invalid_json", f"The body is not valid JSON: {reason}.") from None


def _check_names(param: str, raw: bytes) -> None:
    """Refuse duplicate names one level further down."""
    objects = _OBJECTS.decode(raw) if raw.startswith(b"[") else [_OBJECT.decode(raw)]
    for pairs in objects:
        if len({key.name for key in pairs}) != len(pairs):
            raise ApiError("invalid_json", f"{param} has a duplicate name.")


def _refuse(name: str, raw: bytes) -> None:
    try:
        value = msgspec.json.decode(raw)
    except _BAD:
        value = ...
    if value is not None and value not in HARMLESS.get(name, ()):
        raise ApiError("unsupported_parameter", UNSUPPORTED[name], name)


def _refusal(name: str, message: str) -> tuple[str, str]:
    """Error kind and text for a field of the wrong type, in the caller's words instead of msgspec's."""
    if name == "chat_template_kwargs":
        return "unsupported_parameter", "chat_template_kwargs takes only enable_thinking, true or false."
    what = re.sub(r"\bstr\b", "string", message).replace("`", "").replace("$", name)
    return "invalid_request", f"{name}: {what[0].lower()}{what[1:]}."


def check_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Chat messages as the template wants them: content joined to one string.

    Raises ApiError for none, too many, content of another kind than text, or no content.
    """
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise ApiError("invalid_request", f"messages must hold 1 to {MAX_MESSAGES} messages.", "messages")
    out = []
    for i, message in enumerate(messages):
        content = message.content
        if isinstance(content, list):
            for part in content:
                if part.type != "text" or part.text is None:
                    text = f"messages[{i}]: content parts of type {part.type[:40]!r} are not supported, only text."
                    raise ApiError("unsupported_content", text, "messages")
            content = "\n".join(part.text or "" for part in content)
        if content is None:
            raise ApiError("invalid_request", f"messages[{i}]: content must be a string or text parts.", "messages")
        if message.tool_calls:
            raise ApiError("unsupported_content", f"messages[{i}]: tool_calls is not supported.", "messages")
        # templates know no developer: OpenAI's newer name for system
        fields = {"role": "system" if message.role == "developer" else message.role, "content": content}
        if message.name is not None:
            fields["name"] = message.name
        if message.reasoning_content is not None:
            fields["reasoning_content"] = message.reasoning_content
        out.append(fields)
    return out


def check_stream(request: Generation) -> None:
    if request.stream_options is not None and not request.stream:
        raise ApiError("invalid_request", "stream_options needs stream: true.", "stream_options")


def check_cache_salt(salt: str | None) -> str:
    if salt is not None and not (0 < len(salt) <= MAX_CACHE_SALT and SALT_CHARACTERS.issuperset(salt)):
        raise ApiError("invalid_request", f"cache_salt must be 1 to {MAX_CACHE_SALT} of A-Z a-z 0-9 _ -.", "cache_salt")
    return salt or ""


def sampling_params(request: Generation, defaults: dict[str, float]) -> SamplingParams:
    """The engine's parameters for a request: the request's values, else `defaults` (the model's), else OpenAI's.

    A chat that names no max_tokens gets 16 here too: who knows the prompt's length gives it the rest of the context.
    Ranges are `engine.sequence.check_params`'s business.
    """
    values: dict[str, Any] = {name: kind(defaults[name]) for name, kind in _DEFAULTED.items() if name in defaults}
    for name in _SAMPLING:
        value = getattr(request, name)
        if value is not None:
            values[name] = value
    if isinstance(request.stop, str):
        values["stop"] = [request.stop]
    if 0 < values.get("temperature", 1.0) < 1e-5:
        values["temperature"] = 0.0  # dividing by less overflows: the limit is greedy
    values.setdefault("max_tokens", 16)
    if isinstance(request, ChatRequest):
        _chat_params(request, values)
    else:
        assert isinstance(request, CompletionRequest)
        _completion_params(request, values)
    return SamplingParams(**values)


_DEFAULTED: dict[str, Any] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}
_SAMPLING = [f.name for f in msgspec.structs.fields(Generation) if f.name in SamplingParams.__struct_fields__]


def _completion_params(request: CompletionRequest, values: dict[str, Any]) -> None:
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise ApiError("unsupported_parameter", "best_of is not supported.", "best_of")
    if request.logprobs is not None:
        values["logprobs"] = request.logprobs
        if request.echo:  # the prompt's logprobs come in the same arrays
            values["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
            values["prompt_logprobs_start"] = 0
    elif request.logprob_token_ids:
        values["logprobs"] = 0
    if values["max_tokens"] == 0 and not request.echo and request.prompt_logprobs is None:
        raise ApiError("invalid_request", "max_tokens 0 needs echo or prompt_logprobs.", "max_tokens")


def _chat_params(request: ChatRequest, values: dict[str, Any]) -> None:
    if request.top_logprobs and not request.logprobs:
        raise ApiError("invalid_request", "top_logprobs needs logprobs: true.", "top_logprobs")
    if request.logprobs:
        values["logprobs"] = request.top_logprobs or 0
    elif request.logprob_token_ids:
        values["logprobs"] = 0
    limit, other = request.max_completion_tokens, request.max_tokens
    if limit is not None and other is not None and limit != other:
        raise ApiError("invalid_request", "max_tokens and max_completion_tokens differ: send one.", "max_tokens")
    if limit is not None:
        values["max_tokens"] = limit
    if values["max_tokens"] == 0 and request.prompt_logprobs is None:
        raise ApiError("invalid_request", "max_tokens must be at least 1.", "max_tokens")
