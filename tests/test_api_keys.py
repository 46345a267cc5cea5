"""API keys: what they may, where, and for how long."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from app.access import NEVER_BY_KEY
from app.events import new_id
from tests.fake_llm import FakeLLM, Script
from tests.support import GameClient, Mosquitto, Portal, ask, wait_until


@pytest.fixture(autouse=True)
def script(module_fake: FakeLLM) -> None:
    module_fake.script = Script()


def make(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/api/keys", json={"name": "k", **body})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def using(client: httpx.Client, key: dict[str, Any]) -> httpx.Client:
    return httpx.Client(base_url=client.base_url, headers={"Authorization": f"Bearer {key['secret']}"})


def test_a_key_asks_in_its_owners_name(client: httpx.Client) -> None:
    key = make(client, name="for my script")
    assert key["secret"].startswith("pp_")
    assert len(key["secret"]) > 40
    session = new_id()
    with using(client, key) as program:
        assert ask(program, session).status_code == 200
    assert len(client.get(f"/api/llm/chat/session/{session}/history").json()["messages"]) == 2
    listed = client.get("/api/keys")
    assert key["secret"] not in listed.text
    (shown,) = listed.json()["keys"]
    assert (shown["name"], shown["prefix"]) == ("for my script", key["secret"][:10])
    assert shown["last_used_at"] is not None


def test_a_revoked_key_is_worthless_at_once(client: httpx.Client) -> None:
    key = make(client)
    with using(client, key) as program:
        assert program.get("/api/auth/me").status_code == 200
        assert client.delete(f"/api/keys/{key['id']}").status_code == 204
        refused = program.get("/api/auth/me")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthenticated")
    assert client.get("/api/keys").json()["keys"] == []
    assert client.delete(f"/api/keys/{key['id']}").status_code == 404


def test_a_key_that_has_run_out_is_worthless(client: httpx.Client) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=1)
    with using(client, make(client, expires_at=soon.isoformat())) as program:
        assert program.get("/api/auth/me").status_code == 200
        wait_until(lambda: program.get("/api/auth/me").status_code == 401, 5, "the end of the key")
    past = client.post("/api/keys", json={"name": "k", "expires_at": "2020-01-01T00:00:00Z"})
    assert (past.status_code, past.json()["detail"]) == (422, "expires_at: it is over")


def test_a_key_may_what_its_scopes_say(client: httpx.Client) -> None:
    with using(client, make(client, name="reader", scopes=["sessions:read"])) as program:
        assert program.get("/api/sessions").status_code == 200
        refused = ask(program)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        assert "the key 'reader' does not allow this" in refused.json()["detail"]
        told = program.get("/api/auth/permissions").json()["permissions"]
        assert [one["name"] for one in told if one["allowed"]] == ["sessions:read"]


def test_no_key_makes_itself_last(client: httpx.Client) -> None:
    for scope in NEVER_BY_KEY:
        refused = client.post("/api/keys", json={"name": "k", "scopes": [scope]})
        assert refused.status_code == 422, scope
    with using(client, make(client)) as program:
        body = {"current_password": "correct horse", "new_password": "battery staple"}
        assert program.post("/api/keys", json={"name": "another"}).status_code == 403
        assert program.put("/api/auth/password", json=body).status_code == 403
        assert program.delete("/api/auth/sign-ins").status_code == 403


def test_a_key_cannot_do_more_than_its_owner(client: httpx.Client, fake_portal: Portal) -> None:
    refused = client.post("/api/keys", json={"name": "k", "scopes": ["audit:read"]})
    assert refused.status_code == 422
    assert "audit:read cannot be given" in refused.json()["detail"]
    with fake_portal.client(f"root-{new_id()[-6:]}", role="admin") as admin:
        key = make(client)
        me = client.get("/api/auth/me").json()["id"]
        admin.patch(f"/api/admin/users/{me}", json={"role": "viewer"})
        with using(client, key) as program:
            assert ask(program).status_code == 403


def test_a_key_of_a_project_sees_nothing_else(client: httpx.Client) -> None:
    inside, outside = new_id(), new_id()
    ask(client, inside, project="maze")
    ask(client, outside, project="racing")
    with using(client, make(client, project="maze")) as program:
        listed = program.get("/api/sessions").json()
        assert ([one["session_id"] for one in listed["sessions"]], listed["total"]) == ([inside], 1)
        assert ask(program, inside).status_code == 200
        for refused in (
            ask(program, outside),
            ask(program, project="racing"),
            program.get(f"/api/sessions/{outside}"),
            program.get(f"/api/llm/chat/session/{outside}/history"),
            program.post(f"/api/llm/chat/session/{outside}/stop"),
            program.delete(f"/api/llm/chat/session/{outside}"),
            program.delete(f"/api/sessions/{outside}"),
            program.patch(f"/api/sessions/{outside}", json={"title": "mine"}),
        ):
            assert refused.status_code == 404, refused.request.url
        made = new_id()
        assert ask(program, made).status_code == 200
        assert client.get(f"/api/sessions/{made}").json()["project"] == "maze", "its own is the default"


def test_a_device_key_is_for_mqtt_payloads_and_nothing_else(
    client: httpx.Client, mosquitto: Mosquitto
) -> None:
    device, plain = make(client, device="cab-7"), make(client)
    assert device["scopes"] == ["chat:use"]
    with using(client, device) as program:
        refused = program.get("/api/auth/me")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    game, session = GameClient(mosquitto.port, "maze/assistant_response/#"), new_id()
    topic = f"maze/assistant_response/{session}"
    body = {"message": "hi", "format": "json"}
    game.publish(f"maze/user_input/{session}", {**body, "token": device["secret"]})
    assert json.loads(game.reply(topic))["type"] == "final"
    game.publish(f"maze/user_input/{session}", {**body, "token": plain["secret"]})
    refusal = json.loads(game.reply(topic, 2))["error"]
    assert refusal["code"] == "forbidden"
    assert "make an API key for a device" in refusal["message"]
    game.close()
    history = client.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
    assert len(history) == 2, "it is the owner's session, on the web too"


@pytest.mark.parametrize("secret", ["pp_", "pp_" + "x" * 43, "pp_" + "x" * 60_000])
def test_what_is_no_key_is_refused(client: httpx.Client, secret: str) -> None:
    refused = httpx.get(f"{client.base_url}/api/auth/me", headers={"Authorization": f"Bearer {secret}"})
    assert refused.status_code in {401, 431, 400}
