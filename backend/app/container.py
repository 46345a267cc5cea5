"""Opens and closes the long-lived objects: for the web app, the MQTT side alone, and plain Python."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from app.config import Settings, load_settings
from app.database import Database, migrate
from app.logs import get_logger, quiet_unless_configured
from app.loop import BackgroundLoop
from app.mqtt.bridge import MqttBridge
from app.services.accounts import Accounts
from app.services.llm_client import LLMClient
from app.services.session_manager import SessionManager
from app.services.store import Store
from app.services.templates import Templates

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Container:
    """The long-lived objects of one process, all on one event loop."""

    settings: Settings
    store: Store
    accounts: Accounts
    llm: LLMClient
    templates: Templates
    sessions: SessionManager
    mqtt: MqttBridge | None


_current: Container | None = None
_opening = threading.Lock()


@asynccontextmanager
async def open_container(settings: Settings) -> AsyncIterator[Container]:
    """Opens everything in the order of need and closes it in reverse. Neither the LLM server nor
    the broker need be there. Raises SQLAlchemy's errors when the database cannot be opened."""
    global _current  # noqa: PLW0603 - what the documented accessors return
    async with AsyncExitStack() as stack:
        if settings.database_auto_migrate:
            await asyncio.to_thread(migrate, settings.sqlalchemy_url)
        database = Database(settings.sqlalchemy_url)
        await database.open()
        stack.push_async_callback(database.close)
        store = Store(database)
        accounts = Accounts(settings, database)

        llm = LLMClient(settings)
        await llm.open()
        stack.push_async_callback(llm.close)
        await stack.enter_async_context(_background(llm.watch(), "llm watch"))

        templates = Templates(database)
        sessions = SessionManager(settings, store, llm, templates)
        await sessions.open()
        stack.push_async_callback(sessions.close)
        await stack.enter_async_context(_background(sessions.heartbeat(), "heartbeat"))
        await stack.enter_async_context(_background(sessions.sweep(), "sweep"))

        mqtt = None
        if settings.mqtt_broker_url:
            mqtt = MqttBridge(settings, sessions, accounts, llm, store)
            await mqtt.open()
            stack.push_async_callback(mqtt.close)
        container = Container(settings, store, accounts, llm, templates, sessions, mqtt)
        previous, _current = _current, container
        try:
            yield container
        finally:
            _current = previous


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
    task = asyncio.create_task(coroutine, name=name)
    task.add_done_callback(_report)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("a background task died", task=task.get_name(), exc_info=task.exception())
