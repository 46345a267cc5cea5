"""What routers ask for, as annotated aliases."""

from __future__ import annotations

from typing import Annotated, Protocol

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.errors import Unauthenticated
from app.services.accounts import Accounts, Identity
from app.services.llm_client import LLMClient
from app.services.session_manager import SessionManager
from app.services.store import Store
from app.services.templates import Templates

_bearer = HTTPBearer(auto_error=False, description="The access token of /api/auth/login")


async def _accounts(request: Request) -> Accounts:
    accounts: Accounts = request.app.state.container.accounts
    return accounts


async def _sessions(request: Request) -> SessionManager:
    sessions: SessionManager = request.app.state.container.sessions
    return sessions


async def _templates(request: Request) -> Templates:
    templates: Templates = request.app.state.container.templates
    return templates


async def _llm(request: Request) -> LLMClient:
    llm: LLMClient = request.app.state.container.llm
    return llm


async def _store(request: Request) -> Store:
    store: Store = request.app.state.container.store
    return store


class MqttDoor(Protocol):
    """What HTTP may know of the MQTT door."""

    @property
    def is_connected(self) -> bool:
        """Whether every project is subscribed at the broker."""


async def _mqtt(request: Request) -> MqttDoor | None:
    mqtt: MqttDoor | None = request.app.state.container.mqtt
    return mqtt


AccountsDep = Annotated[Accounts, Depends(_accounts)]
SessionsDep = Annotated[SessionManager, Depends(_sessions)]
TemplatesDep = Annotated[Templates, Depends(_templates)]
LLMDep = Annotated[LLMClient, Depends(_llm)]
StoreDep = Annotated[Store, Depends(_store)]
MqttDep = Annotated[MqttDoor | None, Depends(_mqtt)]


async def _identity(
    accounts: AccountsDep, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Identity:
    if credentials is None:
        raise Unauthenticated("Sign in first: send `Authorization: Bearer` with an access token.")
    return await accounts.identify(credentials.credentials)


CurrentUser = Annotated[Identity, Depends(_identity)]
