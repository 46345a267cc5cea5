"""The hints of a session: the newest one, and those to come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from app.access import Identity
from app.errors import NotFound, StorageUnavailable
from app.events import Final, decode_ending
from app.services.hints import Hint, hint_of
from app.services.projects import Projects
from app.services.session_manager import SessionManager
from app.services.store import Store
from app.services.turns import Turn

RECHECK_S = 5.0
"""How often the database is asked for a new hint, should nobody have told of it."""


@dataclass(frozen=True, slots=True)
class HintOf:
    """A hint, and the turn and the request that it answers."""

    turn_id: str
    request_id: str | None
    hint: Hint


class _Bell(asyncio.Event):
    """Is set at the end of every turn."""

    def began(self, turn: Turn) -> None:
        """See `Watcher`."""

    def ended(self, turn: Turn) -> None:  # noqa: ARG002 - that one has is enough
        """See `Watcher`."""
        self.set()

    def noticed(self, what: str, who: str) -> None:
        """See `Watcher`."""


class HintFeed:
    """Reads the answers to the states of sessions."""

    def __init__(self, store: Store, sessions: SessionManager, projects: Projects) -> None:
        self._store = store
        self._sessions = sessions
        self._projects = projects

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
        come faster than they are taken, the newest. Raises what `SessionManager.may_watch` raises."""
        await self._sessions.may_watch(who, session_id)
        bell = _Bell()
        with self._sessions.watch(who, session_id, bell):
            seen = await self._last_if_any(who, session_id)
            yield seen
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(RECHECK_S):
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
