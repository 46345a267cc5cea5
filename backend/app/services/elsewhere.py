"""Turns that other instances run: followed from here, stopped from here. Their endings are read from the
database; where there is a wire, their events come as they come there."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Protocol

from app.database import insist
from app.events import Cancelled
from app.services.endings import Ended
from app.services.letters import Follow, Heeded, Leave, Pieces, Stop, TurnEnded, post
from app.services.rows import SessionRow, TurnRow
from app.services.store import StaleAttempt, Store
from app.services.turns import Turn, recall
from app.services.watchers import Watchers
from app.services.wire import Wire
from app.tasks import Tasks

POLL_S = 0.25
POLL_BESIDE_WIRE_S = 1.0
"""How often the database is asked what has become of a turn: endings come sooner by the wire."""

RENEW_S, RUNS_OUT_S = 3.0, 10.0
"""How often interest is said again, and how long it counts: who died must not be told for ever."""

HEED_S = 0.7
"""How long an instance may take to say that it stops a turn, before the turn is ended in the database."""

STOPPING_S = 5.0
"""How long it may take from there to the stored ending."""


class Live(Protocol):
    """The turns of this process, and who watches them."""

    instance: str
    turns: dict[str, Turn]
    watchers: Watchers

    def is_here(self, turn: Turn) -> bool:
        """Whether the turn runs, or waits, in this process."""

    def cut_off(self, turn: Turn, ended: Ended) -> None:
        """A turn was ended in the database."""


class _Observed:
    """A turn that is observed, until it has ended or is taken up here."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.bell = asyncio.Event()
        self.renewed_at = float("-inf")
        self.has_gap = True


