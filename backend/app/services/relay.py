"""What this process does for the others on the wire: it tells them of turns that they watch, sends the events
of those that they follow, and stops what they want stopped. And it tells them what is watched here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, NoReturn

from app.database import insist
from app.errors import StorageUnavailable
from app.events import Ending
from app.services.elsewhere import RENEW_S, RUNS_OUT_S
from app.services.letters import (
    AnyLetter,
    Follow,
    Heeded,
    Leave,
    ListChanged,
    Noticed,
    Pieces,
    Stop,
    TurnBegan,
    TurnEnded,
    Watching,
    decode,
    post,
)
from app.services.runner import Runner
from app.services.store import Store
from app.services.turns import Position, Turn
from app.services.watchers import Change, SessionKey
from app.services.wire import Wire
from app.tasks import Tasks

TOGETHER_S = 0.02
"""Events of a turn that come within this time leave together."""


class _SessionElsewhere:
    """Those who watch a session in another process."""

    def __init__(self, wire: Wire, instance: str, key: SessionKey) -> None:
        self._wire, self._instance, self._key = wire, instance, key

    def began(self, turn: Turn) -> None:
        """See `Watcher`."""
        post(self._wire, self._instance, TurnBegan(turn.id))

    def ended(self, turn: Turn) -> None:
        """See `Watcher`."""
        post(self._wire, self._instance, TurnEnded(turn.id))

    def noticed(self, what: str, who: str) -> None:  # noqa: ARG002 - it is the owner
        """See `Watcher`."""
        post(self._wire, self._instance, Noticed(*self._key, what))


class _ListElsewhere:
    """Those who watch the list of an owner's sessions in another process."""

    def __init__(self, wire: Wire, instance: str, owner: str) -> None:
        self._wire, self._instance, self._owner = wire, instance, owner

    def began(self, turn: Turn) -> None:
        """See `ListWatcher`."""
        self.changed(Change.of_begun(turn))

    def ended(self, turn: Turn) -> None:
        """See `ListWatcher`."""
        self.changed(Change.of_ended(turn))

    def changed(self, change: Change) -> None:
        """See `ListWatcher`."""
        post(self._wire, self._instance, ListChanged(self._owner, change))


class _Interest:
    """Something that is watched, or followed, in another process, until `until` unless it says so again."""

    def __init__(self, end: Callable[[], object]) -> None:
        self.end = end
        self.renew()

    def renew(self) -> None:
        """It still is."""
        self.until = asyncio.get_running_loop().time() + RUNS_OUT_S


