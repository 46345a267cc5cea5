"""What is stored of sessions, messages and turns, and the transactions that change it.

A turn is a row of the inbox from the moment it is accepted: `waiting` behind others of its session,
`running`, then the type of the event that ended it. Every change of state is one transaction and
says in its WHERE what it expects, so of two that want the same change exactly one gets it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, and_, delete, func, insert, select, text, update

from app.database import Database, insert_new
from app.errors import Conflict, NotFound, Overloaded, PortalError
from app.events import (
    Cancelled,
    Ending,
    Failed,
    ReplyTarget,
    TurnRequest,
    Usage,
    decode_ending,
    encode,
    new_id,
    type_of,
)
from app.models.tables import ACTIVE, identity, leases, messages, outbox, sessions, turns

T = TypeVar("T")

MAX_WAITING = 16
"""Turns that may wait in one session behind the running one."""

TITLE_CHARS = 80
"""A new session is called after the beginning of its first message."""

RETRY_WINDOW_S = 24 * 3600
"""How long a request id is remembered."""


class SessionRow(msgspec.Struct, frozen=True):
    """A session. `version` changes with its history, whoever changes it."""

    id: str
    owner: str
    session_id: str
    project: str
    system_prompt: str
    leaf_id: str | None
    window_start: str | None
    version: int
    title: str
    template_version: str | None
    created_at: float
    updated_at: float


class TurnRow(msgspec.Struct, frozen=True):
    """A turn as stored. `ending` is the encoded event once it has ended."""

    id: str
    session: str
    position: int
    request_id: str | None
    message_id: str
    options: dict[str, Any]
    deadline: float | None
    detached: bool
    state: str
    attempt: int
    instance: str
    door: str
    role: str
    api_key: str | None
    created_at: float
    ending: bytes | None
    trace: bytes | None

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in {"waiting", "running"}


class MessageRow(msgspec.Struct, frozen=True):
    """A message with the state of its turn."""

    id: str
    parent_id: str | None
    turn_id: str
    role: str
    content: str
    tool_calls: list[dict[str, Any]] | None
    usage: Usage | None
    created_at: float
    turn_state: str

    @property
    def status(self) -> str:
        """`complete`, `pending`, `failed`, `cancelled`, `expired` or `superseded`."""
        names = {"final": "complete", "waiting": "pending", "running": "pending", "error": "failed"}
        return names.get(self.turn_state, self.turn_state)


class Delivery(msgspec.Struct, frozen=True):
    """A row of the outbox: a reply owed to `target`."""

    id: str
    turn_id: str
    target: ReplyTarget
    ready: bool


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What became of a request: a `new` turn, a `known` one, or a new attempt (`again`) at one that
    had failed. `delivery` is the outbox row for a request that names a reply target."""

    kind: Literal["new", "known", "again"]
    turn: TurnRow
    session: SessionRow
    delivery: Delivery | None


@dataclass(frozen=True, slots=True)
class Reply:
    """The assistant's message that a turn ends with."""

    message_id: str
    content: str
    tool_calls: list[dict[str, Any]]
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class Ended:
    """An ending that is stored: by this call (`first`) or by somebody else before."""

    first: bool
    turn_id: str
    ending: Ending
    version: int
    deliveries: tuple[Delivery, ...] = ()


SESSION_COLUMNS = [sessions.c[name] for name in SessionRow.__struct_fields__]
TURN_COLUMNS = [turns.c[name] for name in TurnRow.__struct_fields__]
DELIVERY_COLUMNS = [outbox.c[name] for name in ("id", "turn_id", "project", "topic", "format", "ready")]

# From a leaf towards the root. LIMIT bounds the walk, so a page costs what it shows.
PATH = text("""
    WITH RECURSIVE path(id, parent_id, depth) AS (
        SELECT id, parent_id, 0 FROM messages WHERE id = :leaf
        UNION ALL
        SELECT m.id, m.parent_id, path.depth + 1 FROM messages m JOIN path ON m.id = path.parent_id
        WHERE path.id <> :last AND path.depth + 1 < :limit
    )
    SELECT m.id, m.parent_id, m.turn_id, m.role, m.content, m.tool_calls, m.usage, m.created_at, t.state
    FROM path JOIN messages m ON m.id = path.id JOIN turns t ON t.id = m.turn_id
    ORDER BY path.depth DESC
""").columns(
    messages.c.id,
    messages.c.parent_id,
    messages.c.turn_id,
    messages.c.role,
    messages.c.content,
    messages.c.tool_calls,
    messages.c.usage,
    messages.c.created_at,
    turns.c.state,
)


