"""The disk is full: nothing is acknowledged that is not stored, nothing is lost."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import pytest

from tests.fake_llm import FakeLLM, Script
from tests.support import GameClient, MakePortal, Mosquitto, Portal, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux changes the limits of a running process"),
]

REQUESTS = 6


def let_write(portal: Portal, at_most: int) -> None:
    """Lets no file of the portal grow over so many bytes, its log included: as a full disk does."""
    assert portal.process is not None
    limit = (at_most, resource.RLIM_INFINITY)
    resource.prlimit(portal.process.pid, resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("dies", [False, True], ids=["lives on", "dies meanwhile"])
def test_the_disk_is_full(
    fake_thread: FakeLLM, mosquitto: Mosquitto, tmp_path: Path, make_portal: MakePortal, dies: bool
) -> None:
    fake_thread.script = Script(echo=True, before_first=0.5)
    project = "dying" if dies else "living"
    portal = make_portal(
        tmp_path, LLM_SERVER_URL=fake_thread.url, MQTT_BROKER_URL=mosquitto.url, MQTT_PROJECTS=project
    ).start()
    game = GameClient(mosquitto.port, f"{project}/assistant_response/#")

    def send(number: int) -> None:
        body = {"message": f"message {number}", "requestId": f"r{number}", "format": "json"}
        game.publish(f"{project}/user_input/full-{number}", body)

    with portal.client() as web:
        send(0)
        wait_until(lambda: fake_thread.running == 1, what="a generation")
        let_write(portal, 1)
        for number in range(1, REQUESTS):
            send(number)
        body = {"session_id": "s", "message": "hi", "request_id": "web"}
        wait_until(lambda: fake_thread.finished == 1, what="the end of the generation")
        refused = web.post("/api/llm/chat/session", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert web.get("/health/live").status_code == 200
        assert game.received == [], "nothing is answered that is not stored"
        assert len(fake_thread.requests) == 1, "nothing is generated that is not stored"
        if dies:
            portal.kill()
            portal.start()
        else:
            let_write(portal, resource.RLIM_INFINITY)
        for number in range(REQUESTS):
            reply = json.loads(game.reply(f"{project}/assistant_response/full-{number}"))
            assert reply["response"] == f"echo: message {number}"
        assert web.post("/api/llm/chat/session", json=body).json()["response"] == "echo: hi"
    # What was generated when the disk was full is kept by who lives on, and generated again elsewhere.
    assert len(fake_thread.requests) == REQUESTS + 1 + dies
    assert len(game.received) == REQUESTS, "each is answered once"
    game.close()
    portal.stop()
