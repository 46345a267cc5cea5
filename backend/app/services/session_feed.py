"""What happens in the list of somebody's sessions: what is new in it, changes, goes, and answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from app.access import Identity
from app.database import insist
from app.services.rows import SessionRow
from app.services.session_manager import SessionManager
from app.services.store import Store
from app.services.turns import Turn
from app.services.watchers import Change

MOST_UNTOLD = 1000
"""Sessions whose changes may wait for who reads slowly."""

RECHECK_S = 5.0
"""How often the database is asked whether turns that have begun have ended, should nobody have told it."""


@dataclass(frozen=True, slots=True)
class News:
    """A session as it is now, or the beginning or end of one of its turns."""

    type: Literal["session_created", "session_updated", "session_deleted", "turn_started", "turn_ended"]
    session: SessionRow
    turn: str | None = None


@dataclass(slots=True)
class _Untold:
    """What has happened in a session since it was last told of. Of turns, whether they have ended."""

    has_changed: bool = False
    is_new: bool = False
    turns: dict[str, bool] = field(default_factory=dict)


class _Gathering:
    """Gathers what happens until it is told: of each session only how it is then. See `ListWatcher`."""

    def __init__(self, too_much: Callable[[], None]) -> None:
        self._too_much = too_much
        self._untold: dict[str, _Untold] = {}
        self._has_news = asyncio.Event()

    def began(self, turn: Turn) -> None:
        """See `ListWatcher`."""
        self.changed(Change.of_begun(turn))

    def ended(self, turn: Turn) -> None:
        """See `ListWatcher`."""
        self.changed(Change.of_ended(turn))

    def changed(self, change: Change) -> None:
        """See `ListWatcher`."""
        if change.session not in self._untold and len(self._untold) >= MOST_UNTOLD:
            self._too_much()
            return
        untold = self._untold.setdefault(change.session, _Untold())
        if change.turn is None or not change.has_ended:
            untold.has_changed = True
            untold.is_new |= change.is_new
        if change.turn is not None and change.has_ended and untold.turns.get(change.turn) is False:
            del untold.turns[change.turn]  # it has come and gone
        elif change.turn is not None:
            untold.turns[change.turn] = change.has_ended
        self._has_news.set()

    async def take(self, seconds: float) -> dict[str, _Untold]:
        """What has happened, as soon as something has; nothing when nothing does for so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._has_news.wait()
        self._has_news.clear()
        untold, self._untold = self._untold, {}
        return untold


class SessionFeed:
    """Tells what happens in lists of sessions."""

    def __init__(self, store: Store, sessions: SessionManager) -> None:
        self._store = store
        self._sessions = sessions

    async def follow(self, who: Identity, too_much: Callable[[], None]) -> AsyncGenerator[list[News], None]:
        """At first nothing; then which turns run, and what happens in the list of who asks, in whichever
        process. Of what happens faster than it is taken, how it is in the end; calls `too_much` when that
        becomes too much."""
        gathering = _Gathering(too_much)
        running: dict[str, str] = {}
        with self._sessions.watch_list(who, gathering):
            yield []
            for turn, session in await insist(lambda: self._store.active_of_owner(who.owner)):
                gathering.changed(Change(session, turn=turn))
            while True:
                untold = await gathering.take(RECHECK_S)
                if not untold:
                    await self._find_ended(running, gathering)
                    continue
                news = [item for item in await self._news(untold) if _may_see(who, item)]
                for item in news:
                    _note(running, item)
                if news:
                    yield news

    async def _news(self, untold: Mapping[str, _Untold]) -> list[News]:
        found = await insist(lambda: self._store.sessions_with(list(untold)))
        known = [(*found[id], what) for id, what in untold.items() if id in found]
        return [item for session, is_deleted, what in known for item in _news_of(session, what, is_deleted)]

    async def _find_ended(self, running: dict[str, str], gathering: _Gathering) -> None:
        if not running:
            return
        active = await insist(lambda: self._store.active_among(list(running)))
        for turn, session in running.items():
            if turn not in active:
                gathering.changed(Change(session, turn=turn, has_ended=True))


def _note(running: dict[str, str], news: News) -> None:
    """Keeps in mind which turns were told of and have not ended, and their sessions."""
    if news.type == "turn_started" and news.turn is not None:
        running[news.turn] = news.session.id
    elif news.turn is not None:
        running.pop(news.turn, None)


def _may_see(who: Identity, news: News) -> bool:
    return who.only_project in {None, news.session.project}


def _news_of(session: SessionRow, untold: _Untold, is_deleted: bool) -> Iterator[News]:
    if untold.has_changed and not is_deleted:
        yield News("session_created" if untold.is_new else "session_updated", session)
    for turn, has_ended in untold.turns.items():
        yield News("turn_ended" if has_ended else "turn_started", session, turn)
    if untold.has_changed and is_deleted:
        yield News("session_deleted", session)