class Store:
    """The transactions on sessions, messages, turns, outbox and leases."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- the life of a turn ---

    async def accept(
        self, request: TurnRequest, *, turn_id: str, instance: str, full: Overloaded | None = None
    ) -> Acceptance:
        """Commits the user message and its turn, or finds the turn that the request id names.

        Raises `Conflict` for a request id with another body, `Overloaded` when too many turns of the
        session wait, and `full` when it is given and the turn would be a new one.
        """
        outcome = await self._database.write(
            lambda c: _accept(c, request, turn_id, instance, time.time(), full)
        )
        return _raised(outcome)

    async def claim(self, turn_id: str, instance: str) -> SessionRow | None:
        """Makes a waiting turn the running one of its session; None while an earlier one is active,
        or when it no longer waits for this instance."""
        return await self._database.write(lambda c: _claim(c, turn_id, instance))

    async def end(
        self,
        turn: TurnRow,
        ending: Ending,
        *,
        reply: Reply | None = None,
        trace: bytes | None = None,
        window_start: str | None = None,
        also: Callable[[Connection], None] | None = None,
    ) -> Ended:
        """Ends a turn: reply, history and outbox in one transaction, and what `also` writes. The first
        writer wins; who comes later, or with an attempt that is void, gets the stored ending back.

        Raises `StaleAttempt` when the turn is active in another attempt.
        """
        outcome = await self._database.write(
            lambda c: _end(c, turn, ending, reply, trace, window_start, also)
        )
        if outcome is None:
            raise StaleAttempt("The turn was taken over.")
        return outcome

    async def clear(self, owner: str, session_id: str, partial: dict[str, str]) -> tuple[str, list[Ended]]:
        """Deletes the messages of a session and ends its active turns as cancelled; `partial` has
        the text that each running one had so far. Returns the session's row id with the endings.
        Raises `NotFound`."""
        return _raised(await self._database.write(lambda c: _clear(c, owner, session_id, partial)))

    async def delete_session(
        self, owner: str, session_id: str, partial: dict[str, str]
    ) -> tuple[str, list[Ended]]:
        """Deletes a session, which can be restored, and ends its active turns as `clear` does. Raises
        `NotFound`."""
        return _raised(await self._database.write(lambda c: _delete_session(c, owner, session_id, partial)))

    async def restore_session(self, owner: str, session_id: str, project: str | None = None) -> SessionRow:
        """Brings back the session of this name that was deleted last, of a project where one is given.
        Raises `NotFound`, and `Conflict` when the name is in use again."""
        return _raised(await self._database.write(lambda c: _restore_session(c, owner, session_id, project)))

    async def rename_session(self, session: str, title: str) -> None:
        """Gives a session another title."""
        statement = update(sessions).where(sessions.c.id == session).values(title=title)
        await self._database.write(lambda c: c.execute(statement))

    async def adopt(self, instance: str, *, restarted: bool = False) -> list[tuple[TurnRow, SessionRow]]:
        """Takes over the active turns of instances whose lease has run out; with `restarted` also
        those that an earlier process left under this instance's own name."""
        return await self._database.write(lambda c: _adopt(c, instance, restarted, time.time()))

    async def has_orphans(self, instance: str) -> bool:
        """Whether there is something for `instance` to adopt."""
        statement = _orphans(instance, time.time()).limit(1)
        return await self._database.read(lambda c: c.execute(statement).first() is not None)

    # --- reading ---

    async def session(self, owner: str, session_id: str) -> SessionRow | None:
        """The session that the owner calls `session_id`."""
        return await self._database.read(lambda c: _session(c, owner, session_id))

    async def sessions_of(
        self, owner: str, search: str, *, limit: int, offset: int, project: str | None = None
    ) -> tuple[list[SessionRow], int]:
        """The owner's sessions with `search` in the title, those used last first, and how many there
        are in all; of one project where it is given."""
        wanted = [sessions.c.owner == owner, sessions.c.deleted_at.is_(None)]
        if project is not None:
            wanted.append(sessions.c.project == project)
        if search:
            wanted.append(sessions.c.title.icontains(search, autoescape=True))
        newest = (
            select(*SESSION_COLUMNS)
            .where(*wanted)
            .order_by(sessions.c.updated_at.desc(), sessions.c.id)
            .limit(limit)
            .offset(offset)
        )

        def operation(connection: Connection) -> tuple[list[SessionRow], int]:
            counted = connection.execute(select(func.count()).select_from(sessions).where(*wanted))
            return [SessionRow(*row) for row in connection.execute(newest)], counted.scalar_one()

        return await self._database.read(operation)

    async def turn(self, turn_id: str) -> tuple[TurnRow, SessionRow] | None:
        """A turn and its session."""
        statement = select(*TURN_COLUMNS, *SESSION_COLUMNS).join(sessions).where(turns.c.id == turn_id)
        row = await self._database.read(lambda c: c.execute(statement).first())
        return None if row is None else _turn_and_session(row)

    async def has_request(self, owner: str, session_id: str, request_id: str) -> bool:
        """Whether the session knows the request id."""
        statement = (
            select(turns.c.id)
            .join(sessions)
            .where(_named(owner, session_id), turns.c.request_id == request_id)
            .limit(1)
        )
        return await self._database.read(lambda c: c.execute(statement).first() is not None)

    async def active_turns(self, session: str) -> list[TurnRow]:
        """The waiting and running turns of a session, in order."""
        statement = _active(session).order_by(turns.c.position)
        rows = await self._database.read(lambda c: c.execute(statement).all())
        return [TurnRow(*row) for row in rows]

    async def messages(
        self, leaf: str | None, *, last: str | None = None, limit: int | None = None
    ) -> list[MessageRow]:
        """The path that ends at `leaf`, oldest first: down from `last`, or the newest `limit`."""
        if leaf is None:
            return []
        values = {"leaf": leaf, "last": last or "", "limit": limit or 1_000_000_000}
        rows = await self._database.read(lambda c: c.execute(PATH, values).all())
        return [_message(row) for row in rows]

    async def waiting_messages(self, session: str) -> list[MessageRow]:
        """The user messages that wait for their turn, in order."""
        statement = (
            select(messages, turns.c.state)
            .join(turns, turns.c.message_id == messages.c.id)
            .where(turns.c.session == session, turns.c.state == "waiting", text(ACTIVE))
            .order_by(turns.c.position)
        )
        rows = await self._database.read(lambda c: c.execute(statement).all())
        columns = (
            "id",
            "parent_id",
            "turn_id",
            "role",
            "content",
            "tool_calls",
            "usage",
            "created_at",
            "state",
        )
        return [_message([row._mapping[name] for name in columns]) for row in rows]

    async def message_parent(self, session: str, message_id: str) -> tuple[str | None] | None:
        """The parent of a message of this session, in a tuple; None when there is no such message."""
        statement = select(messages.c.parent_id).where(
            messages.c.id == message_id, messages.c.session == session
        )
        row = await self._database.read(lambda c: c.execute(statement).first())
        return None if row is None else (row[0],)

    # --- outbox ---

    async def ready_deliveries(self, project: str) -> list[Delivery]:
        """The replies owed to a project's clients, oldest first."""
        statement = (
            select(*DELIVERY_COLUMNS).where(outbox.c.project == project, outbox.c.ready).order_by(outbox.c.id)
        )
        rows = await self._database.read(lambda c: c.execute(statement).all())
        return [_delivery(row) for row in rows]

    async def delivered(self, delivery_ids: Sequence[str]) -> None:
        """Forgets replies that the broker has confirmed."""
        await self._database.write(lambda c: c.execute(delete(outbox).where(outbox.c.id.in_(delivery_ids))))

    # --- leases and identity ---

    async def acquire(self, name: str, holder: str, seconds: float, *, force: bool = False) -> bool:
        """Takes or renews the lease `name` for `holder`; with `force` also from a holder whose time is
        not over. False when somebody else holds it."""
        now = time.time()
        values = {"holder": holder, "expires_at": now + seconds}

        def operation(connection: Connection) -> bool:
            free = leases.c.name == name
            if not force:
                free = and_(free, (leases.c.holder == holder) | (leases.c.expires_at < now))
            if connection.execute(update(leases).where(free).values(values)).rowcount:
                return True
            return insert_new(connection, leases, {"name": name, **values})

        return await self._database.write(operation)

    async def release(self, name: str, holder: str) -> None:
        """Gives the lease back, if `holder` has it."""
        statement = delete(leases).where(leases.c.name == name, leases.c.holder == holder)
        await self._database.write(lambda c: c.execute(statement))

    async def database_id(self) -> str:
        """Names this database; made with it."""
        return str(await self._database.read(lambda c: c.execute(select(identity)).scalar_one()))

    async def ping(self) -> None:
        """Raises when the database cannot be read."""
        await self._database.read(lambda c: c.execute(text("SELECT 1")))


