"""One connection to the broker, on the event loop: the only place that knows paho.

The session at the broker is persistent, so what is published while the portal is away waits there.
Messages are acknowledged by whoever handles them (`ack`), and an acknowledgement is tied to the
connection that brought the message: a late one, after a reconnect, could confirm another message
that has the same packet id by then.
"""

from __future__ import annotations

import asyncio
import queue
import random
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from app.config import Settings
from app.logs import get_logger

KEEPALIVE_S = 30
CONNECT_TIMEOUT_S = 5.0
BACKOFF_FIRST_S, BACKOFF_MOST_S = 0.2, 3.0
SESSION_EXPIRY_S = 7 * 24 * 3600
RECEIVE_MAXIMUM = 256
"""Messages that the broker may send before the first of them is acknowledged: the back-pressure."""

MOST_UNCONFIRMED = 1000
"""Publishes that may wait to be confirmed, unless the broker wants fewer; further ones wait to be sent. They
are counted here: paho does not read the broker's Receive Maximum, cannot be told another number while it is
connected, and heeds none when it sends again what was not confirmed."""

PACKET_BYTES = 64
"""What a publish has, at most, beside its topic, payload and correlation data."""

REFUSED_USER = {0x86, 0x87}
"""Bad user name or password, not authorized (MQTT 5, 3.2.2.2)."""

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}

log = get_logger(__name__)


_TABLES = vars(Properties(PacketTypes.PUBLISH))  # type: ignore[no-untyped-call]


def _make_properties(properties: Properties, packet_type: int) -> None:
    """paho's `Properties.__init__`, with the tables of all properties shared: paho writes them down anew for
    every packet, which takes longer than to read the packet."""
    vars(properties).update(_TABLES, packetType=packet_type)


def _clear_properties(properties: Properties) -> None:
    """paho's `Properties.clear`, which looks for every property that there may be, in each new packet."""
    for name in vars(properties).keys() - _TABLES.keys():
        delattr(properties, name)


Properties.__init__, Properties.clear = _make_properties, _clear_properties  # type: ignore[method-assign]


class Incoming(msgspec.Struct, frozen=True):
    """A message from the broker. `connection` counts the connections of this process; `again` when somebody
    may have had it before: not before `since` (Unix time), then. The rest is MQTT 5's: `expiry` in seconds
    that are left, `user` the first value of each user property."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    mid: int = 0
    connection: int = 0
    again: bool = False
    since: float = 0.0
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry: int | None = None
    user: Mapping[str, str] = {}


class Outgoing(msgspec.Struct, frozen=True):
    """A message for the broker; `expiry` in seconds, `content_type` as MIME has it."""

    topic: str
    payload: bytes
    retain: bool = False
    correlation: bytes | None = None
    expiry: int | None = None
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class Broker:
    """Where the broker is, and how to sign in there."""

    url: str
    username: str = ""
    password: str = ""

    @classmethod
    def of(cls, settings: Settings) -> Broker:
        """The broker of the settings, and the portal's user there."""
        password = settings.mqtt_password.get_secret_value()
        return cls(settings.mqtt_broker_url, settings.mqtt_username, password)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        url = urlsplit(self.url)
        return url.hostname or "", url.port or DEFAULT_PORTS[url.scheme]


class PublishRefused(Exception):
    """The broker took a message and threw it away, for its rules do not allow the topic; or it takes none
    that are so large."""


