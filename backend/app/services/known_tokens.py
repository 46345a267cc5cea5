"""Whose the tokens are that came in just now.

To tell who holds a token takes a signature and a question to the database. Somebody who chats asks many
times in a few seconds, so the answer is kept for so long. What this process changes counts at once; what
another one changes, within `KEPT_S`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from app.access import Door, Identity
from app.database import REFRESH_S, Database, Operation
from app.services.policies import Policies

T = TypeVar("T")

KEPT_S = REFRESH_S
MOST_KEPT = 10_000


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a token. It has run out at `ends_at` (Unix time), if it ever does."""

    identity: Identity
    ends_at: float | None

    @property
    def is_good(self) -> bool:
        """Whether the token has not run out yet."""
        return self.ends_at is None or time.time() < self.ends_at


class KnownTokens:
    """Remembers who holds a token, and forgets it when accounts, sign-ins or keys change."""

    def __init__(self, database: Database, policies: Policies) -> None:
        self._database = database
        self._policies = policies
        self._holders: dict[tuple[str, Door], tuple[Holder, float]] = {}
        self._changes = 0

    async def change(self, operation: Operation[T]) -> T:
        """`Database.write` for what changes accounts, sign-ins or keys."""
        try:
            return await self._database.write(operation)
        finally:
            self._changes += 1
            self._holders.clear()

    async def holder(self, token: str, door: Door, look_up: Callable[[], Awaitable[Holder]]) -> Identity:
        """Who holds the token that came in by `door`; raises what `look_up()` does."""
        known = self._holders.get((token, door))
        if known is not None:
            held, until = known
            identity = held.identity
            is_fresh = time.monotonic() < until and held.is_good
            if is_fresh and self._policies.role(identity.role_name) is identity.role:
                return identity
        changes = self._changes
        found = await look_up()
        if changes == self._changes:  # else it may be what was so before the change
            if len(self._holders) >= MOST_KEPT:
                self._holders.clear()
            self._holders[token, door] = (found, time.monotonic() + KEPT_S)
        return found.identity

    def last(self, token: str, door: Door) -> Identity | None:
        """Who held the token when that was looked up last, however long ago, unless it has run out since;
        None when that is not known any more."""
        held, _ = self._holders.get((token, door), (None, 0.0))
        return held.identity if held is not None and held.is_good else None
