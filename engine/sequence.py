"""What a caller asks of one prompt, and the engine's mutable record of answering it.

`SamplingParams` crosses processes (it is part of `messages.AddRequest`), so it is a msgspec struct with checked types.
`Sequence` is the one mutable object per sequence; everything else is frozen or rebuilt each step. No torch here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

MAX_LOGPROBS = 20  # top-n logprobs of one position, and named ids
MAX_STOPS = 16
MAX_SEQUENCES = 128  # n of one request


class ParameterError(ValueError):
    """A request's parameter is out of range or of the wrong kind.

    `param` is the request field to blame, `code` an OpenAI-style error code or None.
    """

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Draw(NamedTuple):
    """What a sequence's draws need of a batch, as long as it lives. filter_width: of the best ids, how many top-k and
    min-p must look at. nucleus: top-p without top-k. num_logprobs: -1 for none. by_row: there is more to it, which is
    looked up for the row in each step.
    """

    filter_width: int
    nucleus: bool
    num_logprobs: int
    by_row: bool


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to continue one prompt.

    temperature: 0 is greedy. top_k: 0 or -1 is off. seed: the same seed gives the same tokens whatever else is in the
    batch; sequence i of n draws from seed + i. stop: strings, matched where text is made; the text ends before the
    match. min_tokens: EOS and stop ids are not sampled before that many tokens. logprobs: top-n beside the sampled
    token's (0: only the sampled token's). prompt_logprobs: top-n of each prompt token from position
    `prompt_logprobs_start` on (position 0 has none). logprob_token_ids: ids whose logprob is always reported.
    detokenize: False leaves `text` empty (LLM only).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int = 64
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    logprob_token_ids: list[int] = []
    detokenize: bool = True

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def draw(self) -> Draw:
        """What each of its draws needs."""
        random = self.temperature > 0
        return Draw(
            filter_width=max(0, self.top_k, 1 if self.min_p > 0 else 0) if random else 0,
            nucleus=random and self.top_p < 1 and self.top_k <= 0,
            num_logprobs=max(-1 if self.logprobs is None else self.logprobs, 0 if self.logprob_token_ids else -1),
            by_row=self.has_penalties or bool(self.logit_bias or self.logprob_token_ids) or self.min_tokens > 0,
        )


def check_params(p: SamplingParams, prompt: list[int], max_model_len: int, vocab_size: int) -> None:
    """Raise ParameterError unless `p` and the prompt's ids are in range for a model of `vocab_size` and
    `max_model_len`.

    Every integer that could index device memory is checked here, on the host. max_tokens 0 is legal: it computes the
    prompt only (prompt logprobs).
    """

    def fail(param: str, message: str, code: str | None = None) -> None:
        raise ParameterError(param, message, code)

    def in_range(param: str, value: float, low: float, high: float) -> None:
        if not math.isfinite(value) or not low <= value <= high:
            fail(param, f"{param} must be between {low:g} and {high:g}, got {value}")

    def ids(param: str, values: list[int], limit: int) -> None:
        if len(values) > limit:
            fail(param, f"{param} takes at most {limit} ids, got {len(values)}")
        for i in values:
            if not 0 <= i < vocab_size:
                fail(param, f"{param}: token id {i} is outside the vocabulary [0, {vocab_size})")

    in_range("temperature", p.temperature, 0, 2)
    if not 0 < p.top_p <= 1:
        fail("top_p", f"top_p must be in (0, 1], got {p.top_p}")
    if not -1 <= p.top_k <= 2**31 - 1:
        fail("top_k", f"top_k must be -1 or 0 (off) or positive, got {p.top_k}")
    in_range("min_p", p.min_p, 0, 1)
    if p.seed is not None and not 0 <= p.seed < 2**63:
        fail("seed", f"seed must be in [0, 2^63), got {p.seed}")
    in_range("presence_penalty", p.presence_penalty, -2, 2)
    in_range("frequency_penalty", p.frequency_penalty, -2, 2)
    if not math.isfinite(p.repetition_penalty) or not 0 < p.repetition_penalty <= 10:
        fail("repetition_penalty", f"repetition_penalty must be in (0, 10], got {p.repetition_penalty}")
    if len(p.logit_bias) > 1024:
        fail("logit_bias", f"logit_bias takes at most 1024 entries, got {len(p.logit_bias)}")
    ids("logit_bias", list(p.logit_bias), 1024)
    for value in p.logit_bias.values():
        in_range("logit_bias", value, -100, 100)
    if len(p.stop) > MAX_STOPS:
        fail("stop", f"stop takes at most {MAX_STOPS} strings, got {len(p.stop)}")
    for s in p.stop:
        if not 0 < len(s) <= 1024:
            fail("stop", "a stop string must have 1 to 1024 characters")
    ids("stop_token_ids", p.stop_token_ids, 64)
    if not 1 <= p.n <= MAX_SEQUENCES:
        fail("n", f"n must be between 1 and {MAX_SEQUENCES}, got {p.n}")
    for param, count in (("logprobs", p.logprobs), ("prompt_logprobs", p.prompt_logprobs)):
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            fail(param, f"{param} must be between 0 and {MAX_LOGPROBS}, got {count}")
    ids("logprob_token_ids", p.logprob_token_ids, MAX_LOGPROBS)
    if p.prompt_logprobs_start < 0:
        fail("prompt_logprobs_start", f"prompt_logprobs_start must not be negative, got {p.prompt_logprobs_start}")
    if not prompt:
        fail("prompt", "the prompt must hold at least one token")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        bad = next(i for i in prompt if not 0 <= i < vocab_size)
        fail("prompt", f"prompt: token id {bad} is outside the vocabulary [0, {vocab_size})")
    if p.max_tokens < 0:
        fail("max_tokens", f"max_tokens must not be negative, got {p.max_tokens}")
    if not 0 <= p.min_tokens <= p.max_tokens:
        fail("min_tokens", f"min_tokens must be between 0 and max_tokens ({p.max_tokens}), got {p.min_tokens}")
    if len(prompt) + p.max_tokens > max_model_len:
        fail(
            "prompt",
            f"this model's context is {max_model_len} tokens; the prompt has {len(prompt)} and max_tokens asks for "
            f"{p.max_tokens} more ({len(prompt) + p.max_tokens} in all). Shorten the prompt or lower max_tokens.",
            "context_length_exceeded",
        )


class Sequence:
    """One prompt being continued by the engine: the only mutable object of a request.

    `token_ids` are those the host knows; `num_tokens` also counts sampled ids that are still on the device. The
    scheduler's one rule: a sequence wants `num_tokens - num_computed` tokens.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "cache_seed",
        "draw",
        "eos_token_ids",
        "finished",
        "first_scheduled",
        "hashes",
        "id",
        "next_prompt_logprob",
        "num_cached_tokens",
        "num_computed",
        "num_tokens",
        "params",
        "prompt_len",
        "row",
        "seed",
        "stop_ids",
        "token_ids",
        "variant",
    )

    def __init__(
        self,
        id: int,
        variant: str,
        prompt: list[int],
        params: SamplingParams,
        eos_token_ids: frozenset[int],
        seed: int,
        cache_seed: bytes,
        hashes: list[bytes],
        arrival: float,
    ) -> None:
        self.id = id
        self.variant = variant
        self.token_ids = list(prompt)
        self.prompt_len = len(prompt)
        self.num_tokens = len(prompt)
        self.num_computed = 0
        self.params = params
        self.draw = params.draw
        # Ids that end the sequence; min_tokens bans them for a while.
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self.eos_token_ids = eos_token_ids
        self.seed = seed
        self.cache_seed = cache_seed
        self.hashes = list(hashes)  # of full blocks of known tokens, prompt and output
        self.blocks: list[int] = []
        self.row = -1  # of the device's tables while running
        self.num_cached_tokens = 0  # prompt tokens taken from the prefix cache at first admission
        self.arrival = arrival
        self.first_scheduled: float | None = None
        self.finished = False
        # The next prompt position whose logprob is owed; prompt_len when none is.
        self.next_prompt_logprob = (
            self.prompt_len if params.prompt_logprobs is None else max(1, params.prompt_logprobs_start)
        )

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled, those still on the device included."""
        return self.num_tokens - self.prompt_len

    @property
    def wants(self) -> int:
        """Tokens it would compute now. A sequence with all its tokens sampled waits for the host to see them."""
        if self.num_tokens - self.prompt_len >= self.params.max_tokens > 0:
            return 0
        return self.num_tokens - self.num_computed

    @property
    def in_flight(self) -> bool:
        """A sampled token has not reached the host yet."""
        return len(self.token_ids) < self.num_tokens