class StaleAttempt(Exception):
    """The turn is active in another attempt: what this one has made is void."""


def _raised(outcome: T | PortalError) -> T:
    """The result of an operation, which returns its errors: raising them would undo its whole group."""
    if isinstance(outcome, PortalError):
        raise outcome
    return outcome


# --- operations ----------------------------------------------------------------------------------


def _named(owner: str, session_id: str) -> ColumnElement[bool]:
    """The session that an owner calls so: a deleted one may have had the same name."""
    mine = and_(sessions.c.owner == owner, sessions.c.session_id == session_id)
    return and_(mine, sessions.c.deleted_at.is_(None))


def _session(connection: Connection, owner: str, session_id: str) -> SessionRow | None:
    statement = select(*SESSION_COLUMNS).where(_named(owner, session_id))
    row = connection.execute(statement).first()
    return None if row is None else SessionRow(*row)


def _locked_session(connection: Connection, session: str) -> tuple[SessionRow, int]:
    """The session, locked for this transaction, and its next position."""
    statement = (
        select(*SESSION_COLUMNS, sessions.c.next_position).where(sessions.c.id == session).with_for_update()
    )
    row = connection.execute(statement).one()
    return SessionRow(*row[:-1]), row[-1]


def _ensure_session(connection: Connection, request: TurnRequest, now: float) -> str:
    statement = select(sessions.c.id).where(_named(request.who.owner, request.session_id))
    found = connection.execute(statement).scalar()
    if found is None:
        values = {
            "id": new_id(),
            "owner": request.who.owner,
            "session_id": request.session_id,
            "project": request.project,
            "system_prompt": request.system_prompt or "",
            "template_version": request.template_version,
            "title": " ".join(request.message.split())[:TITLE_CHARS],
            "version": 0,
            "next_position": 1,
            "created_at": now,
            "updated_at": now,
        }
        insert_new(connection, sessions, values)
        found = connection.execute(statement).scalar_one()
    return str(found)


