"""The transaction that accepts a request: the user message and its turn are committed, or the turn that was
made of the same request before is found."""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, bindparam, delete, func, insert, select, text, update

from app.database import insert_new, insert_of
from app.errors import Conflict, NotFound, Overloaded, PortalError
from app.events import Failed, Kind, Mark, SupersededBy, TurnRequest, decode_ending, encode, new_id
from app.models.tables import ACTIVE, messages, received, sessions, turns
from app.prepared import Prepared
from app.services.branches import drop_reply, is_answered_over, is_busy, last_question, move, parent_for
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

BUSY = "The session is busy: wait until it has answered, or stop it, before you change what was said."

RETRY_WINDOW_S = 24 * 3600
"""How long a request id is remembered, and a message of a broker that has none."""


class Acceptance(msgspec.Struct, frozen=True):
    """What became of a request: a `new` turn, a `known` one, or a new attempt (`again`) at one that
    had failed. `delivery` is the outbox row for a request that names a reply target; `superseded` are the
    waiting states that a newer one took the place of. `is_aside` when the history that the turn goes on from
    is another one than it was."""

    kind: Literal["new", "known", "again"]
    turn: TurnRow
    session: SessionRow
    delivery: Delivery | None
    superseded: tuple[Ended, ...] = ()
    is_aside: bool = False


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
    .where(received.c.mark == bindparam("hash"), received.c.at >= bindparam("since"))
    .where(sessions.c.owner == bindparam("owner"))
)
_ACTIVE = Prepared(
    select(turns.c.id, turns.c.state, turns.c.kind).where(turns.c.session == bindparam("of"), text(ACTIVE))
)
_PLACE = Prepared(
    select(messages.c.parent_id).where(
        messages.c.id == bindparam("message"),
        messages.c.session == bindparam("of"),
        messages.c.role == "user",
    )
)
_MESSAGE_OF = Prepared(
    select(messages.c.id).where(messages.c.id == bindparam("message"), messages.c.session == bindparam("of"))
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
    refusal: PortalError | None,
) -> Acceptance | PortalError:
    """Carries it out; what is refused is returned."""
    if request.mark is not None and request.mark.again:
        sent_again = _of_mark(connection, request, request.mark)
        if sent_again is not None:
            return sent_again
    found = _session_for(connection, request, refusal)
    if isinstance(found, PortalError):
        return found
    session, position = found
    known = _find_request(connection, session, request, now)
    if isinstance(known, PortalError):
        return known
    if known is not None and not _may_try_again(known):
        delivery = owe(connection, known.id, request.reply_to)
        return Acceptance("known", known, session, delivery)
    if refusal is not None:
        return refusal
    draft = _Draft(request, turn_id, instance, session, position, now)
    return _make(connection, draft, known)


class _Draft(msgspec.Struct, frozen=True):
    """What is known of a turn before it is made."""

    request: TurnRequest
    turn_id: str
    instance: str
    session: SessionRow
    position: int
    now: float

    def turn(self, message_id: str, kind: Kind, state: str) -> TurnRow:
        """The turn that answers a message."""
        request, who = self.request, self.request.who
        return TurnRow(
            id=self.turn_id,
            session=self.session.id,
            position=self.position,
            request_id=request.request_id or self.turn_id,
            message_id=message_id,
            kind=kind,
            options=request.options.given(),
            deadline=request.deadline,
            detached=request.detached,
            state=state,
            attempt=1,
            instance=self.instance,
            door=who.door,
            role=who.role_name,
            api_key=who.key.id if who.key else None,
            created_at=self.now,
            ending=None,
            trace=None,
        )


