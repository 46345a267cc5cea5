"""The MQTT door: requests in, replies out, one connection a project.

A request is acknowledged to the broker once it is committed, in the order of arrival; its reply is
published from the outbox, where it stays until the broker has confirmed it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec

from app import __version__
from app.config import Settings
from app.database import insist
from app.errors import Internal, PortalError, StorageUnavailable
from app.events import ReplyTarget, new_id
from app.logs import bind, get_logger
from app.mqtt import answers, home_assistant
from app.mqtt.connection import Broker, Incoming, MqttConnection, Outgoing, PublishRefused
from app.mqtt.contract import Command, Refusal, read
from app.mqtt.payloads import Status
from app.mqtt.requests import Requests
from app.mqtt.topics import request_filters, status_topic
from app.services.drain import Drain
from app.services.leases import Leases
from app.services.llm_client import LLMClient
from app.services.metrics import ProjectFigures
from app.services.outbox import MOST_READ, Delivery, Outbox
from app.services.projects import Projects
from app.services.session_manager import SessionManager
from app.services.store import Store
from app.services.succession import Succession
from app.services.tally import Tally
from app.services.turns import Position, Turn, recall
from app.tasks import Tasks
from app.trace_parent import note_trace

LEASE_S = 10.0
RENEW_S = 3.0
STATUS_S = 1.0
OUTBOX_S = 2.0
FORGET_S = 0.1
MOST_AT_ONCE = 1000
"""Messages that are worked on, beyond which those at QoS 0 are dropped: nothing else holds them back."""

MOST_AHEAD = 64
"""Packets of one stream that may wait for the broker to confirm them."""

JSON, TEXT = "application/json", "text/plain"

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the doors of all projects work with."""

    settings: Settings
    sessions: SessionManager
    succession: Succession
    requests: Requests
    projects: Projects
    llm: LLMClient
    store: Store
    outbox: Outbox
    leases: Leases
    tally: Tally
    drain: Drain


class MqttBridge:
    """Serves the projects of the settings."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._doors: dict[str, ProjectDoor] = {}
        self._tasks = Tasks("mqtt")

    async def open(self) -> None:
        """Starts serving. The broker need not be there."""
        parts = self._parts
        database_id = await parts.store.database_id()
        for name in parts.settings.mqtt_projects:
            door = self._doors[name] = ProjectDoor(name, database_id, parts)
            door.open()
        parts.sessions.on_delivery(self._deliver)
        parts.succession.on_taken_up(self._go_on)

    async def close(self) -> None:
        """Says goodbye on every status topic and disconnects."""
        await self._tasks.close()
        await asyncio.gather(*(door.close() for door in self._doors.values()))

    @property
    def is_connected(self) -> bool:
        """Whether every project is subscribed."""
        return all(self.projects.values())

    @property
    def projects(self) -> dict[str, bool]:
        """The projects, and whether each is subscribed."""
        return {name: door.is_connected for name, door in self._doors.items()}

    def figures(self) -> list[ProjectFigures]:
        """How each project's door is."""
        return [ProjectFigures(name, door.is_connected, door.in_flight) for name, door in self._doors.items()]

    def _deliver(self, delivery: Delivery, turn: Turn) -> None:
        door = self._doors.get(delivery.target.project)
        if door is not None:
            door.deliver(delivery, turn)

    def _go_on(self, turn: Turn) -> None:
        self._tasks.start(self._stream_again(turn), f"streams of {turn.id}")

    async def _stream_again(self, turn: Turn) -> None:
        """A turn was taken up: whoever follows its stream is told that it begins again."""
        for delivery in await insist(lambda: self._parts.outbox.of_turn(turn.id)):
            door = self._doors.get(delivery.target.project)
            if door is not None:
                door.stream(turn, delivery.target, (turn.row.attempt - 1, 0))


