"""Opens and closes the long-lived objects: for the web app, the MQTT side alone, and plain Python."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.config import Settings, load_settings
from app.database import Database, migrate
from app.events import new_id
from app.logs import get_logger, quiet_unless_configured
from app.loop import BackgroundLoop
from app.mqtt.bridge import MqttBridge, Parts
from app.mqtt.requests import Requests
from app.services.accounting import Accounting, close_books
from app.services.accounts import Accounts
from app.services.admission import Admission
from app.services.alerts import Alerts
from app.services.api_keys import ApiKeys
from app.services.audit import Audit
from app.services.authorizer import Authorizer
from app.services.catalog import Catalog
from app.services.devices import DeviceRights, Devices
from app.services.drain import Drain
from app.services.embeddings import Embeddings
from app.services.generating import Generating
from app.services.hint_feed import HintFeed
from app.services.idle_work import IdleWork
from app.services.kept_responses import KeptResponses
from app.services.known_tokens import KnownTokens
from app.services.leases import Leases
from app.services.ledger import Ledger, MemoryLedger
from app.services.links import Links
from app.services.llm_client import LLMClient
from app.services.memory import Memory
from app.services.metrics import Metrics, ProjectFigures, Watched
from app.services.model_defaults import ModelDefaults
from app.services.model_list import ModelList
from app.services.outbox import Outbox
from app.services.people import People
from app.services.pins import Pins
from app.services.policies import Policies, read_roles
from app.services.projects import Projects, read_projects
from app.services.prompting import Prompting
from app.services.relay import Relay
from app.services.runner import Runner
from app.services.servers import Servers
from app.services.session_feed import SessionFeed
from app.services.session_keys import SessionKeys
from app.services.session_manager import SessionManager
from app.services.sign_ins import SignIns
from app.services.store import Store
from app.services.succession import Succession
from app.services.tally import Tally
from app.services.templates import Templates
from app.services.tickets import Tickets
from app.services.token_watch import TokenWatch
from app.services.tracing import Tracing
from app.services.usage import UsageBook
from app.services.wire import Link, Wire
from app.tasks import Tasks

if TYPE_CHECKING:
    from app.services.webhooks import Webhook

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Container:
    """The long-lived objects of one process, all on one event loop."""

    settings: Settings
    database: Database
    store: Store
    outbox: Outbox
    audit: Audit
    authorizer: Authorizer
    policies: Policies
    projects: Projects
    accounts: Accounts
    sign_ins: SignIns
    keys: ApiKeys
    people: People
    links: Links
    devices: Devices
    admission: Admission
    book: UsageBook
    alerts: Alerts
    llm: LLMClient
    embeddings: Embeddings
    templates: Templates
    sessions: SessionManager
    kept: KeptResponses
    servers: Servers
    models: ModelList
    session_keys: SessionKeys
    tickets: Tickets
    token_watch: TokenWatch
    memory: Memory
    pins: Pins
    hints: HintFeed
    feed: SessionFeed
    mqtt: MqttBridge | None
    tally: Tally
    drain: Drain
    metrics: Metrics


_current: Container | None = None
_opening = threading.Lock()


@asynccontextmanager
async def open_container(settings: Settings) -> AsyncIterator[Container]:
    """Opens everything in the order of need and closes it in reverse. Neither the LLM server nor
    the broker need be there. Raises SQLAlchemy's errors when the database cannot be opened, and `Internal`
    when it is not this version's."""
    global _current  # noqa: PLW0603 - what the documented accessors return
    settings = settings.with_instance(f"python-{new_id()}")
    async with AsyncExitStack() as stack:
        await asyncio.to_thread(migrate, settings.sqlalchemy_url, allowed=settings.database_auto_migrate)
        database = Database(settings.sqlalchemy_url, before_commit=close_books)
        await database.open()
        stack.push_async_callback(database.close)
        drain = Drain()
        store, outbox, leases = Store(database), Outbox(database), Leases(database)
        memory = Memory(database)

        audit = Audit(database)
        authorizer = Authorizer(audit)
        projects = await stack.enter_async_context(_projects(settings, database, authorizer))
        policies = await stack.enter_async_context(_policies(settings, database, authorizer, projects))
        ledger = await _ledger(settings, store)
        stack.push_async_callback(ledger.close)
        known = KnownTokens(database, policies)
        sign_ins = SignIns(settings, database, authorizer, known)
        keys = ApiKeys(database, authorizer, policies, known)
        accounts = Accounts(settings, database, sign_ins, keys, policies, authorizer, ledger, known)

        devices = await stack.enter_async_context(_devices(settings, database, authorizer, policies))

        catalog = Catalog(settings.path(settings.models_file))
        llm = await stack.enter_async_context(_llm(settings, catalog))
        servers, models = await stack.enter_async_context(_served(llm, database, authorizer))
        session_keys = SessionKeys(settings, database, store, authorizer, llm)

        book = UsageBook(database)
        alerts = await stack.enter_async_context(_alerts(settings, database, authorizer))
        admission = Admission(settings, policies, ledger, book, catalog, alerts)
        stack.push_async_callback(admission.close)
        tally = Tally(llm.is_known)
        accounting = Accounting(database, admission, tally)
        templates = Templates(database, authorizer)
        wire = await _wire(settings, store)
        runner = Runner(
            store,
            Prompting(settings, store, memory, llm, policies, projects, models.defaults),
            Generating(llm, policies, session_keys),
            accounting,
            IdleWork(settings, llm, store, memory, accounting, drain),
            settings.instance,
            await stack.enter_async_context(_tracing(settings)),
            wire,
        )
        succession = await stack.enter_async_context(
            _succession(Succession(store, leases, runner, admission, policies, devices, drain))
        )
        sessions = SessionManager(
            store, runner, llm, templates, authorizer, policies, projects, admission, drain, models.defaults
        )
        await sessions.open()
        stack.push_async_callback(sessions.close)
        await stack.enter_async_context(_beside_others(succession, wire, runner, store))

        requests = Requests(settings, sessions, projects, accounts, authorizer, devices)
        parts = Parts(
            settings, sessions, succession, requests, projects, llm, store, outbox, leases, tally, drain
        )
        mqtt = await stack.enter_async_context(_mqtt(parts))
        container = Container(
            settings=settings,
            database=database,
            store=store,
            outbox=outbox,
            audit=audit,
            authorizer=authorizer,
            policies=policies,
            projects=projects,
            accounts=accounts,
            sign_ins=sign_ins,
            keys=keys,
            people=People(database, authorizer, policies, sign_ins, known),
            links=Links(database, authorizer, policies),
            devices=devices,
            admission=admission,
            book=book,
            alerts=alerts,
            llm=llm,
            embeddings=Embeddings(llm, authorizer, admission, accounting, drain),
            templates=templates,
            sessions=sessions,
            kept=KeptResponses(store, sessions, authorizer),
            servers=servers,
            models=models,
            session_keys=session_keys,
            tickets=Tickets(settings, database),
            token_watch=await stack.enter_async_context(_token_watch(accounts)),
            memory=memory,
            pins=Pins(settings, memory, sessions, authorizer, llm),
            hints=HintFeed(store, sessions, projects),
            feed=SessionFeed(store, sessions),
            mqtt=mqtt,
            tally=tally,
            drain=drain,
            metrics=Metrics(Watched(tally, runner, llm, database, outbox, _figures(mqtt)), authorizer),
        )
        previous, _current = _current, container
        try:
            yield container
        finally:
            _current = previous


