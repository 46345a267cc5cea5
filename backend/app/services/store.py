"""What is stored of sessions, messages and turns, and the transactions that change it.

A turn is a row of the inbox from the moment it is accepted: `waiting` behind others of its session,
`running`, then the type of the event that ended it. Every change of state is one transaction and
says in its WHERE what it expects, so of two that want the same change exactly one gets it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, and_, delete, func, select, text, update
from sqlalchemy.exc import IntegrityError

from app.database import Database
from app.errors import Conflict, NotFound, PortalError
from app.events import Ending, Mark, TurnRequest
from app.models.tables import ACTIVE, LIVE, identity, leases, messages, session_keys, sessions, turns
from app.services import acceptance, branches, endings
from app.services.acceptance import Acceptance, was_taken
from app.services.endings import Ended, Reply
from app.services.leases import clock
from app.services.leases import forget_old as forget_old_leases
from app.services.rows import (
    MESSAGE_COLUMNS,
    SESSION_COLUMNS,
    TURN_COLUMNS,
    MessageRow,
    SessionRow,
    TurnRow,
    locked_session,
    make_session,
    message_of,
    session_named,
    turn_and_session,
)

T = TypeVar("T")

# From a leaf towards the root. LIMIT bounds the walk, so a page costs what it shows.
PATH = text("""
    WITH RECURSIVE path(id, parent_id, depth) AS (
        SELECT id, parent_id, 0 FROM messages WHERE id = :leaf
        UNION ALL
        SELECT m.id, m.parent_id, path.depth + 1 FROM messages m JOIN path ON m.id = path.parent_id
        WHERE path.id <> :last AND path.depth + 1 < :limit
    )
    SELECT m.id, m.parent_id, m.turn_id, m.role, m.content, m.tool_calls, m.usage, m.created_at,
           t.state, t.kind, m.pinned, m.finish_reason
    FROM path JOIN messages m ON m.id = path.id JOIN turns t ON t.id = m.turn_id
    ORDER BY path.depth DESC