def _accept(
    connection: Connection,
    request: TurnRequest,
    turn_id: str,
    instance: str,
    now: float,
    full: Overloaded | None,
) -> Acceptance | PortalError:
    session, position = _locked_session(connection, _ensure_session(connection, request, now))
    known = _find_request(connection, session, request, now)
    if isinstance(known, PortalError):
        return known
    if known is not None and not _may_try_again(known):
        delivery = _owe(connection, known, request.reply_to)
        return Acceptance("known", known, session, delivery)
    if full is not None:
        return full

    active = connection.execute(select(func.count()).select_from(_active(session.id).subquery())).scalar_one()
    if active > MAX_WAITING:
        return Overloaded(f"{MAX_WAITING} messages already wait in this session.", retry_after=5)
    state = "waiting" if active else "running"
    if known is None:
        turn = _insert_turn(connection, request, turn_id, instance, session, position, state, now)
    else:
        turn = _new_attempt(connection, known, request, instance, position, state)
    if not active:
        session = _attach(connection, session, turn)
    connection.execute(
        update(sessions).where(sessions.c.id == session.id).values(next_position=position + 1, updated_at=now)
    )
    delivery = _owe(connection, turn, request.reply_to)
    return Acceptance("new" if known is None else "again", turn, session, delivery)


