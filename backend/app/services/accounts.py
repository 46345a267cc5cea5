"""Accounts: making them, signing in, and telling who holds a token."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from ipaddress import IPv6Network, ip_address
from typing import Any

from pwdlib import PasswordHash
from sqlalchemy import Connection, Row, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from app.access import LOCAL, Door, Identity
from app.config import Settings
from app.database import Database
from app.errors import (
    Conflict,
    Forbidden,
    InvalidRequest,
    PortalError,
    RateLimited,
    StorageUnavailable,
    Unauthenticated,
)
from app.events import new_id
from app.models.tables import sign_ins, users
from app.services import links
from app.services.api_keys import PREFIX, ApiKeys
from app.services.audit import DENIED, note
from app.services.authorizer import Authorizer
from app.services.known_tokens import Holder, KnownTokens
from app.services.ledger import Ledger, Window
from app.services.policies import ANONYMOUS, NEIGHBOUR, Policies
from app.services.sign_ins import SignIns, Tokens
from app.services.tokens import sign, verify

OPERATOR_TOKEN_S = 60

_hasher = PasswordHash.recommended()
_DECOY = "$argon2id$v=19$m=65536,t=3,p=4$Wmi+fPx3O4i85OywxAF8xg$m9H0kTaAyVHph9Sy8tAanyUHMEXaT/qKeovzlTThf84"
"""The hash of no account's password, to take as long where there is no account. Not made at the start, since
that costs as much as a sign-in."""


def _guesses(name: str, account: str | None, address: str) -> list[Window]:
    """What guessing is slowed by, and then stopped by: the account first, since addresses are many. The name
    counts as it is given, so that one that nobody has is refused as others are; the account, so that a name
    and an email are not two ways to guess at one password."""
    about = [f"name:{name.lower()}", *([] if account is None else [account])]
    what = "wrong passwords for this name"
    return [
        *(Window(what, f"wrong|{whose}|1m", 5, 60) for whose in about),
        *(Window(what, f"wrong|{whose}|1h", 20, 3600) for whose in about),
        Window("wrong passwords from this address", f"wrong|{_network(address)}|15m", 60, 900),
    ]


def _tries(name: str, address: str) -> list[Window]:
    """All that try to sign in, for each costs much; a school must fit in behind one address."""
    return [
        Window("sign-ins with this name", f"try|name:{name.lower()}|1h", 300, 3600),
        Window("sign-ins from this address", f"try|{_network(address)}|1h", 1000, 3600),
    ]


def _changes(account: str) -> list[Window]:
    """What changes of a password are slowed by, and then stopped by. Whoever guesses at it without being
    signed in does not count here."""
    what = "changes of this password"
    return [Window(what, f"change|{account}|1m", 5, 60), Window(what, f"change|{account}|1h", 20, 3600)]


def _strangers(address: str) -> list[Window]:
    """What nobody has to sign in for; a school class behind one address must fit in."""
    return [Window("accounts made from this address", f"stranger|{_network(address)}|1h", 300, 3600)]


def _network(address: str) -> str:
    """What is counted of an address: of IPv6 its first half, for the other one is its owner's to choose."""
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(IPv6Network((int(found) >> 64 << 64, 64)))


