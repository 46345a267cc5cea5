"""`/api/admin/servers`: the LLM servers, for those whose role allows it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from app.dependencies import CurrentUser, ServersDep
from app.hardening import StrictRoute
from app.services.server_state import Breaker, State

router = APIRouter(prefix="/api/admin/servers", tags=["admin"], route_class=StrictRoute)


class Server(BaseModel):
    """An LLM server. `problem` says why it gets no requests now; null where it does."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    provider: Annotated[str, Field(description="`default` for those of LLM_SERVER_URL")]
    kind: str
    url: str
    state: State
    draining: Annotated[bool, Field(description="Whether an admin has taken it out of service")]
    breaker: Breaker
    failures: Annotated[int, Field(description="Requests in a row that it failed at")]
    running: int
    capacity: int
    waiting: Annotated[int, Field(description="Requests that wait for it, or another one of its provider")]
    latency_ms: int | None
    models: list[str]
    problem: str | None


class ServerList(BaseModel):
    """The LLM servers, of all providers."""

    servers: list[Server]


@router.get("")
async def list_servers(user: CurrentUser, servers: ServersDep) -> ServerList:
    """All LLM servers, and how they are."""
    return ServerList(servers=[Server.model_validate(view) for view in await servers.all(user)])


@router.post("/{name}/drain")
async def drain_server(name: str, user: CurrentUser, servers: ServersDep) -> Server:
    """Takes a server out of service: it gets no new requests, and what runs there ends as ever."""
    return Server.model_validate(await servers.drain(user, name, True))


@router.post("/{name}/undrain")
async def undrain_server(name: str, user: CurrentUser, servers: ServersDep) -> Server:
    """Takes a server back into service."""
    return Server.model_validate(await servers.drain(user, name, False))