def _find_request(
    connection: Connection, session: SessionRow, request: TurnRequest, now: float
) -> TurnRow | Conflict | None:
    if request.request_id is None:
        return None
    statement = select(*TURN_COLUMNS, turns.c.fingerprint).where(
        turns.c.session == session.id, turns.c.request_id == request.request_id
    )
    row = connection.execute(statement).first()
    if row is None:
        return None
    turn = TurnRow(*row[:-1])
    if not turn.is_active and turn.created_at < now - RETRY_WINDOW_S:
        connection.execute(update(turns).where(turns.c.id == turn.id).values(request_id=None))
        return None
    if row.fingerprint != request.fingerprint():
        return Conflict(
            "This request_id was already used in this session with another message or parameters."
        )
    return turn


def _may_try_again(turn: TurnRow) -> bool:
    if turn.state != "error" or turn.ending is None:
        return False
    ending = decode_ending(turn.ending)
    return isinstance(ending, Failed) and ending.error.retryable


def _insert_turn(
    connection: Connection,
    request: TurnRequest,
    turn_id: str,
    instance: str,
    session: SessionRow,
    position: int,
    state: str,
    now: float,
) -> TurnRow:
    turn = TurnRow(
        id=turn_id,
        session=session.id,
        position=position,
        request_id=request.request_id or turn_id,
        message_id=new_id(),
        options=request.options.given(),
        deadline=request.deadline,
        detached=request.detached,
        state=state,
        attempt=1,
        instance=instance,
        door=request.who.door,
        role=request.who.role_name,
        api_key=request.who.key.id if request.who.key else None,
        created_at=now,
        ending=None,
        trace=None,
    )
    connection.execute(
        insert(messages).values(
            id=turn.message_id,
            session=session.id,
            turn_id=turn_id,
            role="user",
            content=request.message,
            created_at=now,
        )
    )
    values = {name: getattr(turn, name) for name in TurnRow.__struct_fields__}
    connection.execute(insert(turns).values(**values, fingerprint=request.fingerprint()))
    return turn


def _new_attempt(
    connection: Connection, turn: TurnRow, request: TurnRequest, instance: str, position: int, state: str
) -> TurnRow:
    message = {"id": turn.message_id, "session": turn.session, "turn_id": turn.id, "role": "user"}
    # A clear since then has deleted the message, but not the memory of the request id.
    insert_new(connection, messages, {**message, "content": request.message, "created_at": time.time()})
    changes: dict[str, Any] = {
        "attempt": turn.attempt + 1,
        "position": position,
        "deadline": request.deadline,
        "detached": request.detached,
        "state": state,
        "instance": instance,
        "ending": None,
        "trace": None,
    }
    connection.execute(update(turns).where(turns.c.id == turn.id).values(**changes, ended_at=None))
    # Whoever is owed the failure gets the new ending instead; a publish of the failure that is under
    # way, and then deletes its row, must not take the new one.
    for (owed,) in connection.execute(select(outbox.c.id).where(outbox.c.turn_id == turn.id)).all():
        connection.execute(update(outbox).where(outbox.c.id == owed).values(id=new_id(), ready=False))
    return msgspec.structs.replace(turn, **changes)


def _attach(connection: Connection, session: SessionRow, turn: TurnRow) -> SessionRow:
    """Puts the user message of a turn at the end of the history, from wherever it was."""
    if session.leaf_id == turn.message_id:
        return session
    mine = messages.c.id == turn.message_id
    if turn.attempt > 1:
        # A failed message may have been answered over: those after it close the gap.
        before = select(messages.c.parent_id).where(mine).scalar_subquery()
        connection.execute(
            update(messages)
            .where(messages.c.session == session.id, messages.c.parent_id == turn.message_id)
            .values(parent_id=before)
        )
    connection.execute(update(messages).where(mine).values(parent_id=session.leaf_id))
    connection.execute(update(sessions).where(sessions.c.id == session.id).values(leaf_id=turn.message_id))
    return msgspec.structs.replace(session, leaf_id=turn.message_id)


def _active(session: str) -> Any:
    return select(*TURN_COLUMNS).where(turns.c.session == session, text(ACTIVE))


def _claim(connection: Connection, turn_id: str, instance: str) -> SessionRow | None:
    turn = connection.execute(select(*TURN_COLUMNS).where(turns.c.id == turn_id)).first()
    if turn is None:
        return None
    row = TurnRow(*turn)
    session, _ = _locked_session(connection, row.session)
    earlier = _active(row.session).where(turns.c.position < row.position).limit(1)
    if connection.execute(earlier).first() is not None:
        return None
    claimed = connection.execute(
        update(turns)
        .where(turns.c.id == turn_id, turns.c.state == "waiting", turns.c.instance == instance)
        .values(state="running")
    )
    return _attach(connection, session, row) if claimed.rowcount else None