""").columns(*MESSAGE_COLUMNS)

EVERYBODY = None
"""The owner of an operation on the sessions of all."""


class Store:
    """The transactions on sessions, messages and turns."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- the life of a turn ---

    async def accept(
        self, request: TurnRequest, *, turn_id: str, instance: str, refusal: PortalError | None = None
    ) -> Acceptance:
        """Commits the user message and its turn, or finds the turn that the request id names.

        Raises `Conflict` for a request id with another body, `Overloaded` when too many turns of the
        session wait, and `refusal` when it is given and something would have to be generated.
        """
        return await self._database.write(
            lambda c: acceptance.accept(c, request, turn_id, instance, time.time(), refusal), short=True
        )

    async def claim(self, turn: TurnRow, instance: str) -> SessionRow | None:
        """Makes a waiting turn the running one of its session, if it is not that already; None while an
        earlier one is active, or when it no longer waits for this instance."""
        return await self._database.write(lambda c: endings.claim(c, turn, instance), short=True)

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
            lambda c: endings.end(c, turn, ending, reply, trace, window_start, also), short=True
        )
        if outcome is None:
            raise StaleAttempt("The turn was taken over.")
        return outcome

    async def adopt(
        self, instance: str, lost: Collection[str] = (), *, overdue: bool
    ) -> list[tuple[TurnRow, SessionRow]]:
        """Takes over the active turns of instances that have given their lease back, with `overdue` also of
        those whose lease has run out; and those of this instance that it has `lost`."""
        return await self._database.write(lambda c: _adopt(c, instance, lost, overdue))

    async def has_orphans(self, instance: str, *, overdue: bool) -> bool:
        """Whether other instances have left something for `instance` to adopt."""
        return await self._database.read(
            lambda c: c.execute(_orphans(c, instance, overdue).limit(1)).first() is not None
        )

    # --- changing sessions; with a `mark`, only if that very message was not taken before ---

    async def clear(
        self, owner: str, session_id: str, partial: dict[str, str], mark: Mark | None = None
    ) -> tuple[str, list[Ended]]:
        """Deletes the messages of a session and ends its active turns as cancelled; `partial` has
        the text that each running one had so far. Returns the session's row id with the endings.
        Raises `NotFound`."""

        def operation(connection: Connection) -> tuple[str, list[Ended]] | NotFound:
            taken = was_taken(connection, mark)
            session = endings.locked_by_name(connection, owner, session_id)
            if isinstance(session, NotFound):
                return session
            return session.id, [] if taken else endings.clear(connection, session, partial)

        return await self._database.write(operation)

    async def choose(self, owner: str, session_id: str, message_id: str) -> str:
        """Lets the history of a session go through a message. Returns the newest message of that path. Raises
        `NotFound`, and `Conflict` while a turn of the session is active."""

        def operation(connection: Connection) -> str | PortalError:
            session = endings.locked_by_name(connection, owner, session_id)
            if isinstance(session, NotFound):
                return session
            return branches.choose(connection, session, message_id)

        return await self._database.write(operation)

    async def branches(self, session: SessionRow) -> list[list[str]]:
        """The places of a session where there is more than one message: their ids, the oldest first."""
        return await self._database.read(lambda c: branches.branches(c, session))

    async def set_prompt(
        self,
        owner: str,
        session_id: str,
        prompt: str,
        *,
        project: str,
        reset: bool,
        partial: dict[str, str],
        mark: Mark | None = None,
    ) -> tuple[str, list[Ended]]:
        """Gives a session another system prompt, makes it if it is new, and clears it with `reset`. Returns
        as `clear` does."""

        def operation(connection: Connection) -> tuple[str, list[Ended]]:
            taken = was_taken(connection, mark)
            session = endings.locked_by_name(connection, owner, session_id)
            if isinstance(session, NotFound):
                make_session(connection, owner, session_id, project=project)
                session = endings.locked_by_name(connection, owner, session_id)
            assert isinstance(session, SessionRow)
            if taken:
                return session.id, []
            ended = endings.clear(connection, session, partial) if reset else []
            changes = {"system_prompt": prompt, "template_version": None, "updated_at": time.time()}
            connection.execute(update(sessions).where(sessions.c.id == session.id).values(changes))
            return session.id, ended

        return await self._database.write(operation)

    async def delete_session(
        self,
        owner: str,
        session_id: str,
        partial: dict[str, str],
        mark: Mark | None = None,
        only_turn: str | None = None,
    ) -> tuple[str, list[Ended]]:
        """Deletes a session, which can be restored, and ends its active turns as `clear` does. Raises
        `NotFound`, and `Conflict` when it has another turn than the one that should be its only one."""

        def operation(connection: Connection) -> tuple[str, list[Ended]] | PortalError:
            taken = was_taken(connection, mark)
            session = endings.locked_by_name(connection, owner, session_id)
            if isinstance(session, NotFound):
                return session
            if taken:
                return session.id, []
            others = select(turns.c.id).where(turns.c.session == session.id, turns.c.id != only_turn).limit(1)
            if only_turn is not None and connection.execute(others).first() is not None:
                return Conflict(
                    f"The session has other responses; DELETE /api/sessions/{session_id} deletes all."
                )
            ended = endings.cut_off(connection, session, partial)
            deleted = update(sessions).where(sessions.c.id == session.id).values(deleted_at=time.time())
            connection.execute(deleted)
            connection.execute(delete(session_keys).where(session_keys.c.session == session.id))
            return session.id, ended

        return await self._database.write(operation)

    async def restore_session(self, owner: str, session_id: str, project: str | None = None) -> SessionRow:
        """Brings back the session of this name that was deleted last, of a project where one is given.
        Raises `NotFound`, and `Conflict` when the name is in use again."""
        try:
            return await self._database.write(lambda c: _restore_session(c, owner, session_id, project))
        except IntegrityError:  # it was made after it was looked for
            raise _name_is_used() from None

    async def rename_session(self, session: str, title: str) -> None:
        """Gives a session another title."""
        statement = update(sessions).where(sessions.c.id == session).values(title=title)
        await self._database.write(lambda c: c.execute(statement))

    async def was_taken(self, mark: Mark) -> bool:
        """Whether this very message was noted with `take`, and has come again."""
        return mark.again and await self._database.read(lambda c: acceptance.is_known(c, mark))

    async def take(self, mark: Mark) -> None:
        """Notes that a message was carried out."""
        await self._database.write(lambda c: acceptance.remember(c, mark, None, time.time()))

    async def forget_old(self) -> None:
        """Forgets what is kept for a time only."""

        def operation(connection: Connection) -> None:
            acceptance.forget_old(connection, time.time())
            forget_old_leases(connection)

        await self._database.write(operation)

    # --- reading ---

    async def session(self, owner: str, session_id: str) -> SessionRow | None:
        """The session that the owner calls `session_id`."""
        return await self._database.read(lambda c: session_named(c, owner, session_id))

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

    async def sessions_with(self, ids: Sequence[str]) -> dict[str, tuple[SessionRow, bool]]:
        """The sessions with these row ids, and whether each is deleted."""
        wanted = select(*SESSION_COLUMNS, sessions.c.deleted_at).where(sessions.c.id.in_(ids))
        rows = await self._database.read(lambda c: c.execute(wanted).all())
        return {row.id: (SessionRow(*row[:-1]), row.deleted_at is not None) for row in rows}

    async def names_in_project(self, project: str, owner: str | None) -> list[tuple[str, str]]:
        """Owner and name of all sessions of a project; of one owner, or of `EVERYBODY`."""
        wanted = select(sessions.c.owner, sessions.c.session_id).where(
            sessions.c.project == project, text(LIVE)
        )
        if owner is not EVERYBODY:
            wanted = wanted.where(sessions.c.owner == owner)
        rows = await self._database.read(lambda c: c.execute(wanted).all())
        return [(row.owner, row.session_id) for row in rows]

    async def turn(self, turn_id: str) -> tuple[TurnRow, SessionRow] | None:
        """A turn and its session."""
        return await self._one_turn(turns.c.id == turn_id)

    async def last_hint(self, session: str) -> tuple[TurnRow, SessionRow] | None:
        """The newest state of a session that has its answer, and the session."""
        return await self._one_turn(
            and_(turns.c.session == session, turns.c.kind == "state", turns.c.state == "final")
        )

    async def last_state(self, session: str) -> str | None:
        """The text of the newest state of a session that has its answer."""
        statement = (
            select(messages.c.content)
            .join(turns, turns.c.message_id == messages.c.id)
            .where(turns.c.session == session, turns.c.kind == "state", turns.c.state == "final")
            .order_by(turns.c.position.desc())
            .limit(1)
        )
        return await self._database.read(lambda c: c.execute(statement).scalar())

    async def _one_turn(self, condition: Any) -> tuple[TurnRow, SessionRow] | None:
        """The newest turn of which the condition holds."""
        both = select(*TURN_COLUMNS, *SESSION_COLUMNS).join(sessions)
        statement = both.where(condition).order_by(turns.c.position.desc()).limit(1)
        row = await self._database.read(lambda c: c.execute(statement).first())
        return None if row is None else turn_and_session(row)

    async def has_request(self, owner: str, session_id: str, request_id: str) -> bool:
        """Whether the session knows the request id."""
        named = and_(sessions.c.owner == owner, sessions.c.session_id == session_id, text(LIVE))
        return await self._one_turn(and_(named, turns.c.request_id == request_id)) is not None

    async def active_of(self, instance: str) -> frozenset[str]:
        """The ids of the waiting and running turns that are an instance's."""
        statement = select(turns.c.id).where(text(ACTIVE), turns.c.instance == instance)
        return frozenset(await self._database.read(lambda c: c.execute(statement).scalars().all()))

    async def active_of_owner(self, owner: str) -> list[tuple[str, str]]:
        """The waiting and running turns in all sessions of an owner, each with its session's row id."""
        statement = (
            select(turns.c.id, turns.c.session)
            .join(sessions)
            .where(text(ACTIVE), sessions.c.owner == owner)
            .order_by(turns.c.id)
        )
        rows = await self._database.read(lambda c: c.execute(statement).all())
        return [(row.id, row.session) for row in rows]

    async def active_among(self, ids: Sequence[str]) -> frozenset[str]:
        """Those of these turns that wait or run."""
        statement = select(turns.c.id).where(turns.c.id.in_(ids), turns.c.state.in_(["waiting", "running"]))
        return frozenset(await self._database.read(lambda c: c.execute(statement).scalars().all()))

    async def active_turns(self, session: str) -> list[TurnRow]:
        """The waiting and running turns of a session, in order."""
        rows = await self._database.read(lambda c: c.execute(endings.active_turns(session)).all())
        return [TurnRow(*row) for row in rows]

    async def messages(
        self, leaf: str | None, *, last: str | None = None, limit: int | None = None
    ) -> list[MessageRow]:
        """The path that ends at `leaf`, oldest first: down from `last`, or the newest `limit`."""
        if leaf is None:
            return []
        values = {"leaf": leaf, "last": last or "", "limit": limit or 1_000_000_000}
        rows = await self._database.read(lambda c: c.execute(PATH, values).all())
        return [message_of(row) for row in rows]

    async def waiting_messages(self, session: str) -> list[MessageRow]:
        """The user messages that wait for their turn, in order."""
        statement = (
            select(*MESSAGE_COLUMNS)
            .join(turns, turns.c.message_id == messages.c.id)
            .where(turns.c.session == session, turns.c.state == "waiting", text(ACTIVE))
            .where(messages.c.turn_id == turns.c.id)  # and not one that is answered again, where it stands
            .order_by(turns.c.position)
        )
        rows = await self._database.read(lambda c: c.execute(statement).all())
        return [message_of(row) for row in rows]

    async def message_parent(self, session: str, message_id: str) -> tuple[str | None] | None:
        """The parent of a message of this session, in a tuple; None when there is no such message."""
        statement = select(messages.c.parent_id).where(
            messages.c.id == message_id, messages.c.session == session
        )
        row = await self._database.read(lambda c: c.execute(statement).first())
        return None if row is None else (row[0],)

    async def content_of(self, message_id: str) -> tuple[str, float] | None:
        """The text of a message, and when it was made; None when there is no such message any more."""
        statement = select(messages.c.content, messages.c.created_at).where(messages.c.id == message_id)
        row = await self._database.read(lambda c: c.execute(statement).first())
        return None if row is None else (row.content, row.created_at)

    async def database_id(self) -> str:
        """Names this database; made with it."""
        return str(await self._database.read(lambda c: c.execute(select(identity)).scalar_one()))

    async def ping(self) -> None:
        """Raises when the database cannot be read."""
        await self._database.read(lambda c: c.execute(text("SELECT 1")))


