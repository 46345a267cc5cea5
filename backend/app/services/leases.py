"""Leases: who is in charge of what, among the processes that share a database."""

from __future__ import annotations

import time

from sqlalchemy import Connection, and_, delete, update

from app.database import Database, insert_new
from app.models.tables import leases


class Leases:
    """Takes leases, renews them, and gives them back."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def acquire(self, name: str, holder: str, seconds: float, *, force: bool = False) -> bool:
        """Takes or renews the lease `name` for `holder`; with `force` also from a holder whose time is
        not over. False when somebody else holds it."""
        now = time.time()
        values = {"holder": holder, "expires_at": now + seconds}

        def operation(connection: Connection) -> bool:
            free = leases.c.name == name
            if not force:
                free = and_(free, (leases.c.holder == holder) | (leases.c.expires_at < now))
            if connection.execute(update(leases).where(free).values(values)).rowcount:
                return True
            return insert_new(connection, leases, {"name": name, **values})

        return await self._database.write(operation)

    async def release(self, name: str, holder: str) -> None:
        """Gives the lease back, if `holder` has it."""
        statement = delete(leases).where(leases.c.name == name, leases.c.holder == holder)
        await self._database.write(lambda c: c.execute(statement))
