from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from app.services.streaming_http import (
    MOST_UNREAD,
    Answer,
    BrokenAnswer,
    NoAnswer,
    NoConnection,
    StreamingHttp,
)

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Client(StreamingHttp):
    """Asks one server on this machine."""

    def __init__(self, port: int) -> None:
        super().__init__(connect_timeout=2)
        self._base = f"http://127.0.0.1:{port}"

    async def post(self, path: str, body: bytes = b"{}") -> Answer:
        return await self.request("POST", self._base + path, {"Authorization": "Bearer k"}, body)


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[Client]:
    """A client of a server that does what it is told on each connection."""

    handling: list[asyncio.Task[None]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handling.append(asyncio.create_task(handle(reader, writer)))

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    http = Client(port)
    async with server:
        yield http
        http.close()
        await asyncio.gather(*handling)


async def request_of(reader: asyncio.StreamReader) -> bytes:
    """The next request on a connection, head and body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return head + await reader.readexactly(length)


async def ask(http: Client, body: bytes = b"{}") -> bytes:
    answer = await http.post("/x", body)
    whole = await answer.read_whole(1 << 20)
    await answer.leave(is_read=True)
    return whole


async def test_what_goes_out_and_a_connection_that_is_used_again() -> None:
    seen: list[bytes] = []
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            seen.append(await request_of(reader))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n")
            writer.write(b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n7\r\n, world\r\n0\r\n\r\n")

    async with serving(serve) as http:
        for _ in range(3):
            answer = await http.post("/base/v1/x?a=b", b"body")
            assert (answer.status, answer.content_type) == (200, "text/event-stream")
            assert await answer.read_whole(100) == b"hello, world"
            await answer.leave(is_read=True)
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /base/v1/x?a=b HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nAuthorization: Bearer k" in head
    assert body == b"body"
    assert connections == 1


async def test_chunks_are_read_as_they_come() -> None:
    gate = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        await gate.wait()
        writer.write(b"3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n")
        await writer.drain()

    async with serving(serve) as http:
        answer = await http.post("/", b"")
        assert await answer.read() == b"one"
        assert answer.take() == b""
        gate.set()
        rest = await answer.read_whole(100)
        assert rest == b"twothree"
        await answer.leave(is_read=True)


async def test_a_connection_that_the_server_closed_meanwhile_is_made_anew() -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        if connections == 1:
            await request_of(reader)  # the next one is not answered: the connection ends

    async with serving(serve) as http:
        assert [await ask(http), await ask(http)] == [b"ok", b"ok"]
    assert connections == 2


async def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    connections = 0
    closed = asyncio.Semaphore(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            while True:
                await request_of(reader)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        finally:
            closed.release()

    async with serving(serve) as http:
        await asyncio.gather(ask(http), ask(http))
        await ask(http)
        assert connections == 2
        monkeypatch.setattr("app.services.streaming_http.MOST_IDLE_S", 0.0)
        await ask(http)
        assert connections == 3
        async with asyncio.timeout(5):
            for _ in range(2):
                await closed.acquire()


@pytest.mark.parametrize(
    ("sent", "send_again_s"),
    [
        pytest.param(b"", 0.0, id="late"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-", 60.0, id="after the first bytes of an answer"),
    ],
)
async def test_a_request_that_a_server_may_have_worked_on_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch, sent: bytes, send_again_s: float
) -> None:
    monkeypatch.setattr("app.services.streaming_http.SEND_AGAIN_S", send_again_s)
    requests = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await request_of(reader)
        requests += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await request_of(reader)
        requests += 1
        writer.write(sent)
        await writer.drain()

    async with serving(serve) as http:
        assert await ask(http) == b"ok"
        with pytest.raises(NoAnswer):
            await ask(http)
    assert requests == 2


async def test_leaving_an_answer_closes_its_connection() -> None:
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        assert await reader.read() == b""
        closed.set()

    async with serving(serve) as http:
        answer = await http.post("/", b"")
        await answer.leave(is_read=False)
        async with asyncio.timeout(5):
            await closed.wait()


async def test_whoever_is_cancelled_while_waiting_closes_the_connection() -> None:
    asked, closed = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        asked.set()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        closed.set()

    async with serving(serve) as http:
        waiting = asyncio.create_task(ask(http))
        await asked.wait()
        waiting.cancel()
        async with asyncio.timeout(5):
            await closed.wait()


@pytest.mark.parametrize(
    ("sent", "raised"),
    [
        (b"", NoAnswer),
        (b"SSH-2.0-OpenSSH_9.2\r\n", BrokenAnswer),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", BrokenAnswer),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", BrokenAnswer),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", BrokenAnswer),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\nY: y\r\n\r\n", BrokenAnswer),
    ],
)
async def test_answers_that_are_none(sent: bytes, raised: type[Exception]) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(sent)
        await writer.drain()

    async with serving(serve) as http:
        with pytest.raises(raised):
            await ask(http)


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nall there is")
        await writer.drain()

    async with serving(serve) as http:
        assert await ask(http) == b"all there is"


class _Endless:
    """A connection over which comes whatever is read of it."""

    async def read(self, _until: float | None = None) -> bytes:
        return bytes(4096)


async def test_the_time_for_an_answer_grows_with_its_length_and_no_faster() -> None:
    most = 64 << 20
    began = time.process_time()
    whole = await Answer(cast("Any", _Endless()), 200, {}).read_whole(most)
    assert time.process_time() - began < 2
    assert len(whole) == most


async def test_a_server_waits_for_a_slow_reader() -> None:
    piece = b"%x\r\n%b\r\n" % (65536, b"x" * 65536)
    written = 0
    stalled = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(1000):
            writer.write(piece)
            try:
                async with asyncio.timeout(1):
                    await writer.drain()
            except TimeoutError:
                stalled.set()
                await writer.drain()
            written += 65536
        writer.write(b"0\r\n\r\n")

    async with serving(serve) as http:
        answer = await http.post("/", b"")
        await stalled.wait()
        assert written < 65_536_000
        assert len(answer.take()) <= MOST_UNREAD + 2 * 65536 + 262_144
        rest = 0
        while part := await answer.read():
            rest += len(part)
        assert written == 65_536_000
        await answer.leave(is_read=True)


async def test_a_port_where_nobody_listens() -> None:
    with pytest.raises(NoConnection):
        await Client(1).post("/")


async def test_what_cannot_be_sent_is_not() -> None:
    http = StreamingHttp(connect_timeout=1)
    with pytest.raises(ValueError, match="line break"):
        await http.request("GET", "http://127.0.0.1:1/", {"X-Key": "a\r\nX-Other: b"})
    with pytest.raises(ValueError, match="escaped"):
        await http.request("GET", "http://127.0.0.1:1/a b", {})
