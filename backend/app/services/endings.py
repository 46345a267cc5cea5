"""The transactions that give a turn its place as the running one, and that end turns: the first writer
wins."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import Connection, bindparam, delete, insert, select, text, update

from app.errors import NotFound
from app.events import Cancelled, Ending, ExpiredEvent, Failed, Usage, decode_ending, encode, type_of
from app.models.tables import ACTIVE, messages, sessions, summaries, turns
from app.prepared import Prepared
from app.services.branches import move, slip_in
from app.services.outbox import Delivery, owed_for
from app.services.rows import (
    NAMED_ONE,
    SESSION_COLUMNS,
    TURN_COLUMNS,
    SessionRow,
    TurnRow,
    locked_session,
)


class Reply(msgspec.Struct, frozen=True):
    """The assistant's message that a turn ends with; it has no `finish_reason` where it broke off."""

    message_id: str
    content: str
    tool_calls: list[dict[str, Any]]
    usage: Usage | None
    finish_reason: str | None


class Ended(msgspec.Struct, frozen=True):
    """An ending that is stored: by this call (`first`) or by somebody else before."""

    first: bool
    turn_id: str
    ending: Ending
    version: int
    deliveries: tuple[Delivery, ...] = ()


_CURRENT = Prepared(
    select(turns.c.state, turns.c.attempt, turns.c.instance, turns.c.ending, *SESSION_COLUMNS)
    .join(sessions, sessions.c.id == turns.c.session)
    .where(turns.c.id == bindparam("turn"))
    .with_for_update(of=sessions)
)
_END = Prepared(
    update(turns)
    .where(
        turns.c.id == bindparam("turn"),
        turns.c.state == bindparam("was"),
        turns.c.attempt == bindparam("tried"),
        turns.c.instance == bindparam("held"),
    )
    .values(
        state=bindparam("outcome"),
        ending=bindparam("event"),
        trace=bindparam("cuts"),
        ended_at=bindparam("now"),
    )
)
_CHANGE = Prepared(
    update(sessions)
    .where(sessions.c.id == bindparam("session"))
    .values(
        leaf_id=bindparam("leaf"),
        window_start=bindparam("window"),
        version=bindparam("changed"),
    )
)
_NAMED = Prepared(NAMED_ONE.with_for_update())
_REPLY = Prepared(insert(messages))
_TURN = Prepared(select(*TURN_COLUMNS).where(turns.c.id == bindparam("turn")))
_EARLIER = Prepared(
    select(turns.c.id)
    .where(turns.c.session == bindparam("session"), text(ACTIVE), turns.c.position < bindparam("mine"))
    .limit(1)
)


def active_turns(session: str) -> Any:
    """The waiting and running turns of a session, in order."""
    return select(*TURN_COLUMNS).where(turns.c.session == session, text(ACTIVE)).order_by(turns.c.position)


def claim(connection: Connection, turn: TurnRow, instance: str) -> SessionRow | None:
    """Makes a waiting turn the running one of its session; None when it cannot be that now."""
    found = _TURN.first(connection, {"turn": turn.id})
    if found is None:
        return None
    row = TurnRow(*found)
    session = locked_session(connection, row.session)
    if _EARLIER.first(connection, {"session": session.id, "mine": row.position}) is not None:
        return None
    if (row.state, row.attempt, row.instance) == ("running", turn.attempt, instance):
        return session  # it was claimed, and nobody heard of the commit
    claimed = connection.execute(
        update(turns)
        .where(turns.c.id == turn.id, turns.c.state == "waiting")
        .where(turns.c.attempt == turn.attempt, turns.c.instance == instance)
        .values(state="running")
    )
    if not claimed.rowcount:
        return None
    leaf = move(connection, session, row)
    connection.execute(update(sessions).where(sessions.c.id == session.id).values(leaf_id=leaf))
    return msgspec.structs.replace(session, leaf_id=leaf)