class ProjectDoor:
    """One project: its requests, its replies, its status."""

    def __init__(self, project: str, database_id: str, parts: Parts) -> None:
        settings = parts.settings
        self._project = project
        self._database_id = database_id
        self._parts = parts
        self._lease = f"mqtt:{project}"
        self._holder = settings.instance or new_id()
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._birth = new_id()
        self._status = b""
        self._inbox: asyncio.Queue[Incoming] = asyncio.Queue()
        self._unacked: deque[tuple[Incoming, asyncio.Task[None]]] = deque()
        self._last_in: dict[str, asyncio.Task[None]] = {}
        self._for_all: asyncio.Task[None] | None = None
        self._serves = asyncio.Event()
        """Whether this instance holds the project's lease, as far as it knows."""
        self._renewed_at = 0.0
        self._streaming: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._delivering: set[str] = set()
        self._delivered: set[str] = set()
        """Since the outbox was read last: what was read then may be in it."""
        self._is_behind = True
        """Whether replies are stored that come before those of the turns that end here now."""
        self._look_again = asyncio.Event()
        self._postponed: list[tuple[Delivery, Turn]] = []
        """Since then, too: what ended here, and is published behind what was read."""
        self._to_forget: list[Delivery] = []
        self._has_confirmed = asyncio.Event()
        self._tasks = Tasks(f"mqtt {project}")
        # For life: the count of connections goes on when the lease is lost and taken again.
        self._connection = MqttConnection(
            Broker.of(settings),
            f"portal-{database_id}-{project}",
            request_filters(project, devices=settings.mqtt_acl != "none"),
            will=self._will,
            on_message=self._inbox.put_nowait,
            on_connected=self._connected,
        )

    @property
    def is_connected(self) -> bool:
        """Whether the requests of the project reach this process."""
        return self._connection.is_subscribed

    @property
    def in_flight(self) -> int:
        """How many publishes the broker has not confirmed yet."""
        return self._connection.in_flight

    def open(self) -> None:
        """Starts serving."""
        self._tasks.start(self._run(), "connection")
        self._tasks.start(self._consume(), "requests")
        self._tasks.start(self._forget_confirmed(), "confirmed replies")

    async def close(self) -> None:
        """Stops serving; replies that are not confirmed stay in the outbox."""
        await self._connection.close(status_topic(self._project), self._render_status("offline"))
        await self._tasks.close()
        with suppress(StorageUnavailable):
            await self._forget()
            await self._parts.leases.release(self._lease, self._holder)

    # --- the connection ---

    async def _run(self) -> None:
        """Connects while this instance holds the project's lease: two connections with one client id
        would throw each other out for ever. What is not confirmed when the lease is lost is dropped: replies
        are published from the outbox by whoever has the lease then, and once more from here much later they
        would be old."""
        while True:
            if not await self._has_lease():
                await asyncio.sleep(RENEW_S)
                continue
            self._serves.set()
            self._is_behind = True
            async with AsyncExitStack() as stack:
                for coroutine, name in (
                    (self._connection.run(), "session"),
                    (self._report(), "status"),
                    (self._deliver_stored(), "outbox"),
                ):
                    task = self._tasks.start(coroutine, name)
                    stack.push_async_callback(_cancelled, task)
                stack.callback(self._stop_serving)
                has_lease = True
                while has_lease:
                    await asyncio.sleep(RENEW_S)
                    has_lease = await self._has_lease()
            log.error("another instance took over the project", project=self._project)

    def _stop_serving(self) -> None:
        self._serves.clear()
        for stream in self._streaming.values():
            stream.cancel()

    async def _has_lease(self) -> bool:
        now = time.monotonic()
        try:
            has_lease = await self._parts.leases.acquire(self._lease, self._holder, LEASE_S)
            self._renewed_at = now if has_lease else self._renewed_at
            return has_lease
        except StorageUnavailable as error:
            log.warning("the project's lease could not be written", reason=type(error).__name__)
            return self.is_connected

    def _will(self) -> tuple[str, bytes]:
        self._birth = new_id()
        return status_topic(self._project), self._render_status("offline")

    def _connected(self) -> None:
        log.info("MQTT project is served", project=self._project)
        self._status = b""  # a will may have said otherwise: say it again
        if self._parts.settings.home_assistant_discovery:
            self._connection.send(home_assistant.discovery(self._project, self._database_id))

    async def _report(self) -> None:
        """Keeps `P/status` true."""
        topic = status_topic(self._project)
        while True:
            is_well = self._parts.llm.last_health.status == "ok" and not self._parts.drain.is_on
            status = self._render_status("online" if is_well else "degraded")
            if self.is_connected and status != self._status:
                self._status = status
                with suppress(PublishRefused):
                    await self._connection.send(Outgoing(topic, status, retain=True, content_type=JSON))
            await asyncio.sleep(STATUS_S)

    def _render_status(self, state: Any) -> bytes:
        llm = self._parts.llm
        return msgspec.json.encode(
            Status(
                state,
                self._birth,
                model=llm.last_health.model,
                since=self._since,
                version=__version__,
                queue=llm.queue.waiting,
                eta_s=llm.places.eta(llm.queue.waiting),
            )
        )

    # --- requests ---

    async def _consume(self) -> None:
        """Takes messages in their order; each is acknowledged when its own work is done, and not
        before those that came earlier (MQTT 5, 4.6). Those of one session are carried out one after the
        other, also when the database makes one of them wait, and so is what changes all sessions."""
        while True:
            message = await self._inbox.get()
            if message.qos > 0 and self._parts.drain.is_on:
                continue  # not acknowledged, it comes again to whoever serves the project next
            if message.qos == 0 and len(self._unacked) >= MOST_AT_ONCE:
                log.warning("too many messages at once: one at QoS 0 is dropped", project=self._project)
                continue
            task = self._tasks.start(self._take(message), "request")
            self._unacked.append((message, task))
            task.add_done_callback(lambda _: self._acknowledge())

    def _acknowledge(self) -> None:
        while self._unacked and self._unacked[0][1].done():
            message, task = self._unacked.popleft()
            if not task.cancelled():
                self._connection.ack(message)

    async def _take(self, message: Incoming) -> None:
        if message.retain:
            return  # it was meant for whoever listened then
        note_trace(message.user.get("traceparent"), message.user.get("tracestate"))
        command = read(self._project, self._with_doubt(message))
        if isinstance(command, Refusal):
            await self._parts.requests.refused(command)
            self._refuse(command.target, command.error, command.request_id)
        elif command is not None:
            await self._in_order(command)

    def _with_doubt(self, message: Incoming) -> Incoming:
        """Where the lease may have run out, another instance may have had the message as one that is sent
        again, while this one stood still."""
        late = time.monotonic() - self._renewed_at
        if message.again or late <= LEASE_S:
            return message
        return msgspec.structs.replace(message, again=True, since=time.time() - late - LEASE_S)

    async def _in_order(self, command: Command) -> None:
        task, lane = asyncio.current_task(), f"{command.address.device}/{command.session_id}"
        assert task is not None
        if command.is_for_all and command.verb != "session":  # it has a place in the order of every session
            before, self._for_all = set(self._last_in.values()), task
        else:
            before = {last for last in (self._last_in.get(lane), self._for_all) if last is not None}
        self._last_in[lane] = task
        if before:
            await asyncio.wait(before)
        try:
            await self._carry_out(command)
        finally:
            if self._last_in.get(lane) is task:
                del self._last_in[lane]
            if self._for_all is task:
                self._for_all = None

    async def _carry_out(self, command: Command) -> None:
        bind(project=self._project, **({"request_id": command.request_id} if command.request_id else {}))
        try:
            answer = await self._parts.requests.carry_out(command)
        except PortalError as error:
            self._refuse(command.target, error, command.request_id)
            return
        except Exception:
            log.exception("an MQTT request failed", project=self._project)
            failure = Internal("The portal failed at this request.")
            self._refuse(command.target, failure, command.request_id)
            return
        if isinstance(answer, bytes):
            self._answer(command.target, answer)
        elif answer is not None:
            self.stream(answer, command.target)

    def _refuse(self, target: ReplyTarget | None, error: PortalError, request_id: str | None) -> None:
        self._parts.tally.refuse("mqtt", error.code)
        log.info("MQTT request refused", project=self._project, code=error.code)
        if target is not None:
            self._answer(target, answers.refusal(target, error, request_id))

    def _answer(self, target: ReplyTarget, payload: bytes) -> None:
        """Publishes an answer that needs no outbox: whoever misses it asks again."""
        if self._serves.is_set():
            self._connection.send(_outgoing(target, payload)).add_done_callback(_told)

    # --- replies ---

    def deliver(self, delivery: Delivery, turn: Turn) -> None:
        """Publishes the reply to a turn that has ended, unless another instance serves the project: that one
        finds it in the outbox. Stored replies that come before it are published first."""
        if not self._serves.is_set():
            return
        if turn.is_after_others:
            self._is_behind = True
            self._look_again.set()
        if self._is_behind:
            self._postponed.append((delivery, turn))
        else:
            self._publish(delivery, turn)

    def _publish(self, delivery: Delivery, turn: Turn) -> None:
        if delivery.id in self._delivering:
            return
        self._delivering.add(delivery.id)
        outgoing = _outgoing(delivery.target, self._payload(delivery.target, turn))
        self._connection.send(outgoing).add_done_callback(partial(self._confirmed, delivery))

    def _confirmed(self, delivery: Delivery, answer: asyncio.Future[None]) -> None:
        """The broker has a reply, or has refused it, or the lease was lost before."""
        if answer.cancelled():
            self._delivering.discard(delivery.id)
            return
        error = answer.exception()
        if error is None:
            self._to_forget.append(delivery)
            self._has_confirmed.set()
        elif isinstance(error, PublishRefused):
            # It stays in the outbox, and is tried again when the portal is started again.
            log.error("the broker refused a reply", topic=delivery.target.topic, reason=str(error))
        else:
            log.error("a reply could not be published", exc_info=error)
            self._delivering.discard(delivery.id)  # and is tried again soon

    async def _forget_confirmed(self) -> None:
        """Takes out of the outbox what the broker has, many at a time: a transaction for each would cost as
        much as that which stores its turn. What is lost in between is published once more, word for word.
        Runs until cancelled."""
        while True:
            await self._has_confirmed.wait()
            self._has_confirmed.clear()
            await asyncio.sleep(FORGET_S)
            await insist(self._forget)

    async def _forget(self) -> None:
        gone, self._to_forget = self._to_forget, []
        try:
            await self._parts.outbox.delivered(gone)
        except BaseException:
            self._to_forget += gone
            raise
        self._delivered.update(delivery.id for delivery in gone)
        self._delivering.difference_update(delivery.id for delivery in gone)

    def _payload(self, target: ReplyTarget, turn: Turn) -> bytes:
        assert turn.ending is not None
        project, request_id = self._parts.projects.project(turn.session.project), turn.row.request_id
        try:
            return answers.answer(target, turn.ending, turn.row.kind, request_id, project)
        except Exception:
            log.exception("a reply could not be put into words", turn=turn.id)
            return answers.refusal(target, Internal("The portal failed at this reply."), request_id)

    async def _deliver_stored(self) -> None:
        """Publishes the replies that an earlier process left, and those to turns that another process
        has ended. Runs until cancelled."""
        while True:
            self._look_again.clear()
            self._delivered.clear()
            self._postponed.clear()
            await self._publish_stored()
            if self._look_again.is_set():
                continue
            self._is_behind = False
            for delivery, turn in self._postponed:
                if delivery.id not in self._delivered:
                    self._publish(delivery, turn)
            with suppress(TimeoutError):
                async with asyncio.timeout(OUTBOX_S):
                    await self._look_again.wait()

    async def _publish_stored(self) -> None:
        parts, last = self._parts, None
        while True:
            stored = await insist(lambda after=last: parts.outbox.ready(self._project, after))  # type: ignore[misc]
            for delivery in stored:
                if delivery.id in self._delivering:
                    continue
                found = await insist(lambda turn=delivery.turn_id: parts.store.turn(turn))  # type: ignore[misc]
                if delivery.id in self._delivered:
                    continue
                if found is not None and found[0].ending is not None:
                    self._publish(delivery, recall(*found))
            if len(stored) < MOST_READ:
                return
            last = stored[-1]

    # --- streams ---

    def stream(self, turn: Turn, target: ReplyTarget, after: Position | None = None) -> None:
        """Publishes the events of a turn that come after `after`, where the target wants them, unless another
        instance serves the project. A stream that is running ends there, and this one takes its place."""
        if target.stream is None:
            return
        topic = f"{target.stream}/{turn.row.request_id}"
        key = (turn.id, topic)
        before = self._streaming.get(key)
        if before is not None:
            before.cancel()
        task = self._tasks.start(self._publish_events(turn, topic, target, after, before), "stream")
        self._streaming[key] = task
        task.add_done_callback(partial(self._end_stream, key))

    def _end_stream(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        if self._streaming.get(key) is task:
            del self._streaming[key]

    async def _publish_events(
        self,
        turn: Turn,
        topic: str,
        target: ReplyTarget,
        after: Position | None,
        before: asyncio.Task[None] | None,
    ) -> None:
        if before is not None:
            await asyncio.wait([before])
        try:
            # A turn of an instance that died may be taken up here before the lease is free.
            async with asyncio.timeout(LEASE_S + RENEW_S):
                await self._serves.wait()
        except TimeoutError:
            return
        packets, ahead = answers.Packets(topic, target.chunk), deque[asyncio.Future[None]]()
        try:
            async with aclosing(turn.follow(after)) as batches:
                async for batch in batches:
                    for payload in packets.of(batch):
                        ahead.append(self._connection.send(Outgoing(topic, payload)))
                        if len(ahead) > MOST_AHEAD:
                            await ahead.popleft()
            await asyncio.gather(*ahead)
        except PublishRefused as error:
            log.warning("the broker refused a stream", topic=topic, reason=str(error))


def _outgoing(target: ReplyTarget, payload: bytes) -> Outgoing:
    is_text = target.form == "text" and not payload.startswith(b'{"error":')
    return Outgoing(
        target.topic,
        payload,
        correlation=target.correlation,
        expiry=None if target.expiry is None else max(1, target.expiry),
        content_type=TEXT if is_text else JSON,
    )


def _told(answer: asyncio.Future[None]) -> None:
    if not answer.cancelled() and answer.exception() is not None:
        log.warning("the broker refused an answer", reason=str(answer.exception()))


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
