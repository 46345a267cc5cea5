"""The LLM server goes and comes back; the portal tells so, and recovers by itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import pytest

from tests.support import GameClient, LlamaServer, MakePortal, Mosquitto, wait_until

pytestmark = pytest.mark.slow

CONNECT_TIMEOUT_S = 5.0


def test_the_llm_server_stops_and_starts(
    starter_model: Path, mosquitto: Mosquitto, tmp_path: Path, make_portal: MakePortal
) -> None:
    llama = LlamaServer(starter_model, tmp_path)
    portal = make_portal(
        tmp_path, LLM_SERVER_URL=llama.url, MQTT_BROKER_URL=mosquitto.url, MQTT_PROJECTS="general"
    ).start()
    replies = "general/assistant_response/outage"
    game = GameClient(mosquitto.port, replies, "general/status")
    body = {"session_id": "outage", "message": "hi", "max_tokens": 2, "request_id": "r1"}

    def state() -> str:
        told = game.messages("general/status")
        return str(json.loads(told[-1])["state"]) if told else ""

    with portal.client() as web:
        assert web.post("/api/llm/chat/session", json={**body, "request_id": "r0"}).status_code == 200
        llama.stop()
        began = time.monotonic()
        refused = web.post("/api/llm/chat/session", json=body)
        assert time.monotonic() - began < CONNECT_TIMEOUT_S
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "llm_unavailable"
        assert int(refused.headers["Retry-After"]) >= 1
        assert str(llama.port) not in refused.text, "no upstream address is told"
        game.publish("general/user_input/outage", {"message": "hi", "format": "json", "requestId": "m1"})
        assert json.loads(game.reply(replies))["error"]["code"] == "llm_unavailable"
        game.publish("general/user_input/outage", "hi")
        assert game.reply(replies, 2).startswith(b"Error: ")
        assert web.get("/api/llm/health").json()["status"] == "down"
        assert httpx.get(f"{portal.url}/health/ready").status_code == 503
        assert httpx.get(f"{portal.url}/health/live").status_code == 200
        wait_until(lambda: state() == "degraded", 10, "the status on MQTT")

        llama.start()
        wait_until(lambda: web.get("/api/llm/health").json()["status"] == "ok", 10, "health")
        again = web.post("/api/llm/chat/session", json=body)
        assert again.status_code == 200, "the same request id begins a new attempt"
        game.publish("general/user_input/outage", {"message": "hi", "format": "json", "requestId": "m1"})
        assert json.loads(game.reply(replies, 3))["type"] == "final"
        wait_until(lambda: state() == "online", 10, "the status on MQTT")
        messages = web.get("/api/llm/chat/session/outage/history").json()["messages"]
        assert [message["status"] for message in messages] == ["complete"] * 4
    game.close()
    portal.stop()
    llama.stop()
