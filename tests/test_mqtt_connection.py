"""The connection to the broker, where a broker must do what no real one can be told to do."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import app.mqtt.connection as connection_module
from app.mqtt.connection import KEEPALIVE_S, Broker, Incoming, MqttConnection, Outgoing, PublishRefused
from tests.support import Mosquitto

uvloop = pytest.importorskip("uvloop", reason="other event loops tell of a failed socket again and again")

CONNACK = b"\x20\x03\x00\x00\x00"
QUESTION = b"\x32\x07\x00\x01t\x00\x09\x00x"
"""A PUBLISH at QoS 1."""

PUBLISH = b"\x30\x05\x00\x01t\x00x"
NOT_AUTHORIZED = 0x87
HELLO_S = 5.0


def suback(subscribe: bytes, reason: int = 1) -> bytes:
    """The answer to a SUBSCRIBE with one filter: granted, with QoS 1, or another reason."""
    return b"\x90\x04" + subscribe[2:4] + bytes([0, reason])


def test_a_connection_that_is_reset_behind_messages_is_made_again_at_once() -> None:
    assert HELLO_S < KEEPALIVE_S, "it must not be the missing ping that tells"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        assert uvloop.run(reset_behind(server, messages=50)) == 50


async def reset_behind(server: socket.socket, messages: int) -> int:
    """Sends messages and resets the connection; returns how many came, once there is a new connection."""
    loop, received = asyncio.get_running_loop(), list[Incoming]()
    connection = MqttConnection(
        Broker(f"mqtt://127.0.0.1:{server.getsockname()[1]}"),
        "client",
        ["t"],
        will=lambda: ("will", b""),
        on_message=received.append,
        on_connected=lambda: None,
    )
    running = asyncio.create_task(connection.run())
    async with asyncio.timeout(HELLO_S):
        broker, _ = await loop.sock_accept(server)
        broker.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_recv(broker, 1000)
        await loop.sock_sendall(broker, CONNACK)
        await loop.sock_sendall(broker, suback(await loop.sock_recv(broker, 1000)))
        while not connection.is_subscribed:
            await asyncio.sleep(0)
    # Nothing is awaited in between, so the loop finds the messages and the reset together.
    broker.send(PUBLISH * messages)
    broker.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    broker.close()
    try:
        async with asyncio.timeout(HELLO_S):
            again, _ = await loop.sock_accept(server)
            again.close()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return len(received)


class StrictBroker:
    """A broker that takes `most` publishes before it has confirmed the first of them."""

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()

    async def serve(self, most: int, *refusals: int) -> None:
        """Lets a client connect, and subscribe once each of `refusals` was its answer."""
        self._socket, _ = await self._loop.sock_accept(self._server)
        assert (await self.read())[0] >> 4 == 1, "CONNECT"
        await self.send(b"\x20\x06\x00\x00\x03\x21" + struct.pack(">H", most))
        subscribe = await self.read()
        assert subscribe[0] >> 4 == 8, "SUBSCRIBE"
        for reason in refusals:
            await self.send(suback(subscribe, reason))
            subscribe = await self.read()
            assert subscribe[0] >> 4 == 8, "SUBSCRIBE"
        await self.send(suback(subscribe))

    async def refuse(self) -> None:
        """Tells a client that it may not connect."""
        self._socket, _ = await self._loop.sock_accept(self._server)
        await self.read()
        await self.send(b"\x20\x03\x00" + bytes([NOT_AUTHORIZED, 0]))
        self.hang_up()

    async def read(self) -> bytes:
        """The next packet, which must be a small one."""
        head = await self._exactly(2)
        assert head[1] < 128
        return head + await self._exactly(head[1])

    async def _exactly(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            more = await self._loop.sock_recv(self._socket, size - len(found))
            assert more, "the client went away"
            found += more
        return found

    async def send(self, packet: bytes) -> None:
        await self._loop.sock_sendall(self._socket, packet)

    async def publishes(self) -> list[bytes]:
        """The publishes that come before the answer to a question that is put now."""
        await self.send(QUESTION)
        found = []
        while (packet := await self.read())[0] >> 4 == 3:
            found.append(packet)
        return found

    async def confirm(self, publish: bytes) -> None:
        await self.send(b"\x40\x02" + publish[5:7])

    def hang_up(self) -> None:
        self._socket.close()


def said(publishes: list[bytes]) -> list[bytes]:
    return [publish[-1:] for publish in publishes]


@asynccontextmanager
async def strictly_served() -> AsyncIterator[tuple[StrictBroker, MqttConnection, asyncio.Event]]:
    """A broker, and a client that connects to it and acknowledges whatever comes; when it is subscribed, the
    event is set."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        broker, subscribed = StrictBroker(server), asyncio.Event()
        connection = MqttConnection(
            Broker(f"mqtt://127.0.0.1:{server.getsockname()[1]}"),
            "client",
            ["t"],
            will=lambda: ("will", b""),
            on_message=lambda message: connection.ack(message),  # noqa: PLW0108 - it is being made
            on_connected=subscribed.set,
        )
        running = asyncio.create_task(connection.run())
        try:
            async with asyncio.timeout(20):
                yield broker, connection, subscribed
                broker.hang_up()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_no_more_is_sent_unconfirmed_than_the_broker_takes() -> None:
    async with strictly_served() as (broker, connection, subscribed):
        await broker.serve(most=2)
        await subscribed.wait()
        sent = [connection.send(Outgoing("t", payload)) for payload in (b"0", b"1", b"2", b"3")]
        first = await broker.publishes()
        assert said(first) == [b"0", b"1"]
        await broker.confirm(first[0])
        assert said(await broker.publishes()) == [b"2"]
        broker.hang_up()
        await broker.serve(most=1)
        for payload in (b"1", b"2", b"3"):
            [publish] = await broker.publishes()
            assert publish[-1:] == payload
            await broker.confirm(publish)
        await asyncio.gather(*sent)


