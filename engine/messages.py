"""What crosses processes: msgspec structs in msgpack, never pickle. No torch here.

    API process  --AddRequest, Abort-->                   engine    DEALER to ROUTER, ipc://DIR/engine
    API process  <--StepOutput (one a step)--             engine    the same pair
    API process  --AddVariant, RemoveVariant-->           engine    the same pair; VariantChanged comes back
    parent       --DropClient, Shutdown-->                engine    the same ROUTER
    API, engine  --EngineReady, EngineReport, ApiReport--> parent    PUSH to PULL, ipc://DIR/report
    canary       --CanaryReport-->                        parent    the same
    API process  <--Status (twice a second, and at once when something changes)-- parent   PUB to SUB, ipc://DIR/status

DIR is a fresh 0700 directory. Identities: a DEALER's identity is its client id as 4 big-endian bytes; client ids are
given by the parent and never reused, so a restarted API process cannot be mistaken for the one before it. A sequence
id is `client_id << 40 | counter`; a request of n sequences owns ids `request_id` to `request_id + n - 1`.
"""

from __future__ import annotations

from array import array

import msgspec

from engine.sequence import SamplingParams

CLIENT_SHIFT = 40
ENGINE_ENDPOINT = "engine"
REPORT_ENDPOINT = "report"
STATUS_ENDPOINT = "status"

# why a sequence waits: no room in the KV pool, the step's token budget is spent, the batch has max_num_seqs
WAIT_REASONS = ("blocks", "budget", "rows")
# upper bounds in seconds of the buckets of `EngineStats.step_buckets`, which has one more for what is longer
STEP_BOUNDS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0),
)


def pack_ids(ids: list[int]) -> bytes:
    """Token ids as native 32-bit integers: a tenth of the cost of a msgpack list."""
    return array("I", ids).tobytes()  # they are not negative, and "i" takes 2.6 times as long


def unpack_ids(data: bytes) -> list[int]:
    out = array("i")
    out.frombytes(data)
    return out.tolist()


class AddRequest(msgspec.Struct, tag="add", array_like=True):
    """One prompt to be continued by `params.n` sequences.

    prompt: `pack_ids`; empty within one process, see `Engine.add`. cache_seed:
    `block_manager.prefix_seed(fingerprint, cache_salt)`; empty keeps the request out of the prefix cache. block_hashes:
    `block_manager.hash_blocks(cache_seed, prompt, block_size)`. The API process has validated everything
    (`sequence.check_params`).
    """

    request_id: int
    variant: str
    prompt: bytes
    params: SamplingParams
    cache_seed: bytes
    block_hashes: list[bytes]


class Abort(msgspec.Struct, tag="abort", array_like=True):
    """Free these sequences: the client is gone, or a stop string ended their text. No answer is sent."""

    sequence_ids: list[int]


class DropClient(msgspec.Struct, tag="drop", array_like=True):
    """An API process died: abort all it had."""

    client_id: int


class Shutdown(msgspec.Struct, tag="shutdown", array_like=True):
    """End the engine process after the current step."""


class AddVariant(msgspec.Struct, tag="add_variant", array_like=True):
    """Load a variant, by its format's own name. Answered by VariantChanged. change_id: the API process's own count."""

    change_id: int
    name: str


class RemoveVariant(msgspec.Struct, tag="remove_variant", array_like=True):
    """Take no new requests for a variant, let those in flight finish, and free it. Answered by VariantChanged."""

    change_id: int
    name: str


EngineCommand = AddRequest | Abort | AddVariant | RemoveVariant | DropClient | Shutdown


class Logprobs(msgspec.Struct, array_like=True, gc=False):
    """Log-probabilities at one position: ids and their values, parallel.

    Entry 0 is the token itself; then the top-n in falling order; then `logprob_token_ids` in the order named. An id may
    occur more than once. Values are natural logs of the model's own distribution, before temperature, penalties or
    bias. Tuples of numbers, in an object that the garbage collector need not visit: they come by the ten thousand, and
    whoever keeps them would have it walk through all of them again and again.
    """

    ids: tuple[int, ...]
    values: tuple[float, ...]


class PromptLogprobs(msgspec.Struct, array_like=True):
    """Logprobs of the prompt tokens at positions `start`, `start + 1`, … of a request (sent for its first sequence)."""

    sequence_id: int
    start: int
    positions: list[Logprobs]


class Started(msgspec.Struct, array_like=True):
    """A sequence's prompt is computed. It comes with the first token, or with `Finished` where there is none.

    num_cached_tokens: prompt tokens taken from the prefix cache. queue_seconds: from arrival at the engine to being
    scheduled.
    """

    sequence_id: int
    num_cached_tokens: int
    queue_seconds: float