class MqttConnection:
    """Keeps a connection with `filters` subscribed, for as long as `run` runs.

    `will` makes topic and payload of the last will for each connection; `on_message` and
    `on_connected` are called on the event loop.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        filters: Sequence[str],
        *,
        will: Callable[[], tuple[str, bytes]],
        on_message: Callable[[Incoming], None],
        on_connected: Callable[[], None],
    ) -> None:
        self._broker = broker
        self._filters = filters
        self._will = will
        self._on_message = on_message
        self._on_connected = on_connected
        self._connections = 0
        self._lost = asyncio.Event()
        self._most_unconfirmed = MOST_UNCONFIRMED
        self._largest = sys.maxsize
        self._unconfirmed: dict[int, tuple[Outgoing, asyncio.Future[None]]] = {}
        self._held: deque[tuple[Outgoing, asyncio.Future[None]]] = deque()
        self._is_up = False
        self._troubles: set[tuple[str, str]] = set()
        self.is_subscribed = False
        self._client = _client(broker, client_id)
        self._client.on_socket_open = self._watch_socket
        self._client.on_socket_close = self._forget_socket
        self._client.on_socket_register_write = self._want_write
        self._client.on_socket_unregister_write = self._stop_write
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
        self._client.on_subscribe = self._subscribed
        self._client.on_publish = self._confirmed
        self._client.on_message = self._received

    async def run(self) -> None:
        """Connects, and connects again whenever the connection is lost. Runs until cancelled; what is not
        confirmed then is never sent again."""
        self._loop = asyncio.get_running_loop()
        backoff = BACKOFF_FIRST_S
        try:
            while True:
                self._lost.clear()
                if await self._connect():
                    await self._serve()
                    backoff = BACKOFF_FIRST_S if self.is_subscribed else backoff
                    self.is_subscribed = False
                # Clients that lost the same broker should not all return at the same moment.
                await asyncio.sleep(backoff * random.uniform(0.5, 1.0))  # noqa: S311
                backoff = min(backoff * 2, BACKOFF_MOST_S)
        finally:
            self.is_subscribed = self._is_up = False
            self._client.disconnect()
            self._give_up()

    @property
    def in_flight(self) -> int:
        """How many publishes the broker has not confirmed yet."""
        return len(self._unconfirmed) + len(self._held)

    def send(self, message: Outgoing) -> asyncio.Future[None]:
        """Publishes at QoS 1. The future is done when the broker has confirmed it, after however many
        reconnects, or has `PublishRefused`; it is cancelled when `run` ends before."""
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.append((message, confirmed))
        self._release()
        return confirmed

    def _give_up(self) -> None:
        waiting = [*self._unconfirmed.values(), *self._held]
        self._client.drop_out_messages()
        self._unconfirmed.clear()
        self._held.clear()
        for _, confirmed in waiting:
            confirmed.cancel()

    def _publish(self, message: Outgoing, confirmed: asyncio.Future[None]) -> None:
        if _size_of(message) > self._largest:
            # The broker would break the connection, and the next one, and the next one.
            if not confirmed.done():
                confirmed.set_exception(PublishRefused(f"The broker takes at most {self._largest} bytes."))
            return
        try:
            info = self._client.publish(
                message.topic, message.payload, qos=1, retain=message.retain, properties=_properties(message)
            )
        except Exception as error:  # noqa: BLE001 - whatever paho does not like, its sender must hear of it
            if not confirmed.done():
                confirmed.set_exception(error)
        else:
            self._unconfirmed[info.mid] = message, confirmed

    def _came_up(self) -> None:
        """From now on messages are published at once. paho would let what is published while it connects
        overtake what was published before."""
        self._is_up = self._client.is_connected()
        self._release()

    def _release(self) -> None:
        """Publishes what is held back, as far as the broker takes it now."""
        while self._is_up and self._held and len(self._unconfirmed) < self._most_unconfirmed:
            self._publish(*self._held.popleft())

    def ack(self, message: Incoming) -> None:
        """Acknowledges a message, unless its connection is gone: then the broker sends it again."""
        if message.qos > 0 and message.connection == self._connections and self._client.is_connected():
            self._client.ack(message.mid, message.qos)

    async def close(self, topic: str, farewell: bytes) -> None:
        """Publishes a retained farewell in the place of the will, and disconnects."""
        if self._is_up:
            with suppress(TimeoutError, PublishRefused):
                async with asyncio.timeout(1):
                    await self.send(Outgoing(topic, farewell, retain=True))
            self._client.disconnect()

    # --- the connection's life ---

    async def _connect(self) -> bool:
        topic, payload = self._will()
        self._client.will_set(topic, payload, qos=1, retain=True)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_EXPIRY_S
        properties.ReceiveMaximum = RECEIVE_MAXIMUM
        host, port = self._broker.address

        def connect() -> None:
            self._client.connect(host, port, KEEPALIVE_S, clean_start=False, properties=properties)

        try:
            # paho connects blockingly; everything after that happens on the loop.
            await self._loop.run_in_executor(None, connect)
        except (OSError, ValueError) as error:
            self._tell_of("the broker cannot be reached", str(error) or type(error).__name__)
            return False
        return True

    def _tell_of(self, trouble: str, reason: str) -> None:
        """Logs why there is no connection, as a warning once: it is tried again every few seconds."""
        say = log.debug if (trouble, reason) in self._troubles else log.warning
        self._troubles.add((trouble, reason))
        say(trouble, reason=reason)

    async def _serve(self) -> None:
        """Does paho's housekeeping until the connection is lost."""
        while not self._lost.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._lost.wait()
            self._client.loop_misc()

    def _connected(self, _client: Any, _data: Any, _flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._tell_of("the broker refused the connection", str(reason))
            self._lost.set()
            return
        self._connections += 1
        self._largest = getattr(properties, "MaximumPacketSize", sys.maxsize)
        self._heed(getattr(properties, "ReceiveMaximum", MOST_UNCONFIRMED))
        self._loop.call_soon(self._came_up)  # after paho has sent again what was not confirmed
        self._subscribe()

    def _subscribe(self) -> None:
        if self.is_subscribed or not self._client.is_connected():
            return
        # 2: the broker sends no retained messages on subscribing; requests are never retained.
        options = SubscribeOptions(qos=1, retainHandling=2)
        self._client.subscribe([(name, options) for name in self._filters])

    def _heed(self, receive_maximum: int) -> None:
        """Keeps to the number of unconfirmed publishes that the broker wants (MQTT 5, 3.3.4). Where more than
        that were sent on the connection before, or larger ones than it takes, they are all held back again:
        paho would send them at once."""
        self._most_unconfirmed = min(MOST_UNCONFIRMED, receive_maximum)
        is_too_large = any(_size_of(message) > self._largest for message, _ in self._unconfirmed.values())
        if len(self._unconfirmed) > self._most_unconfirmed or is_too_large:
            self._client.drop_out_messages()
            self._held.extendleft(reversed(self._unconfirmed.values()))
            self._unconfirmed.clear()

    def _subscribed(self, _client: Any, _data: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        pairs = zip(self._filters, reasons, strict=False)
        refused = next(((name, reason) for name, reason in pairs if reason.is_failure), None)
        if refused is not None:
            # Its rules may yet be written: those of a new project are, by whoever manages the broker.
            log.error("the broker refused a subscription", filter=refused[0], reason=str(refused[1]))
            self._loop.call_later(BACKOFF_MOST_S, self._subscribe)
            return
        self.is_subscribed = True
        if self._troubles:
            self._troubles.clear()
            log.info("the broker is there again")
        self._on_connected()

    def _disconnected(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self._tell_of("the connection to the broker is lost", str(reason))
        self._is_up = False
        self._lost.set()

    def _confirmed(self, _client: Any, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
        found = self._unconfirmed.pop(mid, None)
        if found is None:
            return
        self._release()
        _, confirmed = found
        if confirmed.done():
            return
        if reason.is_failure:
            confirmed.set_exception(PublishRefused(str(reason)))
        else:
            confirmed.set_result(None)

    def _received(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        self._on_message(
            Incoming(
                message.topic,
                bytes(message.payload),
                message.qos,
                message.retain,
                message.mid,
                self._connections,
                message.dup,
                **_said(message.properties),
            )
        )

    # --- paho's socket, on the event loop; these may be called from the thread that connects ---

    def _watch_socket(self, _client: Any, _data: Any, sock: Any) -> None:
        if isinstance(sock, socket.socket):
            # Without this a reply waits for the acknowledgement of the packet before it (Nagle).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.call_soon_threadsafe(self._loop.add_reader, sock.fileno(), self._read, sock)

    def _forget_socket(self, _client: Any, _data: Any, sock: Any) -> None:
        self._on_loop(self._loop.remove_reader, sock.fileno())

    def _want_write(self, _client: Any, _data: Any, sock: Any) -> None:
        self._on_loop(self._loop.add_writer, sock.fileno(), self._client.loop_write)

    def _stop_write(self, _client: Any, _data: Any, sock: Any) -> None:
        self._on_loop(self._loop.remove_writer, sock.fileno())

    def _on_loop(self, call: Callable[..., Any], *arguments: Any) -> None:
        """At once on the loop's own thread: a socket's number may mean another one later."""
        try:
            on_loop = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            on_loop = False
        if on_loop:
            call(*arguments)
        else:
            self._loop.call_soon_threadsafe(call, *arguments)

    def _read(self, sock: Any) -> None:
        self._client.loop_read()
        # TLS may have decrypted more than was read, and the socket will not say so.
        pending = getattr(sock, "pending", None)
        while pending is not None and sock.fileno() >= 0 and pending():
            self._client.loop_read()
        # Of a socket that has failed uvloop tells once and never again, though what came before the failure
        # is still to be read, and the failure itself comes last.
        while sock.fileno() >= 0 and _has_failed(sock):
            self._client.loop_read()


def _has_failed(sock: Any) -> bool:
    """Whether the connection of a socket was reset, whatever there is still to be read."""
    if sys.platform == "win32":
        return False  # there is no uvloop
    failure = select.poll()
    failure.register(sock, 0)
    return bool(failure.poll(0))


def _size_of(message: Outgoing) -> int:
    """How many bytes a publish has at most."""
    return PACKET_BYTES + len(message.topic.encode()) + len(message.payload) + len(message.correlation or b"")


def _properties(message: Outgoing) -> Properties | None:
    """MQTT 5's properties of a publish (section 3.3.2.3)."""
    if message.correlation is None and message.expiry is None:
        return None if message.content_type is None else _content(message.content_type)
    found = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if message.correlation is not None:
        found.CorrelationData = message.correlation
    if message.expiry is not None:
        found.MessageExpiryInterval = message.expiry
    if message.content_type is not None:
        found.ContentType = message.content_type
        found.PayloadFormatIndicator = 1  # UTF-8
    return found


class _Packed(Properties):
    """Properties that many publishes have alike, packed once."""

    def __init__(self, found: Properties) -> None:
        object.__setattr__(self, "_packed", found.pack())  # type: ignore[no-untyped-call]

    def pack(self) -> bytes:
        """See paho's."""
        packed: bytes = object.__getattribute__(self, "_packed")
        return packed


@lru_cache(16)
def _content(content_type: str) -> Properties:
    found = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    found.ContentType = content_type
    found.PayloadFormatIndicator = 1  # UTF-8
    return _Packed(found)


def _said(properties: Properties | None) -> dict[str, Any]:
    """What a publish says in its properties, as fields of `Incoming`."""
    if properties is None:
        return {}
    user: dict[str, str] = {}
    for name, value in getattr(properties, "UserProperty", ()):
        user.setdefault(name, value)
    return {
        "response_topic": getattr(properties, "ResponseTopic", None),
        "correlation": getattr(properties, "CorrelationData", None),
        "expiry": getattr(properties, "MessageExpiryInterval", None),
        "user": user,
    }


def _client(broker: Broker, client_id: str = "") -> paho.Client:
    url = urlsplit(broker.url)
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        protocol=MQTTProtocolVersion.MQTTv5,
        transport="websockets" if url.scheme in {"ws", "wss"} else "tcp",
        manual_ack=True,
    )
    client.max_inflight_messages_set(0)  # see MOST_UNCONFIRMED
    if url.scheme in {"ws", "wss"}:
        client.ws_set_options(path=url.path or "/mqtt")
    if url.scheme in {"mqtts", "wss"}:
        client.tls_set()
    if broker.username:
        client.username_pw_set(broker.username, broker.password)
    client.connect_timeout = CONNECT_TIMEOUT_S
    return client


@contextmanager
def _running(client: paho.Client, broker: Broker) -> Iterator[None]:
    """Lets a client work on a thread of its own. Raises `OSError` when the broker cannot be reached."""
    client.connect(*broker.address)
    client.loop_start()
    try:
        yield
    finally:
        client.disconnect()
        client.loop_stop()


def request_once(
    broker: Broker,
    topic: str,
    reply_topic: str,
    payload: bytes,
    *,
    timeout: float,
    is_reply: Callable[[bytes], bool] = bool,
) -> bytes:
    """Publishes one message and returns the first one on `reply_topic` that `is_reply` says yes to; blocks.
    Raises `TimeoutError`, or another `OSError` when the broker cannot be reached or refuses it."""
    client = _client(broker)
    outcomes: queue.Queue[bytes | OSError] = queue.Queue()
    _ask_when_connected(client, topic, reply_topic, payload, is_reply, outcomes.put)
    with _running(client, broker):
        try:
            outcome = outcomes.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"No reply on {reply_topic} within {timeout:g} s.") from None
    if isinstance(outcome, OSError):
        raise outcome
    return outcome


def _ask_when_connected(
    client: paho.Client,
    topic: str,
    reply_topic: str,
    payload: bytes,
    is_reply: Callable[[bytes], bool],
    tell: Callable[[bytes | OSError], None],
) -> None:
    """Makes a client subscribe, then publish, and tell of the reply or of what was refused."""

    def granted(reason: Any) -> bool:
        if reason.is_failure:
            tell(PermissionError(f"The broker refused: {reason}."))
        return not reason.is_failure

    def connected(_client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if granted(reason):
            client.subscribe(reply_topic, qos=1)

    def subscribed(_client: Any, _data: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        if granted(reasons[0]):
            client.publish(topic, payload, qos=1)

    def published(_client: Any, _data: Any, _mid: int, reason: Any, _properties: Any) -> None:
        granted(reason)

    def received(_client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        client.ack(message.mid, message.qos)
        if is_reply(bytes(message.payload)):
            tell(bytes(message.payload))

    client.on_connect, client.on_subscribe = connected, subscribed
    client.on_publish, client.on_message = published, received


def retained(broker: Broker, topics: list[str], *, timeout: float) -> dict[str, bytes]:
    """What the broker keeps on `topics`, as far as it comes within `timeout` seconds; blocks. For checks
    from the command line. Raises `OSError` when the broker cannot be reached, `PermissionError` when it
    refuses this user."""
    found: queue.Queue[tuple[str, bytes] | OSError] = queue.Queue()
    client = _client(broker)

    def connected(_client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            found.put((PermissionError if reason.value in REFUSED_USER else OSError)(str(reason)))
        else:
            client.subscribe([(topic, SubscribeOptions(qos=0)) for topic in topics])

    def received(_client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        if message.retain:
            found.put((message.topic, bytes(message.payload)))

    client.on_connect, client.on_message = connected, received
    kept: dict[str, bytes] = {}
    # There is no message that says "no more".
    with _running(client, broker), suppress(queue.Empty):
        deadline = time.monotonic() + timeout
        while len(kept) < len(topics):
            message = found.get(timeout=max(0.0, deadline - time.monotonic()))
            if isinstance(message, OSError):
                raise message
            kept.update([message])
    return kept