class Elsewhere:
    """The turns of other instances that are of interest here."""

    def __init__(self, store: Store, live: Live, wire: Wire | None) -> None:
        self._store = store
        self._live = live
        self._wire = wire
        self._observed: dict[str, _Observed] = {}
        self._heeded: dict[str, asyncio.Event] = {}
        self._tasks = Tasks("turns elsewhere")

    async def close(self) -> None:
        """Observes nothing any more."""
        await self._tasks.close()

    def turn(self, row: TurnRow, session: SessionRow) -> Turn:
        """A turn that is not, or no longer, this process's: recalled, or observed until it ends."""
        if not row.is_active:
            return recall(row, session)
        turn = Turn(row, session)
        self.observe(turn)
        return turn

    def observe(self, turn: Turn) -> None:
        """Follows a turn that another process runs, until it ends there or is taken up here."""
        turn.task = None
        self._live.turns[turn.id] = turn
        observed = self._observed[turn.id] = _Observed(turn)
        self._attend(turn)
        self._tasks.start(self._observe(observed), f"observe {turn.id}")

    def observes(self, turn: Turn) -> bool:
        """Whether the turn is only observed from here."""
        observed = self._observed.get(turn.id)
        return observed is not None and observed.turn is turn

    async def _observe(self, observed: _Observed) -> None:
        turn = observed.turn
        try:
            while not self._live.is_here(turn) and turn.ending is None:
                found = await insist(lambda: self._store.turn(turn.id))
                if self._live.is_here(turn):
                    return  # it was taken up here in the meantime
                if found is None or not found[0].is_active:
                    self._has_ended(turn, found)
                    return
                self._keep_up(observed, found[0])
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._pause):
                        await observed.bell.wait()
                observed.bell.clear()
        finally:
            if self._observed.get(turn.id) is observed:
                del self._observed[turn.id]

    @property
    def _pause(self) -> float:
        return POLL_BESIDE_WIRE_S if self._wire is not None and self._wire.is_up else POLL_S

    def _has_ended(self, turn: Turn, found: tuple[TurnRow, SessionRow] | None) -> None:
        if self._live.turns.get(turn.id) is turn:
            del self._live.turns[turn.id]
        if found is None or turn.ending is not None:
            return
        turn.take_events(recall(*found))
        key = (turn.session.owner, turn.session.session_id)
        for watcher in list(self._live.watchers.here.of.get(key, ())):
            watcher.ended(turn)

    def _keep_up(self, observed: _Observed, row: TurnRow) -> None:
        """Follows it to where it runs now."""
        turn = observed.turn
        if row.attempt != turn.row.attempt:
            turn.restart(row)
            self._attend(turn)
            observed.has_gap = True
        elif row.instance != turn.row.instance:
            turn.row = row
            observed.has_gap = True
        self._ask_for_events(observed)

    def _attend(self, turn: Turn) -> None:
        turn.is_whole = False  # what has come of it is known only as far as it was heard
        turn.on_followed, turn.on_abandoned = self._followed, self._abandoned

    # --- by the wire ---

    def _followed(self, turn: Turn) -> None:
        observed = self._observed.get(turn.id)
        if observed is not None:
            observed.has_gap = True
            self._ask_for_events(observed)

    def _abandoned(self, turn: Turn) -> None:
        if self._wire is not None:
            post(self._wire, turn.row.instance, Leave(self._live.instance, turn.id))

    def _ask_for_events(self, observed: _Observed) -> None:
        """Asks the instance that runs a turn for its events, when somebody follows it here."""
        turn, now = observed.turn, asyncio.get_running_loop().time()
        if self._wire is None or not self._wire.is_up or turn.followers == 0:
            return
        if observed.has_gap or now >= observed.renewed_at + RENEW_S:
            post(
                self._wire,
                turn.row.instance,
                Follow(self._live.instance, turn.id, turn.last, observed.has_gap),
            )
            observed.renewed_at, observed.has_gap = now, False

    def hear_pieces(self, pieces: Pieces) -> None:
        """Events of a turn have come where it runs."""
        observed = self._observed.get(pieces.turn)
        if observed is not None and not observed.turn.take_in(pieces.attempt, pieces.first, pieces.events):
            observed.has_gap = True  # it is asked for when the turn is looked at next

    def hear_ended(self, turn: str) -> None:
        """A turn has ended: the database has its ending."""
        if turn in self._observed:
            self._observed[turn].bell.set()

    def hear_heeded(self, heeded: Heeded) -> None:
        """A turn is being stopped where it runs."""
        if heeded.turn in self._heeded:
            self._heeded[heeded.turn].set()

    def refresh(self) -> None:
        """Something may have been lost: looks at every turn anew."""
        for observed in self._observed.values():
            observed.has_gap = True
            observed.bell.set()

    # --- ending turns ---

    async def stop(self, row: TurnRow, session: SessionRow) -> None:
        """Stops a turn where it runs, so that its reply is kept as far as it has come; where nobody heeds
        that, it is ended in the database. Returns once it has ended."""
        turn = self._live.turns.get(row.id) or self.turn(row, session)
        while row.is_active:
            if await self._is_heeded(row):
                with suppress(TimeoutError):
                    async with asyncio.timeout(STOPPING_S):
                        await turn.ended()
                        return
            try:
                ended = await self._store.end(row, Cancelled(row.id, "", None))
            except StaleAttempt:  # it has begun anew, elsewhere
                found = await self._store.turn(row.id)
                if found is None:
                    return
                row = found[0]
            else:
                # It may have been taken in, or up, here in the meantime.
                self._live.cut_off(self._live.turns.get(row.id, turn), ended)
                break
        self.tell_ended(row.id)

    async def _is_heeded(self, row: TurnRow) -> bool:
        if self._wire is None or not self._wire.is_up:
            return False
        heeded = self._heeded.setdefault(row.id, asyncio.Event())
        post(self._wire, row.instance, Stop(self._live.instance, row.id))
        try:
            async with asyncio.timeout(HEED_S):
                return await heeded.wait()
        except TimeoutError:
            return False
        finally:
            self._heeded.pop(row.id, None)

    def tell_ended(self, turn: str) -> None:
        """A turn that is not here was ended from here, in the database: whoever runs it is to know."""
        if self._wire is not None:
            post(self._wire, None, TurnEnded(turn))
