"""Where messages stand in a session's history, which is a tree: a session points at the leaf of its path."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection, and_, bindparam, delete, or_, select, text, update

from app.errors import Conflict, NotFound, PortalError
from app.events import Kind
from app.models.tables import ACTIVE, messages, sessions, turns
from app.prepared import Prepared
from app.services.rows import SessionRow, TurnRow

_leaf = messages.alias("leaf")

_LAST = Prepared(
    select(turns.c.kind, messages.c.parent_id)
    .join(_leaf, _leaf.c.turn_id == turns.c.id)
    .join(messages, messages.c.id == turns.c.message_id)
    .where(_leaf.c.id == bindparam("leaf"))
)
_AT = Prepared(
    select(messages.c.role, messages.c.parent_id, turns.c.kind)
    .join(turns, turns.c.id == messages.c.turn_id)
    .where(messages.c.id == bindparam("message"))
)
_OWNER = Prepared(select(messages.c.turn_id).where(messages.c.id == bindparam("message")))
_OTHER = Prepared(
    select(turns.c.id)
    .outerjoin(messages, messages.c.turn_id == turns.c.id)
    .where(
        turns.c.session == bindparam("session"),
        turns.c.message_id == bindparam("message"),
        turns.c.id != bindparam("turn"),
        or_(messages.c.id.is_not(None), text(ACTIVE)),
    )
    .limit(1)
)
_TREE = (
    select(
        messages.c.id,
        messages.c.parent_id,
        and_(messages.c.role == "assistant", turns.c.state == "error").label("is_broken"),
    )
    .join(turns, turns.c.id == messages.c.turn_id)
    .where(messages.c.session == bindparam("session"), turns.c.state != "waiting")
    .order_by(messages.c.created_at, messages.c.id)
)
_BUSY = Prepared(select(turns.c.id).where(turns.c.session == bindparam("session"), text(ACTIVE)).limit(1))
_RUNNING = select(turns.c.message_id).where(
    turns.c.session == bindparam("session"), turns.c.state == "running", text(ACTIVE)
)


def parent_for(connection: Connection, session: SessionRow, kind: str) -> str | None:
    """What a message that comes to the end of the history follows. A state takes the place of a state
    there: however many there were in a row, the history has one."""
    if kind == "state" and session.leaf_id is not None:
        last = _LAST.first(connection, {"leaf": session.leaf_id})
        if last is not None and last[0] == "state":
            parent: str | None = last[1]
            return parent
    return session.leaf_id


def last_question(connection: Connection, session: SessionRow) -> tuple[str, Kind] | None:
    """The last user message of the history, and the kind of its turn."""
    at = session.leaf_id
    while at is not None:
        role, parent, kind = _AT.one(connection, {"message": at})
        if role == "user":
            return at, kind
        at = parent
    return None


def is_busy(connection: Connection, session: SessionRow) -> bool:
    """Whether a turn of a session waits or runs."""
    return _BUSY.first(connection, {"session": session.id}) is not None


def choose(connection: Connection, session: SessionRow, message_id: str) -> str | PortalError:
    """Lets the history go through a message, and on to the newest one behind it, which is returned; what has
    broken off takes the place of no other answer. It begins anew with what is sent to the model."""
    if is_busy(connection, session):
        return Conflict("The session is busy: wait until it has answered, or stop it.")
    rows = connection.execute(_TREE, {"session": session.id}).all()
    if message_id not in {row.id for row in rows}:
        return NotFound("There is no such message in this session.")
    newest = {row.parent_id: row.id for row in sorted(rows, key=lambda row: not row.is_broken)}
    leaf = message_id
    while leaf in newest:
        leaf = newest[leaf]
    changes = {"leaf_id": leaf, "window_start": None, "version": session.version + 1}
    connection.execute(update(sessions).where(sessions.c.id == session.id).values(changes))
    return leaf


def branches(connection: Connection, session: SessionRow) -> list[list[str]]:
    """The places in the tree of messages where there is more than one: their ids, the oldest first."""
    places: dict[str | None, list[str]] = {}
    for row in connection.execute(_TREE, {"session": session.id}):
        places.setdefault(row.parent_id, []).append(row.id)
    return [place for place in places.values() if len(place) > 1]


def answers_again(connection: Connection, turn: TurnRow) -> bool:
    """Whether a turn answers a message that stays where it is: that of another turn, or one that another turn
    has answered."""
    if _OWNER.first(connection, {"message": turn.message_id}) not in {None, (turn.id,)}:
        return True
    return turn.attempt > 1 and is_answered_over(connection, turn)


def is_answered_over(connection: Connection, turn: TurnRow) -> bool:
    """Whether another turn answers the message of this one, or has done so: an answer that was stored."""
    mine = {"session": turn.session, "message": turn.message_id, "turn": turn.id}
    return _OTHER.first(connection, mine) is not None


def move(connection: Connection, session: SessionRow, turn: TurnRow) -> str | None:
    """Puts the user message of a turn at the end of the history, from wherever it was. Returns the leaf that
    the history has then."""
    if session.leaf_id == turn.message_id:
        return session.leaf_id
    if answers_again(connection, turn):
        return session.leaf_id
    _close_gap(connection, turn)
    parent = parent_for(connection, session, turn.kind)
    connection.execute(update(messages).where(messages.c.id == turn.message_id).values(parent_id=parent))
    return turn.message_id


def _close_gap(connection: Connection, turn: TurnRow) -> None:
    """Lets what was said after the message of a turn that had failed follow what is before it."""
    if turn.attempt > 1:
        before = select(messages.c.parent_id).where(messages.c.id == turn.message_id).scalar_subquery()
        after = update(messages).where(
            messages.c.session == turn.session, messages.c.parent_id == turn.message_id
        )
        connection.execute(after.values(parent_id=before))


def drop_reply(connection: Connection, session: SessionRow, turn: TurnRow) -> SessionRow:
    """Deletes what there was of the reply of a failed turn, which is begun again. Returns the session, whose
    leaf may be another one then."""
    mine = (messages.c.session == session.id, messages.c.turn_id == turn.id, messages.c.role == "assistant")
    found = connection.execute(select(messages.c.id).where(*mine)).scalar()
    if found is None:
        return session
    behind = update(messages).where(messages.c.session == session.id, messages.c.parent_id == found)
    connection.execute(behind.values(parent_id=turn.message_id))
    connection.execute(delete(messages).where(messages.c.id == found))
    if session.leaf_id != found:
        return session
    return msgspec.structs.replace(session, leaf_id=turn.message_id)


def slip_in(connection: Connection, session: SessionRow, turn: TurnRow) -> str | None:
    """Keeps the message of a turn that never ran in the history: before the running turn's message,
    which must stay the leaf, or at the end. Returns the leaf."""
    running = connection.execute(_RUNNING, {"session": session.id}).scalar()
    if running is None or running == turn.message_id or answers_again(connection, turn):
        return move(connection, session, turn)
    _close_gap(connection, turn)
    before = select(messages.c.parent_id).where(messages.c.id == running).scalar_subquery()
    connection.execute(update(messages).where(messages.c.id == turn.message_id).values(parent_id=before))
    connection.execute(update(messages).where(messages.c.id == running).values(parent_id=turn.message_id))
    return session.leaf_id
