"""The LLM servers as an admin sees them: how each is, and which are taken out of service for a while.

That a server is out of service stands in the database, for all processes and for the next start.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from app.access import Identity
from app.database import Database, keep_fresh
from app.errors import NotFound
from app.models.tables import drained_servers
from app.services import dialects
from app.services.audit import note
from app.services.authorizer import Authorizer
from app.services.llm_client import LLMClient
from app.services.llm_server import LLMServer
from app.services.server_state import Breaker, State


@dataclass(frozen=True, slots=True)
class ServerView:
    """An LLM server. `kind` is what it was found to be where `models.toml` does not say. `running` of
    `capacity` generations are in progress there; `waiting` requests wait for it or for another one of its
    provider. `failures` is the number of requests in a row that it failed at."""

    name: str
    provider: str
    kind: str
    url: str
    state: State
    draining: bool
    breaker: Breaker
    failures: int
    running: int
    capacity: int
    waiting: int
    latency_ms: int | None
    models: list[str]
    problem: str | None


class Servers:
    """Lists the LLM servers, and takes them out of service and back."""

    def __init__(self, llm: LLMClient, database: Database, authorizer: Authorizer) -> None:
        self._llm = llm
        self._database = database
        self._authorizer = authorizer
        self._changes = 0

    async def refresh(self) -> None:
        """Reads which servers are out of service."""
        wanted, changes = select(drained_servers.c.url), self._changes
        drained = await self._database.read(lambda c: set(c.execute(wanted).scalars()))
        if changes != self._changes:
            return  # what was read may be older than what was changed here meanwhile
        for server in self._llm.servers:
            server.state.drain(server.url in drained)

    async def watch(self) -> None:
        """Looks for what other processes have changed. Runs until cancelled."""
        await keep_fresh(self.refresh, "which LLM servers are out of service")

    async def all(self, who: Identity) -> list[ServerView]:
        """All servers, of all providers. Raises `Forbidden`."""
        await self._authorizer.check(who, "servers:read")
        return [
            _view(server, pool.places.waiting) for pool in self._llm.pools.values() for server in pool.servers
        ]

    async def drain(self, who: Identity, name: str, drained: bool) -> ServerView:
        """Takes a server out of service, or back into it: it gets no new requests, and what runs there ends
        as ever. Raises `Forbidden`, `NotFound`."""
        await self._authorizer.check(who, "servers:write")
        server = next((server for server in self._llm.servers if server.name == name), None)
        if server is None:
            raise NotFound("There is no such LLM server.")
        url, action = server.url, "server.drain" if drained else "server.undrain"

        def operation(connection: Connection) -> None:
            known = connection.execute(delete(drained_servers).where(drained_servers.c.url == url)).rowcount
            if drained:
                connection.execute(insert(drained_servers).values(url=url, drained_at=time.time()))
            if bool(known) != drained:
                note(connection, who, action, target=name)

        await self._database.write(operation)
        self._changes += 1
        server.state.drain(drained)
        waiting = self._llm.pools[server.upstream.name].places.waiting
        return _view(server, waiting)


def _view(server: LLMServer, waiting: int) -> ServerView:
    state = server.state
    return ServerView(
        name=server.name,
        provider=server.upstream.name,
        kind=_kind(server),
        url=server.url,
        state=state.state,
        draining=state.drained,
        breaker=state.breaker,
        failures=state.failures,
        running=state.load.taken,
        capacity=state.load.capacity,
        waiting=waiting,
        latency_ms=server.latency_ms,
        models=sorted(model.name for model in server.models),
        problem=None if state.load.limit else state.why.message,
    )


def _kind(server: LLMServer) -> str:
    kind = server.upstream.kind
    if kind != "compatible":
        return kind
    owners = {model.server for model in server.models}
    return next((found for found, owner in dialects.OWNERS.items() if owner in owners), kind)