class Relay:
    """Serves the other processes on `wire`, and lets this one be served."""

    def __init__(self, wire: Wire, runner: Runner, store: Store) -> None:
        self._wire = wire
        self._runner = runner
        self._watchers = runner.watchers
        self._elsewhere = runner.elsewhere
        self._store = store
        self._watched: dict[tuple[str, SessionKey | str], _Interest] = {}
        self._followed: dict[tuple[str, str], _Interest] = {}
        self._meeting: set[str] = set()
        self._tasks = Tasks("relay")
        self._hear: dict[type[AnyLetter], Callable[[Any], None]] = {
            Watching: self._hear_watching,
            TurnBegan: self._hear_began,
            TurnEnded: self._hear_ended,
            ListChanged: self._hear_list_changed,
            Noticed: self._hear_noticed,
            Follow: self._hear_follow,
            Leave: self._hear_leave,
            Pieces: self._elsewhere.hear_pieces,
            Stop: self._hear_stop,
            Heeded: self._elsewhere.hear_heeded,
        }

    async def run(self) -> NoReturn:
        """Serves until it is cancelled."""
        self._wire.on_message, self._wire.on_up = self._take, self._came_up
        self._watchers.on_watched = self._announce_one
        running = self._tasks.start(self._wire.run(), "the wire")
        try:
            while not running.done():
                await asyncio.wait([running], timeout=RENEW_S)
                self._announce(anew=False)
                self._forget_old()
            raise RuntimeError("the wire has ended")
        finally:
            await self._tasks.close()

    def _take(self, message: bytes) -> None:
        letter = decode(message)
        if getattr(letter, "by", None) != self._runner.instance:
            self._hear[type(letter)](letter)

    # --- what is watched here ---

    def _came_up(self) -> None:
        """Letters were lost: asks anew, and tells again."""
        self._announce(anew=True)
        self._elsewhere.refresh()
        self._tell_of_running(dict(self._watched))

    def _announce_one(self, key: SessionKey | str) -> None:
        sessions, lists = ([], [key]) if isinstance(key, str) else ([key], [])
        post(self._wire, None, Watching(self._runner.instance, sessions, lists))

    def _announce(self, *, anew: bool) -> None:
        sessions, lists = list(self._watchers.here.of), list(self._watchers.lists_here.of)
        if sessions or lists:
            post(self._wire, None, Watching(self._runner.instance, sessions, lists, anew))

    def _hear_began(self, letter: TurnBegan) -> None:
        if letter.turn not in self._meeting:
            self._meeting.add(letter.turn)
            self._tasks.start(self._meet(letter.turn), f"meet {letter.turn}")

    async def _meet(self, turn_id: str) -> None:
        try:
            found = await insist(lambda: self._store.turn(turn_id))
        finally:
            self._meeting.discard(turn_id)
        if found is None:
            return
        turn = self._runner.turns.get(turn_id) or self._elsewhere.turn(*found)
        for watcher in list(self._watchers.here.of.get(_key_of(turn), ())):
            watcher.began(turn)
            if turn.ending is not None:
                watcher.ended(turn)

    def _hear_ended(self, letter: TurnEnded) -> None:
        self._elsewhere.hear_ended(letter.turn)
        turn = self._runner.turns.get(letter.turn)
        if turn is not None and self._runner.is_here(turn):
            self._tasks.start(self._let_go(), "let go")

    async def _let_go(self) -> None:
        with suppress(StorageUnavailable):  # then it is looked at again in a second
            await self._runner.let_go()

    def _hear_list_changed(self, letter: ListChanged) -> None:
        for watcher in list(self._watchers.lists_here.of.get(letter.owner, ())):
            watcher.changed(letter.change)

    def _hear_noticed(self, letter: Noticed) -> None:
        for watcher in list(self._watchers.here.of.get((letter.owner, letter.session_id), ())):
            watcher.noticed(letter.what, letter.owner)

    # --- what others watch ---

    def _hear_watching(self, letter: Watching) -> None:
        untold: dict[tuple[str, SessionKey | str], _Interest] = {}
        keys: list[SessionKey | str] = [*letter.sessions, *letter.lists]
        for key in keys:
            watched = self._watched.get((letter.by, key))
            if watched is None:
                watched = self._watched[letter.by, key] = self._added(letter.by, key)
                untold[letter.by, key] = watched
            elif letter.anew:
                untold[letter.by, key] = watched
            watched.renew()
        self._tell_of_running(untold)

    def _added(self, instance: str, key: SessionKey | str) -> _Interest:
        if isinstance(key, str):
            listing = _ListElsewhere(self._wire, instance, key)
            self._watchers.lists_elsewhere.add(key, listing)
            return _Interest(partial(self._watchers.lists_elsewhere.remove, key, listing))
        watcher = _SessionElsewhere(self._wire, instance, key)
        self._watchers.elsewhere.add(key, watcher)
        return _Interest(partial(self._watchers.elsewhere.remove, key, watcher))

    def _tell_of_running(self, watched: Collection[tuple[str, SessionKey | str]]) -> None:
        """Tells who has come to watch of the turns that there are already."""
        if not watched:
            return
        instances = {instance for instance, _ in watched}
        for turn in self._runner.here:
            for instance in instances:
                if (instance, _key_of(turn)) in watched:
                    post(self._wire, instance, TurnBegan(turn.id))
                if (instance, turn.session.owner) in watched:
                    post(self._wire, instance, ListChanged(turn.session.owner, Change.of_begun(turn)))

    def _forget_old(self) -> None:
        now = asyncio.get_running_loop().time()
        for key in [key for key, interest in self._watched.items() if interest.until < now]:
            self._watched.pop(key).end()
        for interest in [interest for interest in self._followed.values() if interest.until < now]:
            interest.end()

    # --- what others follow, or stop ---

    def _hear_follow(self, letter: Follow) -> None:
        turn, key = self._runner.turns.get(letter.turn), (letter.by, letter.turn)
        followed = self._followed.get(key)
        if followed is not None and not letter.anew:
            followed.renew()
        elif turn is not None and self._runner.is_here(turn):
            task = self._tasks.start(self._forward(letter.by, turn, letter.last), f"forward {turn.id}")
            interest = self._followed[key] = _Interest(task.cancel)
            task.add_done_callback(lambda _: self._no_longer_followed(key, interest))
            if followed is not None:
                followed.end()

    def _no_longer_followed(self, key: tuple[str, str], interest: _Interest) -> None:
        if self._followed.get(key) is interest:
            del self._followed[key]

    async def _forward(self, instance: str, turn: Turn, after: Position) -> None:
        async with aclosing(turn.follow(after)) as batches:
            async for batch in batches:
                events = [item.json for item in batch if not isinstance(item.event, Ending)]
                if events:
                    post(self._wire, instance, Pieces(turn.id, batch[0].attempt, batch[0].n, events))
                if len(events) < len(batch):
                    post(self._wire, instance, TurnEnded(turn.id))
                await asyncio.sleep(TOGETHER_S)

    def _hear_leave(self, letter: Leave) -> None:
        followed = self._followed.get((letter.by, letter.turn))
        if followed is not None:
            followed.end()

    def _hear_stop(self, letter: Stop) -> None:
        turn = self._runner.turns.get(letter.turn)
        if turn is not None and self._runner.is_here(turn):
            self._runner.interrupt(turn, "stop")
            if turn.interruption == "stop":
                post(self._wire, letter.by, Heeded(turn.id))


def _key_of(turn: Turn) -> SessionKey:
    return turn.session.owner, turn.session.session_id
