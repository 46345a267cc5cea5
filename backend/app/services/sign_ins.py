"""Sign-ins: what a password begins, and a refresh token keeps going.

Each renewal gives a new generation of the refresh token, and one of an older generation, used again, ends
the sign-in: somebody else has it too. The generation before is good for some seconds more, because two tabs
of a browser renew at the same time, and because an answer may be lost on its way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, or_, select, update

from app.access import Identity
from app.config import Settings
from app.database import Database
from app.errors import Forbidden, NotFound, PortalError, Unauthenticated
from app.events import new_id
from app.models.tables import sign_ins, users
from app.services.audit import DENIED, note
from app.services.authorizer import Authorizer
from app.services.known_tokens import KnownTokens
from app.services.tokens import sign, verify

RENEWAL_GRACE_S = 60.0
"""How long the refresh token before the newest one is still good."""

USER_AGENT_CHARS = 200

MOST_SHOWN = 200
"""Sign-ins in a list."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a sign-in gives. Times in seconds."""

    access_token: str
    expires_in: int
    refresh_token: str
    refresh_expires_in: int


@dataclass(frozen=True, slots=True)
class SignIn:
    """A sign-in that has not ended. Times are Unix times in seconds."""

    id: str
    user_agent: str
    created_at: float
    renewed_at: float


class SignIns:
    """Begins, renews, lists and ends sign-ins."""

    def __init__(
        self, settings: Settings, database: Database, authorizer: Authorizer, known: KnownTokens
    ) -> None:
        self._settings = settings
        self._database = database
        self._authorizer = authorizer
        self._known = known
        self._access_s = settings.access_token_minutes * 60
        self._refresh_s = settings.refresh_token_days * 86400

    async def begin(
        self, who: Identity, password_hash: str, user_agent: str, details: dict[str, Any]
    ) -> Tokens:
        """A new sign-in of a user who has shown the password with this hash, in the place of those that are
        over; `details` are for the audit log. Raises `Forbidden` when the account is closed,
        `Unauthenticated` when it has got another password since."""
        now = time.time()
        user = who.user or ""
        values = {
            "id": new_id(),
            "user": user,
            "generation": 1,
            "user_agent": user_agent[:USER_AGENT_CHARS],
            "created_at": now,
            "renewed_at": now,
            "expires_at": now + self._refresh_s,
        }

        def operation(connection: Connection) -> PortalError | None:
            refusal = _refusal(connection, user, password_hash)
            if refusal is not None:
                denied: dict[str, Any] = {"outcome": DENIED, "door": who.door, "details": details}
                note(connection, None, "auth.sign_in", target=who.owner, **denied)
                return refusal
            over = or_(sign_ins.c.ended_at.is_not(None), sign_ins.c.expires_at < now)
            connection.execute(delete(sign_ins).where(sign_ins.c.user == user, over))
            connection.execute(insert(sign_ins).values(values))
            note(connection, who, "auth.sign_in", target=who.owner, details=details)
            return None

        await self._database.write(operation)
        return self._tokens(user, str(values["id"]), 1)

    async def renew(self, refresh_token: str) -> Tokens:
        """New tokens for a refresh token, which is used up by that. Raises `Unauthenticated` when it is
        wrong, has run out, or was used before; the last ends the sign-in."""
        claims = verify(self._settings, "refresh", refresh_token)
        generation = await self._known.change(
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
            note(connection, None, "auth.reuse", target=f"user:{row.user}", outcome=DENIED, door="http")
            return None
        values = {"generation": presented + 1, "renewed_at": now, "expires_at": now + self._refresh_s}
        connection.execute(update(sign_ins).where(this).values(values))
        return presented + 1

    def _tokens(self, user: str, sign_in: str, generation: int) -> Tokens:
        access = sign(self._settings, "access", user, self._access_s, sid=sign_in)
        refresh = sign(self._settings, "refresh", user, self._refresh_s, sid=sign_in, gen=generation)
        return Tokens(access, self._access_s, refresh, self._refresh_s)

    async def open_ones(self, who: Identity) -> list[SignIn]:
        """The sign-ins of who asks that have not ended, the newest first, at most `MOST_SHOWN`. Raises
        `Forbidden`."""
        await self._authorizer.check(who, "account:write")
        statement = (
            select(sign_ins.c.id, sign_ins.c.user_agent, sign_ins.c.created_at, sign_ins.c.renewed_at)
            .where(_open_of(who.user), sign_ins.c.expires_at > time.time())
            .order_by(sign_ins.c.created_at.desc())
            .limit(MOST_SHOWN)
        )
        rows = await self._database.read(lambda c: c.execute(statement).all())
        return [SignIn(*row) for row in rows]

    async def end_by_token(self, refresh_token: str) -> None:
        """Ends the sign-in of a refresh token, and with it its access tokens. Does nothing for a token
        that is no longer good."""
        try:
            claims = verify(self._settings, "refresh", refresh_token)
        except Unauthenticated:
            return
        user = str(claims["sub"])

        def operation(connection: Connection) -> None:
            if _end(connection, and_(_open_of(user), sign_ins.c.id == claims["sid"])):
                note(connection, None, "auth.sign_out", target=f"user:{user}", door="http")

        await self._known.change(operation)

    async def end(self, who: Identity, sign_in: str) -> None:
        """Ends one of the sign-ins of who asks. Raises `NotFound`."""
        await self._authorizer.check(who, "account:write")

        def operation(connection: Connection) -> int:
            ended = _end(connection, and_(_open_of(who.user), sign_ins.c.id == sign_in))
            if ended:
                note(connection, who, "auth.sign_out", target=who.owner)
            return ended

        if not await self._known.change(operation):
            raise NotFound("There is no such sign-in.")

    async def end_all(self, who: Identity) -> None:
        """Ends all sign-ins of who asks."""
        await self._authorizer.check(who, "account:write")

        def operation(connection: Connection) -> None:
            self.end_in(connection, who.user or "")
            note(connection, who, "auth.sign_out", target=who.owner, details={"everywhere": True})

        await self._known.change(operation)

    def end_in(self, connection: Connection, user: str, *, but: str | None = None) -> None:
        """Ends all sign-ins of a user, except `but`, with this transaction."""
        _end(connection, _open_of(user) if but is None else and_(_open_of(user), sign_ins.c.id != but))


def _refusal(connection: Connection, user: str, password_hash: str) -> PortalError | None:
    """Why the password with this hash begins no sign-in. The account stays as it is in this transaction:
    what changes it waits, and then ends this sign-in too."""
    this = select(users.c.password_hash, users.c.closed_at).where(users.c.id == user)
    account = connection.execute(this.with_for_update(read=True)).one()
    if account.closed_at is not None:
        return Forbidden("This account is closed; ask an admin.")
    if account.password_hash != password_hash:
        return Unauthenticated("The password has just been changed; sign in with the new one.")
    return None


def _end(connection: Connection, these: ColumnElement[bool]) -> int:
    return int(connection.execute(update(sign_ins).where(these).values(ended_at=time.time())).rowcount)


def _open_of(user: Any) -> ColumnElement[bool]:
    return and_(sign_ins.c.user == user, sign_ins.c.ended_at.is_(None))
