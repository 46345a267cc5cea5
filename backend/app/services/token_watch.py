"""Whether those who stay connected may still be: their tokens are looked at again and again."""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, Protocol

from app.access import Identity
from app.errors import PortalError, StorageUnavailable
from app.services.accounts import Accounts

LOOK_S = 15.0
"""How long it takes at most until it is seen that a token is not good any more."""


class Connected(Protocol):
    """Somebody who came with a token and stays."""

    async def is_now(self, identity: Identity) -> None:
        """The token is good; its holder may have got another role. Raises why they may not stay."""

    def end(self, error: PortalError) -> None:
        """The token is not good any more, or not for this."""


class TokenWatch:
    """Looks at each token once, however many came with it, and at different tokens at different times: many
    who connect at once must not make work for one instant."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._holders: dict[str, list[Connected]] = {}
        self._due: list[tuple[float, str]] = []

    @contextmanager
    def watch(self, token: str, who: Connected) -> Iterator[None]:
        """Tells `who` how it is with the token, for as long as the context is open."""
        if token not in self._holders:
            self._holders[token] = []
            self._come_back(token)
        holders = self._holders[token]
        holders.append(who)
        try:
            yield
        finally:
            holders.remove(who)

    def _come_back(self, token: str) -> None:
        pause = LOOK_S * random.uniform(0.5, 1)  # noqa: S311 - it keeps looks apart, and no secret
        heapq.heappush(self._due, (time.monotonic() + pause, token))

    async def run(self) -> NoReturn:
        """Looks at each token when it is due."""
        while True:
            wait = self._due[0][0] - time.monotonic() if self._due else LOOK_S
            if wait > 0:
                await asyncio.sleep(min(wait, LOOK_S / 2))  # what is new is not due before
                continue
            _, token = heapq.heappop(self._due)
            if self._holders[token]:
                await self._look(token)
                self._come_back(token)
            else:
                del self._holders[token]

    async def _look(self, token: str) -> None:
        holders = self._holders[token]
        try:
            identity = await self._accounts.identify(token)
        except StorageUnavailable:
            return
        except PortalError as error:
            for who in list(holders):
                who.end(error)
            return
        for who in list(holders):
            try:
                await who.is_now(identity)
            except StorageUnavailable:
                return
            except PortalError as error:
                who.end(error)
