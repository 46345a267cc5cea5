"""What the ledger has to be told, and could not be while it was away: it is told again until it takes it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from app.errors import Overloaded
from app.logs import get_logger
from app.tasks import Tasks

RETRY_S = 1.0
MOST_OWED = 10_000

Call = Callable[[], Awaitable[None]]
"""Tells the ledger something. Told twice, it must count once: an answer may have been lost."""

log = get_logger(__name__)


class Arrears:
    """Tells the ledger what it has to know, now or later."""

    def __init__(self) -> None:
        self._owed: deque[Call] = deque()
        self._retrying = Tasks("arrears")
        self._is_retrying = False

    def check(self) -> None:
        """Raises `Overloaded` while the ledger is known to be away: whatever is taken would be owed, too."""
        if self._owed:
            raise Overloaded("What was used cannot be counted now; try again.", retry_after=2)

    async def tell(self, call: Call) -> None:
        """Awaits `call()`, or leaves it for later where the ledger is away."""
        if self._owed:  # it is known to be away, and nobody is to wait for that
            self._owe(call)
            return
        try:
            await call()
        except Overloaded:
            self._owe(call)
        except asyncio.CancelledError:
            self._owe(call)
            raise

    def _owe(self, call: Call) -> None:
        if len(self._owed) >= MOST_OWED:
            log.error("what was used cannot be counted: the ledger is away for too long")
            return
        self._owed.append(call)
        if not self._is_retrying:
            self._is_retrying = True
            self._retrying.start(self._retry(), "retry")

    async def _retry(self) -> None:
        try:
            while not await self._has_caught_up():  # noqa: ASYNC110 - nobody tells when it is back
                await asyncio.sleep(RETRY_S)
        finally:
            self._is_retrying = False

    async def _has_caught_up(self) -> bool:
        while self._owed:
            call = self._owed.popleft()
            try:
                await call()
            except Overloaded:
                self._owed.appendleft(call)
                return False
            except asyncio.CancelledError:
                self._owed.appendleft(call)
                raise
        return True

    async def close(self) -> None:
        """Tells what can be told now, and gives up the rest."""
        await self._retrying.close()
        if not await self._has_caught_up():
            log.warning("the ledger is away: it is not told what was used", things=len(self._owed))
