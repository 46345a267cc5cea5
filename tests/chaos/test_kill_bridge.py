"""Requests flow while the bridge is killed again and again: none is lost, none gets two answers."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.fake_llm import FakeLLM, Script
from tests.support import GameClient, MakePortal, Mosquitto, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KILLS = 20
SESSIONS = 32


class Player(threading.Thread):
    """Sends requests at a steady pace until told to stop."""

    def __init__(self, game: GameClient) -> None:
        super().__init__(name="player")
        self._game = game
        self._enough = threading.Event()
        self.asked: list[str] = []

    def run(self) -> None:
        while not self._enough.wait(0.1):
            request_id = f"r{len(self.asked)}"
            session = f"chaos-{len(self.asked) % SESSIONS}"
            body = {"message": f"message {request_id}", "requestId": request_id, "format": "json"}
            self._game.publish(f"maze/user_input/{session}", body)
            self.asked.append(request_id)

    def finish(self) -> None:
        self._enough.set()
        self.join()


@pytest.fixture
def game(mosquitto: Mosquitto) -> Iterator[GameClient]:
    client = GameClient(mosquitto.port, "maze/assistant_response/#")
    yield client
    client.close()


def answers(game: GameClient) -> dict[str, set[str]]:
    """The texts that each request id was answered with."""
    found: dict[str, set[str]] = {}
    for _, payload, _ in list(game.received):
        reply = json.loads(payload)
        assert reply.get("type") == "final", reply
        found.setdefault(reply["requestId"], set()).add(reply["response"])
    return found


def test_twenty_kills_in_mid_generation(
    fake_thread: FakeLLM, mosquitto: Mosquitto, game: GameClient, tmp_path: Path, make_portal: MakePortal
) -> None:
    fake_thread.script = Script(random=True, between=0.02)
    portal = make_portal(
        tmp_path, LLM_SERVER_URL=fake_thread.url, MQTT_BROKER_URL=mosquitto.url, MQTT_PROJECTS="maze"
    ).start()
    player = Player(game)
    player.start()
    try:
        for _ in range(KILLS):
            wait_until(lambda: fake_thread.running > 0, what="a generation")
            portal.kill()
            wait_until(lambda: fake_thread.running == 0, what="the server noticing")
            portal.start(ready=False)
    finally:
        player.finish()
    wait_until(lambda: len(answers(game)) == len(player.asked), 60, "the last answer")
    portal.stop()

    given = answers(game)
    assert set(given) == set(player.asked), "none is lost"
    assert [texts for texts in given.values() if len(texts) != 1] == [], "none has two texts"
    with closing(sqlite3.connect(tmp_path / "portal.db")) as database:
        states = database.execute("SELECT state, count(*) FROM turns GROUP BY state").fetchall()
        assert states == [("final", len(player.asked))]
        roles = database.execute("SELECT role, count(*) FROM messages GROUP BY role ORDER BY role").fetchall()
        assert roles == [("assistant", len(player.asked)), ("user", len(player.asked))]
        assert database.execute("SELECT count(*) FROM outbox").fetchone() == (0,)
        restarted = database.execute("SELECT count(*) FROM turns WHERE attempt > 1").fetchone()[0]
        order = database.execute(
            "SELECT s.session_id, m.content FROM messages m JOIN turns t ON t.message_id = m.id "
            "JOIN sessions s ON s.id = t.session ORDER BY s.session_id, t.position"
        ).fetchall()
    assert restarted > 0, "some were cut off in mid-generation"
    print(
        f"{KILLS} kills, {len(player.asked)} requests, {restarted} begun again, {len(game.received)} replies"
    )
    for session in range(SESSIONS):
        mine = [content for name, content in order if name == f"chaos-{session}"]
        assert mine == [f"message r{n}" for n in range(session, len(player.asked), SESSIONS)]
    stored = dict(zip([content for _, content in order], range(len(order)), strict=True))
    assert len(stored) == len(player.asked)
