"""HTTP/1.1 to LLM servers, for requests whose answers are read as they come.

A general client costs more for each chunk of an answer than everything else that is done with it: here a
chunk is a call of the parser (httptools, llhttp) and no more, and whoever reads wakes once for all that came
together. There are no redirects, no cookies, no proxies and no packed bodies.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

import httptools

MOST_UNREAD = 256 * 1024
"""Bytes of an answer that wait for their reader, before the server has to."""

MOST_HEADERS = 64 * 1024
"""Bytes of headers that are read."""

END_S = 0.5
"""How long the end of an answer is waited for whose reader has all it wants, to use its connection again."""

MOST_IDLE_S = 30.0
"""How long a connection may have been idle that is used again: who is between may have dropped it since, and
told nobody."""

SEND_AGAIN_S = 1.0
"""A request is sent again where its connection was lost so soon: the server had closed it while it was idle.
Where it was lost later the server may have worked on the request, and failed by it."""


class NoAnswer(Exception):
    """The connection ended before its answer began."""


class NoConnection(NoAnswer):
    """No connection could be made."""


class BrokenAnswer(Exception):
    """The answer is no HTTP, or ended before it was whole."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an address leads: to a server, and there to a path."""

    host: str
    port: int
    has_tls: bool
    target: str
    name: str

    @classmethod
    def of(cls, url: str) -> _Place:
        parts = urlsplit(url)
        has_tls = parts.scheme == "https"
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        port = parts.port or (443 if has_tls else 80)
        name = parts.netloc.rpartition("@")[2]
        if not url.isascii() or any(character <= " " for character in url):
            raise ValueError("an address has a character in it that must be escaped")
        return cls(parts.hostname or "", port, has_tls, target, name)


class StreamingHttp:
    """Connections to servers, used again where that is possible."""

    def __init__(self, *, connect_timeout: float) -> None:
        """Making a connection takes at most `connect_timeout` seconds."""
        self._tls: ssl.SSLContext | None = None
        self._connect_timeout = connect_timeout
        self._idle: dict[tuple[str, int, bool], list[_Connection]] = {}

    def close(self) -> None:
        """Closes the connections that nobody uses."""
        for connections in self._idle.values():
            for connection in connections.copy():
                connection.close()
        self._idle.clear()

    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        until: float | None = None,
    ) -> Answer:
        """Sends a request, and returns once the headers of the answer are there. Raises `NoConnection`,
        `NoAnswer`, `BrokenAnswer`, `TimeoutError` where that is not `until` then (the loop's time), and
        `ValueError` for what cannot be sent. Whoever cancels it closes the connection."""
        place, loop = _place_of(url), asyncio.get_running_loop()
        request = _request(method, place, headers, body)
        idle = self._idle.setdefault((place.host, place.port, place.has_tls), [])
        while idle and loop.time() - idle[0].idle_since >= MOST_IDLE_S:  # the first has been so longest
            idle.pop(0).close()
        while idle:
            connection = idle.pop()
            if not connection.is_open:
                continue
            sent_at = loop.time()
            try:
                return await connection.ask(request, until)
            except NoAnswer:
                if connection.has_news or loop.time() - sent_at >= SEND_AGAIN_S:
                    raise
                break
        return await (await self._connect(place, idle, until)).ask(request, until)

    async def _connect(self, place: _Place, idle: list[_Connection], until: float | None) -> _Connection:
        if place.has_tls and self._tls is None:
            self._tls = ssl.create_default_context()
        loop, tls = asyncio.get_running_loop(), self._tls if place.has_tls else None
        limit = loop.time() + self._connect_timeout
        try:
            async with asyncio.timeout_at(limit if until is None else min(limit, until)):
                _, connection = await loop.create_connection(
                    lambda: _Connection(idle), place.host, place.port, ssl=tls
                )
        except (OSError, UnicodeError) as error:  # also a TimeoutError
            if isinstance(error, TimeoutError) and until is not None and until < limit:
                raise
            raise NoConnection(str(error)) from None
        return connection


_place_of = lru_cache(256)(_Place.of)


def _request(method: str, place: _Place, headers: Mapping[str, str], body: bytes) -> bytes:
    lines = [f"{method} {place.target} HTTP/1.1", f"Host: {place.name}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header has a line break in it")
    lines += ["", ""]
    return "\r\n".join(lines).encode("latin-1") + body