async def test_why_there_is_no_connection_is_logged_once_and_so_is_its_return(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connection_module, "BACKOFF_MOST_S", 0.01)
    async with strictly_served() as (broker, _connection, subscribed):
        await broker.serve(10)
        await subscribed.wait()
        for _ in range(2):
            subscribed.clear()
            broker.hang_up()
            for _ in range(5):
                await broker.refuse()
            await broker.serve(10)
            await subscribed.wait()
            lines = capsys.readouterr().out.splitlines()
            warnings = [line for line in lines if "[warning" in line]
            assert sum("the broker refused the connection" in line for line in warnings) == 1
            assert sum("the connection to the broker is lost" in line for line in warnings) == 2, (
                "as it broke, and as it was refused"
            )
            assert sum("the broker is there again" in line for line in lines) == 1


async def test_a_subscription_that_is_refused_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "BACKOFF_MOST_S", 0.05)
    async with strictly_served() as (broker, connection, subscribed):
        await broker.serve(10, NOT_AUTHORIZED, NOT_AUTHORIZED)
        await subscribed.wait()
        assert connection.is_subscribed


async def test_what_is_larger_than_the_broker_takes_is_refused_and_breaks_no_connection(
    tmp_path: Path,
) -> None:
    broker = Mosquitto(tmp_path, max_packet_size=2000)
    connection = MqttConnection(
        Broker(broker.url),
        "client",
        ["t"],
        will=lambda: ("will", b""),
        on_message=lambda _: None,
        on_connected=lambda: None,
    )
    running = asyncio.create_task(connection.run())
    try:
        async with asyncio.timeout(10):
            fits, too_large, after = (
                connection.send(Outgoing("t", b"x" * size, correlation=b"c" * 100))
                for size in (1800, 1990, 1)
            )
            await fits
            with pytest.raises(PublishRefused, match="2000"):
                await too_large
            await after
    finally:
        running.cancel()
        broker.stop()