def _end(
    connection: Connection,
    turn: TurnRow,
    ending: Ending,
    reply: Reply | None,
    trace: bytes | None,
    window_start: str | None,
    also: Callable[[Connection], None] | None,
) -> Ended | None:
    session, _ = _locked_session(connection, turn.session)
    current = connection.execute(
        select(turns.c.state, turns.c.attempt, turns.c.ending).where(turns.c.id == turn.id)
    ).one()
    if current.state not in {"waiting", "running"}:
        return Ended(False, turn.id, decode_ending(current.ending), session.version)
    if current.attempt != turn.attempt:
        return None
    now = time.time()
    connection.execute(
        update(turns)
        .where(turns.c.id == turn.id)
        .values(state=type_of(ending), ending=encode(ending), trace=trace, ended_at=now)
    )
    if current.state == "waiting":
        _slip_in(connection, session, turn)
        session, _ = _locked_session(connection, turn.session)
    changes: dict[str, Any] = {"version": session.version + 1, "updated_at": now}
    if window_start is not None:
        changes["window_start"] = window_start
    if reply is not None:
        changes["leaf_id"] = reply.message_id
        _insert_reply(connection, turn, reply, now)
    connection.execute(update(sessions).where(sessions.c.id == session.id).values(changes))
    if also is not None:
        also(connection)
    return Ended(True, turn.id, ending, session.version + 1, _make_ready(connection, turn.id))


def _slip_in(connection: Connection, session: SessionRow, turn: TurnRow) -> None:
    """Keeps the message of a turn that never ran in the history: before the running turn's message,
    which must stay the leaf, or at the end."""
    running = connection.execute(
        select(turns.c.message_id).where(
            turns.c.session == session.id, turns.c.state == "running", text(ACTIVE)
        )
    ).scalar()
    if running is None or running == turn.message_id:
        _attach(connection, session, turn)
        return
    before = select(messages.c.parent_id).where(messages.c.id == running).scalar_subquery()
    connection.execute(update(messages).where(messages.c.id == turn.message_id).values(parent_id=before))
    connection.execute(update(messages).where(messages.c.id == running).values(parent_id=turn.message_id))


def _insert_reply(connection: Connection, turn: TurnRow, reply: Reply, now: float) -> None:
    connection.execute(
        insert(messages).values(
            id=reply.message_id,
            session=turn.session,
            parent_id=turn.message_id,
            turn_id=turn.id,
            role="assistant",
            content=reply.content,
            tool_calls=reply.tool_calls or None,
            usage=None if reply.usage is None else msgspec.to_builtins(reply.usage),
            created_at=now,
        )
    )


def _clear(
    connection: Connection, owner: str, session_id: str, partial: dict[str, str]
) -> tuple[str, list[Ended]] | NotFound:
    cut = _cut_off(connection, owner, session_id, partial)
    if isinstance(cut, NotFound):
        return cut
    session, ended = cut
    connection.execute(delete(messages).where(messages.c.session == session))
    changes = {"leaf_id": None, "window_start": None, "updated_at": time.time()}
    connection.execute(update(sessions).where(sessions.c.id == session).values(changes))
    return session, ended


def _delete_session(
    connection: Connection, owner: str, session_id: str, partial: dict[str, str]
) -> tuple[str, list[Ended]] | NotFound:
    cut = _cut_off(connection, owner, session_id, partial)
    if not isinstance(cut, NotFound):
        deleted = update(sessions).where(sessions.c.id == cut[0]).values(deleted_at=time.time())
        connection.execute(deleted)
    return cut


def _cut_off(
    connection: Connection, owner: str, session_id: str, partial: dict[str, str]
) -> tuple[str, list[Ended]] | NotFound:
    """Ends the active turns of a session, whose history is then another one."""
    found = _session(connection, owner, session_id)
    if found is None:
        return NotFound("There is no such session.")
    session, _ = _locked_session(connection, found.id)
    ended = _cancel_active(connection, session, partial)
    bumped = update(sessions).where(sessions.c.id == session.id).values(version=session.version + 1)
    connection.execute(bumped)
    return session.id, ended


