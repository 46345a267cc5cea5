"""The rows that the store reads and writes: sessions, turns, messages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, bindparam, select, text

from app.database import insert_new
from app.events import Kind, Usage, new_id
from app.models.tables import LIVE, messages, sessions, turns
from app.prepared import Prepared


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
    kind: Kind
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
    """A message with the state and the kind of its turn. The `tool_calls` of an assistant's message are
    those that it made; of a tool's, the one that it answers."""

    id: str
    parent_id: str | None
    turn_id: str
    role: str
    content: str
    tool_calls: list[dict[str, Any]] | None
    usage: Usage | None
    created_at: float
    turn_state: str
    kind: Kind
    pinned: bool = False
    finish_reason: str | None = None

    @property
    def status(self) -> str:
        """`complete`, `pending`, `failed`, `cancelled`, `expired` or `superseded`."""
        names = {"final": "complete", "waiting": "pending", "running": "pending", "error": "failed"}
        return names.get(self.turn_state, self.turn_state)


SESSION_COLUMNS = [sessions.c[name] for name in SessionRow.__struct_fields__]
TURN_COLUMNS = [turns.c[name] for name in TurnRow.__struct_fields__]

_MESSAGE_NAMES = ("id", "parent_id", "turn_id", "role", "content", "tool_calls", "usage", "created_at")
MESSAGE_COLUMNS = [
    *(messages.c[name] for name in _MESSAGE_NAMES),
    turns.c.state,
    turns.c.kind,
    messages.c.pinned,
    messages.c.finish_reason,
]

NAMED_ONE = select(*SESSION_COLUMNS).where(
    sessions.c.owner == bindparam("owner"), sessions.c.session_id == bindparam("name"), text(LIVE)
)
"""The session that `owner` calls `name`: a deleted one may have had the same name."""

NAMED = Prepared(NAMED_ONE)
_LOCKED = Prepared(select(*SESSION_COLUMNS).where(sessions.c.id == bindparam("session")).with_for_update())


def session_named(connection: Connection, owner: str, name: str) -> SessionRow | None:
    """The session that an owner calls so."""
    row = NAMED.first(connection, {"owner": owner, "name": name})
    return None if row is None else SessionRow(*row)


def locked_session(connection: Connection, session: str) -> SessionRow:
    """The session with this row id, locked for the transaction."""
    return SessionRow(*_LOCKED.one(connection, {"session": session}))


def make_session(
    connection: Connection,
    owner: str,
    name: str,
    *,
    project: str,
    system_prompt: str = "",
    template_version: str | None = None,
    title: str = "",
) -> None:
    """Makes a session, unless somebody else has just made it."""
    now = time.time()
    values = {
        "id": new_id(),
        "owner": owner,
        "session_id": name,
        "project": project,
        "system_prompt": system_prompt,
        "template_version": template_version,
        "title": title,
        "version": 0,
        "next_position": 1,
        "created_at": now,
        "updated_at": now,
    }
    insert_new(connection, sessions, values)


def turn_and_session(row: Sequence[Any]) -> tuple[TurnRow, SessionRow]:
    """Both, from a row of their columns."""
    border = len(TURN_COLUMNS)
    return TurnRow(*row[:border]), SessionRow(*row[border:])


def message_of(row: Sequence[Any]) -> MessageRow:
    """A message, from a row of `MESSAGE_COLUMNS`."""
    values = dict(zip(MessageRow.__struct_fields__, row, strict=True))
    if values["usage"] is not None:
        values["usage"] = msgspec.convert(values["usage"], Usage)
    values["pinned"] = bool(values["pinned"])
    return MessageRow(**values)
