"""The wire by PostgreSQL: LISTEN and NOTIFY."""

from __future__ import annotations

import asyncio
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from typing import NoReturn

from psycopg import AsyncConnection, Error
from psycopg.rows import TupleRow
from sqlalchemy.engine import make_url

from app.services.wire import QUIET_S, Letter, WireDown

PART = 7900
"""A payload has less than 8,000 bytes (PostgreSQL, NOTIFY): longer messages go in parts, of so many. Each has
a number, as of equal notices in a transaction only one is sent."""

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
        channels, payloads = map(list, zip(*_parts(letters), strict=True))
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


def _parts(messages: Iterable[Letter]) -> Iterator[tuple[str, str]]:
    """The parts of messages, each with its channel: `NUMBER:TEXT`, or `NUMBER+TEXT` where more follows."""
    numbers = count()
    for channel, message in messages:
        text = b64encode(message).decode()
        for at in range(0, len(text), PART):
            follows = "+" if at + PART < len(text) else ":"
            yield channel, f"{next(numbers)}{follows}{text[at : at + PART]}"


class _Letters:
    """Puts parts together. Those of a message come one after the other: they were sent in one transaction."""

    def __init__(self, heard: Callable[[bytes], None]) -> None:
        self._heard = heard
        self._begun: dict[int, list[str]] = {}

    def add(self, sender: int, part: str) -> None:
        _number, follows, text = re.split("([:+])", part, maxsplit=1)
        if follows == "+":
            self._begun.setdefault(sender, []).append(text)
        else:
            self._heard(b64decode("".join([*self._begun.pop(sender, ()), text])))
