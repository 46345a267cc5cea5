"""Runs the turns of this process: their order in each session, the generation, the stored ending.

Each running turn is a task. Whatever happens to a follower, to the LLM server or to the database,
the task ends only when the turn's ending is stored, or when another process is in charge of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection

from app.database import insist
from app.errors import Internal, PortalError, StorageUnavailable
from app.events import Cancelled, Ending, ExpiredEvent, Failed, Final, GenerationOptions, decode_ending
from app.logs import context_with, get_logger
from app.services import turn_log
from app.services.accounting import Accounting
from app.services.elsewhere import Elsewhere
from app.services.endings import Ended, Reply
from app.services.generating import Generating
from app.services.history import History
from app.services.idle_work import IdleWork
from app.services.llm_server import Message
from app.services.outbox import Delivery
from app.services.prompting import Asked, Prompting
from app.services.rows import SessionRow, TurnRow
from app.services.store import StaleAttempt, Store
from app.services.tracing import Tracing
from app.services.turns import Interruption, Turn
from app.services.watchers import Watchers
from app.services.wire import Wire
from app.tasks import Tasks

T = TypeVar("T")

ELSEWHERE_POLL_S = 0.25
IDLE_SESSIONS = 1000
"""Sessions at rest whose history is kept in memory; of others it is read again when they speak."""

log = get_logger(__name__)


@dataclass(slots=True)
class LiveSession:
    """A session of this process: its history as of `version`, and its turns in order."""

    row: SessionRow
    history: History | None = None
    version: int = -1
    asked: Asked | None = None
    chore: asyncio.Task[None] | None = None
    running: Turn | None = None
    waiting: list[Turn] = field(default_factory=list)


class Runner:
    """The live turns and sessions of this process. `instance` is its name in the database."""

    def __init__(
        self,
        store: Store,
        prompting: Prompting,
        generating: Generating,
        accounting: Accounting,
        idle_work: IdleWork,
        instance: str,
        tracing: Tracing | None = None,
        wire: Wire | None = None,
    ) -> None:
        self._store = store
        self._prompting = prompting
        self._generating = generating
        self._accounting = accounting
        self._idle_work = idle_work
        self._tracing = tracing
        self.instance = instance
        self._sessions: OrderedDict[str, LiveSession] = OrderedDict()
        self._running, self._aside, self._chores = Tasks("turn"), Tasks("turns"), Tasks("rest")
        self._closing = False
        self.watchers = Watchers()
        self.turns: dict[str, Turn] = {}
        self.elsewhere = Elsewhere(store, self, wire)
        self.on_delivery: Callable[[Delivery, Turn], None] = lambda _delivery, _turn: None

    async def close(self) -> None:
        """Stops working; turns that are not done stay accepted, for whoever takes them up."""
        self._closing = True
        for turn in list(self.turns.values()):
            self.interrupt(turn, "shutdown")
        await self._running.wait()  # also those whose turns were ended by others, and that clean up
        await self._chores.close()
        await self._aside.wait()
        await self.elsewhere.close()
        await self._idle_work.close()

    # --- order ---

    def enqueue(self, turn: Turn) -> None:
        """Lets an accepted turn run when it is its session's next."""
        live = self._sessions.setdefault(turn.session.id, LiveSession(turn.session))
        self._begin(turn)
        if not turn.row.detached:
            turn.on_abandoned = self._abandoned
        for watcher in self.watchers.of(turn):
            watcher.began(turn)
        if live.chore is not None:
            live.chore.cancel()
        live.waiting.append(turn)
        live.waiting.sort(key=lambda waiting: waiting.row.position)
        self._pump(live)
        if turn in live.waiting and turn.row.deadline is not None:
            delay = max(0.0, turn.row.deadline - time.time())
            turn.expiry = asyncio.get_running_loop().call_later(delay, self.interrupt, turn, "expired")

    def run_unstored(self, turn: Turn, messages: Sequence[Message], options: GenerationOptions) -> None:
        """Runs a turn without a session, of which nothing is stored."""
        self._begin(turn)
        turn.on_abandoned = self._abandoned
        working = self._work_unstored(turn, messages, options)
        turn.task = self._running.start(working, turn.id, turn.context)

    def _begin(self, turn: Turn) -> None:
        self.turns[turn.id] = turn
        turn.context = context_with(turn=turn.id)
        if self._tracing is not None and turn.spans is None:
            self._tracing.begin(turn)

    def interrupt(self, turn: Turn, why: Interruption) -> None:
        """Cuts a turn off: its generation if it runs, its wait if it waits."""
        if turn.interruption is not None or turn.ending is not None:
            return
        turn.interruption = why
        if turn.interruptible and turn.task is not None:
            turn.task.cancel()
        live = self._sessions.get(turn.session.id)
        if live is None or turn not in live.waiting:
            return
        live.waiting.remove(turn)
        _cancel_expiry(turn)
        if why == "taken":
            self._aside.start(self._taken_over(live, turn), f"leave {turn.id}")
        elif why in {"stop", "expired"}:
            ending = ExpiredEvent(turn.id) if why == "expired" else Cancelled(turn.id, "", None)
            self._aside.start(self._conclude(live, turn, ending, None), f"end {turn.id}")

    def abandon(self, accepting: asyncio.Task[Turn]) -> None:
        """Who asked for a turn was cancelled while it was accepted."""
        if accepting.cancelled() or accepting.exception() is not None:
            return
        turn = accepting.result()
        if not turn.row.detached and turn.followers == 0:
            self._abandoned(turn)

    def forget_history(self, session: str) -> None:
        """The history of a session was changed past its turns."""
        live = self._sessions.get(session)
        if live is not None:
            live.history = None
            if live.chore is not None:
                live.chore.cancel()

    def _pump(self, live: LiveSession) -> None:
        """Lets the next turn of a session run."""
        if live.running is not None or self._closing:
            return
        if live.waiting:
            turn = live.running = live.waiting.pop(0)
            _cancel_expiry(turn)  # the deadline is now that of the wait for a place
            working = self._work(live, turn)
            turn.task = self._running.start(working, turn.id, turn.context)
            return
        self._sessions.move_to_end(live.row.id)
        while len(self._sessions) > IDLE_SESSIONS:
            oldest = next(iter(self._sessions.values()))
            if oldest.running is not None:
                break
            self._sessions.popitem(last=False)

    def _abandoned(self, turn: Turn) -> None:
        if not self._closing:
            self.interrupt(turn, "stop")

    def _count(self, turn: Turn) -> None:
        """What the turn has used is written down, unless that was done with its ending."""
        if not turn.is_counted:
            self._aside.start(self._accounting.count(turn), f"count {turn.id}")

    # --- running ---

    async def _work(self, live: LiveSession, turn: Turn) -> None:
        """One turn, from its claim to its stored ending."""
        try:
            if await self._claim(live, turn):
                ending, reply = await self._answer(live, turn)
                if ending is not None:
                    await self._conclude(live, turn, ending, reply)
                elif turn.interruption == "taken":
                    await self._taken_over(live, turn)
        except StorageUnavailable:
            log.warning("a turn is left for the next start", turn=turn.id)  # only when closing
        except Exception:
            log.exception("a turn could not be ended", turn=turn.id)
            live.history = None
            await self._conclude(live, turn, Failed(turn.id, Internal("The portal failed.").info), None)
        finally:
            live.running = None
            if turn.ending is not None:
                self.turns.pop(turn.id, None)
                self._count(turn)
            self._pump(live)
            self._rest(live, turn)

    def _rest(self, live: LiveSession, turn: Turn) -> None:
        """When nobody speaks in the session, begins what is better done now than while somebody waits."""
        history, asked = live.history, live.asked
        if live.running is not None or history is None or asked is None or turn.ending is None:
            return
        if self._closing or not self._idle_work.is_wanted(history):
            return

        def ended(chore: asyncio.Task[None]) -> None:
            if live.chore is chore:
                live.chore = None

        chores = self._do_chores(live, turn, history, asked)
        live.chore = self._chores.start(chores, turn.id)
        live.chore.add_done_callback(ended)

    async def _do_chores(self, live: LiveSession, turn: Turn, history: History, asked: Asked) -> None:
        try:
            if await self._idle_work.summarise(history, turn, asked, live.version):
                live.version += 1
            if history.is_cold:
                await self._idle_work.warm(history, turn, asked.options)
        except Exception:
            log.exception("work for a session at rest failed", turn=turn.id)

    async def _claim(self, live: LiveSession, turn: Turn) -> bool:
        """Waits until the turn is the running one of its session, also among other instances; False
        when it is no longer this instance's to run."""
        if turn.row.state == "running":
            self._refresh(live, turn, turn.session)
            return turn.interruption != "ended"
        while turn.interruption is None:
            if turn.row.deadline is not None and turn.row.deadline <= time.time():
                turn.interruption = "expired"
                break
            session = await self._insist(lambda: self._store.claim(turn.row, self.instance))
            if session is not None:
                self._refresh(live, turn, session)
                return True
            found = await self._insist(lambda: self._store.turn(turn.id))
            if found is not None and found[0].ending is not None:
                self._ended_elsewhere(turn, *found)
                return False
            if found is None or (found[0].instance, found[0].attempt) != (self.instance, turn.row.attempt):
                await self._taken_over(live, turn)
                return False
            if live.waiting and live.waiting[0].row.position < turn.row.position:
                # An earlier turn of the session was taken up here meanwhile: this one waits for it.
                turn.task = None
                self.enqueue(turn)
                return False
            await asyncio.sleep(ELSEWHERE_POLL_S)
        return turn.interruption in {"stop", "expired"}

    def _refresh(self, live: LiveSession, turn: Turn, session: SessionRow) -> None:
        """Forgets a history that somebody else has changed."""
        live.row = session
        if live.version != session.version:
            live.history, turn.is_after_others = None, session.version > 0

    async def _answer(self, live: LiveSession, turn: Turn) -> tuple[Ending | None, Reply | None]:
        """The ending to store, and the reply with it; no ending when the turn must stay active."""
        try:
            history = await self._insist(lambda: self._history(live, turn))
            asked = live.asked = self._prompting.asked(turn)
            prompting = self._prompting.fit(history, turn, asked)
            again = partial(self._prompting.refit, history, turn, asked)
            return await self._generating.run(turn, prompting, asked.options, again)
        except PortalError as error:
            return Failed(turn.id, error.info), None
        except Exception:
            log.exception("a turn failed", turn=turn.id)
            return Failed(turn.id, Internal("The portal failed at this turn.").info), None

    async def _history(self, live: LiveSession, turn: Turn) -> History:
        prompt = self._prompting.system_prompt(live.row, turn)
        if live.row.version == 0 and turn.question is not None:
            live.history, live.version = History(prompt), 0  # no turn has ended here yet
        elif live.history is None or turn.question is None:
            live.history = await self._prompting.recall(live.row, turn)
            live.version = live.row.version
        live.history.system_prompt = prompt  # a role may have got another one
        return live.history

    async def _work_unstored(
        self, turn: Turn, messages: Sequence[Message], options: GenerationOptions
    ) -> None:
        ending: Ending | None = None
        try:
            ending, _ = await self._generating.run(turn, _as_they_are(messages), options)
        except Exception:
            log.exception("a turn failed", turn=turn.id)
        finally:
            self.turns.pop(turn.id, None)
            ending = ending or Failed(turn.id, Internal("The portal failed at this turn.").info)
            turn_log.ended(turn, ending)
            turn.end(ending)
            self._count(turn)

    # --- ending ---

    async def _conclude(self, live: LiveSession, turn: Turn, ending: Ending, reply: Reply | None) -> None:
        """Stores the ending, however long the database refuses, and tells the followers."""
        is_sent = reply is not None and not isinstance(ending, Failed)
        history = live.history if live.running is turn and is_sent else None
        start = None
        if history is not None and reply is not None:
            history.add(
                turn.row.message_id,
                turn.question or "",
                reply.content,
                reply.usage,
                turn.row.kind,
                pinned=turn.is_pinned,
            )
            if live.asked is not None:
                history.make_room(live.asked.room)
            start = history.window_start
        # A trace tells how the text was cut into pieces: without a text it tells nothing.
        trace = turn.trace if isinstance(ending, Final | Cancelled) else None
        used = self._accounting.used(turn, ending)

        def also(connection: Connection) -> None:
            self._accounting.write(connection, turn, used)

        try:
            ended = await self._insist(
                lambda: self._store.end(
                    turn.row, ending, reply=reply, trace=trace, window_start=start, also=also
                )
            )
        except StaleAttempt:
            await self._taken_over(live, turn)
            return
        if not (ended.first and ended.version == live.version + 1):
            live.history = None  # somebody else has changed it too
        elif live.running is turn and not is_sent and live.row.leaf_id != turn.row.message_id:
            live.history = None  # it ends before the question, which keeps its old answer
        live.version = ended.version
        if ended.first:
            await self._accounting.settle(turn, used)
        self.settle(turn, ended)

    def settle(self, turn: Turn, ended: Ended) -> None:
        """The ending of a turn is stored: tells its followers, and the outbox."""
        if self.turns.get(turn.id) is turn:
            del self.turns[turn.id]
        if turn.ending is None:
            turn_log.ended(turn, ended.ending)
        turn.end(ended.ending)
        # Its task counts it, when the generation is closed; another instance's turn is counted there.
        if turn.task is None and turn.row.instance == self.instance:
            self._count(turn)
        for delivery in ended.deliveries:
            self.on_delivery(delivery, turn)
        for watcher in self.watchers.of(turn):
            watcher.ended(turn)

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeats a transaction until the database takes it, or until this process ends."""
        return await insist(call, unless=lambda: self._closing)

    # --- beside other instances ---

    @property
    def here(self) -> list[Turn]:
        """The turns that run, or wait, in this process."""
        return [turn for turn in self.turns.values() if self.is_here(turn)]

    def is_here(self, turn: Turn) -> bool:
        """Whether the turn runs, or waits, in this process."""
        live = self._sessions.get(turn.session.id)
        return turn.task is not None or (live is not None and turn in live.waiting)

    def cut_off(self, turn: Turn, ended: Ended) -> None:
        """A turn was ended in the database: it goes no further here."""
        self.interrupt(turn, "ended")
        self.settle(turn, ended)

    def _ended_elsewhere(self, turn: Turn, row: TurnRow, session: SessionRow) -> None:
        """A turn of this process was ended by another one."""
        assert row.ending is not None
        self.cut_off(turn, Ended(False, turn.id, decode_ending(row.ending), session.version))
        self.forget_history(session.id)

    async def _taken_over(self, live: LiveSession, turn: Turn) -> None:
        log.warning("a turn was taken over", turn=turn.id)
        await self._accounting.release(turn)
        live.history = None
        self.elsewhere.observe(turn)

    async def lost(self) -> frozenset[str]:
        """The active turns that are this instance's in the database, and that nobody runs here: of those
        that have just been accepted, or have just ended, too."""
        active = await self._store.active_of(self.instance)
        return frozenset(id for id in active if not self._has(self.turns.get(id)))

    def _has(self, turn: Turn | None) -> bool:
        return turn is not None and (self.is_here(turn) or not self.elsewhere.observes(turn))

    async def let_go(self) -> None:
        """Cuts off the turns of this process that somebody else has ended, or taken over: a stop, a clear or
        a delete in another process, or an instance that thought this one dead."""
        mine = [turn for turn in self.here if _can_be_cut(turn)]
        active = await self._store.active_of(self.instance) if mine else frozenset()
        for turn in mine:
            if turn.id in active:
                continue
            found = await self._store.turn(turn.id)
            if found is None or not _can_be_cut(turn) or not self.is_here(turn):
                continue
            if found[0].ending is not None:
                self._ended_elsewhere(turn, *found)
            elif found[0].instance != self.instance:
                self.interrupt(turn, "taken")


def _can_be_cut(turn: Turn) -> bool:
    """Whether a stored turn waits, or generates: what comes after that sees for itself what the database
    says."""
    is_at_work = turn.interruptible or turn.task is None
    return is_at_work and turn.session.id != "" and turn.interruption is None


async def _as_they_are(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


def _cancel_expiry(turn: Turn) -> None:
    if turn.expiry is not None:
        turn.expiry.cancel()
        turn.expiry = None
