"""HTTP, WebSocket and MQTT clients that cost next to nothing: bytes made before, marks counted in answers."""

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


class SocketConnection(asyncio.Protocol):
    """A WebSocket on a session (RFC 6455, section 5), which counts what comes; without extensions, for
    messages of under 64 KiB to the portal."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._buffer = b""
        self._is_open = False
        self.arrivals: list[float] = []
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()

    @classmethod
    async def open(cls, server: Server, session: str) -> SocketConnection:
        """Connects, and returns when the portal says that the socket is there. Raises `WrongAnswer`."""
        head = (
            f"GET /ws/chat/{session} HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        )
        head += f"Authorization: Bearer {server.token}\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
        request = f"{head}Sec-WebSocket-Version: 13\r\n\r\n".encode()
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(request), HOST, server.port)
        await connection._ready
        return connection

    def say(self, body: dict[str, str]) -> None:
        """Sends a message."""
        self._send(0x1, json.dumps(body).encode())

    async def ended(self, tokens: int) -> None:
        """Returns when a turn has ended; `arrivals` has then when each piece came, in seconds of
        `perf_counter`. Raises `WrongAnswer` where there are not so many."""
        await self._ended
        if len(self.arrivals) < tokens:
            raise WrongAnswer(f"{len(self.arrivals)} of {tokens} pieces")

    def close(self) -> None:
        """Disconnects."""
        self._transport.close()

    def _send(self, opcode: int, data: bytes) -> None:
        """A frame, masked with zeros: it must be masked, and so it stays as it is."""
        size = len(data)
        length = bytes([128 | size]) if size < 126 else bytes([254]) + size.to_bytes(2, "big")
        self._transport.write(bytes([0x80 | opcode]) + length + b"\0\0\0\0" + data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def connection_lost(self, exc: Exception | None) -> None:
        for waiting in (self._ready, self._ended):
            if not waiting.done():
                waiting.set_exception(WrongAnswer(f"the socket was closed: {exc}"))
                waiting.exception()  # nobody may be waiting for it

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._is_open:
            head, mark, rest = self._buffer.partition(b"\r\n\r\n")
            if not mark:
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self._ready.set_exception(WrongAnswer(head.split(b"\r\n", 1)[0].decode()))
                return
            self._is_open, self._buffer = True, rest
        now = time.perf_counter()
        while (frame := _frame(self._buffer)) is not None:
            opcode, said, size = frame
            self._buffer = self._buffer[size:]
            self._take(opcode, said, now)

    def _take(self, opcode: int, said: bytes, now: float) -> None:
        if opcode == 0x9:
            self._send(0xA, said)
        elif b'"type":"ai_message_chunk"' in said:
            self.arrivals += [now] * said.count(PIECE)
        elif b'"type":"connection_established"' in said:
            self._ready.set_result(None)
        elif b'"type":"ai_message_complete"' in said and not self._ended.done():
            self._ended.set_result(None)
        elif b'"type":"error"' in said and not self._ended.done():
            self._ended.set_exception(WrongAnswer(said[:200].decode()))


def _frame(data: bytes) -> tuple[int, bytes, int] | None:
    """The first frame, as its kind, what it says, and its length; None where it has not come wholly."""
    if len(data) < 2:
        return None
    size, start = data[1], 2
    if size == 126:
        size, start = int.from_bytes(data[2:4], "big"), 4
    elif size == 127:
        size, start = int.from_bytes(data[2:10], "big"), 10
    if len(data) < start + size:
        return None
    return data[0] & 0x0F, data[start : start + size], start + size


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
