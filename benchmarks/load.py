"""Puts load on a server and prints what was seen, as JSON: `python -m benchmarks.load '{"kind": …}'`.

A process of its own, so that it can be kept on another core than what it measures.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from contextlib import suppress
from itertools import pairwise
from typing import Literal

import msgspec
import uvloop

from benchmarks.wire import Connection, MqttConnection, Server, Shape, SocketConnection, WrongAnswer

WARM_UP_S = 0.7


class Order(msgspec.Struct, frozen=True):
    """What to do: `lanes` clients, each with one request at a time, for so many seconds. `live` begins
    each lane's one stream of `tokens` within the first second, `live-sockets` the same over sockets.
    `idle-sockets` are opened and say nothing; of `shared-sockets`, all on one session, one asks."""

    kind: Literal["whole", "burst", "live", "mqtt", "live-sockets", "idle-sockets", "shared-sockets"]
    port: int
    lanes: int
    seconds: float
    shape: Shape = "openai"
    token: str = ""
    tokens: int = 64

    @property
    def server(self) -> Server:
        """Where it goes."""
        return Server(self.port, self.shape, self.token)


class Seen(msgspec.Struct, frozen=True):
    """`rate` in requests a second, the others in seconds. `gaps_p99` is between pieces of a stream."""

    rate: float = 0.0
    median: float = 0.0
    p99: float = 0.0
    gaps_p99: float = 0.0
    error: str = ""


def share(values: list[float], part: float) -> float:
    """The value that so large a part of all values is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


async def carry_out(order: Order) -> Seen:
    """Puts on the load."""
    kinds = {
        "live": live,
        "live-sockets": live_sockets,
        "idle-sockets": idle_sockets,
        "shared-sockets": shared_sockets,
    }
    try:
        return await kinds.get(order.kind, rate)(order)
    except (WrongAnswer, OSError) as error:
        return Seen(error=str(error))


async def rate(order: Order) -> Seen:
    """Closed loops for some seconds, after a while that does not count."""
    lane = mqtt_lane if order.kind == "mqtt" else http_lane
    await first_answer(order)
    begin = time.perf_counter() + WARM_UP_S
    took: list[float] = []
    async with asyncio.timeout(order.seconds + 60), asyncio.TaskGroup() as group:
        for number in range(order.lanes):
            group.create_task(lane(order, f"s{number}", begin, took))
    if not took:
        return Seen(error="no request was answered in time")
    return Seen(rate=len(took) / order.seconds, median=share(took, 0.5), p99=share(took, 0.99))


async def first_answer(order: Order) -> None:
    """Waits until one request is answered: what a bridge does once at its first one is no part of a rate,
    and an MQTT bridge may not have subscribed yet."""
    if order.kind != "mqtt":
        connection = await Connection.open(order.server)
        await connection.ask(order.server.request("first", "hello", stream=False))
        connection.close()
        return None
    reply = "maze/assistant_response/first"
    game = await MqttConnection.open(order.port, reply)
    for attempt in range(30):
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                payload = b'{"message": "hello", "requestId": "first-%d"}' % attempt
                return await game.ask("maze/user_input/first", payload, reply)
    raise WrongAnswer("nothing came over MQTT within 30 s")


async def http_lane(order: Order, session: str, begin: float, took: list[float]) -> None:
    """One client over HTTP, in a session of its own."""
    connection = await Connection.open(order.server)
    stream = order.kind == "burst"
    number = 0
    while (asked := time.perf_counter()) < begin + order.seconds:
        request = order.server.request(session, f"message {number}", stream=stream)
        await connection.ask(request, order.tokens if stream else None)
        if begin <= asked:
            took.append(time.perf_counter() - asked)
        number += 1
    connection.close()


async def mqtt_lane(order: Order, session: str, begin: float, took: list[float]) -> None:
    """One game over MQTT, in a session of its own."""
    reply = f"maze/assistant_response/{session}"
    connection = await MqttConnection.open(order.port, reply)
    lane, number = secrets.token_hex(4).encode(), 0  # what an earlier load asked is not to be asked again
    while (asked := time.perf_counter()) < begin + order.seconds:
        payload = b'{"message": "message %d", "requestId": "%s-%d"}' % (number, lane, number)
        await connection.ask(f"maze/user_input/{session}", payload, reply)
        if begin <= asked:
            took.append(time.perf_counter() - asked)
        number += 1
    connection.close()


async def live(order: Order) -> Seen:
    """One long stream for each lane, all of them at once."""
    connections = [await Connection.open(order.server) for _ in range(order.lanes)]

    async def stream(number: int) -> list[float]:
        await asyncio.sleep(number / order.lanes)
        request = order.server.request(f"s{number}", "go on", stream=True)
        await connections[number].ask(request, order.tokens)
        return connections[number].arrivals

    async with asyncio.timeout(order.seconds + 60):
        return _gaps(await asyncio.gather(*(stream(number) for number in range(order.lanes))))


def _gaps(arrivals: list[list[float]]) -> Seen:
    gaps = [later - earlier for lane in arrivals for earlier, later in pairwise(lane)]
    return Seen(gaps_p99=share(gaps, 0.99))


async def live_sockets(order: Order) -> Seen:
    """One long turn over a socket for each lane, all of them at once."""
    sockets = await _sockets(order, [f"w{number}" for number in range(order.lanes)])

    async def turn(number: int) -> list[float]:
        await asyncio.sleep(number / order.lanes)
        sockets[number].say({"type": "send_message", "message": "go on"})
        await sockets[number].ended(order.tokens)
        return sockets[number].arrivals

    async with asyncio.timeout(order.seconds + 60):
        return _gaps(await asyncio.gather(*(turn(number) for number in range(order.lanes))))


async def shared_sockets(order: Order) -> Seen:
    """One turn, which all sockets on its session are sent."""
    sockets = await _sockets(order, ["shared"] * order.lanes)
    sockets[0].say({"type": "send_message", "message": "go on"})
    async with asyncio.timeout(order.seconds + 60):
        await asyncio.gather(*(opened.ended(order.tokens) for opened in sockets))
    return _gaps([opened.arrivals for opened in sockets])


async def idle_sockets(order: Order) -> Seen:
    """Sockets on sessions in which nothing happens, for so many seconds after the last was opened."""
    sockets = await _sockets(order, [f"idle{number}" for number in range(order.lanes)])
    await asyncio.sleep(order.seconds)
    for opened in sockets:
        opened.close()
    return Seen()


async def _sockets(order: Order, sessions: list[str]) -> list[SocketConnection]:
    return [await SocketConnection.open(order.server, session) for session in sessions]


def main() -> None:
    """Carries out the order in the first argument."""
    try:
        seen = uvloop.run(carry_out(msgspec.json.decode(sys.argv[1], type=Order)))
    except* (WrongAnswer, OSError, TimeoutError) as failed:
        seen = Seen(error="; ".join(sorted({str(error) or "too slow" for error in failed.exceptions})))
    print(msgspec.json.encode(seen).decode())


if __name__ == "__main__":
    main()
