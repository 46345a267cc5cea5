"""Runs the turns of this process: their order in each session, the generation, the stored ending.

Each running turn is a task. Whatever happens to a follower, to the LLM server or to the database,
the task ends only when the turn's ending is stored, or when another process is in charge of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection

from app.config import Settings
from app.database import insist
from app.errors import ContextExceeded, Expired, Internal, PortalError, StorageUnavailable
from app.events import Cancelled, Ending, ExpiredEvent, Failed, Final, GenerationOptions, Usage, new_id
from app.logs import get_logger
from app.services.accounting import Accounting
from app.services.endings import Ended, Reply
from app.services.history import History
from app.services.idle_work import IdleWork
from app.services.llm_client import LLMClient
from app.services.llm_server import Message
from app.services.measures import estimated, share_of_thinking, timed
from app.services.memory import Memory
from app.services.outbox import Delivery
from app.services.policies import Policies
from app.services.projects import Projects
from app.services.prompting import Asked, Prompting
from app.services.replies import Done, InQueue
from app.services.routing import OwnKey
from app.services.rows import SessionRow, TurnRow
from app.services.session_keys import SessionKeys
from app.services.store import StaleAttempt, Store
from app.services.turns import Interruption, Turn, recall

T = TypeVar("T")

ELSEWHERE_POLL_S = 0.25
RUNAWAY_FACTOR = 2
LONGEST_TOKEN_CHARS = 64
"""A reply with this many times the tokens that were asked for, or longer than so many of the longest tokens
are, is cut off: its server does not heed `max_tokens`."""

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
        settings: Settings,
        store: Store,
        memory: Memory,
        llm: LLMClient,
        policies: Policies,
        projects: Projects,
        accounting: Accounting,
        keys: SessionKeys,
        instance: str,
    ) -> None:
        self._settings = settings
        self._prompting = Prompting(settings, store, memory, llm, policies, projects)
        self._idle_work = IdleWork(settings, llm, store, memory, accounting)
        self._store = store
        self._llm = llm
        self._accounting = accounting
        self._keys = keys
        self._instance = instance
        self._sessions: OrderedDict[str, LiveSession] = OrderedDict()
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._chores: set[asyncio.Task[None]] = set()
        self._closing = False
        self._bells: dict[tuple[str, str], list[asyncio.Event]] = {}
        self.turns: dict[str, Turn] = {}
        self.on_delivery: Callable[[Delivery, Turn], None] = lambda _delivery, _turn: None

    async def close(self) -> None:
        """Stops working; turns that are not done stay accepted, for whoever takes them up."""
        self._closing = True
        tasks = [turn.task for turn in self.turns.values() if turn.task is not None]
        for turn in list(self.turns.values()):
            self.interrupt(turn, "shutdown")
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*tasks, *self._side_tasks, *self._chores, return_exceptions=True)
        await self._idle_work.close()

    # --- order ---

    def enqueue(self, turn: Turn) -> None:
        """Lets an accepted turn run when it is its session's next."""
        live = self._sessions.setdefault(turn.session.id, LiveSession(turn.session))
        self.turns[turn.id] = turn
        if not turn.row.detached:
            turn.on_abandoned = self._abandoned
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
        self.turns[turn.id] = turn
        turn.on_abandoned = self._abandoned
        turn.task = asyncio.create_task(self._work_unstored(turn, messages, options), name=f"chat {turn.id}")

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
        if why in {"stop", "expired"}:
            ending = ExpiredEvent(turn.id) if why == "expired" else Cancelled(turn.id, "", None)
            self._aside(self._conclude(live, turn, ending, None), f"end {turn.id}")

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
            turn.task = asyncio.create_task(self._work(live, turn), name=f"turn {turn.id}")
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
            self._aside(self._accounting.count(turn), f"count {turn.id}")

    def _aside(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)

    # --- running ---

    async def _work(self, live: LiveSession, turn: Turn) -> None:
        """One turn, from its claim to its stored ending."""
        try:
            if await self._claim(live, turn):
                ending, reply = await self._answer(live, turn)
                if ending is not None:
                    await self._conclude(live, turn, ending, reply)
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
            self._chores.discard(chore)
            if live.chore is chore:
                live.chore = None

        chores = self._do_chores(live, turn, history, asked)
        live.chore = asyncio.create_task(chores, name=f"rest {turn.id}")
        self._chores.add(live.chore)
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
            self._refresh(live, turn.session)
            return turn.interruption != "ended"
        while turn.interruption is None:
            if turn.row.deadline is not None and turn.row.deadline <= time.time():
                turn.interruption = "expired"
                break
            session = await self._insist(lambda: self._store.claim(turn.id, self._instance))
            if session is not None:
                self._refresh(live, session)
                return True
            found = await self._insist(lambda: self._store.turn(turn.id))
            if found is None or found[0].instance != self._instance or not found[0].is_active:
                self.watch_elsewhere(turn)
                return False
            if live.waiting and live.waiting[0].row.position < turn.row.position:
                # An earlier turn of the session was taken up here meanwhile: this one waits for it.
                turn.task = None
                self.enqueue(turn)
                return False
            await asyncio.sleep(ELSEWHERE_POLL_S)
        return turn.interruption in {"stop", "expired"}

    def _refresh(self, live: LiveSession, session: SessionRow) -> None:
        """Forgets a history that somebody else has changed."""
        live.row = session
        if live.version != session.version:
            live.history = None

    async def _answer(self, live: LiveSession, turn: Turn) -> tuple[Ending | None, Reply | None]:
        """The ending to store, and the reply with it; no ending when the turn must stay active."""
        try:
            history = await self._insist(lambda: self._history(live, turn))
            asked = live.asked = self._prompting.asked(turn)
            prompting = self._prompting.fit(history, turn, asked)
            again = partial(self._prompting.refit, history, turn, asked)
            return await self._generate(turn, prompting, asked.options, again)
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

    async def _generate(
        self,
        turn: Turn,
        prompting: Coroutine[Any, Any, Sequence[Message]],
        options: GenerationOptions,
        again: Callable[[ContextExceeded], Awaitable[Sequence[Message]]] | None = None,
    ) -> tuple[Ending | None, Reply | None]:
        """Makes the prompt and generates, with the turn's events, and tells how it ended. Where the server
        has no room for the prompt, the one that is made `again` is tried, once."""
        turn.interruptible = True
        try:
            if turn.interruption is not None:
                prompting.close()
                return _interrupted(turn)
            turn.prompt = await prompting
            try:
                done = await self._stream(turn, options)
            except ContextExceeded as refused:
                if again is None:
                    raise
                turn.prompt = await again(refused)
                done = await self._stream(turn, options)
            if done.usage is None:
                await self._measure(turn, options)
            else:
                turn.usage = timed(turn, done.usage)
            return _finished(turn, done)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if turn.interruption is None or task is None:
                raise
            task.uncancel()
            if turn.interruption == "stop":
                await self._measure(turn, options)
            return _interrupted(turn)
        except Expired:
            return ExpiredEvent(turn.id), None
        except PortalError as error:
            await self._measure(turn, options)
            return Failed(turn.id, error.info), _reply_of(turn)
        finally:
            turn.interruptible = False

    async def _measure(self, turn: Turn, options: GenerationOptions) -> None:
        """Finds out what a turn has used that the server has not reported, as well as that can be told. The
        turn cannot be interrupted any more."""
        turn.interruptible = False
        if not turn.meter.model:
            return
        usage = await self._llm.count(turn.prompt, turn.written, options.model)
        if usage is None:
            usage = estimated(turn)
        else:
            reasoning = share_of_thinking(turn, usage.completion_tokens)
            usage = msgspec.structs.replace(usage, reasoning_tokens=reasoning)
        turn.usage = timed(turn, usage)

    async def _stream(self, turn: Turn, options: GenerationOptions) -> Done:
        own_key: OwnKey | None = None
        if self._llm.own_key_providers and turn.session.id:
            own_key = await self._insist(lambda: self._keys.of(turn.session.id))
        updates = self._llm.stream(
            turn.prompt,
            options,
            deadline=turn.row.deadline,
            owner=turn.session.owner,
            session=turn.session.id or None,
            meter=turn.meter,
            own_key=own_key,
            allowed=self._prompting.role_of(turn).models,
        )
        most = RUNAWAY_FACTOR * self._llm.max_tokens_of(options)
        async with aclosing(updates):
            async for update in updates:
                if isinstance(update, InQueue):
                    turn.queued(update.position, update.eta_s)
                elif isinstance(update, Done):
                    return update
                elif update.kind == "text":
                    turn.token(update.content)
                else:
                    turn.thinking(update.content)
                if turn.pieces > most or turn.chars > most * LONGEST_TOKEN_CHARS:
                    log.warning("a runaway generation is cut off", turn=turn.id, pieces=turn.pieces)
                    return Done("length", None, [])
        raise AssertionError("a generation ended without saying so")

    async def _work_unstored(
        self, turn: Turn, messages: Sequence[Message], options: GenerationOptions
    ) -> None:
        ending: Ending | None = None
        try:
            ending, _ = await self._generate(turn, _as_they_are(messages), options)
        except Exception:
            log.exception("a turn failed", turn=turn.id)
        finally:
            self.turns.pop(turn.id, None)
            turn.end(ending or Failed(turn.id, Internal("The portal failed at this turn.").info))
            self._count(turn)

    # --- ending ---

    async def _conclude(self, live: LiveSession, turn: Turn, ending: Ending, reply: Reply | None) -> None:
        """Stores the ending, however long the database refuses, and tells the followers."""
        is_sent = reply is not None and not isinstance(ending, Failed)
        history = live.history if live.running is turn and is_sent else None
        start = None
        if history is not None and reply is not None:
            history.add(turn.row.message_id, turn.question or "", reply.content, reply.usage, turn.row.kind)
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
            log.warning("a turn was taken over", turn=turn.id)
            await self._accounting.release(turn)
            live.history = None
            self.watch_elsewhere(turn)
            return
        if not (ended.first and ended.version == live.version + 1):
            live.history = None  # somebody else has changed it too
        live.version = ended.version
        if ended.first:
            await self._accounting.settle(turn, used)
        self.settle(turn, ended)

    def settle(self, turn: Turn, ended: Ended) -> None:
        """The ending of a turn is stored: tells its followers, and the outbox."""
        self.turns.pop(turn.id, None)
        turn.end(ended.ending)
        if turn.task is None:  # else its task counts it, when the generation is closed
            self._count(turn)
        for delivery in ended.deliveries:
            self.on_delivery(delivery, turn)
        for event in self._bells.get((turn.session.owner, turn.session.session_id), ()):
            event.set()
        log.info("turn ended", turn=turn.id, ending=type(ended.ending).__name__)

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeats a transaction until the database takes it, or until this process ends."""
        return await insist(call, unless=lambda: self._closing)

    @contextmanager
    def bell(self, owner: str, session_id: str, event: asyncio.Event) -> Iterator[None]:
        """Sets `event` whenever a turn of the session has ended here."""
        bells = self._bells.setdefault((owner, session_id), [])
        bells.append(event)
        try:
            yield
        finally:
            bells.remove(event)
            if not bells:
                self._bells.pop((owner, session_id), None)

    # --- turns of other instances ---

    def is_here(self, turn: Turn) -> bool:
        """Whether the turn runs, or waits, in this process."""
        live = self._sessions.get(turn.session.id)
        return turn.task is not None or (live is not None and turn in live.waiting)

    def turn_elsewhere(self, row: TurnRow, session: SessionRow) -> Turn:
        """A turn that is not, or no longer, this process's: recalled, or watched until it ends."""
        if not row.is_active:
            return recall(row, session)
        turn = Turn(row, session)
        self.watch_elsewhere(turn)
        return turn

    def watch_elsewhere(self, turn: Turn) -> None:
        """Follows a turn that another process runs, until it ends there or is taken up here."""
        turn.task = None
        self.turns[turn.id] = turn
        self._aside(self._poll(turn), f"watch {turn.id}")

    async def _poll(self, turn: Turn) -> None:
        while turn.task is None and not self._closing:
            found = await self._insist(lambda: self._store.turn(turn.id))
            if found is None or not found[0].is_active:
                self.turns.pop(turn.id, None)
                if found is not None:
                    turn.take_events(recall(*found))
                return
            await asyncio.sleep(ELSEWHERE_POLL_S)