def _make(connection: Connection, draft: _Draft, known: TurnRow | None) -> Acceptance | PortalError:
    """Makes the turn where its message belongs: at the end of the history, or aside, where that has to be
    read anew."""
    request, leaf = draft.request, draft.session.leaf_id
    is_at_end = not request.needs_session or (request.follows is not None and request.follows == leaf)
    if request.regenerate or (known is not None and is_answered_over(connection, known)):
        made = _answer_again(connection, draft, known)
    elif is_at_end:
        return _take_in(connection, draft, known)
    else:
        made = _set_aside(connection, draft, known)
    return made if isinstance(made, PortalError) else msgspec.structs.replace(made, is_aside=True)


def _take_in(connection: Connection, draft: _Draft, known: TurnRow | None) -> Acceptance | PortalError:
    """Makes the turn of a new message, or lets one that had failed begin again at the end of the history."""
    request, session, now = draft.request, draft.session, draft.now
    active = _ACTIVE.all(connection, {"of": session.id})
    old = [id for id, state, kind in active if request.kind == kind == "state" and state == "waiting"]
    if len(active) - len(old) > MAX_WAITING:
        return Overloaded(f"{MAX_WAITING} messages already wait in this session.", retry_after=5)

    by = request.request_id or draft.turn_id
    superseded = tuple(_supersede(connection, turn, by, session, now) for turn in old)
    state = "waiting" if len(active) > len(old) else "running"
    leaf = session.leaf_id
    if known is None:
        turn = draft.turn(new_id(), request.kind, state)
        parent = parent_for(connection, session, request.kind) if state == "running" else None
        _insert_message(connection, turn, request.message, parent)
        _insert_turn(connection, turn, request)
        leaf = turn.message_id if state == "running" else leaf
    else:
        session = drop_reply(connection, session, known)
        # A clear since then has deleted the message, but not the memory of the request id.
        message = {"id": known.message_id, "session": session.id, "turn_id": known.id, "role": "user"}
        insert_new(connection, messages, {**message, "content": request.message, "created_at": now})
        turn = _new_attempt(connection, known, draft, state)
        leaf = move(connection, session, turn) if state == "running" else session.leaf_id
    kind: Literal["new", "again"] = "new" if known is None else "again"
    return _accepted(connection, draft, kind, turn, leaf, superseded)


def _answer_again(connection: Connection, draft: _Draft, known: TurnRow | None) -> Acceptance | PortalError:
    """Makes the turn that answers the last message again. The history stays as it is until there is a new
    answer, which is a sibling of the old one then."""
    session = draft.session
    if is_busy(connection, session):
        return Conflict(BUSY)
    last = last_question(connection, session)
    if last is None:
        return NotFound("There is no message that could be answered again.")
    message_id, kind = last
    if known is None:
        turn = draft.turn(message_id, kind, "running")
        _insert_turn(connection, turn, draft.request)
        return _accepted(connection, draft, "new", turn, session.leaf_id)
    if known.message_id != message_id:
        return Conflict("The conversation has gone on since this request: send a new one.")
    turn = _new_attempt(connection, known, draft, "running")
    return _accepted(connection, draft, "again", turn, drop_reply(connection, session, known).leaf_id)


def _set_aside(connection: Connection, draft: _Draft, known: TurnRow | None) -> Acceptance | PortalError:
    """Makes the turn of a message that does not come to the end of the history, which goes on from there: it
    stands in the place of another one, as its sibling, or behind the one that it follows."""
    session, request = draft.session, draft.request
    if is_busy(connection, session):
        return Conflict(BUSY)
    edited = request.edits if known is None else known.message_id
    if edited is not None:
        place = _PLACE.first(connection, {"message": edited, "of": session.id})
        gone = "edits: there is no such message of yours in this session"
    else:
        place = _MESSAGE_OF.first(connection, {"message": request.follows, "of": session.id})
        gone = "What this is to go on from is not in the session any more."
    if place is None:
        return NotFound(gone)
    if known is not None:
        turn = _new_attempt(connection, known, draft, "running")
        drop_reply(connection, session, known)
        return _accepted(connection, draft, "again", turn, turn.message_id)
    turn = draft.turn(new_id(), "message", "running")
    _insert_message(connection, turn, request.message, place[0])
    _insert_turn(connection, turn, request)
    return _accepted(connection, draft, "new", turn, turn.message_id)


