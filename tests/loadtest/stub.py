"""A server that streams as it is told by the model's name, for tests of the load generator: `python stub.py`.

Prints its port. NAME is served as fast as it can write, NAME:slow waits 50 ms and then 10 ms between events, NAME:stuck
handles one request at a time, NAME:dies, NAME:cut, NAME:full and NAME:crlf do what they say. GET /seen tells the bodies
that came and how many ran at once. Each event is one write, so that a reader that keeps up gets them one by one.
"""

from __future__ import annotations

import asyncio
import json

NAMES = ["stub", *(f"stub:{kind}" for kind in ("a", "b", "slow", "stuck", "dies", "cut", "full", "crlf"))]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Stub:
    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self.paths: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.turn = asyncio.Lock()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = [line for line in head.lower().split("\r\n") if line.startswith("content-length:")]
                raw = await reader.readexactly(int(length[0].split(":")[1])) if length else b"{}"
                await self.answer(head.split()[1], json.loads(raw), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def answer(self, path: str, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            self.plain(writer, 200, {"data": [{"id": name} for name in NAMES]})
        elif path == "/seen":
            self.plain(writer, 200, {"bodies": self.bodies, "paths": sorted(self.paths), "most": self.most_at_once})
        elif not path.startswith("/v1/"):
            self.plain(writer, 404, {"detail": "not here"})
        else:
            self.bodies.append(body)
            self.paths.add(path)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                await self.stream(path, body, str(body["model"]).partition(":")[2], writer)
            finally:
                self.at_once -= 1

    def plain(self, writer: asyncio.StreamWriter, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)

    async def stream(self, path: str, body: dict[str, object], kind: str, writer: asyncio.StreamWriter) -> None:
        if kind == "full":
            self.plain(writer, 503, {"error": {"message": "queue full"}})
            return
        if kind == "stuck":
            async with self.turn:
                await asyncio.sleep(0.1)
        if kind == "slow":
            await asyncio.sleep(0.05)
        end = b"\r\n\r\n" if kind == "crlf" else b"\n\n"
        writer.write(HEAD)
        chat = path.endswith("chat/completions")
        piece = {"delta": {"content": 'é "text":"x" data: [DONE]'}} if chat else {"text": 'é "text":"x" data: [DONE]'}
        event = {"id": "cmpl-" + "0" * 32, "created": 1, "model": body["model"], "choices": [{"index": 0, **piece}]}
        frame = chunk(b"data: " + json.dumps(event).encode() + end)
        count = int(str(body["max_tokens"]))
        for i in range(count):
            if kind in ("dies", "cut") and i == 2:
                said = b'data: {"error": {"message": "engine died"}}\n\n' if kind == "dies" else b""
                writer.write(chunk(said) if said else b"")
                writer.write(b"0\r\n\r\n")
                return
            writer.write(frame)
            await asyncio.sleep(0.01 if kind == "slow" else 0)
            if i % 32 == 0:
                await writer.drain()
        prompt = body.get("prompt")
        used = {"prompt_tokens": len(prompt) if isinstance(prompt, list) else 1, "completion_tokens": count}
        writer.write(chunk(b"data: " + json.dumps({"choices": [], "usage": used}).encode() + end))
        writer.write(chunk(b"data: [DONE]" + end) + b"0\r\n\r\n")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def main() -> None:
    server = await asyncio.start_server(Stub().serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