def end(
    connection: Connection,
    turn: TurnRow,
    ending: Ending,
    reply: Reply | None,
    trace: bytes | None,
    window_start: str | None,
    also: Callable[[Connection], None] | None,
) -> Ended | None:
    """Ends a turn; None when it is active in another attempt, or when its time has run out for an instance
    that has it no more."""
    state, attempt, instance, stored, *rest = _CURRENT.one(connection, {"turn": turn.id})
    session = SessionRow(*rest)
    if state not in {"waiting", "running"}:
        return Ended(False, turn.id, decode_ending(stored), session.version)
    # A turn that waits keeps its attempt when another instance takes it up, which may let it run by now.
    if attempt != turn.attempt or (isinstance(ending, ExpiredEvent) and instance != turn.instance):
        return None
    now, leaf = time.time(), session.leaf_id
    read = {"turn": turn.id, "was": state, "tried": attempt, "held": instance}
    stored_as = {"outcome": type_of(ending), "event": encode(ending), "cuts": trace, "now": now}
    if not _END.run(connection, {**read, **stored_as}):
        # PostgreSQL reads the turn before it waits for the session. That is locked now.
        return end(connection, turn, ending, reply, trace, window_start, also)
    if state == "waiting" and turn.kind == "message":  # a state that never ran is of no use to anybody
        leaf = slip_in(connection, session, turn)
    if reply is not None:
        if leaf == turn.message_id or not isinstance(ending, Failed):
            leaf = reply.message_id  # what has broken off takes the place of no other answer
        _insert_reply(connection, turn, reply, now)
    version = session.version + 1
    changes = {"leaf": leaf, "window": window_start or session.window_start, "changed": version}
    _CHANGE.run(connection, {"session": session.id, **changes})
    if also is not None:
        also(connection)
    return Ended(True, turn.id, ending, version, owed_for(connection, turn.id))


def _insert_reply(connection: Connection, turn: TurnRow, reply: Reply, now: float) -> None:
    row = {
        "id": reply.message_id,
        "session": turn.session,
        "parent_id": turn.message_id,
        "turn_id": turn.id,
        "role": "assistant",
        "content": reply.content,
        "tool_calls": reply.tool_calls or None,
        "usage": None if reply.usage is None else msgspec.to_builtins(reply.usage),
        "finish_reason": reply.finish_reason,
        "created_at": now,
    }
    _REPLY.run(connection, row)


def clear(connection: Connection, session: SessionRow, partial: dict[str, str]) -> list[Ended]:
    """Deletes the messages of a session, and cuts its turns off."""
    ended = cut_off(connection, session, partial)
    connection.execute(delete(messages).where(messages.c.session == session.id))
    connection.execute(delete(summaries).where(summaries.c.session == session.id))
    changes = {"leaf_id": None, "window_start": None, "updated_at": time.time()}
    connection.execute(update(sessions).where(sessions.c.id == session.id).values(changes))
    return ended


def cut_off(connection: Connection, session: SessionRow, partial: dict[str, str]) -> list[Ended]:
    """Ends the active turns of a locked session, whose history is then another one."""
    ended = []
    version = session.version + 1
    for row in connection.execute(active_turns(session.id)).all():
        ending = Cancelled(row.id, response=partial.get(row.id, ""), message_id=None)
        changes = {"state": "cancelled", "ending": encode(ending), "ended_at": time.time()}
        connection.execute(update(turns).where(turns.c.id == row.id).values(changes))
        ended.append(Ended(True, row.id, ending, version, owed_for(connection, row.id)))
    connection.execute(update(sessions).where(sessions.c.id == session.id).values(version=version))
    return ended


def locked_by_name(connection: Connection, owner: str, session_id: str) -> SessionRow | NotFound:
    """The session that an owner calls so, locked for the transaction."""
    row = _NAMED.first(connection, {"owner": owner, "name": session_id})
    return NotFound("There is no such session.") if row is None else SessionRow(*row)
