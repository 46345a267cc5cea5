"""Tickets: each opens one WebSocket, once. A page that cannot put its token into a header asks for one first;
in the log of a proxy it is worth nothing any more."""

from __future__ import annotations

import secrets
import time

from sqlalchemy import Connection, delete, insert

from app.config import Settings
from app.database import Database
from app.errors import Unauthenticated
from app.models.tables import tickets
from app.services.links import hash_of
from app.services.vault import Vault

GOOD_S = 30
"""How long a ticket is good."""

TICKET_BYTES = 24


class Tickets:
    """Gives out tickets and takes them in. What is stored of one does not open anything."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._vault = Vault(settings)
        self._database = database

    async def issue(self, token: str) -> str:
        """A ticket in the place of a token."""
        ticket, now = secrets.token_urlsafe(TICKET_BYTES), time.time()
        secret = hash_of(ticket)
        row = {"secret_hash": secret, "sealed": self._vault.seal(token, secret), "expires_at": now + GOOD_S}

        def operation(connection: Connection) -> None:
            connection.execute(delete(tickets).where(tickets.c.expires_at < now))
            connection.execute(insert(tickets).values(row))

        await self._database.write(operation)
        return ticket

    async def redeem(self, ticket: str) -> str:
        """The token in the place of which a ticket was given; the ticket is used up. Raises
        `Unauthenticated`."""
        secret = hash_of(ticket)
        mine = delete(tickets).where(tickets.c.secret_hash == secret, tickets.c.expires_at >= time.time())
        sealed = await self._database.write(
            lambda c: c.execute(mine.returning(tickets.c.sealed)).scalar_one_or_none()
        )
        token = None if sealed is None else self._vault.open(sealed, secret)
        if token is None:
            raise Unauthenticated("ticket: it was used, has run out, or is none; ask for another one.")
        return token
