"""What the chaos tests share: how long they run, a game that plays on whatever happens, and what must hold at
the end."""

from __future__ import annotations

import json
import queue
import sqlite3
import threading
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from tests.support import Portal, wait_until

SESSIONS = 32
MOST_OPEN = 64
"""Requests without an answer: a game that has so many waits before it asks again."""


@dataclass(frozen=True)
class Form:
    """How often something breaks, and how many requests flow meanwhile, at least."""

    requests: int
    bridge_kills: int
    broker_kills: int
    broker_restarts: int
    takeovers: int
    stops: int
    """How often a turn is stopped at each door, at each stage."""
    overload_s: float
    drain_s: float
    """How long the replies take that are not to be cut."""
    soak_minutes: float | None
    """None: as `--soak-minutes` says."""
    soak_turn_s: float
    """How long load is put on the portal before it is looked at, again and again."""
    soak_rate: float
    """Things done a second."""
    soak_growth_mb: float
    """How much memory may grow: in the short form caches still fill."""
    soak_late: int
    """How many files and threads may come late: in the short form some readers of the database."""
    slack: int
    """How many times as long as it should something may take: the short form runs beside other tests."""


FORMS = {
    "short": Form(
        requests=200,
        bridge_kills=20,
        broker_kills=4,
        broker_restarts=3,
        takeovers=1,
        stops=1,
        overload_s=5,
        drain_s=3,
        soak_minutes=0.12,
        soak_turn_s=2.5,
        soak_rate=60,
        soak_growth_mb=15,
        soak_late=12,
        slack=3,
    ),
    "long": Form(
        requests=1000,
        bridge_kills=100,
        broker_kills=20,
        broker_restarts=10,
        takeovers=6,
        stops=7,
        overload_s=60,
        drain_s=25,
        soak_minutes=None,
        soak_turn_s=55,
        soak_rate=40,
        soak_growth_mb=5,
        soak_late=0,
        slack=1,
    ),
}