class Answer:
    """An answer that is being read. Whoever has it must `leave` it."""

    def __init__(self, connection: _Connection, status: int, headers: Mapping[str, str]) -> None:
        self._connection = connection
        self.status = status
        self.headers = headers
        """By their names in small letters."""

    @property
    def content_type(self) -> str:
        """The media type, without its parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def take(self) -> bytes:
        """What has come and was not read yet, without waiting."""
        return self._connection.take()

    async def read(self, until: float | None = None) -> bytes:
        """What has come since the last time, at least a byte; nothing at the end. Raises `BrokenAnswer`, and
        `TimeoutError` where nothing has come `until` then (the loop's time)."""
        return await self._connection.read(until)

    async def read_whole(self, most: int) -> bytes:
        """All of it, or its first `most` bytes. Raises `BrokenAnswer`."""
        parts: list[bytes] = []
        length = 0
        while length < most and (part := await self.read()):
            parts.append(part)
            length += len(part)
        return b"".join(parts)[:most]

    async def leave(self, *, is_read: bool) -> None:
        """Gives the connection back. Unless the answer `is_read`, and ends soon, it is closed, which tells
        the server to stop."""
        connection = self._connection
        try:
            if is_read and not connection.is_whole:
                async with asyncio.timeout(END_S):
                    while await connection.read():
                        pass
        except (TimeoutError, BrokenAnswer):
            pass
        finally:
            connection.finish()


def _give_up(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


class _Connection(asyncio.Protocol):
    """One connection, with one answer at a time."""

    def __init__(self, idle: list[_Connection]) -> None:
        self._idle = idle
        self._loop = asyncio.get_running_loop()
        self.is_open = True
        self.is_whole = False
        self.idle_since = 0.0
        self._reset()

    def _reset(self) -> None:
        self._parts: list[bytes] = []
        self.on_body = self._parts.append  # what the parser calls for each part: nothing is cheaper
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._header_bytes = self._before_body = 0
        self._status = 0
        self._unread = 0
        self._is_paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._problem: Exception | None = None
        self.is_whole = False
        self._may_go_on = False

    # --- for the client ---

    async def ask(self, request: bytes, until: float | None) -> Answer:
        """Sends a request and waits for the headers of its answer."""
        self._reset()
        try:
            self._transport.write(request)
            while not self._status:
                if self._problem is not None:
                    raise self._problem
                if not self.is_open:
                    raise NoAnswer("The connection was closed.")
                await self._news(until)
        except BaseException:
            self.close()
            raise
        return Answer(self, self._status, self._headers)

    @property
    def has_news(self) -> bool:
        """Whether something has come since a request was sent."""
        return self._before_body > 0

    def take(self) -> bytes:
        """See `Answer`."""
        parts = self._parts
        if not parts:
            return b""
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self._unread = 0
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    async def read(self, until: float | None = None) -> bytes:
        """See `Answer`."""
        while not self._parts:
            if self.is_whole:
                return b""
            if self._problem is not None:
                raise self._problem
            if not self.is_open:
                raise BrokenAnswer("The connection was closed in the answer.")
            await self._news(until)
        return self.take()

    def finish(self) -> None:
        """The answer is of no more use; the connection is, where the answer was whole."""
        if self.is_open and self.is_whole and self._may_go_on and self._problem is None:
            self.take()
            self.idle_since = self._loop.time()
            self._idle.append(self)
        else:
            self.close()

    def close(self) -> None:
        """Closes the connection at once."""
        self.is_open = False
        self._transport.abort()

    async def _news(self, until: float | None) -> None:
        waiter = self._waiter = self._loop.create_future()
        # A timer alone costs half of what asyncio.timeout_at does.
        timer = None if until is None else self._loop.call_at(until, _give_up, waiter)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- for the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's is its own

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._problem = BrokenAnswer(f"The answer is no HTTP: {error}")
            self.close()
        if not self._status:
            self._before_body += len(data)  # the parser tells of a header only when it has all of it
            if self._before_body > MOST_HEADERS and self._problem is None:
                self._problem = BrokenAnswer("The headers are too long.")
                self.close()
        self._unread += len(data)
        if self._unread > MOST_UNREAD and self._parts and not self._is_paused and self.is_open:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self.is_open = False
        is_bounded = "content-length" in self._headers or "transfer-encoding" in self._headers
        if self._status and not is_bounded and error is None:
            self.is_whole = True  # such an answer ends with its connection (RFC 9112, 6.3)
        if self in self._idle:
            self._idle.remove(self)
        self._wake()

    # --- for the parser ---

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header has come."""
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MOST_HEADERS:
            raise ValueError("the headers are too long")
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """All headers have come."""
        status = self._parser.get_status_code()
        if status < 200:  # an interim answer; the real one follows
            self._headers = {}
        else:
            self._status = status

    def on_message_complete(self) -> None:
        """The answer is whole."""
        self.is_whole = self._status > 0
        self._may_go_on = self._parser.should_keep_alive()
