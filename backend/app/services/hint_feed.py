"""The hints of a session: the newest one, and those to come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from app.access import Identity
from app.errors import NotFound, StorageUnavailable
from app.events import Final, check_id, decode_ending
from app.services.authorizer import Authorizer
from app.services.hints import Hint, hint_of
from app.services.projects import Projects
from app.services.session_manager import SessionManager
from app.services.store import Store

POLL_S = 1.0
"""How often hints are looked for that another process may have made."""


@dataclass(frozen=True, slots=True)
class HintOf:
    """A hint, and the turn and the request that it answers."""

    turn_id: str
    request_id: str | None
    hint: Hint


class HintFeed:
    """Reads the answers to the states of sessions."""

    def __init__(
        self, store: Store, sessions: SessionManager, projects: Projects, authorizer: Authorizer
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._projects = projects
        self._authorizer = authorizer

    async def may_read(self, who: Identity, session_id: str) -> None:
        """Returns when who asks may read the session, which need not be there yet. Raises `InvalidRequest`,
        `Forbidden`."""
        check_id("session_id", session_id)
        await self._authorizer.check(who, "sessions:read")

    async def last(self, who: Identity, session_id: str) -> HintOf | None:
        """The answer to the session's newest state that has one. Raises `NotFound`."""
        session = await self._sessions.session(who, session_id)
        found = await self._store.last_hint(session.id)
        if found is None or found[0].ending is None:
            return None
        ending = decode_ending(found[0].ending)
        assert isinstance(ending, Final)
        hint = hint_of(ending, self._projects.project(session.project))
        return HintOf(found[0].id, found[0].request_id, hint)

    async def follow(self, who: Identity, session_id: str) -> AsyncGenerator[HintOf | None, None]:
        """The newest hint that there is, or None; then those to come, from whichever process. Of those that
        come faster than they are taken, the newest. Raises what `may_read` raises."""
        await self.may_read(who, session_id)
        bell = asyncio.Event()
        with self._sessions.bell(who, session_id, bell):
            seen = await self._last_if_any(who, session_id)
            yield seen
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await bell.wait()
                bell.clear()
                newest = await self._last_if_any(who, session_id)
                if newest is not None and (seen is None or newest.turn_id != seen.turn_id):
                    seen = newest
                    yield newest

    async def _last_if_any(self, who: Identity, session_id: str) -> HintOf | None:
        try:
            return await self.last(who, session_id)
        except (NotFound, StorageUnavailable):
            return None
