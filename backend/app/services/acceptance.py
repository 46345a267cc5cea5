"""The transaction that accepts a request: the user message and its turn are committed, or the turn that was
made of the same request before is found."""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, bindparam, delete, func, insert, select, text, update

from app.database import insert_new, insert_of
from app.errors import Conflict, Overloaded, PortalError
from app.events import Failed, Mark, SupersededBy, TurnRequest, decode_ending, encode, new_id
from app.models.tables import ACTIVE, messages, received, sessions, turns
from app.prepared import Prepared
from app.services.branches import drop_reply, move, parent_for
from app.services.endings import Ended
from app.services.outbox import Delivery, owe, owe_again, owed_for
from app.services.rows import (
    NAMED_ONE,
    SESSION_COLUMNS,
    TURN_COLUMNS,
    SessionRow,
    TurnRow,
    make_session,
    turn_and_session,
)

MAX_WAITING = 16
"""Turns that may wait in one session behind the running one."""

TITLE_CHARS = 80
"""A new session is called after the beginning of its first message."""

RETRY_WINDOW_S = 24 * 3600
"""How long a request id is remembered, and a message of a broker that has none."""


class Acceptance(msgspec.Struct, frozen=True):
    """What became of a request: a `new` turn, a `known` one, or a new attempt (`again`) at one that
    had failed. `delivery` is the outbox row for a request that names a reply target; `superseded` are the
    waiting states that a newer one took the place of."""

    kind: Literal["new", "known", "again"]
    turn: TurnRow
    session: SessionRow
    delivery: Delivery | None
    superseded: tuple[Ended, ...] = ()


_SESSION = Prepared(NAMED_ONE.add_columns(sessions.c.next_position).with_for_update())
_OF_REQUEST = Prepared(
    select(*TURN_COLUMNS, turns.c.fingerprint).where(
        turns.c.session == bindparam("session"), turns.c.request_id == bindparam("request")
    )
)
_OF_MARK = Prepared(
    select(*TURN_COLUMNS, *SESSION_COLUMNS)
    .join(sessions, sessions.c.id == turns.c.session)
    .join(received, received.c.turn_id == turns.c.id)
    .where(received.c.mark == bindparam("hash"), sessions.c.owner == bindparam("owner"))
)
_ACTIVE = Prepared(
    select(turns.c.id, turns.c.state, turns.c.kind).where(turns.c.session == bindparam("of"), text(ACTIVE))
)
_TURN, _MESSAGE = Prepared(insert(turns)), Prepared(insert(messages))
_MOVED = Prepared(
    update(sessions)
    .where(sessions.c.id == bindparam("moved"))
    .values(leaf_id=bindparam("leaf"), next_position=bindparam("position"), updated_at=bindparam("now"))
)
_SUPERSEDED = Prepared(
    update(turns)
    .where(turns.c.id == bindparam("old"), turns.c.state == "waiting")
    .values(state="superseded", ending=bindparam("event"), ended_at=bindparam("now"))
)


def _remember(dialect: str) -> Any:
    inserted = insert_of(dialect, received)
    again = {"turn_id": inserted.excluded.turn_id, "at": inserted.excluded.at}
    return inserted.on_conflict_do_update(index_elements=["mark"], set_=again)


_REMEMBER = Prepared(_remember)


def accept(
    connection: Connection,
    request: TurnRequest,
    turn_id: str,
    instance: str,
    now: float,
    full: Overloaded | None,
) -> Acceptance | PortalError:
    """Carries it out; what is refused is returned."""
    if request.mark is not None and request.mark.again:
        sent_again = _of_mark(connection, request, request.mark)
        if sent_again is not None:
            return sent_again
    session, position = _session_for(connection, request)
    known = _find_request(connection, session, request, now)
    if isinstance(known, PortalError):
        return known
    if known is not None and not _may_try_again(known):
        delivery = owe(connection, known.id, request.reply_to)
        return Acceptance("known", known, session, delivery)
    if full is not None:
        return full
    active = _ACTIVE.all(connection, {"of": session.id})
    old = [id for id, state, kind in active if request.kind == kind == "state" and state == "waiting"]
    if len(active) - len(old) > MAX_WAITING:
        return Overloaded(f"{MAX_WAITING} messages already wait in this session.", retry_after=5)

    superseded = tuple(
        _supersede(connection, turn, request.request_id or turn_id, session, now) for turn in old
    )
    state = "waiting" if len(active) > len(old) else "running"
    parent = parent_for(connection, session, request.kind) if state == "running" else None
    if known is None:
        turn = _insert_turn(connection, request, turn_id, instance, session, position, state, parent, now)
    else:
        session = drop_reply(connection, session, known)
        turn = _new_attempt(connection, known, request, instance, position, state)
        if state == "running":
            move(connection, session, turn)
    leaf = turn.message_id if state == "running" else session.leaf_id
    _MOVED.run(connection, {"moved": session.id, "leaf": leaf, "position": position + 1, "now": now})
    session = msgspec.structs.replace(session, leaf_id=leaf)
    delivery = owe(connection, turn.id, request.reply_to)
    return Acceptance("new" if known is None else "again", turn, session, delivery, superseded)


