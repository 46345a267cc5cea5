"""The accounts of others, for admins."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, or_, select, update

from app.access import Identity
from app.database import Database
from app.errors import Conflict, InvalidRequest, NotFound, PortalError
from app.models.tables import sign_ins, users
from app.services.audit import note
from app.services.authorizer import Authorizer
from app.services.known_tokens import KnownTokens
from app.services.links import Link, make_password_link
from app.services.policies import ADMIN, Policies
from app.services.sign_ins import SignIns


@dataclass(frozen=True, slots=True)
class Person:
    """An account. Times are Unix times in seconds; `last_seen_at` is when a sign-in was last renewed."""

    id: str
    username: str
    email: str
    role: str
    created_at: float
    closed_at: float | None
    last_seen_at: float | None


_SEEN = (
    select(func.max(sign_ins.c.renewed_at)).where(sign_ins.c.user == users.c.id).scalar_subquery()
).label("last_seen_at")
_COLUMNS = [
    users.c.id,
    users.c.username,
    users.c.email,
    users.c.role,
    users.c.created_at,
    users.c.closed_at,
    _SEEN,
]


class People:
    """Lists and changes accounts."""

    def __init__(
        self,
        database: Database,
        authorizer: Authorizer,
        policies: Policies,
        sign_ins: SignIns,
        known: KnownTokens,
    ) -> None:
        self._database = database
        self._authorizer = authorizer
        self._policies = policies
        self._sign_ins = sign_ins
        self._known = known

    async def search(
        self, who: Identity, text: str = "", *, limit: int = 50, offset: int = 0
    ) -> tuple[list[Person], int]:
        """The accounts with `text` in name or email, by name, and how many there are. The log says that
        they were shown: they are personal data."""
        await self._authorizer.check(who, "users:read")
        matching = or_(
            users.c.username.icontains(text, autoescape=True), users.c.email.icontains(text, autoescape=True)
        )

        def operation(connection: Connection) -> tuple[list[Person], int]:
            total = connection.execute(select(func.count()).select_from(users).where(matching)).scalar_one()
            page = select(*_COLUMNS).where(matching).order_by(users.c.username).limit(limit).offset(offset)
            found = [Person(*row) for row in connection.execute(page)]
            note(connection, who, "user.list", personal_data=True, details={"shown": len(found)})
            return found, total

        return await self._database.write(operation)

    async def change(
        self, who: Identity, user: str, *, role: str | None = None, closed: bool | None = None
    ) -> Person:
        """Gives an account another role, closes it (which ends its sign-ins), or opens it again. Raises
        `NotFound`, `InvalidRequest`, and `Conflict` when no open admin account would be left, or when it gets
        another role at the same moment."""
        await self._authorizer.check(who, "users:write")
        if role is not None and not self._policies.has_role(role):
            raise InvalidRequest("role: there is no such role")
        if role is not None:
            await self._authorizer.check_within(who, self._policies.role(role))
        had = await self._check_not_above(who, user)
        changes: dict[str, Any] = {} if role is None else {"role": role}
        if closed is not None:
            changes["closed_at"] = time.time() if closed else None

        def operation(connection: Connection) -> Person | PortalError:
            # All admins are locked, so that of two who demote each other one comes second.
            admins = connection.execute(
                select(users.c.id).where(users.c.role == ADMIN, users.c.closed_at.is_(None)).with_for_update()
            ).scalars()
            loses = closed or role not in {None, ADMIN}
            if loses and list(admins) == [user]:
                return Conflict("This is the last admin: make another one first.")
            if changes:
                this = update(users).where(users.c.id == user, users.c.role == had)
                if not connection.execute(this.values(changes)).rowcount:
                    return Conflict("This account has just got another role: look at it again.")
                if closed:
                    self._sign_ins.end_in(connection, user)
                details = {
                    name: value for name, value in (("role", role), ("closed", closed)) if value is not None
                }
                note(connection, who, "user.change", target=f"user:{user}", details=details)
            return Person(*connection.execute(select(*_COLUMNS).where(users.c.id == user)).one())

        return await self._known.change(operation)

    async def password_link(self, who: Identity, user: str) -> Link:
        """A link with which the account's owner sets a new password. Raises `NotFound`."""
        await self._authorizer.check(who, "users:write")
        await self._check_not_above(who, user)
        return await self._database.write(lambda c: make_password_link(c, who, user))

    async def sign_out(self, who: Identity, user: str) -> None:
        """Ends all sign-ins of an account. Raises `NotFound`."""
        await self._authorizer.check(who, "users:write")
        await self._check_not_above(who, user)

        def operation(connection: Connection) -> None:
            self._sign_ins.end_in(connection, user)
            note(connection, who, "user.sign_out", target=f"user:{user}")

        await self._known.change(operation)

    async def has_admin(self) -> bool:
        """Whether there is an open account of an admin."""
        statement = select(users.c.id).where(users.c.role == ADMIN, users.c.closed_at.is_(None)).limit(1)
        return await self._database.read(lambda c: c.execute(statement).first() is not None)

    async def _check_not_above(self, who: Identity, user: str) -> str:
        """The role of an account. Raises `NotFound`, and `Forbidden` for one with rights that `who` does not
        have."""
        statement = select(users.c.role).where(users.c.id == user)
        role: str | None = await self._database.read(lambda c: c.execute(statement).scalar())
        if role is None:
            raise NotFound("There is no such account.")
        await self._authorizer.check_within(who, self._policies.role(role))
        return role
