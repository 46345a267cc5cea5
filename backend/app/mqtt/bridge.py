"""The MQTT door: requests in, replies out, one connection a project.

A request is acknowledged to the broker once it is committed, in the order of arrival; its reply is
published from the outbox, where it stays until the broker has confirmed it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from typing import Any

from app import __version__
from app.access import Identity
from app.config import Settings
from app.database import insist
from app.errors import Internal, NotFound, PortalError, StorageUnavailable, Unauthenticated
from app.events import ReplyTarget, TurnRequest, is_id, new_id
from app.logs import get_logger
from app.mqtt import contract
from app.mqtt.connection import Broker, Incoming, MqttConnection, PublishRefused
from app.services.accounts import Accounts
from app.services.authorizer import Authorizer
from app.services.llm_client import LLMClient
from app.services.session_manager import SessionManager
from app.services.store import Delivery, Store
from app.services.turns import Turn, recall

LEASE_S = 10.0
RENEW_S = 3.0
STATUS_S = 1.0
OUTBOX_S = 2.0

log = get_logger(__name__)


class MqttBridge:
    """Serves the projects of the settings."""

    def __init__(
        self,
        settings: Settings,
        sessions: SessionManager,
        accounts: Accounts,
        authorizer: Authorizer,
        llm: LLMClient,
        store: Store,
    ) -> None:
        self._sessions = sessions
        self._store = store
        self._settings = settings
        self._accounts = accounts
        self._authorizer = authorizer
        self._llm = llm
        self._projects: dict[str, ProjectDoor] = {}

    async def open(self) -> None:
        """Starts serving. The broker need not be there."""
        self._sessions.on_delivery(self._deliver)
        database_id = await self._store.database_id()
        for name in self._settings.mqtt_projects:
            door = self._projects[name] = ProjectDoor(
                name,
                database_id,
                self._settings,
                self._sessions,
                self._accounts,
                self._authorizer,
                self._llm,
                self._store,
            )
            door.open()

    async def close(self) -> None:
        """Says goodbye on every status topic and disconnects."""
        await asyncio.gather(*(door.close() for door in self._projects.values()))

    @property
    def is_connected(self) -> bool:
        """Whether every project is subscribed."""
        return all(door.is_connected for door in self._projects.values())

    def _deliver(self, delivery: Delivery, turn: Turn) -> None:
        door = self._projects.get(delivery.target.project)
        if door is not None:
            door.deliver(delivery, turn)


class ProjectDoor:
    """One project: its requests, its replies, its status."""

    def __init__(
        self,
        project: str,
        database_id: str,
        settings: Settings,
        sessions: SessionManager,
        accounts: Accounts,
        authorizer: Authorizer,
        llm: LLMClient,
        store: Store,
    ) -> None:
        self._project = project
        self._settings = settings
        self._sessions = sessions
        self._accounts = accounts
        self._authorizer = authorizer
        self._llm = llm
        self._store = store
        self._lease = f"mqtt:{project}"
        self._holder = settings.instance or new_id()
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._birth = new_id()
        self._status = b""
        self._inbox: asyncio.Queue[Incoming] = asyncio.Queue()
        self._unacked: deque[tuple[Incoming, asyncio.Task[None]]] = deque()
        self._delivering: set[str] = set()
        self._delivered: set[str] = set()
        """Since the outbox was read last: what was read then may be in it."""
        self._tasks: set[asyncio.Task[Any]] = set()
        # For life: replies that wait to be confirmed, and the count of connections, outlast each one.
        self._connection = MqttConnection(
            Broker(
                settings.mqtt_broker_url, settings.mqtt_username, settings.mqtt_password.get_secret_value()
            ),
            f"portal-{database_id}-{project}",
            contract.request_filters(project),
            will=self._will,
            on_message=self._inbox.put_nowait,
            on_connected=self._connected,
        )

    @property
    def is_connected(self) -> bool:
        """Whether the requests of the project reach this process."""
        return self._connection.is_subscribed

    def open(self) -> None:
        """Starts serving."""
        self._start(self._run(), "connection")
        self._start(self._consume(), "requests")

    async def close(self) -> None:
        """Stops serving; replies that are not confirmed stay in the outbox."""
        topic = contract.status_topic(self._project)
        await self._connection.close(topic, self._render_status("offline"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(StorageUnavailable):
            await self._store.release(self._lease, self._holder)

    def _start(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine, name=f"mqtt {self._project}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("an MQTT task died", task=task.get_name(), exc_info=task.exception())

    # --- the connection ---

    async def _run(self) -> None:
        """Connects while this instance holds the project's lease: two connections with one client id
        would throw each other out for ever."""
        while True:
            if not await self._has_lease():
                await asyncio.sleep(RENEW_S)
                continue
            async with AsyncExitStack() as stack:
                for coroutine, name in (
                    (self._connection.run(), "session"),
                    (self._report(), "status"),
                    (self._deliver_stored(), "outbox"),
                ):
                    task = self._start(coroutine, name)
                    stack.push_async_callback(_cancelled, task)
                has_lease = True
                while has_lease:
                    await asyncio.sleep(RENEW_S)
                    has_lease = await self._has_lease()
            log.error("another instance took over the project", project=self._project)

    async def _has_lease(self) -> bool:
        try:
            return await self._store.acquire(self._lease, self._holder, LEASE_S)
        except StorageUnavailable as error:
            log.warning("the project's lease could not be written", reason=type(error).__name__)
            return self.is_connected

    def _will(self) -> tuple[str, bytes]:
        self._birth = new_id()
        return contract.status_topic(self._project), self._render_status("offline")

    def _connected(self) -> None:
        log.info("MQTT project is served", project=self._project)
        self._status = b""  # a will may have said otherwise: say it again

    async def _report(self) -> None:
        """Keeps `P/status` true."""
        topic = contract.status_topic(self._project)
        while True:
            health = self._llm.last_health
            status = self._render_status("online" if health.status == "ok" else "degraded")
            if self.is_connected and status != self._status:
                self._status = status
                await self._connection.publish(topic, status, retain=True)
            await asyncio.sleep(STATUS_S)

    def _render_status(self, state: Any) -> bytes:
        places = self._llm.places
        return contract.status(
            state,
            self._birth,
            since=self._since,
            version=__version__,
            model=self._llm.last_health.model,
            queue=places.waiting,
            eta_s=places.eta(places.waiting),
        )

    # --- requests ---

    async def _consume(self) -> None:
        """Takes messages in their order; each is acknowledged when its own work is done, and not
        before those that came earlier (MQTT 5, 4.6)."""
        while True:
            message = await self._inbox.get()
            try:
                work = await self._begin(message)
            except Exception:
                log.exception("an MQTT request failed", project=self._project)
                work = self._fail(message)
            task = self._start(work, "request")
            self._unacked.append((message, task))
            task.add_done_callback(lambda _: self._acknowledge())

    def _acknowledge(self) -> None:
        while self._unacked and self._unacked[0][1].done():
            message, task = self._unacked.popleft()
            if not task.cancelled():
                self._connection.ack(message)

    async def _begin(self, message: Incoming) -> Coroutine[Any, Any, None]:
        """Reads a message and finds out who sent it; returns the rest of the work."""
        if message.retain:
            return _nothing()
        topic_session = contract.session_of_topic(message.topic)
        if not message.payload and topic_session:
            return self._clear(topic_session)
        request = contract.read_request(self._project, message.topic, message.payload)
        if isinstance(request, contract.Refusal):
            if isinstance(request.error, contract.ForeignReplyTopic):
                await self._authorizer.deny(self._accounts.anonymous(self._project), "reply topic of another")
            return self._refuse(request.target, request.error, request.request_id)
        try:
            who = await self._who(request.input.token)
        except PortalError as error:
            return self._refuse(request.target, error, request.input.request_id)
        return self._submit(request, who)

    async def _fail(self, message: Incoming) -> None:
        """Answers a message that could not even be read for a fault of the portal's."""
        session_id = contract.session_of_topic(message.topic)
        if session_id is not None and is_id(session_id):
            target = ReplyTarget(self._project, contract.reply_topic(self._project, session_id))
            await self._refuse(target, Internal("The portal failed at this request."), None)

    async def _who(self, token: str | None) -> Identity:
        if token:
            return await insist(lambda: self._accounts.identify(token, door="mqtt"))
        if not self._settings.anonymous_mqtt:
            raise Unauthenticated("token: messages without one are not answered here.")
        return self._accounts.anonymous(self._project)

    async def _submit(self, request: contract.Request, who: Identity) -> None:
        body = request.input
        turn = TurnRequest(
            who=who,
            session_id=request.session_id,
            message=body.message,
            request_id=body.request_id,
            system_prompt=body.prompt,
            project=self._project,
            options=body,
            deadline=None if body.deadline_s is None else time.time() + body.deadline_s,
            reply_to=request.target,
        )
        try:
            await insist(lambda: self._sessions.submit(turn))
        except PortalError as error:
            await self._refuse(request.target, error, body.request_id)
        except Exception:
            log.exception("an MQTT request failed", project=self._project)
            failure = Internal("The portal failed at this request.")
            await self._refuse(request.target, failure, body.request_id)

    async def _clear(self, session_id: str) -> None:
        target = ReplyTarget(self._project, contract.reply_topic(self._project, session_id))
        try:
            who = await self._who(None)
            await insist(lambda: self._sessions.clear(who, session_id))
        except NotFound:
            pass  # it is as empty as it should be
        except PortalError as error:
            await self._refuse(target, error, None)
            return
        await self._connection.publish(target.topic, contract.CLEARED)

    async def _refuse(self, target: ReplyTarget | None, error: PortalError, request_id: str | None) -> None:
        log.info("MQTT request refused", project=self._project, code=error.code)
        if target is None:
            return
        session_id = target.topic.split("/")[2]
        await self._connection.publish(
            target.topic, contract.refusal(target.format, error, session_id, request_id)
        )

    # --- replies ---

    def deliver(self, delivery: Delivery, turn: Turn) -> None:
        """Publishes the reply to a turn that has ended."""
        if delivery.id not in self._delivering:
            self._delivering.add(delivery.id)
            self._start(self._deliver(delivery, turn), "reply")

    async def _deliver(self, delivery: Delivery, turn: Turn) -> None:
        try:
            assert turn.ending is not None
            target = delivery.target
            payload = contract.answer(
                target.format, turn.ending, turn.session.session_id, turn.row.request_id
            )
            await self._connection.publish(target.topic, payload)
            await insist(lambda: self._store.delivered([delivery.id]))
            self._delivered.add(delivery.id)
        except PublishRefused as error:
            # It stays in the outbox, and is tried again when the portal is started again.
            log.error("the broker refused a reply", topic=target.topic, reason=str(error))
            return
        self._delivering.discard(delivery.id)

    async def _deliver_stored(self) -> None:
        """Publishes the replies that an earlier process left, and those to turns that another process
        has ended. Runs until cancelled."""
        while True:
            self._delivered.clear()
            for delivery in await insist(lambda: self._store.ready_deliveries(self._project)):
                found = await insist(lambda turn=delivery.turn_id: self._store.turn(turn))  # type: ignore[misc]
                if delivery.id in self._delivered:
                    continue
                if found is not None and found[0].ending is not None:
                    self.deliver(delivery, recall(*found))
            await asyncio.sleep(OUTBOX_S)


async def _nothing() -> None:
    """For messages that ask for nothing."""


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
