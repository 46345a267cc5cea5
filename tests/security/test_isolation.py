"""Two people, every route and every transport: nothing of one ever reaches the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import pytest

from app.events import new_id
from tests.fake_llm import FakeLLM, Script, text
from tests.security.routes import NOBODYS, PUBLIC, ROUTES, call, problem
from tests.support import GameClient, Mosquitto, Portal, token_of

CANARY = f"canary-{new_id()}"
"""In all that Ada has said and made."""

WITH_IDS = [name for name, route in ROUTES.items() if "{" in name and route.needs != PUBLIC]
FOR_ADMINS = ("users:", "roles:", "audit:", "devices:", "servers:")
OWN = [name for name in WITH_IDS if not ROUTES[name].needs.startswith(FOR_ADMINS)]
"""Routes to things that somebody owns."""


@dataclass
class Stage:
    ada: httpx.Client
    others: dict[str, httpx.Client]
    ids: dict[str, str]
    """Of Ada's things."""
    message: str


@pytest.fixture(scope="module")
def stage(fake_portal: Portal, module_fake: FakeLLM) -> Iterator[Stage]:
    """Ada, who has one of everything, and two others: an author, and even an admin."""
    module_fake.script = Script(pieces=text("I say ", CANARY))
    with ExitStack() as stack:
        ada = stack.enter_context(fake_portal.client("ada"))
        others = {
            role: stack.enter_context(fake_portal.client(f"bo-{role}", role=role))
            for role in ("author", "admin")
        }
        template = {"title": f"T {CANARY}", "content": f"Say {CANARY}."}
        template_id = ada.post("/api/templates", json=template).json()["id"]
        asked = {"session_id": "shared-name", "message": f"I am {CANARY}", "template_id": template_id}
        turn = ada.post("/api/llm/chat/session", json={**asked, "request_id": "r"}).json()
        key = ada.post("/api/keys", json={"name": CANARY}).json()
        sign_in = ada.get("/api/auth/sign-ins").json()["sign_ins"][0]["id"]
        ids = {
            "session_id": "shared-name",
            "turn_id": turn["turn_id"],
            "response_id": f"resp_{turn['turn_id']}",
            "model": "nobodys",
            "message_id": turn["message_id"],
            "template_id": template_id,
            "version": "1",
            "key_id": key["id"],
            "sign_in_id": sign_in,
            "user_id": ada.get("/api/auth/me").json()["id"],
        }
        yield Stage(ada, others, ids, turn["message_id"])


def everything_of(ada: httpx.Client) -> list[str]:
    """All that Ada has."""
    paths = (
        "/api/llm/chat/session/shared-name/history",
        "/api/sessions",
        "/api/templates",
        "/api/keys",
        "/api/auth/sign-ins",
    )
    return [ada.get(path).text for path in paths]


@pytest.mark.parametrize("role", ["author", "admin"])
@pytest.mark.parametrize("name", OWN)
def test_things_of_another_are_not_found_and_not_touched(stage: Stage, role: str, name: str) -> None:
    before = everything_of(stage.ada)
    answer = call(stage.others[role], name, stage.ids)
    told = problem(answer)
    assert told[:2] == (404, "not_found")
    assert CANARY not in answer.text
    assert told == problem(call(stage.others[role], name, NOBODYS)), "nor is it told that it is there"
    assert everything_of(stage.ada) == before


@pytest.mark.parametrize("role", ["author", "admin"])
@pytest.mark.parametrize("name", [name for name in ROUTES if name not in WITH_IDS])
def test_no_other_answer_holds_anything_of_another(stage: Stage, role: str, name: str) -> None:
    if ROUTES[name].fresh or name == "POST /api/auth/logout":
        return  # they end the caller's own sign-in, which the rest of the tests need
    answer = call(stage.others[role], name, {**stage.ids, "session_id": f"own-{new_id()}"})
    # The model says the same to everybody.
    answered_alike = name.startswith(("POST /api/llm/chat", "POST /v1/chat", "POST /v1/responses"))
    assert answered_alike or CANARY not in answer.text
    assert stage.ids["session_id"] not in answer.text or "audit" in name


def test_an_equal_session_id_is_another_session(stage: Stage) -> None:
    before = everything_of(stage.ada)
    bo = stage.others["author"]
    answer = call(bo, "POST /api/llm/chat/session", stage.ids)
    assert answer.status_code == 200
    assert answer.json()["turn_id"] != stage.ids["turn_id"]
    said = bo.get("/api/llm/chat/session/shared-name/history").json()["messages"]
    assert said[0]["content"] == "hi"
    assert everything_of(stage.ada) == before
    bo.delete("/api/sessions/shared-name")


def test_an_equal_request_id_gets_no_answer_of_another(stage: Stage) -> None:
    bo = stage.others["author"]
    body = {"session_id": "shared-name", "message": f"I am {CANARY}", "request_id": "r"}
    answer = bo.post("/api/llm/chat/session", json=body).json()
    assert answer["turn_id"] != stage.ids["turn_id"]
    bo.delete("/api/sessions/shared-name")


def test_a_child_under_the_wrong_parent_is_not_found(stage: Stage) -> None:
    bo, session = stage.others["author"], new_id()
    bo.post("/api/llm/chat/session", json={"session_id": session, "message": "hi"})
    history = f"/api/llm/chat/session/{session}/history"
    assert bo.get(history, params={"before": stage.message}).status_code == 404
    assert stage.ada.get(
        "/api/llm/chat/session/shared-name/history", params={"before": stage.message}
    ).is_success
    admin, ids = stage.others["admin"], stage.ids
    user = admin.get("/api/auth/me").json()["id"]
    assert admin.delete(f"/api/admin/users/{user}/keys/{ids['key_id']}").status_code == 404


def test_a_template_of_another_makes_no_session(stage: Stage) -> None:
    body = {"session_id": new_id(), "message": "hi", "template_id": stage.ids["template_id"]}
    for role in ("author", "admin"):
        answer = stage.others[role].post("/api/llm/chat/session", json=body)
        assert (answer.status_code, CANARY in answer.text) == (404, False)


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
def test_nobody_follows_the_turn_of_another(stage: Stage, accept: str) -> None:
    path = f"/api/llm/turns/{stage.ids['turn_id']}/events"
    headers = {"Accept": accept, "Last-Event-ID": "1.0"}
    for other in stage.others.values():
        answer = other.get(path, headers=headers)
        assert (answer.status_code, CANARY in answer.text) == (404, False)
    assert CANARY in stage.ada.get(path, headers={"Accept": accept}).text


def test_over_mqtt_a_token_leads_to_its_own_sessions(stage: Stage, mosquitto: Mosquitto) -> None:
    before = everything_of(stage.ada)
    game = GameClient(mosquitto.port, "maze/assistant_response/#")
    topic = "maze/assistant_response/shared-name"
    asked = {"message": f"I am {CANARY}", "requestId": "r", "format": "json"}
    replies = []
    tokens = [token_of(stage.others["author"]), token_of(stage.others["admin"]), None]
    for number, token in enumerate(tokens):
        game.publish("maze/user_input/shared-name", {**asked, "token": token})
        replies.append(json.loads(game.reply(topic, number + 1)))
    game.publish("maze/user_input/shared-name", b"")
    game.wait_for(lambda: len(game.messages_unlocked(topic)) == 4)
    game.close()
    assert {reply["type"] for reply in replies} == {"final"}
    assert len({reply["turn_id"] for reply in replies} | {stage.ids["turn_id"]}) == 4
    assert everything_of(stage.ada) == before