async def _as_they_are(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


def _cancel_expiry(turn: Turn) -> None:
    if turn.expiry is not None:
        turn.expiry.cancel()
        turn.expiry = None


def _interrupted(turn: Turn) -> tuple[Ending | None, Reply | None]:
    if turn.interruption == "expired":
        return ExpiredEvent(turn.id), None
    if turn.interruption != "stop":
        return None, None
    reply = _reply_of(turn)
    if reply is None:
        return Cancelled(turn.id, "", None, turn.usage), None
    stored = turn.row.message_id != ""
    return Cancelled(turn.id, reply.content, reply.message_id if stored else None, turn.usage), reply


def _reply_of(turn: Turn) -> Reply | None:
    """What there is of a reply that broke off."""
    response = "".join(turn.response)
    return Reply(new_id(), response, [], turn.usage) if response else None


def _finished(turn: Turn, done: Done) -> tuple[Final, Reply]:
    now = time.monotonic()
    response = "".join(turn.response)
    usage = turn.usage or Usage(estimated=True)
    reply = Reply(new_id(), response, done.tool_calls, usage)
    final = Final(
        turn.id,
        response=response,
        finish_reason=done.finish_reason,
        usage=usage,
        tool_calls=done.tool_calls,
        elapsed_ms=round((now - turn.began) * 1000),
        ttft_ms=usage.ttft_ms,
        message_id=reply.message_id if turn.row.message_id else None,
    )
    return final, reply
