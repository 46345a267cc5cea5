"""API keys: for programs that ask in somebody's name.

A key is `pp_` and 43 random characters; only its hash is stored. It may do what both its owner's role and
its scopes allow. A key for a device is for MQTT payloads, which a broker and whoever listens there can
read: it is good for nothing else. Its owner names the device as they like, so it counts as its owner does.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, insert, select, update

from app.access import NEVER_BY_KEY, PERMISSIONS, Identity, KeyUse
from app.database import Database
from app.errors import Forbidden, InvalidRequest, NotFound, StorageUnavailable, Unauthenticated
from app.events import new_id
from app.logs import get_logger
from app.models.tables import api_keys, users
from app.services.audit import note
from app.services.authorizer import Authorizer
from app.services.known_tokens import Holder, KnownTokens
from app.services.links import hash_of
from app.services.policies import Policies

PREFIX = "pp_"
PREFIX_CHARS = 10
MOST_KEYS = 100
USED_EVERY_S = 60.0
"""How exact `last_used_at` is."""

DEVICE_SCOPES = ("chat:use",)

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret. Times are Unix times in seconds."""

    id: str
    name: str
    prefix: str
    scopes: Sequence[str]
    project: str | None
    device: str | None
    created_at: float
    expires_at: float | None
    last_used_at: float | None


COLUMNS = [api_keys.c[name] for name in ApiKey.__dataclass_fields__]


class ApiKeys:
    """Makes, lists, checks and revokes keys."""

    def __init__(
        self, database: Database, authorizer: Authorizer, policies: Policies, known: KnownTokens
    ) -> None:
        self._database = database
        self._authorizer = authorizer
        self._policies = policies
        self._known = known

    async def make(
        self,
        who: Identity,
        name: str,
        *,
        scopes: Sequence[str] | None = None,
        project: str | None = None,
        device: str | None = None,
        expires_at: float | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key and its secret, which is never shown again. Without `scopes` it may do all that a key
        of its owner can. Raises `Forbidden`, `InvalidRequest`."""
        await self._authorizer.check(who, "keys:write")
        possible = DEVICE_SCOPES if device else [name for name in PERMISSIONS if name not in NEVER_BY_KEY]
        mine = [name for name in possible if who.may(name)]
        wrong = [name for name in scopes or () if name not in mine]
        if wrong:
            raise InvalidRequest(f"scopes: {', '.join(wrong)} cannot be given; there are {', '.join(mine)}")
        if expires_at is not None and expires_at <= time.time():
            raise InvalidRequest("expires_at: it is over")
        secret = PREFIX + secrets.token_urlsafe(32)
        chosen = mine if scopes is None else sorted(set(scopes))
        now = time.time()
        key = ApiKey(new_id(), name, secret[:PREFIX_CHARS], chosen, project, device, now, expires_at, None)

        def operation(connection: Connection) -> bool:
            if len(connection.execute(_of(who.user or "")).all()) >= MOST_KEYS:
                return False
            values = {name: getattr(key, name) for name in ApiKey.__dataclass_fields__}
            connection.execute(insert(api_keys).values(**values, user=who.user, secret_hash=hash_of(secret)))
            note(connection, who, "key.make", target=f"key:{key.id}", details={"scopes": list(chosen)})
            return True

        if who.user is None or not await self._database.write(operation):
            raise InvalidRequest(f"name: at most {MOST_KEYS} keys; revoke one first")
        return key, secret

    async def mine(self, who: Identity) -> list[ApiKey]:
        """The keys of who asks that are not revoked, the newest first. Raises `Forbidden`."""
        await self._authorizer.check(who, "keys:write")
        return await self._of(who.user or "")

    async def of(self, who: Identity, user: str) -> list[ApiKey]:
        """The keys of an account, for admins. Raises `Forbidden`."""
        await self._authorizer.check(who, "users:read")
        return await self._of(user)

    async def _of(self, user: str) -> list[ApiKey]:
        rows = await self._database.read(lambda c: c.execute(_of(user)).all())
        return [ApiKey(*row) for row in rows]

    async def revoke(self, who: Identity, key_id: str, *, of: str | None = None) -> None:
        """Makes a key worthless at once: one's own, or, with the right to change accounts, that of
        another user. Raises `NotFound`."""
        await self._authorizer.check(who, "keys:write" if of is None else "users:write")
        mine = and_(api_keys.c.id == key_id, api_keys.c.user == (of or who.user))
        statement = update(api_keys).where(mine, api_keys.c.revoked_at.is_(None))

        def operation(connection: Connection) -> bool:
            gone = connection.execute(statement.values(revoked_at=time.time())).rowcount > 0
            if gone:
                note(connection, who, "key.revoke", target=f"key:{key_id}")
            return gone

        if not await self._known.change(operation):
            raise NotFound("There is no such key.")

    async def identify(self, secret: str, *, in_payload: bool) -> Holder:
        """Whose key it is; `in_payload` when it came in an MQTT payload. Raises `Unauthenticated`, and
        `Forbidden` for a key in the wrong place."""
        statement = (
            select(users, *(column.label(f"key_{column.name}") for column in COLUMNS))
            .join(api_keys, api_keys.c.user == users.c.id)
            .where(api_keys.c.secret_hash == hash_of(secret), api_keys.c.revoked_at.is_(None))
            .where(users.c.closed_at.is_(None))
        )
        row = await self._database.read(lambda c: c.execute(statement).first())
        now = time.time()
        if row is None or (row.key_expires_at is not None and row.key_expires_at <= now):
            raise Unauthenticated("The API key is wrong, revoked, or has run out.")
        if in_payload and row.key_device is None:
            raise Forbidden("token: others can read it here; make an API key for a device, and use that.")
        if not in_payload and row.key_device is not None:
            raise Forbidden("This API key is for the MQTT payloads of a device only.")
        if row.key_last_used_at is None or now - row.key_last_used_at >= USED_EVERY_S:
            await self._used(row.key_id, now)
        key = KeyUse(row.key_id, row.key_name, frozenset(row.key_scopes), row.key_project)
        who = self._policies.identity(row, key=key, door="mqtt" if in_payload else "http")
        return Holder(who, row.key_expires_at)

    async def _used(self, key_id: str, now: float) -> None:
        statement = update(api_keys).where(api_keys.c.id == key_id).values(last_used_at=now)
        try:
            await self._database.write(lambda c: c.execute(statement))
        except StorageUnavailable:
            log.warning("the use of a key could not be noted")  # it is no reason to refuse it


def _of(user: str) -> Any:
    return (
        select(*COLUMNS)
        .where(api_keys.c.user == user, api_keys.c.revoked_at.is_(None))
        .order_by(api_keys.c.id.desc())
    )
