"""The wire by PostgreSQL: LISTEN and NOTIFY."""

from __future__ import annotations

import asyncio
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NoReturn

from psycopg import AsyncConnection, Error
from psycopg.rows import TupleRow
from sqlalchemy.engine import make_url

from app.services.wire import QUIET_S, Letter, WireDown

PART = 7900
"""A payload has less than 8,000 bytes (PostgreSQL, NOTIFY): longer messages go in parts, of so many."""

_NOTIFY = "SELECT pg_notify(channel, part) FROM unnest(%s::text[], %s::text[]) AS parts(channel, part)"

Connection = AsyncConnection[TupleRow]


class PostgresLink:
    """See `Link`. It has a connection to listen, and one to send once there is something to say."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._sender: Connection | None = None

    async def listen(
        self, channels: Sequence[str], heard: Callable[[bytes], None], ready: Callable[[], None]
    ) -> NoReturn:
        """See `Link`."""
        letters = _Letters(heard)
        try:
            async with await self._connect() as connection:
                for channel in channels:
                    await connection.execute(f"LISTEN {channel}".encode())
                ready()
                while True:
                    async for notice in connection.notifies(timeout=QUIET_S):
                        letters.add(notice.pid, notice.payload)
                    async with asyncio.timeout(QUIET_S):
                        await connection.execute("SELECT 1")
        except (Error, OSError) as error:  # a TimeoutError is an OSError
            raise WireDown(f"PostgreSQL: {type(error).__name__}") from None

    async def send(self, letters: Sequence[Letter]) -> None:
        """See `Link`."""
        parts = [(channel, part) for channel, message in letters for part in _parts(message)]
        channels, payloads = [channel for channel, _ in parts], [part for _, part in parts]
        try:
            async with asyncio.timeout(QUIET_S):
                if self._sender is None or self._sender.broken:
                    self._sender = await self._connect()
                await self._sender.execute(_NOTIFY, [channels, payloads])
        except (Error, OSError) as error:
            await self.close()
            raise WireDown(f"PostgreSQL: {type(error).__name__}") from None

    async def close(self) -> None:
        """See `Link`."""
        sender, self._sender = self._sender, None
        if sender is not None:
            with suppress(Error, OSError):
                await sender.close()

    async def _connect(self) -> Connection:
        return await AsyncConnection.connect(self._url, autocommit=True, connect_timeout=2)


def _parts(message: bytes) -> Iterator[str]:
    """The parts of a message; all but the last one begin with `+`."""
    text = b64encode(message).decode()
    for at in range(0, len(text), PART):
        is_last = at + PART >= len(text)
        yield ("." if is_last else "+") + text[at : at + PART]


class _Letters:
    """Puts parts together. Those of a message come one after the other: they were sent in one transaction."""

    def __init__(self, heard: Callable[[bytes], None]) -> None:
        self._heard = heard
        self._begun: dict[int, list[str]] = {}

    def add(self, sender: int, part: str) -> None:
        if part[0] == "+":
            self._begun.setdefault(sender, []).append(part[1:])
        else:
            self._heard(b64decode("".join([*self._begun.pop(sender, ()), part[1:]])))
