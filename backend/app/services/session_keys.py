"""Keys that sessions bring: with them a session's turns at a provider are its owner's own business.

A key is stored encrypted, is shown to nobody again, and is sent to no other provider than the one it is for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from app.access import Identity
from app.config import Settings
from app.database import Database
from app.errors import InvalidRequest, NotFound
from app.events import is_id
from app.models.tables import session_keys
from app.services.audit import note
from app.services.authorizer import Authorizer
from app.services.llm_client import LLMClient
from app.services.routing import OwnKey
from app.services.store import Store
from app.services.vault import Vault


@dataclass(frozen=True, slots=True)
class StoredKey:
    """That a session has a key, and for which provider. `created_at` is a Unix time in seconds."""

    provider: str
    created_at: float


class SessionKeys:
    """Takes, keeps and forgets the keys of sessions."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        store: Store,
        authorizer: Authorizer,
        llm: LLMClient,
    ) -> None:
        self._vault = Vault(settings)
        self._database = database
        self._store = store
        self._authorizer = authorizer
        self._llm = llm

    async def put(self, who: Identity, session_id: str, provider: str, key: str) -> StoredKey:
        """Gives a session a key for a provider, in place of the one that it had. Raises `NotFound`, and
        `InvalidRequest` for a provider that takes none."""
        session = await self._session(who, "sessions:write", session_id)
        takers = self._llm.own_key_providers
        if not takers:
            raise InvalidRequest(
                "provider: no provider here takes keys of sessions (`own_keys` in models.toml)"
            )
        if provider not in takers:
            raise InvalidRequest(f"provider: one of {', '.join(takers)} takes keys of sessions")
        stored = StoredKey(provider, time.time())
        row = {
            "session": session,
            "provider": provider,
            "sealed": self._vault.seal(key, _about(session, provider)),
            "created_at": stored.created_at,
        }

        def operation(connection: Connection) -> None:
            connection.execute(delete(session_keys).where(session_keys.c.session == session))
            connection.execute(insert(session_keys).values(row))
            note(connection, who, "session.key.set", target=session_id, details={"provider": provider})

        await self._database.write(operation)
        return stored

    async def get(self, who: Identity, session_id: str) -> StoredKey:
        """Which key a session has. Raises `NotFound` also when it has none."""
        session = await self._session(who, "sessions:read", session_id)
        wanted = select(session_keys.c.provider, session_keys.c.created_at)
        found = await self._database.read(
            lambda c: c.execute(wanted.where(session_keys.c.session == session)).one_or_none()
        )
        if found is None:
            raise NotFound("This session has no key of its own.")
        return StoredKey(found.provider, found.created_at)

    async def forget(self, who: Identity, session_id: str) -> None:
        """Takes a session's key away. Raises `NotFound` also when it has none."""
        session = await self._session(who, "sessions:write", session_id)

        def operation(connection: Connection) -> bool:
            gone = connection.execute(delete(session_keys).where(session_keys.c.session == session)).rowcount
            if gone:
                note(connection, who, "session.key.delete", target=session_id)
            return gone > 0

        if not await self._database.write(operation):
            raise NotFound("This session has no key of its own.")

    async def of(self, session: str) -> OwnKey | None:
        """The key that the turns of a session bring with them."""
        wanted = select(session_keys.c.provider, session_keys.c.sealed)
        found = await self._database.read(
            lambda c: c.execute(wanted.where(session_keys.c.session == session)).one_or_none()
        )
        if found is None:
            return None
        return OwnKey(found.provider, self._vault.open(found.sealed, _about(session, found.provider)))

    async def _session(self, who: Identity, permission: str, session_id: str) -> str:
        session = await self._store.session(who.owner, session_id) if is_id(session_id) else None
        project = None if session is None else session.project
        await self._authorizer.check(who, permission, project=project, what="session")
        if session is None:
            raise NotFound("There is no such session.")
        return session.id


def _about(session: str, provider: str) -> str:
    return f"{session}:{provider}"
