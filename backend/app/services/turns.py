"""A turn while it lives: its events, and those who follow them.

Every event has a number within its attempt: 0 is `accepted`; in later attempts 1 is `restarted`.
What a follower has seen it names by `(attempt, n)`, and gets the rest, whichever door it comes by.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import Context
from typing import Any, Literal

import msgspec

from app.access import Identity
from app.errors import Expired, InvalidRequest, Superseded, from_info
from app.events import (
    Accepted,
    Cancelled,
    Ending,
    ExpiredEvent,
    Final,
    Queued,
    Restarted,
    SupersededBy,
    Thinking,
    Token,
    TurnEvent,
    Usage,
    decode_ending,
    encode,
)
from app.services.admission import NO_TICKET
from app.services.places import Meter
from app.services.rows import SessionRow, TurnRow
from app.services.tracing import TurnSpans

Interruption = Literal["stop", "expired", "ended", "taken", "shutdown"]
"""Why a turn's generation is cut off: `ended` was its ending in the database, `taken` was the turn over by
another process."""

Position = tuple[int, int]
"""(attempt, n): the last event that a follower has seen."""

_encode_trace = msgspec.msgpack.Encoder().encode
_decode_trace = msgspec.msgpack.Decoder().decode
_decode_event = msgspec.json.Decoder(TurnEvent).decode


class Numbered(msgspec.Struct, frozen=True):
    """An event with its place in the turn. `json` is the event, encoded once for all followers."""

    attempt: int
    n: int
    event: TurnEvent
    json: bytes

    @property
    def id(self) -> str:
        """The place as the id of a server-sent event: `attempt.n`."""
        return f"{self.attempt}.{self.n}"


def parse_position(text: str) -> Position:
    """The place that an event id names. Raises `InvalidRequest`."""
    attempt, dot, n = text.partition(".")
    if not (dot and attempt.isdecimal() and n.isdecimal() and len(text) < 20):
        raise InvalidRequest("after: an event id such as 1.17 is needed")
    return int(attempt), int(n)


class Turn:
    """A turn of this process. Only its session's worker adds events, or who hears of them from the process
    that it runs in."""

    def __init__(self, row: TurnRow, session: SessionRow) -> None:
        self.row = row
        self.id = row.id
        self.session = session
        self.ending: Ending | None = None
        """The last event, once there is one that ends the turn."""
        self.began = time.monotonic()
        self.first_token_at: float | None = None
        self.response: list[str] = []
        self.interruption: Interruption | None = None
        self.task: asyncio.Task[None] | None = None
        self.interruptible = False
        self.expiry: asyncio.TimerHandle | None = None
        self.question: str | None = None
        self.asked_at = row.created_at
        self.is_pinned = False
        """Whether its question is: one that was answered before may be."""
        self.prompt: Sequence[Mapping[str, Any]] = ()
        self.pieces = self.chars = 0
        self.meter = Meter()
        self.usage: Usage | None = None
        self.ticket = NO_TICKET
        self.is_counted = False
        self.followers = 0
        self.context: Context | None = None
        """That of its acceptance: whichever task starts it, it runs in this one."""
        self.spans: TurnSpans | None = None
        self.is_after_others = False
        """Whether turns of its session that came before it may have ended in another process."""
        self.on_followed: Callable[[Turn], None] | None = None
        self.on_abandoned: Callable[[Turn], None] | None = None
        self.is_whole = True
        """Whether all events of this attempt are known here, so that their numbers are those that they came
        with: not while it is observed, and not when it ended without a trace."""
        self._events: list[Numbered] = []
        self._trace: list[Any] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._announce()

    def _announce(self) -> None:
        row, session = self.row, self.session
        accepted = Accepted(row.id, session.session_id or None, row.request_id, row.message_id or None)
        self._append(accepted)
        if row.attempt > 1:
            self._append(Restarted(row.id, row.attempt))

    def queued(self, position: int, eta_s: float) -> None:
        """The turn waits for a place."""
        self._trace.append([position, eta_s])
        self._append(Queued(self.id, position, eta_s))

    def thinking(self, content: str) -> None:
        """A piece of reasoning has come."""
        self.pieces += 1
        self.chars += len(content)
        self._trace.append(content)
        self._append(Thinking(self.id, content))

    def token(self, content: str) -> None:
        """A piece of the reply has come."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self.pieces += 1
        self.chars += len(content)
        self.response.append(content)
        self._trace.append(len(content))
        self._append(Token(self.id, content))

    def end(self, ending: Ending) -> None:
        """The ending is stored."""
        if self.ending is None:
            self._append(ending)

    @property
    def last(self) -> Position:
        """The place of the last event that there is."""
        return self.row.attempt, len(self._events) - 1

    def take_in(self, attempt: int, first: int, events: Sequence[bytes]) -> bool:
        """Takes in events of this turn that came to another process, encoded, the first of them with the
        number `first`. False when some are missing before them."""
        if attempt != self.row.attempt or self.ending is not None:
            return True
        if first > len(self._events):
            return False
        for event in map(_decode_event, events[len(self._events) - first :]):
            if isinstance(event, Token):
                self.response.append(event.content)
            self._append(event)
        return True

    def take_events(self, other: Turn) -> None:
        """Takes over the events of the same turn as it ended elsewhere."""
        self.row, self.ending, self.is_whole = other.row, None, other.is_whole
        self._events, self._trace = other._events[:-1], other._trace
        self._append(other._events[-1].event)

    def restart(self, row: TurnRow) -> None:
        """A new attempt begins, with nothing of what was before."""
        self.row = row
        self.interruption = self.spans = self.on_followed = self.on_abandoned = None
        self.first_token_at = None
        self.response, self._trace, self._events, self.ending = [], [], [], None
        self.meter, self.usage, self.is_counted = Meter(), None, False
        self.pieces = self.chars = 0
        self.is_whole = True
        self._announce()

    @property
    def model(self) -> str | None:
        """The model that answers, or that has answered, where that is known."""
        told = self.ending.usage if isinstance(self.ending, Final | Cancelled) else None
        return self.meter.model or (None if told is None else told.model)

    @property
    def written(self) -> str:
        """All that the model has written: its reasoning, as far as that is shown, and the reply."""
        return "".join([self.reasoning, *self.response])

    @property
    def reasoning(self) -> str:
        """The reasoning, as far as it is shown."""
        return "".join(item for item in self._trace if isinstance(item, str))

    @property
    def trace(self) -> bytes:
        """Where the events of this attempt began and ended, for `replay`: a piece of the reply as
        its length in characters, of the reasoning as its text, a place in the queue as a pair."""
        return _encode_trace(self._trace)

    async def follow(self, after: Position | None = None) -> AsyncGenerator[Sequence[Numbered], None]:
        """Yields the events that come after `after`, in lists of all that are there, up to the
        ending. Nobody misses that: where events are missing before it, its number may be that of another one
        that was seen, so it is told whatever `after` is."""
        with self._attended():
            attempt, n = _start(after, self.row.attempt)
            while True:
                if attempt != self.row.attempt:
                    attempt, n = self.row.attempt, 1
                if self.ending is not None and (not self.is_whole or n > len(self._events)):
                    n = min(n, len(self._events) - 1)
                batch = self._events[n:]
                if batch:
                    yield batch
                    n += len(batch)
                    if isinstance(batch[-1].event, Ending):
                        return
                elif self.ending is None:
                    await self._change()
                else:
                    return

    async def ended(self) -> Ending:
        """The ending, once it is stored. Waiting for it is following."""
        with self._attended():
            while (ending := self.ending) is None:
                await self._change()
            return ending

    @contextmanager
    def _attended(self) -> Iterator[None]:
        self.followers += 1
        if self.followers == 1 and self.on_followed is not None:
            self.on_followed(self)
        try:
            yield
        finally:
            self.followers -= 1
            if self.followers == 0 and self.ending is None and self.on_abandoned is not None:
                self.on_abandoned(self)

    async def _change(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            with suppress(ValueError):  # where there is news, nobody waits any more
                self._waiters.remove(waiter)
            raise

    def _append(self, event: TurnEvent) -> None:
        if self.ending is not None:
            return  # nothing comes after an ending
        if isinstance(event, Ending):
            self.ending = event
        self._events.append(Numbered(self.row.attempt, len(self._events), event, encode(event)))
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


def _start(after: Position | None, attempt: int) -> Position:
    """Where to go on: in another attempt than the one that was seen, `restarted` comes first."""
    if after is None:
        return attempt, 0
    if after[0] == attempt:
        return attempt, after[1] + 1
    return attempt, 1


def unstored(turn_id: str, who: Identity, project: str, question: str) -> Turn:
    """A turn without a session, of which nothing but its usage is stored."""
    now = time.time()
    session = SessionRow("", who.owner, "", project, "", None, None, 0, "", None, now, now)
    row = TurnRow(
        id=turn_id,
        session="",
        position=0,
        request_id=None,
        message_id="",
        kind="message",
        options={},
        deadline=None,
        detached=False,
        state="running",
        attempt=1,
        instance="",
        door=who.door,
        role=who.role_name,
        api_key=who.key.id if who.key else None,
        created_at=now,
        ending=None,
        trace=None,
    )
    turn = Turn(row, session)
    turn.question = question
    return turn


def recall(row: TurnRow, session: SessionRow) -> Turn:
    """An ended turn with its events, from what is stored of it."""
    assert row.ending is not None
    ending = decode_ending(row.ending)
    turn = Turn(row, session)
    turn.is_whole = row.trace is not None
    text = ending.response if isinstance(ending, Final | Cancelled) else ""
    cursor = 0
    for item in _decode_trace(row.trace) if row.trace else ():
        if isinstance(item, int):
            turn.token(text[cursor : cursor + item])
            cursor += item
        elif isinstance(item, str):
            turn.thinking(item)
        else:
            turn.queued(*item)
    turn.end(ending)
    return turn


def answer_of(ending: Ending) -> Final | Cancelled:
    """The ending of a turn that has an answer, whole or stopped; raises the error of any other."""
    if isinstance(ending, Final | Cancelled):
        return ending
    if isinstance(ending, SupersededBy):
        raise Superseded(f"Superseded by request {ending.by}.")
    if isinstance(ending, ExpiredEvent):
        raise Expired("The deadline passed before the turn ran.")
    raise from_info(ending.error)