def _cancel_active(connection: Connection, session: SessionRow, partial: dict[str, str]) -> list[Ended]:
    ended = []
    for row in connection.execute(_active(session.id).order_by(turns.c.position)).all():
        ending = Cancelled(row.id, response=partial.get(row.id, ""), message_id=None)
        changes = {"state": "cancelled", "ending": encode(ending), "ended_at": time.time()}
        connection.execute(update(turns).where(turns.c.id == row.id).values(changes))
        ended.append(Ended(True, row.id, ending, session.version + 1, _make_ready(connection, row.id)))
    return ended


def _restore_session(
    connection: Connection, owner: str, session_id: str, project: str | None
) -> SessionRow | PortalError:
    if _session(connection, owner, session_id) is not None:
        return Conflict("There is a newer session with this id.")
    deleted = (
        select(sessions.c.id)
        .where(sessions.c.owner == owner, sessions.c.session_id == session_id)
        .order_by(sessions.c.deleted_at.desc())
        .limit(1)
    )
    if project is not None:
        deleted = deleted.where(sessions.c.project == project)
    found = connection.execute(deleted).scalar()
    if found is None:
        return NotFound("There is no such session.")
    connection.execute(update(sessions).where(sessions.c.id == found).values(deleted_at=None))
    return _locked_session(connection, found)[0]


def _orphans(instance: str, now: float) -> Any:
    alive = select(func.substr(leases.c.name, len("instance:") + 1)).where(
        leases.c.name.like("instance:%"), leases.c.expires_at >= now
    )
    return (
        select(*TURN_COLUMNS, *SESSION_COLUMNS)
        .join(sessions)
        .where(text(ACTIVE), turns.c.instance != instance, turns.c.instance.not_in(alive))
    )


def _adopt(
    connection: Connection, instance: str, restarted: bool, now: float
) -> list[tuple[TurnRow, SessionRow]]:
    rows = connection.execute(_orphans(instance, now)).all()
    if restarted:
        mine = select(*TURN_COLUMNS, *SESSION_COLUMNS).join(sessions).where(text(ACTIVE))
        rows = [*rows, *connection.execute(mine.where(turns.c.instance == instance)).all()]
    adopted = []
    for row in rows:
        turn, session = _turn_and_session(row)
        changes = {
            "instance": instance,
            "state": "waiting",
            "attempt": turn.attempt + (turn.state == "running"),
        }
        taken = connection.execute(
            update(turns)
            .where(turns.c.id == turn.id, turns.c.state == turn.state, turns.c.attempt == turn.attempt)
            .where(turns.c.instance == turn.instance)
            .values(changes)
        )
        if taken.rowcount:
            adopted.append((msgspec.structs.replace(turn, **changes), session))
    return sorted(adopted, key=lambda pair: pair[0].position)


def _owe(connection: Connection, turn: TurnRow, target: ReplyTarget | None) -> Delivery | None:
    """Puts the reply to `target` into the outbox, unless it waits there already."""
    if target is None:
        return None
    delivery = Delivery(new_id(), turn.id, target, ready=not turn.is_active)
    values = {
        "id": delivery.id,
        "turn_id": turn.id,
        "project": target.project,
        "topic": target.topic,
        "format": target.format,
        "ready": delivery.ready,
    }
    return delivery if insert_new(connection, outbox, values) else None


def _make_ready(connection: Connection, turn_id: str) -> tuple[Delivery, ...]:
    statement = (
        update(outbox).where(outbox.c.turn_id == turn_id).values(ready=True).returning(*DELIVERY_COLUMNS)
    )
    return tuple(_delivery(row) for row in connection.execute(statement).all())


def _turn_and_session(row: Row[Any]) -> tuple[TurnRow, SessionRow]:
    border = len(TURN_COLUMNS)
    return TurnRow(*row[:border]), SessionRow(*row[border:])


def _message(row: Sequence[Any]) -> MessageRow:
    names = MessageRow.__struct_fields__
    values = dict(zip(names, row, strict=True))
    if values["usage"] is not None:
        values["usage"] = msgspec.convert(values["usage"], Usage)
    return MessageRow(**values)


def _delivery(row: Row[Any]) -> Delivery:
    return Delivery(row.id, row.turn_id, ReplyTarget(row.project, row.topic, row.format), row.ready)