class Finished(msgspec.Struct, array_like=True):
    """The last word on a sequence. reason: "stop" (EOS or a stop id), "length", "error" or "removed" (its variant is no
    longer there).

    The stopping token is the last of the sequence's tokens already sent.
    """

    sequence_id: int
    reason: str
    error: str | None = None


class StepOutput(msgspec.Struct, tag="step", array_like=True):
    """Everything one engine step has for one API process.

    sequence_ids and token_ids are parallel, one entry for each new token, in order; logprobs is parallel to them or
    empty when no sequence in it asked.
    """

    epoch: int
    sequence_ids: list[int]
    token_ids: list[int]
    logprobs: list[Logprobs | None]
    prompt_logprobs: list[PromptLogprobs]
    started: list[Started]
    finished: list[Finished]


class VariantChanged(msgspec.Struct, tag="changed", array_like=True):
    """A change of the set of variants is done, or refused: `code`, and `message` for the user.

    revision: of the first EngineInfo that shows it. changed: False if there was nothing to do.
    """

    change_id: int
    revision: int
    changed: bool
    code: str | None = None
    message: str = ""


class VariantInfo(msgspec.Struct, array_like=True):
    """One loaded variant. fingerprint seeds its prefix hashes; bytes are of stored weights, own and shared. removing:
    it takes no new requests.
    """

    name: str
    fingerprint: bytes
    block_size: int
    own_bytes: int
    shared_bytes: int
    removing: bool = False


class EngineInfo(msgspec.Struct, array_like=True):
    """What an API process must know of the engine to validate and hash. Lengths and counts are in tokens or blocks.

    revision: of the set of variants, which may change while serving. headroom: bytes that variants may yet take.
    """

    max_model_len: int
    vocab_size: int  # ids the tokenizer knows; larger ids are never sampled and not accepted
    eos_token_ids: list[int]
    default_variant: str
    variants: list[VariantInfo]
    num_blocks: int
    max_num_seqs: int
    enable_prefix_caching: bool
    device: str
    dtype: str
    revision: int = 0
    headroom: int = 0


class VariantStats(msgspec.Struct, array_like=True):
    """Running totals of one variant since the engine started, and two gauges. Seconds are device time.

    waiting: sequences by reason, one of WAIT_REASONS.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # prompt tokens found
    running: int = 0
    waiting: dict[str, int] = {}


class EngineStats(msgspec.Struct, array_like=True):
    """The engine at one moment. busy_seconds: how long the present step has been running (0 when idle).

    step_buckets: finished steps by their wall time (STEP_BOUNDS), which step_seconds sums up. wait_seconds: what of it
    the device stood idle between two batches, waiting for the host. graph_replays: batches through a CUDA graph.
    compiles: versions of Triton kernels compiled before the engine was ready and since (which should stay 0).
    """

    busy_seconds: float
    blocks_total: int
    blocks_used: int  # referenced by a sequence
    blocks_cached: int  # free, but holding a reusable prefix
    variants: dict[str, VariantStats]
    step_buckets: list[int]
    step_seconds: float = 0.0
    wait_seconds: float = 0.0
    graph_replays: int = 0
    compiles_before_ready: int = 0
    compiles_after_ready: int = 0


class EngineReady(msgspec.Struct, tag="ready", array_like=True):
    """The engine has loaded; again whenever its set of variants has changed."""

    epoch: int
    info: EngineInfo


class EngineReport(msgspec.Struct, tag="engine", array_like=True):
    """The engine's heartbeat, from a thread of its own, twice a second."""

    epoch: int
    stats: EngineStats


class ApiReport(msgspec.Struct, tag="api", array_like=True):
    """An API process is listening; counter deltas since its last report, keyed by (metric, label values …).

    epoch, revision: of the set of variants that it goes by; -1 before there is one.
    """

    client_id: int
    listening: bool
    deltas: dict[str, float]
    epoch: int = -1
    revision: int = -1


class CanaryReport(msgspec.Struct, tag="canary", array_like=True):
    """What a round of the canary found: figures by variant and name (`server.canary`), and when, in Unix time."""

    figures: dict[str, dict[str, float]]
    at: float


Report = EngineReady | EngineReport | ApiReport | CanaryReport


class Status(msgspec.Struct, tag="status", array_like=True):
    """What every API process knows of the whole. state: "loading", "ready", "dead" (restarting) or "stalled" (no
    heartbeat). canary: its last round, if there is one. settled: all API processes that listen go by the set of
    variants of `info`.
    """

    epoch: int
    state: str
    info: EngineInfo | None
    stats: EngineStats | None
    totals: dict[str, float]
    canary: CanaryReport | None = None
    settled: bool = True
