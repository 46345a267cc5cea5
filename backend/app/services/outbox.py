"""The outbox: replies that are owed to MQTT clients. A row is made when a request is accepted, is due when
its turn has ended, and goes when the broker has confirmed the publish."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, bindparam, delete, func, select, update

from app.database import Database, insert_of
from app.events import ReplyTarget, new_id
from app.models.tables import outbox, turns
from app.prepared import Prepared

MOST_READ = 500
"""Replies that are read at once."""


class Delivery(msgspec.Struct, frozen=True):
    """A row of the outbox: a reply owed to `target`."""

    id: str
    turn_id: str
    target: ReplyTarget


_COLUMNS = [outbox.c[name] for name in ("id", "turn_id", "target")]
_OF_TURN = Prepared(select(*_COLUMNS).where(outbox.c.turn_id == bindparam("turn")))
_GONE = Prepared(
    delete(outbox).where(outbox.c.turn_id == bindparam("turn"), outbox.c.id == bindparam("gone"))
)


def _owe(dialect: str) -> Any:
    inserted = insert_of(dialect, outbox)
    again = {"id": inserted.excluded.id}
    return inserted.on_conflict_do_update(index_elements=["turn_id", "target_hash"], set_=again)


_OWE = Prepared(_owe)

_decode = msgspec.json.Decoder(ReplyTarget).decode


def owe(connection: Connection, turn_id: str, target: ReplyTarget | None) -> Delivery | None:
    """Puts the reply to `target` into the outbox. One that is there already gets another id: it may have been
    published to whoever asks again now, and that must not take the new one."""
    if target is None:
        return None
    delivery, encoded = Delivery(new_id(), turn_id, target), msgspec.json.encode(target)
    values = {
        "id": delivery.id,
        "turn_id": turn_id,
        "project": target.project,
        "target": encoded,
        "target_hash": hashlib.sha256(encoded).hexdigest(),
    }
    _OWE.run(connection, values)
    return delivery


def owed_for(connection: Connection, turn_id: str) -> tuple[Delivery, ...]:
    """What is, or will be, owed for a turn."""
    return tuple(_delivery(row) for row in _OF_TURN.all(connection, {"turn": turn_id}))


def owe_again(connection: Connection, turn_id: str) -> None:
    """A new attempt begins: whoever is owed the failure gets the new ending instead. A publish of the
    failure that is under way, and then deletes its row, must not take the new one."""
    for owed in owed_for(connection, turn_id):
        mine = update(outbox).where(outbox.c.turn_id == turn_id, outbox.c.id == owed.id)
        connection.execute(mine.values(id=new_id()))


class Outbox:
    """Reads what is owed, and forgets what has been delivered."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def ready(self, project: str, after: Delivery | None = None) -> list[Delivery]:
        """The replies owed to a project's clients now, in the order in which their turns ended, at most
        `MOST_READ`; of turns that ended `after` that of another reply."""
        wanted = (
            select(*_COLUMNS)
            .join(turns, turns.c.id == outbox.c.turn_id)
            .where(outbox.c.project == project, turns.c.ended_at.is_not(None))
            .order_by(turns.c.ended_at, turns.c.position)  # whoever asks again gives an old reply a new id
            .limit(MOST_READ)
        )
        if after is not None:
            last = turns.alias()
            ended_at = select(last.c.ended_at).where(last.c.id == after.turn_id).scalar_subquery()
            wanted = wanted.where(turns.c.ended_at > ended_at)
        return await self._database.read(lambda c: [_delivery(row) for row in c.execute(wanted)])

    async def depths(self) -> dict[str, int]:
        """How many replies are owed now to each project's clients, where there are any."""
        wanted = (
            select(outbox.c.project, func.count())
            .join(turns, turns.c.id == outbox.c.turn_id)
            .where(turns.c.ended_at.is_not(None))
            .group_by(outbox.c.project)
        )
        return await self._database.read(lambda c: dict(c.execute(wanted).tuples().all()))

    async def of_turn(self, turn_id: str) -> list[Delivery]:
        """What is, or will be, owed for a turn."""
        return list(await self._database.read(lambda c: owed_for(c, turn_id)))

    async def delivered(self, deliveries: Sequence[Delivery]) -> None:
        """Forgets replies that the broker has confirmed."""
        gone = [{"turn": delivery.turn_id, "gone": delivery.id} for delivery in deliveries]
        if not gone:
            return
        await self._database.write(lambda c: _GONE.run_all(c, gone), short=True)


def _delivery(row: Sequence[Any]) -> Delivery:
    delivery, turn_id, target = row
    return Delivery(delivery, turn_id, _decode(target))
