"""HTTP and MQTT clients that cost next to nothing: prepared bytes out, markers counted in what comes."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Literal, cast

Shape = Literal["portal", "openai"]

HOST = "127.0.0.1"
MODEL = "mock"

PIECE = b"word"
"""What is once in each piece of the mock's reply, however a bridge puts pieces together."""

LONGEST_MARK = 16
"""Bytes; a mark may be cut in two by the network."""


class WrongAnswer(Exception):
    """An answer that is no success, or that lacks a part: a rate made of such says nothing."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go, and in which form: a session's turn of the portal, or OpenAI's completion."""

    port: int
    shape: Shape
    token: str = ""

    def request(self, session: str, text: str, *, stream: bool) -> bytes:
        """A whole HTTP request."""
        if self.shape == "portal":
            path = "/api/llm/chat/session" + ("/stream" if stream else "")
            body = {"session_id": session, "message": text}
        else:
            path = "/v1/chat/completions"
            message = {"role": "user", "content": text}
            body = {"model": MODEL, "stream": stream, "messages": [message]}  # type: ignore[dict-item]
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {self.token}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        return head.encode() + data

    @property
    def end_mark(self) -> bytes:
        """What is in a stream that came to its good end; a portal's goes on with the whole reply."""
        return b'"type":"final"' if self.shape == "portal" else b"[DONE]"


class Connection(asyncio.Protocol):
    """A kept-alive connection with one request at a time."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._begin()

    @classmethod
    async def open(cls, server: Server) -> Connection:
        """Connects."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(server), HOST, server.port)
        return connection

    def _begin(self) -> None:
        self.arrivals: list[float] = []
        self._head = b""
        self._tail = b""
        self._last = b""
        self._left: int | None = None
        self._ended = False

    async def ask(self, request: bytes, tokens: int | None = None) -> None:
        """Sends a request and returns once its answer is whole; `arrivals` has then when each piece came,
        in seconds of `perf_counter`. With `tokens` it is a stream of so many pieces. Raises
        `WrongAnswer`."""
        self._begin()
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done
        if not self._head.startswith(b"HTTP/1.1 200"):
            raise WrongAnswer(self._head.split(b"\r\n", 1)[0].decode())
        if tokens is not None and (len(self.arrivals) < tokens or not self._ended):
            raise WrongAnswer(f"{len(self.arrivals)} of {tokens} pieces, ended: {self._ended}")

    def close(self) -> None:
        """Disconnects."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(WrongAnswer(f"the connection was lost: {exc}"))

    def data_received(self, data: bytes) -> None:
        if not self._head.endswith(b"\r\n\r\n"):
            head, mark, data = (self._head + data).partition(b"\r\n\r\n")
            self._head = head + mark
            if not mark:
                return
            place = head.lower().find(b"content-length:")
            if place >= 0:
                self._left = int(head[place + 15 :].split(b"\r\n", 1)[0])
        if self._left is not None:
            self._left -= len(data)
            is_whole = self._left <= 0
        else:
            is_whole = self._chunk(data)
        if is_whole and not self._done.done():
            self._done.set_result(None)

    def _chunk(self, data: bytes) -> bool:
        now = time.perf_counter()
        if not self._ended:
            seen = self._tail + data
            end = seen.find(self._server.end_mark)
            self._ended = end >= 0
            pieces = seen[:end] if self._ended else seen
            # What was counted in the tail is not counted again.
            new = pieces.count(PIECE) - self._tail.count(PIECE)
            self.arrivals += [now] * new
            self._tail = seen[-LONGEST_MARK:]
        self._last = (self._last + data)[-5:]
        return self._last == b"0\r\n\r\n"


class MqttConnection(asyncio.Protocol):
    """An MQTT 3.1.1 client at QoS 1 (OASIS MQTT 3.1.1, section 3), for topics and payloads of under
    16 KiB."""

    def __init__(self) -> None:
        self._buffer = b""
        self._next_id = 1
        self._waiting: dict[bytes, asyncio.Future[None]] = {}
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(cls, port: int, subscription: str) -> MqttConnection:
        """Connects and subscribes."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, HOST, port)
        name = b"bench-%d" % time.time_ns()
        connection._send(0x10, b"\x00\x04MQTT\x04\x02\x00\x00" + _text(name))
        connection._send(0x82, b"\x00\x01" + _text(subscription.encode()) + b"\x01")
        await connection._ready
        return connection

    async def ask(self, topic: str, payload: bytes, reply_topic: str) -> None:
        """Publishes and returns once the answer came on `reply_topic`. Raises `WrongAnswer` when it is
        something else."""
        waiter = self._waiting[reply_topic.encode()] = asyncio.get_running_loop().create_future()
        self._next_id = self._next_id % 65_000 + 1
        self._send(0x32, _text(topic.encode()) + self._next_id.to_bytes(2, "big") + payload)
        await waiter

    def close(self) -> None:
        """Disconnects."""
        self._send(0xE0, b"")
        self._transport.close()

    def _send(self, kind: int, body: bytes) -> None:
        size = len(body)
        length = bytes([size]) if size < 128 else bytes([size % 128 | 128, size // 128])
        self._transport.write(bytes([kind]) + length + body)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data
        while len(buffer) >= 2:
            size, start = buffer[1], 2
            if size >= 128:
                if len(buffer) < 3:
                    break
                size, start = size % 128 + 128 * buffer[2], 3
            if len(buffer) < start + size:
                break
            self._packet(buffer[0], buffer[start : start + size])
            buffer = buffer[start + size :]
        self._buffer = buffer

    def _packet(self, first: int, body: bytes) -> None:
        if first >> 4 == 9:  # SUBACK
            self._ready.set_result(None)
        elif first >> 4 == 3:  # PUBLISH
            end = 2 + int.from_bytes(body[:2], "big")
            if first & 0x06:
                self._send(0x40, body[end : end + 2])
            waiter = self._waiting.pop(body[2:end], None)
            if waiter is None or waiter.done():
                return
            said = body[end + 2 if first & 0x06 else end :]
            if said.startswith(PIECE):
                waiter.set_result(None)
            else:
                waiter.set_exception(WrongAnswer(said[:100].decode(errors="replace")))


def _text(content: bytes) -> bytes:
    return len(content).to_bytes(2, "big") + content