def _accepted(
    connection: Connection,
    draft: _Draft,
    kind: Literal["new", "again"],
    turn: TurnRow,
    leaf: str | None,
    superseded: tuple[Ended, ...] = (),
) -> Acceptance:
    session, after = draft.session, draft.position + 1
    _MOVED.run(connection, {"moved": session.id, "leaf": leaf, "position": after, "now": draft.now})
    session = msgspec.structs.replace(session, leaf_id=leaf)
    return Acceptance(kind, turn, session, owe(connection, turn.id, draft.request.reply_to), superseded)


def _session_for(
    connection: Connection, request: TurnRequest, refusal: PortalError | None
) -> tuple[SessionRow, int] | PortalError:
    """The session, locked for this transaction and made if it is new, and its next position. What is refused
    makes none."""
    named = {"owner": request.who.owner, "name": request.session_id}
    row = _SESSION.first(connection, named)
    if row is None and request.needs_session:
        return NotFound("There is no such session.")
    if row is None and refusal is not None:
        return refusal
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


def _insert_message(connection: Connection, turn: TurnRow, content: str, parent: str | None) -> None:
    message = {"id": turn.message_id, "session": turn.session, "parent_id": parent, "turn_id": turn.id}
    _MESSAGE.run(connection, {**message, "role": "user", "content": content, "created_at": turn.created_at})


def _insert_turn(connection: Connection, turn: TurnRow, request: TurnRequest) -> None:
    _TURN.run(connection, {**msgspec.structs.asdict(turn), "fingerprint": request.fingerprint()})
    if request.mark is not None:
        remember(connection, request.mark, turn.id, turn.created_at)


def _new_attempt(connection: Connection, turn: TurnRow, draft: _Draft, state: str) -> TurnRow:
    changes: dict[str, Any] = {
        "attempt": turn.attempt + 1,
        "position": draft.position,
        "deadline": draft.request.deadline,
        "detached": draft.request.detached,
        "state": state,
        "instance": draft.instance,
        "ending": None,
        "trace": None,
    }
    connection.execute(update(turns).where(turns.c.id == turn.id).values(**changes, ended_at=None))
    owe_again(connection, turn.id)
    return msgspec.structs.replace(turn, **changes)


# --- messages that a broker sends again ----------------------------------------------------------


def _of_mark(connection: Connection, request: TurnRequest, mark: Mark) -> Acceptance | None:
    """The turn that this very message has made before. Its reply is owed, or was delivered, already."""
    row = _OF_MARK.first(connection, {"hash": mark.hash, "since": mark.since, "owner": request.who.owner})
    return None if row is None else Acceptance("known", *turn_and_session(row), delivery=None)


def remember(connection: Connection, mark: Mark, turn_id: str | None, now: float) -> None:
    """Notes that a message was taken."""
    _REMEMBER.run(connection, {"mark": mark.hash, "turn_id": turn_id, "at": now})


def is_known(connection: Connection, mark: Mark) -> bool:
    """Whether a message was noted."""
    known = select(func.count()).select_from(received)
    known = known.where(received.c.mark == mark.hash, received.c.at >= mark.since)
    return bool(connection.execute(known).scalar_one())


def was_taken(connection: Connection, mark: Mark | None) -> bool:
    """Whether this very message was taken before, and came again; if not, notes that it is now."""
    if mark is None:
        return False
    if mark.again and is_known(connection, mark):
        return True
    remember(connection, mark, None, time.time())
    return False


def forget_old(connection: Connection, now: float) -> None:
    """Forgets messages that no broker will send again."""
    connection.execute(delete(received).where(received.c.at < now - RETRY_WINDOW_S))