def _figures(mqtt: MqttBridge | None) -> Callable[[], Sequence[ProjectFigures]]:
    return (lambda: ()) if mqtt is None else mqtt.figures


def check_files(settings: Settings) -> None:
    """Reads the files that settings name. Raises `InvalidRequest`, which says what is wrong in them."""
    read_roles(settings.path(settings.roles_file))
    read_projects(settings.path(settings.projects_file))
    LLMClient(settings, Catalog(settings.path(settings.models_file)))


def _webhook(settings: Settings) -> Webhook | None:
    url = settings.alert_webhook_url.get_secret_value()
    if not url:
        return None
    from app.services.outbound import Outbound  # aiohttp, which takes memory, comes with it
    from app.services.webhooks import Webhook

    return Webhook(url, Outbound(settings.outbound_allow))


@asynccontextmanager
async def _alerts(settings: Settings, database: Database, authorizer: Authorizer) -> AsyncIterator[Alerts]:
    webhook = _webhook(settings)
    async with AsyncExitStack() as stack:
        if webhook is not None:
            await stack.enter_async_context(_background(webhook.run(), "alert webhook"))
        yield Alerts(database, authorizer, settings.alert_percent, webhook)


@asynccontextmanager
async def _tracing(settings: Settings) -> AsyncIterator[Tracing | None]:
    if not settings.otel_exporter_otlp_endpoint:
        yield None
        return
    tracing = Tracing(settings)
    try:
        yield tracing
    finally:
        await tracing.close()


@asynccontextmanager
async def _succession(succession: Succession) -> AsyncIterator[Succession]:
    await succession.open()
    try:
        async with _background(succession.heartbeat(), "heartbeat"):
            yield succession
    finally:
        await succession.close()


