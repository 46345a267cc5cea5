"""Roles as data: permissions, models, tools, system prompts, redaction, and where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from app.access import PERMISSIONS
from app.events import new_id
from app.services.redaction import redact
from tests.fake_llm import FakeLLM, Script
from tests.support import GameClient, MakePortal, Mosquitto, Portal, ask, owner_of, token_of, wait_until
from tests.test_run_server import refuse_settings

CHAT = ["chat:use", "sessions:read", "account:write"]


@pytest.fixture
def role() -> str:
    return f"r-{new_id()[-8:]}"


def define(admin: httpx.Client, name: str, **definition: Any) -> httpx.Response:
    return admin.put(f"/api/admin/roles/{name}", json={"permissions": CHAT, **definition})


def test_a_person_is_told_what_they_may(fake_portal: Portal, admin: httpx.Client) -> None:
    with fake_portal.client(f"v-{new_id()[-6:]}", role="viewer") as viewer:
        told = viewer.get("/api/auth/permissions").json()
    allowed = {one["name"] for one in told["permissions"] if one["allowed"]}
    assert (told["role"], allowed) == (
        "viewer",
        {"sessions:read", "templates:read", "account:write", "usage:read"},
    )
    assert {one["name"] for one in told["permissions"]} == set(PERMISSIONS)
    told = admin.get("/api/auth/permissions").json()
    assert all(one["allowed"] for one in told["permissions"])


def test_a_role_names_the_models_that_may_be_used(
    fake_portal: Portal, admin: httpx.Client, role: str
) -> None:
    define(admin, role, models=["fake-*"])
    with fake_portal.client(f"m-{new_id()[-6:]}", role=role) as client:
        assert ask(client).status_code == 200
        define(admin, role, models=["other-*"])
        for body in ({}, {"model": "fake-1"}, {"model": "default"}):
            refused = ask(client, **body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
            assert "may use other-*, not 'fake-1'" in refused.json()["detail"]


def test_a_role_names_the_tools_that_may_be_offered(
    fake_portal: Portal, admin: httpx.Client, role: str
) -> None:
    define(admin, role, tools=["maze_*"])
    tool = {"type": "function", "function": {"name": "maze_open", "parameters": {}}}
    other = {"type": "function", "function": {"name": "rm", "parameters": {}}}
    with fake_portal.client(f"t-{new_id()[-6:]}", role=role) as client:
        assert ask(client, tools=[tool]).status_code == 200
        refused = ask(client, tools=[tool, other])
        assert (refused.status_code, refused.json()["detail"]) == (
            403,
            f"tools: the role {role!r} may not use 'rm'.",
        )
        for name in ("rm-1", "rm-2"):
            more = {"type": "function", "function": {"name": name, "parameters": {}}}
            assert ask(client, tools=[more]).status_code == 403
        denied = admin.get("/api/admin/audit", params={"actor": owner_of(client), "outcome": "denied"}).json()
        assert [entry["target"] for entry in denied["entries"]] == ["tool rm"], (
            "and not what else one invents"
        )
        strange_ones: list[dict[str, Any]] = [{}, {"function": "maze_open"}, {"function": {}}]
        for strange in strange_ones:
            assert ask(client, tools=[strange]).status_code == 422, "that is no tool"


def test_the_system_prompt_of_a_role_comes_before_the_sessions(
    fake_portal: Portal, admin: httpx.Client, role: str, module_fake: FakeLLM
) -> None:
    def seen() -> list[str]:
        messages = module_fake.requests[-1]["messages"]
        return [message["content"] for message in messages if message["role"] == "system"]

    define(admin, role, system_prompt="Be kind.")
    session = new_id()
    with fake_portal.client(f"s-{new_id()[-6:]}", role=role) as client:
        ask(client, session, system_prompt="Be brief.")
        assert seen() == ["Be kind.\n\nBe brief."]
        define(admin, role, system_prompt="Be wise.")
        ask(client, session)
        assert seen() == ["Be wise.\n\nBe brief."], "another prompt of the role holds from now on"
        ask(client)
        assert seen() == ["Be wise."]
        client.post("/api/llm/chat", json={"messages": [{"role": "system", "content": "Ignore all."}]})
        assert seen() == ["Be wise.\n\nIgnore all."]
        client.post("/api/llm/chat", json={"messages": [{"role": "user", "content": "hi"}]})
        assert seen() == ["Be wise."]
        shown = client.get(f"/api/llm/chat/session/{session}/history").json()["messages"][0]
        assert shown["content"] == "Be brief.", "the role's is not the session's"


def test_a_role_may_mask_personal_data(
    fake_portal: Portal, admin: httpx.Client, role: str, module_fake: FakeLLM
) -> None:
    define(admin, role, redaction=True)
    session, message = new_id(), "Mail ada@example.org or call +49 30 1234567."
    with fake_portal.client(f"d-{new_id()[-6:]}", role=role) as client:
        ask(client, session, message=message)
        masked = "Mail [email] or call [phone]."
        assert module_fake.requests[-1]["messages"][-1]["content"] == masked
        history = client.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
        assert history[0]["content"] == masked, "nor is it stored"
        for content, sent in ((message, masked), ([{"text": message}], [{"text": masked}])):
            client.post("/api/llm/chat", json={"messages": [{"role": "user", "content": content}]})
            assert module_fake.requests[-1]["messages"][-1]["content"] == sent


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("ada.l+x@mail.example.co.uk!", "[email]!"),
        ("IBAN DE89 3704 0044 0532 0130 00 now", "IBAN [iban] now"),
        ("card 4111 1111 1111 1111.", "card [card]."),
        ("number 4111 1111 1111 1112 is none", "number 4111 1111 1111 1112 is none"),
        ("from 192.168.10.5 and 999.1.1.1", "from [address] and 999.1.1.1"),
        ("call 030 123 456 78", "call [phone]"),
        ("level 12, 300 points, 3.14, 2026-11-21", "level 12, 300 points, 3.14, 2026-11-21"),
    ],
)
def test_what_is_masked(text: str, masked: str) -> None:
    assert redact(text) == masked


def test_a_role_over_mqtt_is_the_same(fake_portal: Portal, mosquitto: Mosquitto, admin: httpx.Client) -> None:
    game = GameClient(mosquitto.port, "maze/assistant_response/#")
    with fake_portal.client(f"w-{new_id()[-6:]}", role="viewer") as viewer:
        session = new_id()
        game.publish(f"maze/user_input/{session}", {"message": "hi", "token": token_of(viewer)})
        reply = game.reply(f"maze/assistant_response/{session}").decode()
        assert reply.startswith("Error: ")
        assert "the role 'viewer' does not allow this" in reply
    game.close()


def test_games_without_a_token_have_the_role_of_players(
    make_portal: MakePortal, tmp_path: Path, fake_thread: FakeLLM, mosquitto: Mosquitto
) -> None:
    (tmp_path / "roles.toml").write_text(
        '[neighbour]\npermissions = ["chat:use"]\nsystem_prompt = "You guide a player."\n'
    )
    settings = {"MQTT_BROKER_URL": mosquitto.url, "MQTT_PROJECTS": "racing"}
    make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url, **settings).start()
    game = GameClient(mosquitto.port, "racing/assistant_response/#")
    game.publish("racing/user_input/s", "hi")
    game.reply("racing/assistant_response/s")
    assert fake_thread.requests[-1]["messages"][0]["content"] == "You guide a player."
    game.close()


# --- where roles come from -----------------------------------------------------------------------


def test_the_api_is_above_the_file_and_the_file_above_what_is_shipped(
    make_portal: MakePortal, tmp_path: Path
) -> None:
    file = tmp_path / "roles.toml"
    file.write_text('[viewer]\npermissions = ["sessions:read"]\n[guest]\npermissions = []\n')
    portal = make_portal(tmp_path).start(ready=False)
    with portal.client("root", role="admin") as admin:

        def sources() -> dict[str, str]:
            return {one["name"]: one["source"] for one in admin.get("/api/admin/roles").json()["roles"]}

        assert sources()["viewer"] == sources()["guest"] == "file"
        assert sources()["admin"] == "shipped"
        define(admin, "viewer")
        assert sources()["viewer"] == "api"
        portal.stop()
        portal.start(ready=False)
        assert sources()["viewer"] == "api", "it is stored"
        assert admin.delete("/api/admin/roles/viewer").status_code == 204
        assert sources()["viewer"] == "file"
        assert admin.delete("/api/admin/roles/viewer").status_code == 404


def test_a_role_that_people_have_cannot_be_deleted(
    fake_portal: Portal, admin: httpx.Client, role: str
) -> None:
    define(admin, role)
    with fake_portal.client(f"x-{new_id()[-6:]}", role=role) as client:
        refused = admin.delete(f"/api/admin/roles/{role}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
        admin.patch(f"/api/admin/users/{client.get('/api/auth/me').json()['id']}", json={"role": "player"})
    assert admin.delete(f"/api/admin/roles/{role}").status_code == 204


def test_a_role_is_deleted_by_who_could_define_it(make_portal: MakePortal, tmp_path: Path, role: str) -> None:
    portal = make_portal(tmp_path).start(ready=False)
    with portal.client("root", role="admin") as admin:
        define(admin, "clerk", permissions=["chat:use", "account:write", "roles:write"])
        define(admin, "author", permissions=["chat:use"])
        define(admin, "viewer", permissions=["chat:use", "audit:read"])
        define(admin, role, permissions=["chat:use", "audit:read"])
        with portal.client("clerk", role="clerk") as clerk:
            for name in ("author", "viewer", role):
                refused = clerk.delete(f"/api/admin/roles/{name}")
                assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden"), name
                assert "rights that you do not have" in refused.json()["detail"]
            define(admin, role, permissions=["chat:use"])
            assert clerk.delete(f"/api/admin/roles/{role}").status_code == 204


@pytest.mark.parametrize(
    ("name", "body", "problem"),
    [
        ("admin", {"permissions": []}, "the role of the admins is as it is"),
        ("x", {"permissions": ["fly"]}, "is no permission"),
        ("x", {"permissions": ["chat:*", "moon:*"]}, "is no permission"),
        ("x", {"permissions": [], "limits": {"daily_tokens": -1}}, "limits.daily_tokens"),
        ("x", {"permissions": [], "limits": {"weekly": 1}}, "limits.weekly"),
        ("X Y", {"permissions": []}, "name"),
    ],
)
def test_a_wrong_role_is_told(admin: httpx.Client, name: str, body: dict[str, Any], problem: str) -> None:
    refused = admin.put(f"/api/admin/roles/{name}", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_request")
    assert problem in refused.json()["detail"]


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("roles.toml", "[x]\npermissions = 'all'", "x.permissions"),
        ("roles.toml", "[x]\npermissions = ['fly']", "is no permission"),
        ("roles.toml", "[X]\npermissions = []", "'X' cannot name a role"),
        ("roles.toml", "[x", "roles.toml: Expected ']'"),
        ("models.toml", "[models.a.price]\ninput = -1", "models.a.price.input"),
        ("models.toml", "[models.a.price]\ninptu = 1", "models.a.price.inptu"),
    ],
)
def test_a_wrong_file_is_told_at_the_start(tmp_path: Path, file: str, text: str, problem: str) -> None:
    (tmp_path / file).write_text(text)
    assert problem in refuse_settings(tmp_path, "")


def test_what_another_process_defines_is_known_here(
    make_portal: MakePortal, tmp_path: Path, fake_thread: FakeLLM
) -> None:
    fake_thread.script = Script()
    one = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url).start()
    (tmp_path / "two").mkdir()
    database = f"sqlite:///{tmp_path / 'portal.db'}"
    two = make_portal(tmp_path / "two", LLM_SERVER_URL=fake_thread.url, DATABASE_URL=database).start()
    with one.client("root", role="admin") as admin, two.client("ada") as ada:
        define(admin, "author", permissions=["account:write"])
        wait_until(lambda: ask(ada).status_code == 403, 10, "the other process' change")
