"""Who watches sessions, or the list of an owner's: they are told of every turn, whichever door it came by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import msgspec

from app.services.turns import Turn

SessionKey = tuple[str, str]
"""A session's owner, and what they call it."""

Key = TypeVar("Key", SessionKey, str)
W = TypeVar("W", bound="TurnWatcher")


class TurnWatcher(Protocol):
    """Is told of turns. What it is told in must not wait."""

    def began(self, turn: Turn) -> None:
        """A turn was accepted, or taken up anew: it may be one that was told of before."""

    def ended(self, turn: Turn) -> None:
        """A turn has ended, and its ending is stored."""


class Watcher(TurnWatcher, Protocol):
    """Watches one session."""

    def noticed(self, what: str, who: str) -> None:
        """Another watcher has said that `who` does something: `typing`, `stop_typing`."""


class Change(msgspec.Struct, frozen=True, array_like=True):
    """Something in the list of an owner's sessions. `session` is the id of its row; with `is_new` it is new
    in the list. It is about the session itself, or about one of its turns."""

    session: str
    is_new: bool = False
    turn: str | None = None
    has_ended: bool = False

    @classmethod
    def of_begun(cls, turn: Turn) -> Change:
        """A turn has begun, and has made its session if that was not there before."""
        session = turn.session
        return cls(session.id, session.created_at >= turn.row.created_at, turn.id)

    @classmethod
    def of_ended(cls, turn: Turn) -> Change:
        """A turn has ended."""
        return cls(turn.session.id, turn=turn.id, has_ended=True)


class ListWatcher(TurnWatcher, Protocol):
    """Watches the list of an owner's sessions."""

    def changed(self, change: Change) -> None:
        """Something has changed in it."""


class Watched(Generic[Key, W]):
    """Those who watch, by what they watch."""

    def __init__(self) -> None:
        self.of: dict[Key, list[W]] = {}

    def add(self, key: Key, watcher: W) -> None:
        """Begins to watch."""
        self.of.setdefault(key, []).append(watcher)

    def remove(self, key: Key, watcher: W) -> None:
        """Watches no more."""
        self.of[key].remove(watcher)
        if not self.of[key]:
            del self.of[key]


class Watchers:
    """All who watch: here, and in other processes."""

    def __init__(self) -> None:
        self.here: Watched[SessionKey, Watcher] = Watched()
        self.lists_here: Watched[str, ListWatcher] = Watched()
        self.elsewhere: Watched[SessionKey, Watcher] = Watched()
        self.lists_elsewhere: Watched[str, ListWatcher] = Watched()
        self.on_watched: Callable[[SessionKey | str], None] = lambda _key: None
        """Is called with what is watched here and was not watched before: a session, or the list of an
        owner."""

    @contextmanager
    def watch(self, owner: str, session_id: str, watcher: Watcher) -> Iterator[None]:
        """Tells `watcher` of the session that `owner` calls so, which need not be there yet."""
        with self._added(self.here, (owner, session_id), watcher):
            yield

    @contextmanager
    def watch_list(self, owner: str, watcher: ListWatcher) -> Iterator[None]:
        """Tells `watcher` of all sessions of `owner`."""
        with self._added(self.lists_here, owner, watcher):
            yield

    @contextmanager
    def _added(self, watched: Watched[Key, W], key: Key, watcher: W) -> Iterator[None]:
        is_first = key not in watched.of
        watched.add(key, watcher)
        if is_first:
            self.on_watched(key)
        try:
            yield
        finally:
            watched.remove(key, watcher)

    def notice(self, owner: str, session_id: str, by: Watcher, what: str) -> None:
        """Tells the other watchers of a session what somebody does."""
        key = (owner, session_id)
        for watcher in [*self.here.of.get(key, ()), *self.elsewhere.of.get(key, ())]:
            if watcher is not by:
                watcher.noticed(what, owner)

    def change(self, owner: str, session: str, *, is_new: bool = False) -> None:
        """Tells who watches the list of an owner's sessions that one has changed, or is new there. `session`
        is the id of its row."""
        for watcher in self.of_list(owner):
            watcher.changed(Change(session, is_new))

    def of(self, turn: Turn) -> list[TurnWatcher]:
        """Those who watch the session of a turn, or the list that it stands in."""
        if not (self.here.of or self.lists_here.of or self.elsewhere.of or self.lists_elsewhere.of):
            return []
        owner = turn.session.owner
        key = (owner, turn.session.session_id)
        return [*self.here.of.get(key, ()), *self.elsewhere.of.get(key, ()), *self.of_list(owner)]

    def of_list(self, owner: str) -> list[ListWatcher]:
        """Those who watch the list of an owner's sessions."""
        return [*self.lists_here.of.get(owner, ()), *self.lists_elsewhere.of.get(owner, ())]