@asynccontextmanager
async def _beside_others(
    succession: Succession, wire: Wire | None, runner: Runner, store: Store
) -> AsyncIterator[None]:
    """Works beside the other processes on this database."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_background(succession.sweep(), "sweep"))
        if wire is not None:
            await stack.enter_async_context(_background(Relay(wire, runner, store).run(), "relay"))
        yield


async def _ledger(settings: Settings, store: Store) -> Ledger:
    if not settings.redis_url:
        return MemoryLedger()
    from app.services.redis_ledger import RedisLedger

    return RedisLedger(settings.redis_url, await store.database_id())


async def _wire(settings: Settings, store: Store) -> Wire | None:
    """The wire to other processes; None where there is nothing to carry it: SQLite without Redis."""
    link: Link
    if settings.redis_url:
        from app.services.redis_wire import RedisLink

        link = RedisLink(settings.redis_url)
    elif settings.sqlalchemy_url.startswith("postgresql"):
        from app.services.postgres_wire import PostgresLink

        link = PostgresLink(settings.sqlalchemy_url)
    else:
        return None
    return Wire(link, await store.database_id(), settings.instance)


@asynccontextmanager
async def _projects(
    settings: Settings, database: Database, authorizer: Authorizer
) -> AsyncIterator[Projects]:
    projects = Projects(database, authorizer, settings.path(settings.projects_file), settings.mqtt_projects)
    await projects.open()
    async with _background(projects.watch(), "projects"):
        yield projects


@asynccontextmanager
async def _policies(
    settings: Settings, database: Database, authorizer: Authorizer, projects: Projects
) -> AsyncIterator[Policies]:
    policies = Policies(database, authorizer, settings.path(settings.roles_file), projects)
    await policies.open()
    async with _background(policies.watch(), "policies"):
        yield policies


@asynccontextmanager
async def _token_watch(accounts: Accounts) -> AsyncIterator[TokenWatch]:
    watch = TokenWatch(accounts)
    async with _background(watch.run(), "token watch"):
        yield watch


@asynccontextmanager
async def _llm(settings: Settings, catalog: Catalog) -> AsyncIterator[LLMClient]:
    llm = LLMClient(settings, catalog)
    await llm.open()
    try:
        async with _background(llm.watch(), "llm watch"):
            yield llm
    finally:
        await llm.close()


@asynccontextmanager
async def _served(
    llm: LLMClient, database: Database, authorizer: Authorizer
) -> AsyncIterator[tuple[Servers, ModelList]]:
    """The LLM servers, and the models, as people see them and choose among them."""
    servers = Servers(llm, database, authorizer)
    models = ModelList(database, authorizer, llm, ModelDefaults(database, authorizer, llm))
    await servers.refresh()
    await models.open()
    async with (
        _background(servers.watch(), "llm servers"),
        _background(models.watch(), "models"),
        _background(models.defaults.watch(), "default models"),
    ):
        yield servers, models


@asynccontextmanager
async def _mqtt(parts: Parts) -> AsyncIterator[MqttBridge | None]:
    if not parts.settings.mqtt_broker_url:
        yield None
        return
    bridge = MqttBridge(parts)
    await bridge.open()
    try:
        yield bridge
    finally:
        await bridge.close()


def _device_rights(settings: Settings) -> DeviceRights | None:
    if settings.mqtt_acl != "mosquitto":
        return None
    from app.mqtt.dynsec import DynamicSecurity

    return DynamicSecurity(settings)


@asynccontextmanager
async def _devices(
    settings: Settings, database: Database, authorizer: Authorizer, policies: Policies
) -> AsyncIterator[Devices]:
    devices = Devices(settings, database, authorizer, policies, _device_rights(settings))
    if settings.mqtt_acl == "none":
        yield devices
        return
    await devices.open()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_background(devices.watch(), "devices"))
        if settings.mqtt_broker_url:
            await stack.enter_async_context(_background(devices.keep_in_sync(), "device rights"))
        yield devices


def current() -> Container:
    """The container of this process. Where none is open, one is opened from the environment and
    `backend/.env` on an event loop of its own, without MQTT, and closed at exit."""
    with _opening:
        return _current or _open_in_background()


def _open_in_background() -> Container:
    quiet_unless_configured()
    loop = BackgroundLoop()
    context = open_container(load_settings(mqtt_broker_url=""))

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop.loop).result()

    def close() -> None:
        run(context.__aexit__(None, None, None))
        loop.stop()

    container: Container = run(context.__aenter__())
    atexit.register(close)
    return container


@asynccontextmanager
async def _background(coroutine: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Runs a task that never ends by itself for as long as the context is open."""
    tasks = Tasks("background")
    tasks.start(coroutine, name)
    try:
        yield
    finally:
        await tasks.close()