class Player:
    """A game that asks at a steady pace, in `SESSIONS` sessions by turns, on a thread of its own. The broker
    keeps its session, so replies wait there while it is cut off; requests wait here, as paho lets what is
    published while it connects overtake what it has yet to send again. With `repeat_s` it sends a request
    again, with the same id, whenever it has had no answer for so long."""

    def __init__(
        self, port: int, project: str, *, pace_s: float = 0.1, repeat_s: float | None = None
    ) -> None:
        self._project = project
        self._pace_s = pace_s
        self._repeat_s = repeat_s
        self._enough, self._done, self._subscribed = threading.Event(), threading.Event(), threading.Event()
        self._held: deque[str] = deque()
        self._said: dict[str, float] = {}
        self._texts: dict[str, set[str]] = {}
        self._other: list[dict[str, Any]] = []
        self.replies = self.repeats = 0
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=f"player-{project}", clean_session=False
        )
        self._client.reconnect_delay_set(1, 1)
        granted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        # One by one: the broker of the setup refuses wildcards here.
        topics = [(f"{project}/assistant_response/chaos-{number}", 1) for number in range(SESSIONS)]

        def connected(*_: Any) -> None:
            self._client.subscribe(topics)

        def subscribed(_client: Any, _data: Any, _mid: int, reasons: Any, _properties: Any) -> None:
            granted.put(not any(reason.is_failure for reason in reasons))
            self._subscribed.set()

        def disconnected(*_: Any) -> None:
            self._subscribed.clear()

        self._client.on_connect, self._client.on_subscribe = connected, subscribed
        self._client.on_disconnect = disconnected
        self._client.on_message = self._received
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        while not granted.get(timeout=10):
            pass  # a new portal has yet to write the broker's rules, which sends away who came before
        self._thread = threading.Thread(target=self._play, name="player")

    @property
    def asked(self) -> list[str]:
        """The ids of the requests, in their order."""
        return list(self._said)

    @property
    def unanswered(self) -> list[str]:
        """Those of them that have had no answer yet."""
        return [request for request in self.asked if request not in self._texts]

    def start(self) -> Player:
        """Begins to play."""
        self._thread.start()
        return self

    def wait_for_answer(self) -> None:
        """Waits for one more."""
        before = self.replies
        wait_until(lambda: self.replies > before, what="an answer")

    def finish(self, at_least: int) -> None:
        """Asks on until there are so many requests, and waits for the last answer."""
        wait_until(lambda: len(self._said) >= at_least, 600, f"{at_least} requests")
        self._enough.set()
        wait_until(lambda: not self.unanswered, 90, f"the answers to {self.unanswered[:20]}")
        self.close()

    def close(self) -> None:
        """Leaves the game."""
        self._done.set()
        self._thread.join()
        self._client.disconnect()
        self._client.loop_stop()

    def assert_each_has_one_text(self) -> None:
        """No request was lost, refused, or answered with two different texts."""
        assert self._other == [], "there are only answers"
        assert set(self._texts) == set(self._said), "none is lost"
        assert {request: texts for request, texts in self._texts.items() if len(texts) != 1} == {}

    def _play(self) -> None:
        while not self._done.wait(self._pace_s):
            if not self._enough.is_set() and len(self.unanswered) < MOST_OPEN:
                self._ask(f"r{len(self._said)}")
            if self._repeat_s is not None and self._subscribed.is_set():
                self._repeat(time.monotonic() - self._repeat_s)
            while self._held and self._subscribed.is_set():
                self._publish(self._held.popleft())

    def _ask(self, request: str) -> None:
        self._said[request] = time.monotonic()
        self._held.append(request)

    def _publish(self, request: str) -> None:
        body = {"message": f"message {request}", "requestId": request, "format": "json"}
        session = f"chaos-{int(request[1:]) % SESSIONS}"
        self._client.publish(f"{self._project}/user_input/{session}", json.dumps(body), qos=1)

    def _repeat(self, said_before: float) -> None:
        for request in self.unanswered:
            if self._said[request] < said_before:
                self.repeats += 1
                self._ask(request)

    def _received(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        self.replies += 1
        reply = json.loads(message.payload)
        if reply.get("type") == "final":
            self._texts.setdefault(reply["requestId"], set()).add(reply["response"])
        else:
            self._other.append(reply)


def assert_stored_once(database: Path, asked: list[str], *, in_order: bool = True) -> int:
    """The database holds each request and its answer once, nothing is owed any more, and with `in_order` the
    sessions have their messages in the order in which they were sent. Returns how many turns were begun
    more than once."""
    with closing(sqlite3.connect(database)) as connection:
        # A reply leaves the outbox when the broker has confirmed it, after the player has it.
        wait_until(lambda: _rows(connection, "SELECT count(*) FROM outbox") == [(0,)], what="the outbox")
        states = _rows(connection, "SELECT state, count(*) FROM turns GROUP BY state")
        assert states == [("final", len(asked))]
        roles = _rows(connection, "SELECT role, count(*) FROM messages GROUP BY role ORDER BY role")
        assert roles == [("assistant", len(asked)), ("user", len(asked))]
        stored = _rows(
            connection,
            "SELECT s.session_id, m.content FROM messages m JOIN turns t ON t.message_id = m.id "
            "JOIN sessions s ON s.id = t.session ORDER BY s.session_id, t.position",
        )
        again = _rows(connection, "SELECT count(*) FROM turns WHERE attempt > 1")[0][0]
    assert sorted(content for _, content in stored) == sorted(f"message {request}" for request in asked)
    for number in range(SESSIONS if in_order else 0):
        mine = [content for name, content in stored if name == f"chaos-{number}"]
        sent = [f"message {request}" for request in asked[number::SESSIONS]]
        assert mine == sent, f"session {number}: {mine}, sent as {sent}"
    return int(again)


def _rows(connection: sqlite3.Connection, statement: str) -> list[tuple[Any, ...]]:
    return connection.execute(statement).fetchall()


def listens(portal: Portal) -> bool:
    """Whether the portal has subscribed to all its projects' requests."""
    try:
        return bool(httpx.get(f"{portal.url}/health/ready", timeout=5).json()["mqtt"] == "ok")
    except httpx.HTTPError:
        return False
