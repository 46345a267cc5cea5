"""Another program holds the database: nothing is acknowledged that is not stored, nothing is lost."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from app.database import LOCK_TIMEOUT_S
from tests.fake_llm import FakeLLM, Script
from tests.support import GameClient, MakePortal, Mosquitto, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

LOCKED_S = 10.0


def test_the_database_is_locked_for_ten_seconds(
    fake_thread: FakeLLM, mosquitto: Mosquitto, tmp_path: Path, make_portal: MakePortal
) -> None:
    fake_thread.script = Script(echo=True, before_first=0.5)
    portal = make_portal(
        tmp_path, LLM_SERVER_URL=fake_thread.url, MQTT_BROKER_URL=mosquitto.url, MQTT_PROJECTS="racing"
    ).start()
    game = GameClient(mosquitto.port, "racing/assistant_response/#")

    def send(number: int) -> None:
        body = {"message": f"message {number}", "requestId": f"r{number}", "format": "json"}
        game.publish(f"racing/user_input/locked-{number}", body)

    with portal.client() as web:
        send(0)
        wait_until(lambda: fake_thread.running == 1, what="a generation")
        with closing(sqlite3.connect(tmp_path / "portal.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            began = time.monotonic()
            for number in range(1, 6):
                send(number)
            body = {"session_id": "s", "message": "hi", "request_id": "web"}
            refused = web.post("/api/llm/chat/session", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert time.monotonic() - began < 2 * LOCK_TIMEOUT_S + 1, (
                "its own wait, and that of who was before"
            )
            assert web.get("/health/live").status_code == 200
            assert game.received == [], "nothing is answered that is not stored"
            assert len(fake_thread.requests) == 1
            time.sleep(max(0.0, began + LOCKED_S - time.monotonic()))  # the outage itself
            other.execute("ROLLBACK")
        for number in range(6):
            reply = json.loads(game.reply(f"racing/assistant_response/locked-{number}"))
            assert reply["response"] == f"echo: message {number}"
        assert web.post("/api/llm/chat/session", json=body).json()["response"] == "echo: hi"
    assert len(fake_thread.requests) == 7, "every request was generated once"
    game.close()
    portal.stop()
