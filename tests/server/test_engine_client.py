"""`EngineClient` on the wire: the test plays the engine and the parent, over the same sockets."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator

import msgspec
import pytest
import zmq

from engine.messages import (
    Abort,
    AddRequest,
    AddVariant,
    ApiReport,
    EngineCommand,
    EngineInfo,
    EngineStats,
    Finished,
    Report,
    Status,
    StepOutput,
    VariantChanged,
    VariantInfo,
    unpack_ids,
)
from engine.sequence import SamplingParams
from server.api_config import ApiConfig
from server.engine_client import MAX_PENDING, EngineClient, RequestStream
from server.errors import ApiError, ClientGone
from server.metrics import Counters
from server.prepared import Prepared

VARIANT = VariantInfo("bf16", b"print", 16, 1, 0)
INFO = EngineInfo(2048, 100, [0], "bf16", [VARIANT], 64, 8, True, "cpu", "float32")


class Peer:
    """The engine's and the parent's ends of the sockets."""

    def __init__(self, folder: str) -> None:
        self.context = zmq.Context()
        self.router, self.pull, self.pub = (self.context.socket(k) for k in (zmq.ROUTER, zmq.PULL, zmq.PUB))
        for socket, name in ((self.router, "engine"), (self.pull, "report"), (self.pub, "status")):
            socket.bind(f"ipc://{folder}/{name}")
        self.identity = b""

    async def command(self) -> EngineCommand:
        while not self.router.poll(0):
            await asyncio.sleep(0.005)
        self.identity, frame = self.router.recv_multipart()
        return msgspec.msgpack.decode(frame, type=EngineCommand)

    async def report(self) -> ApiReport:
        while not self.pull.poll(0):
            await asyncio.sleep(0.005)
        return msgspec.msgpack.decode(self.pull.recv(), type=Report)

    def step(
        self, sequence_ids: list[int], token_ids: list[int], finished: list[Finished] | None = None, epoch: int = 1
    ):
        output = StepOutput(epoch, sequence_ids, token_ids, [], [], [], finished or [])
        self.router.send_multipart([self.identity, msgspec.msgpack.encode(output)])

    async def tell(
        self,
        client: EngineClient,
        state: str = "ready",
        epoch: int = 1,
        busy: float = 0.0,
        revision: int = 0,
        settled: bool = True,
    ) -> None:
        """Publish a status until it has arrived (a subscription takes a moment to be known)."""
        info = msgspec.structs.replace(INFO, revision=revision)
        status = Status(epoch, state, info, EngineStats(busy, 64, 0, 0, {}, []), {}, None, settled)
        while client.status != status:
            self.pub.send(msgspec.msgpack.encode(status))
            await asyncio.sleep(0.01)


@pytest.fixture
async def wired() -> AsyncIterator[tuple[EngineClient, Peer]]:
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(folder)
        config = ApiConfig(
            client_id=3,
            ipc_dir=folder,
            socket_fd=0,
            model_folder="",
            served_model_name="m",
            model_root="",
            max_queued_requests=4,
            step_timeout=0.5,
        )
        client = EngineClient(config, Counters())
        client.open()
        await peer.tell(client)
        while not client.connected():
            await asyncio.sleep(0.005)
        yield client, peer
        await client.close()
        peer.context.destroy(linger=0)


def prepared(n: int = 1, prompts: int = 1) -> Prepared:
    return Prepared(
        id="cmpl-1",
        created=0,
        model="m:bf16",
        variant=VARIANT,
        chat=False,
        prompts=[[1, 2, 3]] * prompts,
        cache_seed=b"seed",
        hashes=[[]] * prompts,
        params=SamplingParams(n=n),
        stop_ids=frozenset(),
        skip_special_tokens=True,
        echo=None,
        logprobs=None,
        prompt_logprobs=None,
        prompt_logprobs_start=0,
        include_usage=False,
        continuous_usage=False,
    )


async def start(client: EngineClient, peer: Peer, n: int = 1) -> tuple[RequestStream, list[int]]:
    stream = client.submit(prepared(n))
    added = await peer.command()
    assert isinstance(added, AddRequest)
    return stream, list(range(added.request_id, added.request_id + n))


async def test_ids_carry_the_client_and_never_overlap(wired):
    client, peer = wired
    client.submit(prepared(n=2, prompts=2))
    first, second = await peer.command(), await peer.command()
    assert peer.identity == (3).to_bytes(4, "big")
    assert first.request_id == 3 << 40
    assert second.request_id == first.request_id + 2
    assert unpack_ids(first.prompt) == [1, 2, 3]
    assert client.num_in_flight == 4


async def test_what_comes_while_nobody_waits_is_one_piece(wired):
    client, peer = wired
    stream, ids = await start(client, peer, n=2)
    for token in range(5):
        peer.step(ids, [token, token + 50])
    peer.step([], [], [Finished(i, "length") for i in ids])
    while client.num_in_flight:
        await asyncio.sleep(0.005)
    pieces = [(s.index, s.take()[0], s.finished.reason) for s in await stream.next()]
    assert pieces == [(0, [0, 1, 2, 3, 4], "length"), (1, [50, 51, 52, 53, 54], "length")]


async def test_finish_and_abort_are_told_once_and_late_tokens_are_dropped(wired):
    client, peer = wired
    stream, ids = await start(client, peer, n=3)
    client.finish(stream.sequences[0])
    client.finish(stream.sequences[0])
    client.abort(stream)
    client.abort(stream)
    assert await peer.command() == Abort([ids[0]])
    assert await peer.command() == Abort(ids[1:])
    peer.step(ids, [1, 1, 1])
    await asyncio.sleep(0.05)
    assert not peer.router.poll(0)
    assert all(not s.pending_ids for s in stream.sequences)
    assert client.num_in_flight == 0


async def test_a_waiting_handler_learns_that_the_client_is_gone(wired):
    client, peer = wired
    stream, ids = await start(client, peer)
    waiting = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    client.disconnected(stream)
    with pytest.raises(ClientGone):
        await waiting
    assert await peer.command() == Abort(ids)


async def test_a_client_that_never_reads_is_dropped(wired):
    client, peer = wired
    stream, ids = await start(client, peer)
    stream.writer = asyncio.create_task(asyncio.sleep(60))  # stands in a send that does not return
    for _ in range(MAX_PENDING // 256 + 1):
        peer.step(ids * 256, [1] * 256)
    assert await peer.command() == Abort(ids)
    with pytest.raises(asyncio.CancelledError):
        await stream.writer
    assert isinstance(stream.error, ClientGone)


@pytest.mark.parametrize(("state", "epoch"), [("dead", 1), ("loading", 2), ("ready", 2)])
async def test_the_engines_end_fails_what_is_in_flight(wired, state, epoch):
    client, peer = wired
    stream, _ = await start(client, peer)
    await peer.tell(client, state, epoch)
    with pytest.raises(ApiError) as caught:
        await stream.next()
    assert caught.value.kind == "engine_dead"


async def test_output_of_another_epoch_is_dropped(wired):
    client, peer = wired
    stream, ids = await start(client, peer)
    peer.step(ids, [1], epoch=0)
    peer.step(ids, [2], epoch=1)
    (sequence,) = await stream.next()
    assert sequence.take()[0] == [2]


@pytest.mark.parametrize(("state", "busy", "kind"), [("stalled", 0.0, "unhealthy"), ("ready", 9.0, "unhealthy")])
async def test_a_hung_engine_times_requests_out(wired, state, busy, kind):
    client, peer = wired
    stream, _ = await start(client, peer)
    await peer.tell(client, state, busy=busy)
    assert client.unhealthy().kind == kind
    with pytest.raises(ApiError) as caught:
        await stream.next()
    assert caught.value.rule.status == 504


async def test_admission_has_a_limit_but_never_starves_a_large_request(wired):
    client, peer = wired
    with client.admission(9):  # more than the limit, but alone
        pass
    await start(client, peer, n=3)
    with pytest.raises(ApiError) as caught, client.admission(2):
        pass
    assert caught.value.kind == "queue_full"
    with client.admission(1), pytest.raises(ApiError), client.admission(1):
        pass


async def test_counts_reach_the_parent_as_deltas(wired):
    client, peer = wired
    client.counters.add("requests", "chat", "bf16", "200")
    client.counters.add("requests", "chat", "bf16", "200")
    totals: dict[str, float] = {}
    while not totals:
        report = await peer.report()
        assert report.client_id == 3
        totals |= report.deltas
    assert totals == {"requests|chat|bf16|200": 2.0}


async def test_a_change_is_answered_when_all_processes_know(wired, monkeypatch):
    client, peer = wired

    async def changed(revision: int) -> tuple[asyncio.Task[VariantChanged], VariantChanged]:
        """A change that the engine has made, and this process has seen."""
        asked = asyncio.create_task(client.change_variants(AddVariant, "int8-row"))
        command = await peer.command()
        assert isinstance(command, AddVariant)
        answer = VariantChanged(command.change_id, revision, True)
        peer.router.send_multipart([peer.identity, msgspec.msgpack.encode(answer)])
        await peer.tell(client, revision=revision, settled=False)
        return asked, answer

    asked, answer = await changed(1)
    while (report := await peer.report()).revision != 1:  # at once, not with the next counts
        assert report.revision < 1
    assert (report.client_id, report.epoch) == (3, 1)
    await asyncio.sleep(0.05)
    assert not asked.done()
    await peer.tell(client, revision=1)
    assert await asyncio.wait_for(asked, 5) == answer

    monkeypatch.setattr("server.variant_changes.PATIENCE_SECONDS", 0.2)
    asked, answer = await changed(2)  # another process hangs
    await asyncio.sleep(0.05)
    assert not asked.done()
    await asyncio.sleep(0.2)
    await peer.tell(client, busy=0.1, revision=2, settled=False)
    assert await asyncio.wait_for(asked, 5) == answer
