"""Leases: who is in charge of what, among the processes that share a database."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection, Float, cast, delete, extract, func, literal

from app.database import Database, insert_of
from app.models.tables import leases

FORGET_S = 24 * 3600


def clock(connection: Connection) -> Any:
    """The time (Unix), by a clock that all who share the database have in common."""
    if connection.dialect.name == "postgresql":
        return cast(extract("epoch", func.clock_timestamp()), Float)
    return literal(time.time())


def forget_old(connection: Connection) -> None:
    """Forgets leases of those who will not come back."""
    connection.execute(delete(leases).where(leases.c.expires_at < clock(connection) - FORGET_S))


class Leases:
    """Takes leases, renews them, and gives them back."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def acquire(self, name: str, holder: str, seconds: float, *, force: bool = False) -> bool:
        """Takes or renews the lease `name` for `holder`; with `force` also from a holder whose time is
        not over. False when somebody else holds it."""

        def operation(connection: Connection) -> bool:
            now = clock(connection)
            values = {"name": name, "holder": holder, "expires_at": now + seconds}
            inserted = insert_of(connection.dialect.name, leases).values(values)
            free = None if force else (leases.c.holder == holder) | (leases.c.expires_at < now)
            taken = {"holder": inserted.excluded.holder, "expires_at": inserted.excluded.expires_at}
            taking = inserted.on_conflict_do_update(index_elements=["name"], set_=taken, where=free)
            return connection.execute(taking.returning(leases.c.name)).first() is not None

        return await self._database.write(operation)

    async def release(self, name: str, holder: str) -> None:
        """Gives the lease back, if `holder` has it."""
        statement = delete(leases).where(leases.c.name == name, leases.c.holder == holder)
        await self._database.write(lambda c: c.execute(statement))
