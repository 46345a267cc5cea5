"""Who watches sessions in this process: they are told of every turn, whichever door it came by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from app.services.turns import Turn


class Watcher(Protocol):
    """Is told of the turns of a session. What it is told in must not wait."""

    def began(self, turn: Turn) -> None:
        """A turn was accepted, or taken up anew: it may be one that was told of before."""

    def ended(self, turn: Turn) -> None:
        """A turn has ended, and its ending is stored."""

    def noticed(self, what: str, who: str) -> None:
        """Another watcher has said that `who` does something: `typing`, `stop_typing`."""


class Watchers:
    """The watchers of all sessions."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, str], list[Watcher]] = {}

    @contextmanager
    def watch(self, owner: str, session_id: str, watcher: Watcher) -> Iterator[None]:
        """Tells `watcher` of the session that `owner` calls so, which need not be there yet."""
        key = (owner, session_id)
        self._of.setdefault(key, []).append(watcher)
        try:
            yield
        finally:
            self._of[key].remove(watcher)
            if not self._of[key]:
                del self._of[key]

    def notice(self, owner: str, session_id: str, by: Watcher, what: str) -> None:
        """Tells the other watchers of a session what somebody does."""
        for watcher in list(self._of.get((owner, session_id), ())):
            if watcher is not by:
                watcher.noticed(what, owner)

    def of(self, turn: Turn) -> list[Watcher]:
        """Those who watch the session of a turn."""
        if not self._of:
            return []
        return list(self._of.get((turn.session.owner, turn.session.session_id), ()))
