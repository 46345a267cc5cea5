"""What routers ask for, as annotated aliases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Protocol

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBearer as HTTPBearerModel
from fastapi.security.base import SecurityBase

from app.access import Identity, bearer_token
from app.config import Settings
from app.errors import Unauthenticated
from app.services.accounts import Accounts
from app.services.admission import Admission
from app.services.alerts import Alerts
from app.services.api_keys import ApiKeys
from app.services.audit import Audit
from app.services.authorizer import Authorizer
from app.services.devices import Devices
from app.services.drain import Drain
from app.services.embeddings import Embeddings
from app.services.hint_feed import HintFeed
from app.services.kept_responses import KeptResponses
from app.services.links import Links
from app.services.llm_client import LLMClient
from app.services.memory import Memory
from app.services.metrics import Metrics
from app.services.model_defaults import ModelDefaults
from app.services.model_list import ModelList
from app.services.people import People
from app.services.pins import Pins
from app.services.policies import Policies
from app.services.projects import Projects
from app.services.servers import Servers
from app.services.session_keys import SessionKeys
from app.services.session_manager import SessionManager
from app.services.sign_ins import SignIns
from app.services.store import Store
from app.services.templates import Templates
from app.services.tickets import Tickets
from app.services.usage import UsageBook


async def _accounts(request: Request) -> Accounts:
    accounts: Accounts = request.app.state.container.accounts
    return accounts


async def _sign_ins(request: Request) -> SignIns:
    sign_ins: SignIns = request.app.state.container.sign_ins
    return sign_ins


async def _keys(request: Request) -> ApiKeys:
    keys: ApiKeys = request.app.state.container.keys
    return keys


async def _people(request: Request) -> People:
    people: People = request.app.state.container.people
    return people


async def _links(request: Request) -> Links:
    links: Links = request.app.state.container.links
    return links


async def _devices(request: Request) -> Devices:
    devices: Devices = request.app.state.container.devices
    return devices


async def _policies(request: Request) -> Policies:
    policies: Policies = request.app.state.container.policies
    return policies


async def _authorizer(request: Request) -> Authorizer:
    authorizer: Authorizer = request.app.state.container.authorizer
    return authorizer


async def _admission(request: Request) -> Admission:
    admission: Admission = request.app.state.container.admission
    return admission


async def _book(request: Request) -> UsageBook:
    book: UsageBook = request.app.state.container.book
    return book


async def _alerts(request: Request) -> Alerts:
    alerts: Alerts = request.app.state.container.alerts
    return alerts


async def _audit(request: Request) -> Audit:
    audit: Audit = request.app.state.container.audit
    return audit


async def _sessions(request: Request) -> SessionManager:
    sessions: SessionManager = request.app.state.container.sessions
    return sessions


async def _pins(request: Request) -> Pins:
    pins: Pins = request.app.state.container.pins
    return pins


async def _memory(request: Request) -> Memory:
    memory: Memory = request.app.state.container.memory
    return memory


async def _templates(request: Request) -> Templates:
    templates: Templates = request.app.state.container.templates
    return templates


async def _llm(request: Request) -> LLMClient:
    llm: LLMClient = request.app.state.container.llm
    return llm


async def _embeddings(request: Request) -> Embeddings:
    embeddings: Embeddings = request.app.state.container.embeddings
    return embeddings


async def _kept(request: Request) -> KeptResponses:
    kept: KeptResponses = request.app.state.container.kept
    return kept


async def _store(request: Request) -> Store:
    store: Store = request.app.state.container.store
    return store


async def _servers(request: Request) -> Servers:
    servers: Servers = request.app.state.container.servers
    return servers


async def _defaults(request: Request) -> ModelDefaults:
    defaults: ModelDefaults = request.app.state.container.models.defaults
    return defaults


async def _models(request: Request) -> ModelList:
    models: ModelList = request.app.state.container.models
    return models


async def _session_keys(request: Request) -> SessionKeys:
    keys: SessionKeys = request.app.state.container.session_keys
    return keys


async def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.container.metrics
    return metrics


async def _drain(request: Request) -> Drain:
    drain: Drain = request.app.state.container.drain
    return drain


async def _tickets(request: Request) -> Tickets:
    tickets: Tickets = request.app.state.container.tickets
    return tickets


class MqttDoor(Protocol):
    """What HTTP may know of the MQTT door."""

    @property
    def is_connected(self) -> bool:
        """Whether every project is subscribed at the broker."""

    @property
    def projects(self) -> Mapping[str, bool]:
        """The projects, and whether each is subscribed."""


async def _mqtt(request: Request) -> MqttDoor | None:
    mqtt: MqttDoor | None = request.app.state.container.mqtt
    return mqtt


async def _hints(request: Request) -> HintFeed:
    hints: HintFeed = request.app.state.container.hints
    return hints


async def _projects(request: Request) -> Projects:
    projects: Projects = request.app.state.container.projects
    return projects


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.container.settings
    return settings


AccountsDep = Annotated[Accounts, Depends(_accounts)]
SignInsDep = Annotated[SignIns, Depends(_sign_ins)]
ApiKeysDep = Annotated[ApiKeys, Depends(_keys)]
PeopleDep = Annotated[People, Depends(_people)]
LinksDep = Annotated[Links, Depends(_links)]
DevicesDep = Annotated[Devices, Depends(_devices)]
PoliciesDep = Annotated[Policies, Depends(_policies)]
AuthorizerDep = Annotated[Authorizer, Depends(_authorizer)]
AdmissionDep = Annotated[Admission, Depends(_admission)]
UsageDep = Annotated[UsageBook, Depends(_book)]
AlertsDep = Annotated[Alerts, Depends(_alerts)]
AuditDep = Annotated[Audit, Depends(_audit)]
SessionsDep = Annotated[SessionManager, Depends(_sessions)]
PinsDep = Annotated[Pins, Depends(_pins)]
MemoryDep = Annotated[Memory, Depends(_memory)]
TemplatesDep = Annotated[Templates, Depends(_templates)]
LLMDep = Annotated[LLMClient, Depends(_llm)]
EmbeddingsDep = Annotated[Embeddings, Depends(_embeddings)]
KeptDep = Annotated[KeptResponses, Depends(_kept)]
ServersDep = Annotated[Servers, Depends(_servers)]
DefaultsDep = Annotated[ModelDefaults, Depends(_defaults)]
ModelsDep = Annotated[ModelList, Depends(_models)]
SessionKeysDep = Annotated[SessionKeys, Depends(_session_keys)]
TicketsDep = Annotated[Tickets, Depends(_tickets)]
StoreDep = Annotated[Store, Depends(_store)]
MetricsDep = Annotated[Metrics, Depends(_metrics)]
DrainDep = Annotated[Drain, Depends(_drain)]
HintsDep = Annotated[HintFeed, Depends(_hints)]
ProjectsDep = Annotated[Projects, Depends(_projects)]
SettingsDep = Annotated[Settings, Depends(_settings)]
MqttDep = Annotated[MqttDoor | None, Depends(_mqtt)]


class _SignedIn(SecurityBase):
    """Who asks: one dependency, where a scheme, the accounts and a function of both would be solved one by
    one for every request."""

    scheme_name = "HTTPBearer"
    model = HTTPBearerModel(description="The access token of /api/auth/login, or an API key")

    async def __call__(self, request: Request) -> Identity:
        token = bearer_token(request.headers.get("Authorization"))
        if not token:
            raise Unauthenticated(
                "Sign in first: send `Authorization: Bearer` with an access token or an API key."
            )
        return await self._identify(request.app.state.container.accounts, token)

    async def _identify(self, accounts: Accounts, token: str) -> Identity:
        return await accounts.identify(token)


class _Watching(_SignedIn):
    """Who asks how the portal is, also while the database is away."""

    async def _identify(self, accounts: Accounts, token: str) -> Identity:
        return await accounts.identify_for_watching(token)


SIGNED_IN = _SignedIn()

CurrentUser = Annotated[Identity, Depends(SIGNED_IN)]
WatchingUser = Annotated[Identity, Depends(_Watching())]
