"""Accounts and access tokens.

Tokens are JWTs (RFC 7519) signed with HS256 and no other algorithm; every claim that is relied on is
required to be there, which python-jose does not do by itself.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from jose import JWTError, jwt
from pwdlib import PasswordHash
from sqlalchemy import Connection, Row, func, insert, or_, select
from sqlalchemy.exc import IntegrityError

from app.config import Settings
from app.database import Database
from app.errors import Conflict, Forbidden, Unauthenticated
from app.events import new_id
from app.models.tables import users

ALGORITHM = "HS256"
ISSUER = "prompt-portal"
AUDIENCE = "prompt-portal"
REQUIRED_CLAIMS = ("exp", "sub", "iss", "aud", "jti")

OPERATOR = "local"
"""The subject of tokens for whoever holds the server's secret: the setup's own check."""

OPERATOR_TOKEN_S = 60
LONGEST_TOKEN = 4096

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


class Accounts:
    """Registers people, signs them in, and tells who holds a token."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database

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

    async def login(self, name: str, password: str) -> str:
        """An access token for the account with this username or email. Raises `Unauthenticated`,
        without telling which of the two was wrong, in the same time."""
        statement = select(users).where(or_(users.c.username == name, users.c.email == name.lower()))
        row = await self._database.read(lambda c: c.execute(statement).first())
        stored = row.password_hash if row is not None else _DECOY
        matches = await asyncio.to_thread(_hasher.verify, password, stored)
        if row is None or not matches:
            raise Unauthenticated("The name or the password is wrong.")
        return _token(self._settings, row.id, self.token_seconds)

    @property
    def token_seconds(self) -> int:
        """How long an access token is good for."""
        return self._settings.access_token_minutes * 60

    async def identify(self, token: str) -> Identity:
        """Who holds the token. Raises `Unauthenticated` when it is forged, has run out, or its
        account is gone."""
        subject = _subject(self._settings, token)
        if subject == OPERATOR:
            return Identity(OPERATOR, OPERATOR, "", False, 0.0)
        statement = select(users).where(users.c.id == subject)
        row = await self._database.read(lambda c: c.execute(statement).first())
        if row is None:
            raise Unauthenticated("The account of this token is gone.")
        return _identity(row)


def operator_token(settings: Settings) -> str:
    """A token of one minute for the owner `local`, for programs that hold the server's secret."""
    return _token(settings, OPERATOR, OPERATOR_TOKEN_S)


def _token(settings: Settings, subject: str, seconds: int) -> str:
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": subject,
        "iat": now,
        "exp": now + seconds,
        "jti": new_id(),
        "typ": "access",
    }
    return jwt.encode(claims, settings.secret_key.get_secret_value(), algorithm=ALGORITHM)


def _subject(settings: Settings, token: str) -> str:
    options = {f"require_{claim}": True for claim in REQUIRED_CLAIMS}
    if len(token) > LONGEST_TOKEN:
        raise Unauthenticated("This is no access token.")
    try:
        claims = jwt.decode(
            token,
            settings.secret_key.get_secret_value(),
            algorithms=[ALGORITHM],
            audience=AUDIENCE,
            issuer=ISSUER,
            options=options,
        )
    except (JWTError, ValueError, RecursionError):  # jose parses the header before it checks anything
        raise Unauthenticated("The access token is wrong or has run out; sign in again.") from None
    if claims.get("typ") != "access":
        raise Unauthenticated("This is no access token.")
    return str(claims["sub"])


def _identity(row: Row[tuple[str]]) -> Identity:
    return Identity(f"user:{row.id}", row.username, row.email, row.is_admin, row.created_at)
