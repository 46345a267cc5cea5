"""One-use links: an invitation to make an account, or the leave to set a new password.

A link holds a secret of which only the hash is stored. Whoever uses it first has used it up, also when two
try at the same moment. It is good for as long as its maker has the right to make it.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, insert, literal, select, update

from app.access import ALL_RIGHTS, LOCAL, Identity
from app.database import Database
from app.errors import InvalidRequest, NotFound
from app.events import new_id
from app.models.tables import links, users
from app.services.audit import note
from app.services.authorizer import Authorizer
from app.services.policies import Policies

Kind = Literal["invitation", "password"]

INVITATION_DAYS = 7
PASSWORD_HOURS = 24


def hash_of(secret: str) -> str:
    """What is stored of a secret that is long and random: guessing it is hopeless without slow hashes."""
    return hashlib.sha256(secret.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Link:
    """A link that was made. `secret` is known only at that moment; times are Unix times in seconds."""

    id: str
    kind: str
    role: str | None
    made_by: str
    created_at: float
    expires_at: float
    secret: str = ""

    @property
    def path(self) -> str:
        """Where the page uses it. The secret is behind `#`, which browsers send to no server."""
        return f"/{'join' if self.kind == 'invitation' else 'new-password'}#{self.secret}"


@dataclass(frozen=True, slots=True)
class Grant:
    """What a link is good for."""

    link: str
    role: str | None
    user: str | None
    made_by: str


class Links:
    """Makes, lists and takes back links."""

    def __init__(self, database: Database, authorizer: Authorizer, policies: Policies) -> None:
        self._database = database
        self._authorizer = authorizer
        self._policies = policies

    async def invite(
        self, who: Identity, role: str, days: float = INVITATION_DAYS, *, alone: bool = False
    ) -> Link:
        """An invitation to make one account with a role; with `alone` the earlier ones that `who` has made
        for this role are worthless then. Raises `Forbidden`, `InvalidRequest`."""
        await self._authorizer.check(who, "users:write")
        if not self._policies.has_role(role):
            raise InvalidRequest("role: there is no such role")
        await self._authorizer.check_within(who, self._policies.role(role))
        earlier = and_(links.c.made_by == who.owner, links.c.role == role, links.c.used_at.is_(None))

        def operation(connection: Connection) -> Link:
            if alone:
                connection.execute(delete(links).where(earlier))
            return _make(connection, who, "invitation", days * 86400, role=role, target=role)

        return await self._database.write(operation)

    async def invitations(self, who: Identity) -> list[Link]:
        """The invitations that can still be used, the newest first."""
        await self._authorizer.check(who, "users:read")
        statement = _LINKS.where(links.c.kind == "invitation", _usable()).order_by(links.c.id.desc())
        rows = await self._database.read(lambda c: c.execute(statement).all())
        return [
            Link(row.id, row.kind, row.role, row.made_by, row.created_at, row.expires_at)
            for row in rows
            if _may_be_given(row, self._policies)
        ]

    async def take_back(self, who: Identity, link_id: str) -> None:
        """Makes an invitation worthless. Raises `NotFound`."""
        await self._authorizer.check(who, "users:write")
        statement = delete(links).where(links.c.id == link_id, links.c.kind == "invitation", _usable())

        def operation(connection: Connection) -> bool:
            gone = connection.execute(statement).rowcount > 0
            if gone:
                note(connection, who, "user.uninvite", target=link_id)
            return gone

        if not await self._database.write(operation):
            raise NotFound("There is no such invitation.")


def make_password_link(connection: Connection, who: Identity, user: str) -> Link:
    """The leave to set a new password for an account, once; earlier ones are worthless then."""
    connection.execute(delete(links).where(links.c.user == user, links.c.used_at.is_(None)))
    return _make(connection, who, "password", PASSWORD_HOURS * 3600, user=user, target=f"user:{user}")


def find(connection: Connection, policies: Policies, kind: Kind, secret: str) -> Grant | None:
    """What a link is good for, in the transaction in which it is used; None when it is not, or no longer,
    good."""
    this = _LINKS.where(links.c.secret_hash == hash_of(secret), links.c.kind == kind, _usable())
    row = connection.execute(this.with_for_update(of=links)).first()
    if row is None or not _may_be_given(row, policies):
        return None
    return Grant(row.id, row.role, row.user, row.made_by)


def use_up(connection: Connection, grant: Grant) -> None:
    """Makes the link worthless, in the transaction in which it was found."""
    connection.execute(update(links).where(links.c.id == grant.link).values(used_at=time.time()))


_makers, _holders = users.alias(), users.alias()
_LINKS = select(
    links, _makers.c.role.label("role_of_maker"), _holders.c.role.label("role_of_holder")
).select_from(
    links.outerjoin(
        _makers, and_(links.c.made_by == literal("user:").concat(_makers.c.id), _makers.c.closed_at.is_(None))
    ).outerjoin(_holders, links.c.user == _holders.c.id)
)
"""Links with the roles that their makers, where their accounts are open, and the holders of the accounts that
they are for have now."""


def _may_be_given(link: Row[Any], policies: Policies) -> bool:
    """Whether the maker of one of `_LINKS` may still give what it gives."""
    by_operator = link.made_by == LOCAL.owner
    maker = ALL_RIGHTS if by_operator else policies.role(link.role_of_maker or "")
    given = policies.role(link.role or link.role_of_holder or "")
    return maker.allows("users:write") and not maker.lacks(given)


def _usable() -> ColumnElement[bool]:
    return and_(links.c.used_at.is_(None), links.c.expires_at > time.time())


def _make(
    connection: Connection,
    who: Identity,
    kind: Kind,
    seconds: float,
    *,
    target: str,
    role: str | None = None,
    user: str | None = None,
) -> Link:
    now = time.time()
    secret = secrets.token_urlsafe(32)
    link = Link(new_id(), kind, role, who.owner, now, now + seconds, secret)
    values = {"id": link.id, "kind": kind, "secret_hash": hash_of(secret), "role": role, "user": user}
    connection.execute(
        insert(links).values(**values, made_by=who.owner, created_at=now, expires_at=link.expires_at)
    )
    note(connection, who, f"link.{kind}", target=target)
    return link
