"""What of a session's history outlives a cut: pinned exchanges, and a summary of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, String, bindparam, literal, select, text, update

from app.database import Database, insert_of
from app.models.tables import messages, sessions, summaries, turns
from app.services.rows import MESSAGE_COLUMNS, MessageRow, SessionRow, locked_session, message_of

_PINNED = text("""
    WITH RECURSIVE path(id, parent_id, depth) AS (
        SELECT id, parent_id, 0 FROM messages WHERE id = :leaf
        UNION ALL
        SELECT m.id, m.parent_id, path.depth + 1 FROM messages m JOIN path ON m.id = path.parent_id
    )
    SELECT m.id, m.parent_id, m.turn_id, m.role, m.content, m.tool_calls, m.usage, m.created_at,
           t.state, t.kind, m.pinned, m.finish_reason
    FROM path JOIN messages m ON m.id = path.id JOIN turns t ON t.id = m.turn_id
    WHERE t.message_id IN (
        SELECT answered.message_id FROM messages p JOIN turns answered ON answered.id = p.turn_id
        WHERE p.session = :session AND p.pinned
    )
    ORDER BY path.depth DESC
""").columns(*MESSAGE_COLUMNS)
_ANY_PINNED = (
    select(literal(1)).where(messages.c.session == bindparam("session"), text("messages.pinned")).limit(1)
)
_SUMMARIES = text("""
    WITH RECURSIVE path(id, parent_id, session, content, until) AS (
        SELECT m.id, m.parent_id, s.session, s.content, s.until
        FROM messages m JOIN summaries s ON s.session = m.session WHERE m.id IN :starts
        UNION ALL
        SELECT m.id, m.parent_id, path.session, path.content, path.until
        FROM messages m JOIN path ON m.id = path.parent_id WHERE path.id <> path.until
    )
    SELECT session, content, until FROM path WHERE id = until
""").bindparams(bindparam("starts", type_=String, expanding=True))
"""A session has one summary, and many branches: that of another branch tells what was never said in this."""

_OF_QUESTION = (
    select(*MESSAGE_COLUMNS)
    .join(turns, turns.c.id == messages.c.turn_id)
    .where(
        messages.c.session == bindparam("session"),
        turns.c.session == bindparam("session"),
        turns.c.message_id
        == select(turns.c.message_id)
        .join(messages, messages.c.turn_id == turns.c.id)
        .where(messages.c.id == bindparam("message"), messages.c.session == bindparam("session"))
        .scalar_subquery(),
    )
)
"""A question, and all answers to it: an exchange is told by the message that its turns answer."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """What is sent before the window of a session: its pinned exchanges, and the summary of what else was
    said before the message `until`."""

    pinned: list[MessageRow]
    summary: str | None = None
    until: str | None = None


class Memory:
    """Keeps pins and summaries."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def before(self, session: str, start: MessageRow) -> Remembered:
        """What is remembered of the path to `start`, the first message of the window; of a summary only when
        it was made on this path."""

        def operation(connection: Connection) -> Remembered:
            found = connection.execute(_SUMMARIES, {"starts": [start.id]}).first()
            content, until = (None, None) if found is None else (found.content, found.until)
            return Remembered(_pinned(connection, session, start.parent_id), content, until)

        return await self._database.read(operation)

    async def pinned(self, session: str, leaf: str) -> list[MessageRow]:
        """The messages of all pinned exchanges on the path that ends at `leaf`, oldest first."""
        return await self._database.read(lambda c: _pinned(c, session, leaf))

    async def exchange(self, session: str, message_id: str) -> list[MessageRow]:
        """The question that a message of the session is, or answers, and its answer: that one, or the newest;
        each message after the one that it follows; none when there is no such message."""
        named = {"session": session, "message": message_id}
        rows = await self._database.read(lambda c: c.execute(_OF_QUESTION, named).all())
        found = [message_of(row) for row in rows]
        answers = {row.id: row.turn_id for row in found if row.role != "user"}
        answer = answers.get(message_id) or max(answers.values(), default="")
        return _in_order([row for row in found if row.role == "user" or row.turn_id == answer])

    async def pin(self, session: str, message_id: str, *, pinned: bool) -> bool:
        """Pins a message, or no longer; False when it is gone. What is sent changes with it, so the
        session gets another version."""

        def operation(connection: Connection) -> bool:
            row = locked_session(connection, session)
            mine = (messages.c.id == message_id, messages.c.session == session)
            changed = connection.execute(update(messages).where(*mine).values(pinned=pinned or None))
            _new_version(connection, row)
            return bool(changed.rowcount)

        return await self._database.write(operation)

    async def summaries(self, of: Iterable[SessionRow]) -> dict[str, str]:
        """The summaries that are sent to the model, by the sessions' row ids: see `before`."""
        named = {"starts": [session.window_start for session in of if session.window_start is not None]}
        rows = await self._database.read(lambda c: c.execute(_SUMMARIES, named).all())
        return {row.session: row.content for row in rows}

    async def summarise(
        self, session: str, version: int, content: str, until: str, also: Callable[[Connection], None]
    ) -> bool:
        """Stores the summary of what was said before the message `until`, and what `also` writes. A session
        of this `version` gets the next one; one that has another already gets no summary (False)."""

        def operation(connection: Connection) -> bool:
            also(connection)
            row = locked_session(connection, session)
            if row.version != version:
                return False
            body = {"content": content, "until": until, "made_at": time.time()}
            made = insert_of(connection.dialect.name, summaries).values(session=session, **body)
            connection.execute(made.on_conflict_do_update(index_elements=["session"], set_=body))
            _new_version(connection, row)
            return True

        return await self._database.write(operation)


def _pinned(connection: Connection, session: str, leaf: str | None) -> list[MessageRow]:
    if connection.execute(_ANY_PINNED, {"session": session}).first() is None:
        return []
    rows = connection.execute(_PINNED, {"session": session, "leaf": leaf}).all()
    return [message_of(row) for row in rows]


def _in_order(rows: list[MessageRow]) -> list[MessageRow]:
    parents = {row.id: row.parent_id for row in rows}

    def depth(message: str | None) -> int:
        return 0 if message not in parents else 1 + depth(parents[message])

    return sorted(rows, key=lambda row: (depth(row.id), row.created_at))


def _new_version(connection: Connection, row: SessionRow) -> None:
    changed = update(sessions).where(sessions.c.id == row.id).values(version=row.version + 1)
    connection.execute(changed)