def _session_for(connection: Connection, request: TurnRequest) -> tuple[SessionRow, int]:
    """The session, locked for this transaction and made if it is new, and its next position."""
    named = {"owner": request.who.owner, "name": request.session_id}
    row = _SESSION.first(connection, named)
    if row is None:
        make_session(
            connection,
            **named,
            project=request.project,
            system_prompt=request.system_prompt or "",
            template_version=request.template_version,
            title=" ".join(request.message.split())[:TITLE_CHARS],
        )
        row = _SESSION.one(connection, named)
    return SessionRow(*row[:-1]), row[-1]


def _find_request(
    connection: Connection, session: SessionRow, request: TurnRequest, now: float
) -> TurnRow | Conflict | None:
    if request.request_id is None:
        return None
    named = {"session": session.id, "request": request.request_id}
    row = _OF_REQUEST.first(connection, named)
    if row is None:
        return None
    turn = TurnRow(*row[:-1])
    if not turn.is_active and turn.created_at < now - RETRY_WINDOW_S:
        connection.execute(update(turns).where(turns.c.id == turn.id).values(request_id=None))
        return None
    if row[-1] != request.fingerprint():
        return Conflict(
            "This request_id was already used in this session with another message or parameters."
        )
    return turn


def _may_try_again(turn: TurnRow) -> bool:
    if turn.state != "error" or turn.ending is None:
        return False
    ending = decode_ending(turn.ending)
    return isinstance(ending, Failed) and ending.error.retryable


def _supersede(connection: Connection, turn_id: str, by: str, session: SessionRow, now: float) -> Ended:
    """Ends a waiting state. Its message never came into the history, so that stays as it is."""
    ending = SupersededBy(turn_id, by)
    _SUPERSEDED.run(connection, {"old": turn_id, "event": encode(ending), "now": now})
    return Ended(True, turn_id, ending, session.version, owed_for(connection, turn_id))


def _insert_turn(
    connection: Connection,
    request: TurnRequest,
    turn_id: str,
    instance: str,
    session: SessionRow,
    position: int,
    state: str,
    parent: str | None,
    now: float,
) -> TurnRow:
    turn = TurnRow(
        id=turn_id,
        session=session.id,
        position=position,
        request_id=request.request_id or turn_id,
        message_id=new_id(),
        kind=request.kind,
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
    message = {"id": turn.message_id, "session": session.id, "parent_id": parent, "turn_id": turn_id}
    _MESSAGE.run(connection, {**message, "role": "user", "content": request.message, "created_at": now})
    _TURN.run(connection, {**msgspec.structs.asdict(turn), "fingerprint": request.fingerprint()})
    if request.mark is not None:
        remember(connection, request.mark, turn_id, now)
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
    owe_again(connection, turn.id)
    return msgspec.structs.replace(turn, **changes)


# --- messages that a broker sends again ----------------------------------------------------------


def _of_mark(connection: Connection, request: TurnRequest, mark: Mark) -> Acceptance | None:
    """The turn that this very message has made before. Its reply is owed, or was delivered, already."""
    row = _OF_MARK.first(connection, {"hash": mark.hash, "owner": request.who.owner})
    return None if row is None else Acceptance("known", *turn_and_session(row), delivery=None)


def remember(connection: Connection, mark: Mark, turn_id: str | None, now: float) -> None:
    """Notes that a message was taken."""
    _REMEMBER.run(connection, {"mark": mark.hash, "turn_id": turn_id, "at": now})


def was_taken(connection: Connection, mark: Mark | None) -> bool:
    """Whether this very message was taken before, and came again; if not, notes that it is now."""
    if mark is None:
        return False
    taken = select(func.count()).select_from(received).where(received.c.mark == mark.hash)
    if mark.again and connection.execute(taken).scalar_one():
        return True
    remember(connection, mark, None, time.time())
    return False


def forget_old(connection: Connection, now: float) -> None:
    """Forgets messages that no broker will send again."""
    connection.execute(delete(received).where(received.c.at < now - RETRY_WINDOW_S))
