"""Accounts, and the sign-ins of their people.

A sign-in begins with a password and lasts as long as its refresh token is renewed. Each renewal gives a
new generation of the token, and one of an older generation, used again, ends the sign-in: somebody else
has it too. The generation before is good for some seconds more, because two tabs of a browser renew at
the same time, and because an answer may be lost on its way.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from pwdlib import PasswordHash
from sqlalchemy import Connection, Row, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from app.config import Settings
from app.database import Database
from app.errors import Conflict, Forbidden, Unauthenticated
from app.events import new_id
from app.models.tables import sign_ins, users
from app.services.tokens import sign, verify

OPERATOR = "local"
"""The subject of tokens for whoever holds the server's secret: the setup's own check."""

OPERATOR_TOKEN_S = 60

RENEWAL_GRACE_S = 60.0
"""How long the refresh token before the newest one is still good."""

USER_AGENT_CHARS = 200

_hasher = PasswordHash.recommended()
_DECOY = _hasher.hash("no account has this password")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks. `owner` is what sessions belong to."""

    owner: str
    username: str
    email: str
    is_admin: bool
    created_at: float


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a sign-in gives. Times in seconds."""

    access_token: str
    expires_in: int
    refresh_token: str
    refresh_expires_in: int


class Accounts:
    """Registers people, signs them in and out, and tells who holds a token."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._access_s = settings.access_token_minutes * 60
        self._refresh_s = settings.refresh_token_days * 86400

    async def register(self, username: str, email: str, password: str) -> Identity:
        """Makes an account; the first one is an admin's. Raises `Conflict` when the name or the
        address is taken, `Forbidden` when registration is closed."""
        password_hash = await asyncio.to_thread(_hasher.hash, password)
        closed = self._settings.registration == "closed"

        def operation(connection: Connection) -> Row[tuple[str]] | None:
            is_first = connection.execute(select(func.count()).select_from(users)).scalar_one() == 0
            if closed and not is_first:
                return None
            values = {
                "id": new_id(),
                "username": username,
                "email": email.lower(),
                "password_hash": password_hash,
                "is_admin": is_first,
                "created_at": time.time(),
            }
            connection.execute(insert(users).values(values))
            return connection.execute(select(users).where(users.c.id == values["id"])).one()

        try:
            row = await self._database.write(operation)
        except IntegrityError:
            raise Conflict("This username or email already has an account.") from None
        if row is None:
            raise Forbidden("Registration is closed; ask an admin for an account.")
        return _identity(row)

    async def sign_in(self, name: str, password: str, user_agent: str = "") -> Tokens:
        """Begins a sign-in of the account with this username or email. Raises `Unauthenticated`,
        without telling which of the two was wrong, in the same time."""
        statement = select(users).where(or_(users.c.username == name, users.c.email == name.lower()))
        row = await self._database.read(lambda c: c.execute(statement).first())
        stored = row.password_hash if row is not None else _DECOY
        matches = await asyncio.to_thread(_hasher.verify, password, stored)
        if row is None or not matches:
            raise Unauthenticated("The name or the password is wrong.")
        now = time.time()
        values = {
            "id": new_id(),
            "user": row.id,
            "generation": 1,
            "user_agent": user_agent[:USER_AGENT_CHARS],
            "created_at": now,
            "renewed_at": now,
            "expires_at": now + self._refresh_s,
        }
        await self._database.write(lambda c: c.execute(insert(sign_ins).values(values)))
        return self._tokens(row.id, values["id"], 1)

    async def renew(self, refresh_token: str) -> Tokens:
        """New tokens for a refresh token, which is used up by that. Raises `Unauthenticated` when it is
        wrong, has run out, or was used before; the last ends the sign-in."""
        claims = verify(self._settings, "refresh", refresh_token)
        generation = await self._database.write(
            lambda connection: self._renew(connection, str(claims["sid"]), int(claims["gen"]))
        )
        if generation is None:
            raise Unauthenticated("This sign-in has ended; sign in again.")
        return self._tokens(claims["sub"], claims["sid"], generation)

    def _renew(self, connection: Connection, sign_in: str, presented: int) -> int | None:
        """The generation that is good from now on; None ends the sign-in, or finds it ended."""
        this = sign_ins.c.id == sign_in
        row = connection.execute(select(sign_ins).where(this).with_for_update()).first()
        now = time.time()
        if row is None or row.ended_at is not None:
            return None
        if presented == row.generation - 1 and now - row.renewed_at <= RENEWAL_GRACE_S:
            return int(row.generation)
        if presented != row.generation:
            connection.execute(update(sign_ins).where(this).values(ended_at=now))
            return None
        values = {"generation": presented + 1, "renewed_at": now, "expires_at": now + self._refresh_s}
        connection.execute(update(sign_ins).where(this).values(values))
        return presented + 1

    async def sign_out(self, refresh_token: str) -> None:
        """Ends the sign-in of a refresh token, and with it its access tokens. Does nothing for a token
        that is no longer good."""
        try:
            claims = verify(self._settings, "refresh", refresh_token)
        except Unauthenticated:
            return
        is_open = (sign_ins.c.id == claims["sid"]) & sign_ins.c.ended_at.is_(None)
        statement = update(sign_ins).where(is_open).values(ended_at=time.time())
        await self._database.write(lambda c: c.execute(statement))

    def _tokens(self, user: str, sign_in: str, generation: int) -> Tokens:
        access = sign(self._settings, "access", user, self._access_s, sid=sign_in)
        refresh = sign(self._settings, "refresh", user, self._refresh_s, sid=sign_in, gen=generation)
        return Tokens(access, self._access_s, refresh, self._refresh_s)

    async def identify(self, token: str) -> Identity:
        """Who holds the access token. Raises `Unauthenticated` when it is forged, has run out, or its
        account or its sign-in is gone."""
        claims = verify(self._settings, "access", token)
        if claims["sub"] == OPERATOR:
            return Identity(OPERATOR, OPERATOR, "", False, 0.0)
        statement = (
            select(users)
            .join(sign_ins, sign_ins.c.user == users.c.id)
            .where(users.c.id == claims["sub"], sign_ins.c.id == claims.get("sid"))
            .where(sign_ins.c.ended_at.is_(None))
        )
        row: Row[Any] | None = await self._database.read(lambda c: c.execute(statement).first())
        if row is None:
            raise Unauthenticated("This sign-in has ended; sign in again.")
        return _identity(row)


def operator_token(settings: Settings) -> str:
    """A token of one minute for the owner `local`, for programs that hold the server's secret."""
    return sign(settings, "access", OPERATOR, OPERATOR_TOKEN_S)


def _identity(row: Row[Any]) -> Identity:
    return Identity(f"user:{row.id}", row.username, row.email, row.is_admin, row.created_at)
