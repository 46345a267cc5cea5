"""The outbox: replies that are owed to MQTT clients. A row is made when a request is accepted, is ready when
its turn has ended, and goes when the broker has confirmed the publish."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, bindparam, delete, select, update

from app.database import Database, insert_of
from app.events import ReplyTarget, new_id
from app.models.tables import outbox
from app.prepared import Prepared

MOST_READ = 500
"""Replies that are read at once."""


class Delivery(msgspec.Struct, frozen=True):
    """A row of the outbox: a reply owed to `target`."""

    id: str
    turn_id: str
    target: ReplyTarget
    ready: bool


_COLUMNS = [outbox.c[name] for name in ("id", "turn_id", "target", "ready")]
_READY = Prepared(
    update(outbox).where(outbox.c.turn_id == bindparam("turn")).values(ready=True).returning(*_COLUMNS)
)
_GONE = Prepared(delete(outbox).where(outbox.c.id == bindparam("gone")))


def _owe(dialect: str) -> Any:
    inserted = insert_of(dialect, outbox)
    again = {"id": inserted.excluded.id, "ready": inserted.excluded.ready}
    return inserted.on_conflict_do_update(index_elements=["turn_id", "target_hash"], set_=again)


_OWE = Prepared(_owe)

_decode = msgspec.json.Decoder(ReplyTarget).decode


def owe(connection: Connection, turn_id: str, target: ReplyTarget | None, *, ready: bool) -> Delivery | None:
    """Puts the reply to `target` into the outbox. One that is there already gets another id: it may have been
    published to whoever asks again now, and that must not take the new one."""
    if target is None:
        return None
    delivery, encoded = Delivery(new_id(), turn_id, target, ready), msgspec.json.encode(target)
    values = {
        "id": delivery.id,
        "turn_id": turn_id,
        "project": target.project,
        "target": encoded,
        "target_hash": hashlib.sha256(encoded).hexdigest(),
        "ready": ready,
    }
    _OWE.run(connection, values)
    return delivery


def make_ready(connection: Connection, turn_id: str) -> tuple[Delivery, ...]:
    """The turn has ended: what is owed for it."""
    return tuple(_delivery(row) for row in _READY.all(connection, {"turn": turn_id}))


def owe_again(connection: Connection, turn_id: str) -> None:
    """A new attempt begins: whoever is owed the failure gets the new ending instead. A publish of the
    failure that is under way, and then deletes its row, must not take the new one."""
    for (owed,) in connection.execute(select(outbox.c.id).where(outbox.c.turn_id == turn_id)).all():
        connection.execute(update(outbox).where(outbox.c.id == owed).values(id=new_id(), ready=False))


class Outbox:
    """Reads what is owed, and forgets what has been delivered."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def ready(self, project: str) -> list[Delivery]:
        """The replies owed to a project's clients now, oldest first, at most `MOST_READ`."""
        wanted = select(*_COLUMNS).where(outbox.c.project == project, outbox.c.ready)
        return await self._read(wanted.order_by(outbox.c.id).limit(MOST_READ))

    async def of_turn(self, turn_id: str) -> list[Delivery]:
        """What is, or will be, owed for a turn."""
        return await self._read(select(*_COLUMNS).where(outbox.c.turn_id == turn_id))

    async def _read(self, statement: Any) -> list[Delivery]:
        rows = await self._database.read(lambda c: c.execute(statement).all())
        return [_delivery(row) for row in rows]

    async def delivered(self, delivery_ids: Sequence[str]) -> None:
        """Forgets replies that the broker has confirmed."""
        gone = [{"gone": delivery} for delivery in delivery_ids]
        if not gone:
            return
        await self._database.write(lambda c: _GONE.run_all(c, gone), short=True)


def _delivery(row: Sequence[Any]) -> Delivery:
    delivery, turn_id, target, ready = row
    return Delivery(delivery, turn_id, _decode(target), ready)