class Accounts:
    """Registers people, checks their passwords, and tells who holds a token."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        sign_ins: SignIns,
        keys: ApiKeys,
        policies: Policies,
        authorizer: Authorizer,
        ledger: Ledger,
        known: KnownTokens,
    ) -> None:
        self._settings = settings
        self._database = database
        self._sign_ins = sign_ins
        self._keys = keys
        self._policies = policies
        self._authorizer = authorizer
        self._ledger = ledger
        self._known = known

    async def register(
        self, username: str, email: str, password: str, *, invitation: str | None = None, address: str = ""
    ) -> Identity:
        """Makes an account: with the role of the invitation, or with `DEFAULT_ROLE` where registration is
        open. Raises `Conflict` when the name or the address is taken, `Forbidden` without an invitation
        where one is needed, `InvalidRequest` when it is not good."""
        await self._take(_strangers(address), f"{username} {address}")
        password_hash = await asyncio.to_thread(_hasher.hash, password)
        values = {"id": new_id(), "username": username, "email": email.lower(), "created_at": time.time()}

        def operation(connection: Connection) -> Row[Any] | PortalError:
            role = self._role_of_new(connection, invitation)
            if isinstance(role, PortalError):
                return role
            connection.execute(insert(users).values(**values, role=role, password_hash=password_hash))
            row = connection.execute(select(users).where(users.c.id == values["id"])).one()
            details = {"role": role, "invited": invitation is not None}
            note(
                connection,
                self._policies.identity(row),
                "auth.register",
                target=f"user:{row.id}",
                details=details,
            )
            return row

        try:
            row = await self._database.write(operation)
        except IntegrityError:
            raise Conflict("This username or email already has an account.") from None
        return self._policies.identity(row)

    def _role_of_new(self, connection: Connection, invitation: str | None) -> str | PortalError:
        if invitation is not None:
            found = links.find(connection, self._policies, "invitation", invitation)
            if found is None or found.role is None:
                return InvalidRequest("invitation: it was used, has run out, or is none; ask for another one")
            if self._settings.registration != "closed" or found.made_by == LOCAL.owner:
                links.use_up(connection, found)
                return found.role
        if self._settings.registration == "invite":
            return Forbidden("Accounts are made by invitation here; ask an admin for one.")
        if self._settings.registration == "closed":
            return Forbidden("Registration is closed; ask an admin for an account.")
        return self._settings.default_role

    async def sign_in(self, name: str, password: str, *, address: str, user_agent: str = "") -> Tokens:
        """Begins a sign-in of the account with this username or email. Raises `Unauthenticated`,
        without telling which of the two was wrong, in the same time; `RateLimited` after too many, above all
        wrong ones, for the name or from the address; `Forbidden` for a closed account."""
        statement = select(users).where(or_(users.c.username == name, users.c.email == name.lower()))
        row = await self._database.read(lambda c: c.execute(statement).first())
        account = None if row is None else f"user:{row.id}"
        details, guess, this_try = {"address": address}, _guesses(name, account, address), new_id()
        # Each is counted before it is looked at, so that many at once are no way around.
        await self._take([*guess, *_tries(name, address)], this_try)
        if not await _is_right(row, password) or row is None:
            denied: dict[str, Any] = {"outcome": DENIED, "door": "http", "details": details}
            target = account or ""  # what was typed may be a password
            await self._database.write(lambda c: note(c, None, "auth.sign_in", target=target, **denied))
            raise Unauthenticated("The name or the password is wrong.")
        await self._ledger.give_back(this_try, guess)
        return await self._sign_ins.begin(
            self._policies.identity(row), row.password_hash, user_agent, details
        )

    async def change_password(self, who: Identity, current: str, new: str, *, address: str) -> None:
        """Gives an account another password, and ends all its sign-ins but the one that asks. Raises
        `InvalidRequest` when `current` is wrong, `RateLimited` after too many tries."""
        await self._authorizer.check(who, "account:write")
        await self._take(_changes(who.owner), new_id())
        statement = select(users).where(users.c.id == who.user)
        row = await self._database.read(lambda c: c.execute(statement).first())
        if row is None or not await _is_right(row, current):
            denied: dict[str, Any] = {"outcome": DENIED, "details": {"address": address}}
            await self._database.write(lambda c: note(c, who, "auth.password", target=who.owner, **denied))
            raise InvalidRequest("current_password: it is wrong")
        password_hash = await asyncio.to_thread(_hasher.hash, new)

        def operation(connection: Connection) -> InvalidRequest | None:
            if not _set_password(connection, row.id, password_hash, was=row.password_hash):
                return InvalidRequest("current_password: it has just been changed")
            self._sign_ins.end_in(connection, who.user or "", but=who.sign_in)
            note(connection, who, "auth.password", target=who.owner)
            return None

        await self._known.change(operation)

    async def reset_password(self, link: str, new: str, *, address: str) -> None:
        """Sets the password of the account that an admin's link is for, and ends all its sign-ins. Raises
        `InvalidRequest` when the link is not, or no longer, good."""
        await self._take(_strangers(address), address)
        password_hash = await asyncio.to_thread(_hasher.hash, new)

        def operation(connection: Connection) -> bool:
            found = links.find(connection, self._policies, "password", link)
            if found is None or found.user is None:
                return False
            links.use_up(connection, found)
            _set_password(connection, found.user, password_hash)
            self._sign_ins.end_in(connection, found.user)
            note(connection, None, "auth.password", target=f"user:{found.user}", door="http")
            return True

        if not await self._known.change(operation):
            raise InvalidRequest("link: it was used, has run out, or is none; ask an admin for another one")

    async def _take(self, windows: list[Window], what: str) -> None:
        for quota in await self._ledger.take(what, windows):
            if quota.is_full:
                raise RateLimited(
                    f"Too many {quota.window.name}; try again later.", retry_after=quota.resets_in
                )

    async def identify(self, token: str, *, door: Door = "http") -> Identity:
        """Who holds the access token or API key that came in by `door`. Raises `Unauthenticated` when it
        is forged, has run out, or its account or its sign-in is gone."""
        return await self._known.holder(token, door, lambda: self._look_up(token, door))

    async def identify_for_watching(self, token: str) -> Identity:
        """As `identify`; while the database cannot be asked, whoever held the token last. That is for what
        tells of an outage, and changes nothing."""
        try:
            return await self.identify(token)
        except StorageUnavailable:
            last = self._known.last(token, "http")
            if last is None:
                raise
            return last

    async def _look_up(self, token: str, door: Door) -> Holder:
        if token.startswith(PREFIX):
            return await self._keys.identify(token, in_payload=door == "mqtt")
        claims = verify(self._settings, "access", token)
        if claims["sub"] == LOCAL.owner:
            return Holder(replace(LOCAL, door=door), claims["exp"])
        sign_in = claims.get("sid")
        statement = (
            select(users)
            .join(sign_ins, sign_ins.c.user == users.c.id)
            .where(users.c.id == claims["sub"], sign_ins.c.id == sign_in)
            .where(sign_ins.c.ended_at.is_(None), users.c.closed_at.is_(None))
        )
        row: Row[Any] | None = await self._database.read(lambda c: c.execute(statement).first())
        if row is None:
            raise Unauthenticated("This sign-in has ended; sign in again.")
        return Holder(self._policies.identity(row, sign_in=sign_in, door=door), claims["exp"])

    def anonymous(self, project: str) -> Identity:
        """Whoever sends MQTT messages in a project without showing who they are."""
        name = NEIGHBOUR if self._settings.broker_is_local else ANONYMOUS
        return Identity(f"anon:{project}", name, self._policies.role(name), door="mqtt")


def operator_token(settings: Settings) -> str:
    """A token of one minute for the owner `local`, for programs that hold the server's secret."""
    return sign(settings, "access", LOCAL.owner, OPERATOR_TOKEN_S)


async def _is_right(account: Row[Any] | None, password: str) -> bool:
    """Whether the password is the account's; it takes the same time where there is none."""
    stored = _DECOY if account is None else account.password_hash
    return await asyncio.to_thread(_hasher.verify, password, stored) and account is not None


def _set_password(connection: Connection, user: str, password_hash: str, *, was: str | None = None) -> bool:
    """Sets a password; with `was` only in the place of that one. Tells whether it did."""
    this = update(users).where(users.c.id == user)
    if was is not None:
        this = this.where(users.c.password_hash == was)
    return connection.execute(this.values(password_hash=password_hash)).rowcount > 0
