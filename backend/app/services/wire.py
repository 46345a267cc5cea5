"""The wire between the processes that share a database: what one of them does, the others hear of at once.

It is only speed. The database is the truth, and what is lost here is found there, later: so nothing waits
for the wire, and nothing is kept for it while it is down.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

from app.logs import get_logger

RETRY_FIRST_S, RETRY_MOST_S = 0.2, 5.0
QUIET_S = 5.0
"""After so long a silence it is asked whether the other end is still there, and as long for the answer."""

MOST_WAITING_BYTES = 4 << 20
"""What may wait to be sent, beyond which it is dropped."""

Letter = tuple[str, bytes]
"""A channel, and what goes there."""

log = get_logger(__name__)


class WireDown(Exception):
    """What carries the messages does not answer."""


class Link(Protocol):
    """What carries messages between processes: Redis, or PostgreSQL."""

    async def listen(
        self, channels: Sequence[str], heard: Callable[[bytes], None], ready: Callable[[], None]
    ) -> NoReturn:
        """Calls `heard` with what is sent to these channels, once it has called `ready`. Raises `WireDown`
        when the connection cannot be made, or breaks."""

    async def send(self, letters: Sequence[Letter]) -> None:
        """Sends messages in their order. Raises `WireDown`."""

    async def close(self) -> None:
        """Closes its connections."""


class Wire:
    """Carries messages to one instance, or to all. `shared` names what they share; whoever is called
    `instance` hears what is for it."""

    def __init__(self, link: Link, shared: str, instance: str) -> None:
        self._link = link
        self._shared = shared
        self._instance = instance
        self._waiting: list[Letter] = []
        self._bytes = 0
        self._has_letters = asyncio.Event()
        self._has_warned = False
        self.is_up = False
        self.on_message: Callable[[bytes], None] = lambda _message: None
        self.on_up: Callable[[], None] = lambda: None
        """Is called whenever messages may have been lost, and go through again."""

    def tell(self, instance: str | None, message: bytes) -> None:
        """Sends a message to an instance, or to all where None is given, also to this one. It is lost when
        the wire is down, or what waits is too much."""
        if self.is_up and self._bytes + len(message) <= MOST_WAITING_BYTES:
            self._bytes += len(message)
            self._waiting.append((self._channel(instance), message))
            self._has_letters.set()

    async def run(self) -> None:
        """Listens and sends until it is cancelled; then the connections are closed."""
        sending = asyncio.create_task(self._send(), name="wire: sending")
        try:
            await self._listen()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await self._link.close()

    def _channel(self, instance: str | None) -> str:
        whose = "" if instance is None else f"/{instance}"
        return "portal_" + hashlib.sha256(f"{self._shared}{whose}".encode()).hexdigest()[:40]

    async def _listen(self) -> NoReturn:
        channels = [self._channel(None), self._channel(self._instance)]
        pause = RETRY_FIRST_S
        while True:
            try:
                await self._link.listen(channels, self._heard, self._ready)
            except WireDown as error:
                pause = RETRY_FIRST_S if self.is_up else min(pause * 2, RETRY_MOST_S)
                self.is_up = False
                self._warn(error)
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - no secret

    def _ready(self) -> None:
        self.is_up = True
        self._works()
        self.on_up()

    def _works(self) -> None:
        if self._has_warned:
            log.info("the wire to other processes works again")
        self._has_warned = False

    def _warn(self, error: WireDown) -> None:
        if not self._has_warned:
            log.warning(
                "the wire to other processes is down: they are asked by the database", reason=str(error)
            )
        self._has_warned = True

    def _heard(self, message: bytes) -> None:
        try:
            self.on_message(message)
        except Exception:
            log.exception("a message of another process could not be understood")

    async def _send(self) -> NoReturn:
        pause = RETRY_FIRST_S
        while True:
            await self._has_letters.wait()
            self._has_letters.clear()
            letters, self._waiting, self._bytes = self._waiting, [], 0
            try:
                await self._link.send(letters)
            except WireDown as error:
                self._warn(error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, RETRY_MOST_S)
                if self.is_up:  # else it is when the listening goes on
                    self.on_up()
                continue
            pause = RETRY_FIRST_S
            if self.is_up:
                self._works()