class StaleAttempt(Exception):
    """The turn is active in another attempt: what this one has made is void."""


def _name_is_used() -> Conflict:
    return Conflict("There is a newer session with this id.")


def _restore_session(
    connection: Connection, owner: str, session_id: str, project: str | None
) -> SessionRow | PortalError:
    if session_named(connection, owner, session_id) is not None:
        return _name_is_used()
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
    return locked_session(connection, found)


def _orphans(connection: Connection, instance: str, overdue: bool) -> Any:
    alive = select(func.substr(leases.c.name, len("instance:") + 1)).where(leases.c.name.like("instance:%"))
    if overdue:
        alive = alive.where(leases.c.expires_at >= clock(connection))
    return (
        select(*TURN_COLUMNS, *SESSION_COLUMNS)
        .join(sessions)
        .where(text(ACTIVE), turns.c.instance != instance, turns.c.instance.not_in(alive))
    )


def _adopt(
    connection: Connection, instance: str, lost: Collection[str], overdue: bool
) -> list[tuple[TurnRow, SessionRow]]:
    rows = connection.execute(_orphans(connection, instance, overdue)).all()
    if lost:
        mine = select(*TURN_COLUMNS, *SESSION_COLUMNS).join(sessions).where(text(ACTIVE))
        mine = mine.where(turns.c.instance == instance, turns.c.id.in_(lost))
        rows = [*rows, *connection.execute(mine).all()]
    adopted = []
    for row in rows:
        turn, session = turn_and_session(row)
        changes: Mapping[str, Any] = {
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
