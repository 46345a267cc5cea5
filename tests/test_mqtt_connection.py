"""The connection to the broker, where a broker must do what no real one can be told to do."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from app.mqtt.connection import KEEPALIVE_S, Broker, Incoming, MqttConnection

uvloop = pytest.importorskip("uvloop", reason="other event loops tell of a failed socket again and again")

CONNACK = b"\x20\x03\x00\x00\x00"
PUBLISH = b"\x30\x05\x00\x01t\x00x"
HELLO_S = 5.0


def suback(subscribe: bytes) -> bytes:
    """The answer to a SUBSCRIBE with one filter."""
    return b"\x90\x04" + subscribe[2:4] + b"\x00\x01"


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
