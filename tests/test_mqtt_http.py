"""What games do over MQTT, for programs that speak HTTP; hints over a WebSocket."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from app.events import new_id
from tests.fake_llm import FakeLLM, Script, text
from tests.support import GameClient, Mosquitto, Portal, token_of, wait_until

pytestmark = pytest.mark.slow


def publish(client: httpx.Client, session: str, **body: Any) -> dict[str, Any]:
    answer = client.post("/api/mqtt/publish_state", json={"session_id": session, **body})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def follow(portal: Portal, session: str, **options: Any) -> ClientConnection:
    url = portal.url.replace("http://", "ws://")
    socket: ClientConnection = connect(f"{url}/api/mqtt/ws/hints/{session}", **options)
    return socket


def bearer(client: httpx.Client) -> dict[str, str]:
    return {"Authorization": client.headers["Authorization"]}


def test_a_state_over_http_is_answered_everywhere(
    fake_portal: Portal, client: httpx.Client, mosquitto: Mosquitto, llm: FakeLLM, session: str
) -> None:
    game = GameClient(mosquitto.port, f"maze/hint/{session}")
    assert client.get("/api/mqtt/last_hint", params={"session_id": session}).status_code == 404
    with follow(fake_portal, session, additional_headers=bearer(client)) as socket:
        assert json.loads(socket.recv(10)) == {"type": "connection_established", "session_id": session}
        told = publish(client, session, state={"x": 1}, request_id="r")
        assert told["hint_topic"] == f"maze/hint/{session}"
        shown = {"session_id": session, "turn_id": told["turn_id"], "request_id": "r", "hint": "Hello there"}
        assert json.loads(socket.recv(10)) == {"type": "hint", **shown}
    assert client.get("/api/mqtt/last_hint", params={"session_id": session}).json() == shown
    assert json.loads(game.reply(f"maze/hint/{session}")) == {"hint": "Hello there", "requestId": "r"}
    game.close()


def test_a_hint_that_came_by_mqtt_is_pushed_too(
    fake_portal: Portal, client: httpx.Client, mosquitto: Mosquitto, llm: FakeLLM, session: str
) -> None:
    game = GameClient(mosquitto.port, f"maze/hint/{session}")
    protocols = [Subprotocol("bearer"), Subprotocol(token_of(client))]
    with follow(fake_portal, session, subprotocols=protocols) as socket:
        assert socket.subprotocol == "bearer"
        socket.recv(10)
        llm.script = Script(pieces=text("Left."))
        game.publish(f"maze/state/{session}", {"x": 1, "token": token_of(client)})
        assert json.loads(socket.recv(10))["hint"] == "Left."
    game.close()


def test_a_template_over_http(client: httpx.Client, llm: FakeLLM, session: str) -> None:
    saved = client.post("/api/templates", json={"title": "T", "content": "Guide {{ name }}."}).json()
    body = {"session_id": session, "template_id": saved["id"], "variables": {"name": "Ada"}}
    assert client.post("/api/mqtt/publish_template", json=body).json()["ok"]
    told = publish(client, session, state={"x": 1})
    wait_until(lambda: client.get("/api/mqtt/last_hint", params={"session_id": session}).is_success)
    assert told["session_id"] == session
    assert llm.requests[-1]["messages"][0]["content"] == "Guide Ada."
    both = {**body, "template": "x"}
    assert client.post("/api/mqtt/publish_template", json=both).status_code == 422


def test_a_state_makes_a_session_from_a_template(client: httpx.Client, llm: FakeLLM, session: str) -> None:
    saved = client.post("/api/templates", json={"title": "T", "content": "Guide {{ name }}."}).json()["id"]
    publish(client, session, state={"x": 1}, template_id=saved, variables={"name": "Ada"})
    wait_until(lambda: client.get("/api/mqtt/last_hint", params={"session_id": session}).is_success)
    assert llm.requests[-1]["messages"][0]["content"] == "Guide Ada."


def test_only_a_project_that_there_is_gets_a_prompt(client: httpx.Client, llm: FakeLLM, session: str) -> None:
    body = {"template": "Guide.", "project": "invented"}
    refused = client.post("/api/mqtt/publish_template", json=body)
    assert refused.status_code == 422
    assert refused.json()["error"]["message"].startswith("project: one of ")
    assert "maze" in refused.json()["error"]["message"]
    assert client.post("/api/mqtt/publish_template", json={**body, "project": "maze"}).json()["ok"]
    publish(client, session, state={"x": 1}, project="maze")
    wait_until(lambda: client.get("/api/mqtt/last_hint", params={"session_id": session}).is_success)
    assert llm.requests[-1]["messages"][0]["content"] == "Guide."


def test_the_doors_status(client: httpx.Client) -> None:
    told = client.get("/api/mqtt/status").json()
    assert (told["enabled"], told["connected"]) == (True, True)
    assert {"project": "maze", "connected": True} in told["projects"]


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({}, 401),
        ({"additional_headers": {"Authorization": "Bearer forged"}}, 401),
        ({"subprotocols": [Subprotocol("bearer"), Subprotocol("forged")]}, 401),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_nobody_else_opens_a_socket(
    fake_portal: Portal, client: httpx.Client, options: dict[str, Any], status: int
) -> None:
    if "origin" in options:
        options = {**options, "additional_headers": bearer(client)}
    with pytest.raises(InvalidStatus) as refused, follow(fake_portal, "s", **options):
        pass
    assert refused.value.response.status_code == status


def test_a_page_of_the_portal_may(fake_portal: Portal, client: httpx.Client) -> None:
    with follow(fake_portal, "s", origin=fake_portal.url, additional_headers=bearer(client)) as socket:
        assert json.loads(socket.recv(10))["type"] == "connection_established"


def test_nobody_hears_the_hints_of_another(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    heard: list[str] = []
    with (
        fake_portal.client(f"eve-{new_id()[-6:]}") as eve,
        follow(fake_portal, session, additional_headers=bearer(eve)) as socket,
        follow(fake_portal, session, additional_headers=bearer(client)) as own,
    ):
        listening = threading.Thread(target=lambda: heard.extend(str(found) for found in socket))
        listening.start()
        publish(client, session, state={"x": 1})
        assert own.recv(10)
        assert json.loads(own.recv(10))["type"] == "hint"
        assert eve.get("/api/mqtt/last_hint", params={"session_id": session}).status_code == 404
        socket.close()
        listening.join()
    assert [json.loads(message)["type"] for message in heard] == ["connection_established"]
