"""Canaries: what nobody must find in logs, errors, the audit log and metrics; and whose text is whose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.cli.people import invite
from app.events import new_id
from tests.fake_llm import FakeLLM, FakeThread, Script
from tests.support import SECRET, GameClient, Mosquitto, Portal

pytestmark = pytest.mark.slow

PASSWORD = "kanarienvogel-password-1"
WRONG_PASSWORD = "kanarienvogel-password-2"
NEW_PASSWORD = "kanarienvogel-password-3"
PROMPT = "kanarienvogel-prompt"
SYSTEM_PROMPT = "kanarienvogel-system-prompt"
TEMPLATE = "kanarienvogel-template"
MESSAGE = "kanarienvogel-message-over-mqtt"
HOOK = "kanarienvogel-hook"
LLM_KEY = "kanarienvogel-llm-key"


@pytest.fixture(scope="module")
def llm() -> Iterator[FakeLLM]:
    """One of its own, that fails when it is told to."""
    running = FakeThread()
    yield running.fake
    running.close()


@pytest.fixture(scope="module")
def talkative(
    llm: FakeLLM, mosquitto: Mosquitto, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Portal]:
    """A portal that logs as much as it can, with a webhook that it must not call."""
    running = Portal(
        tmp_path_factory.mktemp("talkative"),
        LOG_LEVEL="debug",
        LLM_SERVER_URL=llm.url,
        LLM_API_KEY=LLM_KEY,
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS="racing",
        ALERT_WEBHOOK_URL=f"http://127.0.0.1:9/{HOOK}",
    ).start()
    yield running
    running.stop()


class Witness:
    """A client that remembers the errors it was told."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.errors: list[str] = []

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = self.client.request(method, path, **options)
        if answer.status_code >= 400:
            self.errors.append(answer.text + str(answer.headers))
        return answer


def use_everything(witness: Witness, portal: Portal, llm: FakeLLM, broker: Mosquitto) -> list[str]:
    """Does all that has a secret in it, rightly and wrongly; returns the secrets that were made."""
    ask, link = witness.ask, invite(portal.env_file, "admin").secret
    account = {"username": "canary", "email": "canary@example.org", "password": PASSWORD, "invitation": link}
    assert ask("POST", "/api/auth/register", json=account).status_code == 201
    ask("POST", "/api/auth/register", json=account)
    ask("POST", "/api/auth/register", json={**account, "username": "?", "password": WRONG_PASSWORD})
    ask("POST", "/api/auth/login", json={"username": "canary", "password": WRONG_PASSWORD})
    ask("POST", "/api/auth/login", json={"username": WRONG_PASSWORD, "password": WRONG_PASSWORD})
    ask("POST", "/api/auth/login", json={"username": "canary", "password": [WRONG_PASSWORD]})
    ask("POST", "/api/auth/login", content=f'{{"password": "{WRONG_PASSWORD}"', headers=JSON)
    ask("POST", f"/api/auth/login?password={WRONG_PASSWORD}")
    ask("POST", "/api/auth/token", data={"grant_type": WRONG_PASSWORD})
    given = ask("POST", "/api/auth/token", data={"username": "canary", "password": PASSWORD}).json()
    access, refresh = given["access_token"], given["refresh_token"]
    ask("GET", "/api/auth/me", headers={"Authorization": f"Bearer {refresh}"})
    ask("GET", "/api/auth/me", headers={"Authorization": f"Bearer {access}x"})
    ask("POST", "/api/auth/refresh", headers={"Cookie": f"portal_refresh={access}"})
    witness.client.headers["Authorization"] = f"Bearer {access}"
    change = {"current_password": WRONG_PASSWORD, "new_password": NEW_PASSWORD}
    ask("PUT", "/api/auth/password", json=change)
    assert ask("PUT", "/api/auth/password", json={**change, "current_password": PASSWORD}).status_code == 204
    key = ask("POST", "/api/keys", json={"name": "k"}).json()["secret"]
    device = ask("POST", "/api/keys", json={"name": "d", "device": "car"}).json()["secret"]
    ask("GET", "/api/auth/me", headers={"Authorization": f"Bearer {device}"})
    ask("POST", "/api/keys", json={"name": "k"}, headers={"Authorization": f"Bearer {key}"})
    invitation = ask("POST", "/api/admin/invitations", json={"role": "viewer"}).json()["path"].split("#")[1]
    ask("POST", "/api/auth/password-reset", json={"link": invitation, "new_password": NEW_PASSWORD})
    _chat(ask, llm)
    _over_mqtt(broker, access, device)
    ask("POST", "/api/auth/token", data={"grant_type": "refresh_token", "refresh_token": refresh})
    made = [access, refresh, key, device, invitation, link]
    return [*made, *(secret.rsplit(".", 1)[-1] for secret in (access, refresh))]


JSON = {"Content-Type": "application/json"}


def _chat(ask: Any, llm: FakeLLM) -> None:
    body = {"session_id": "s", "message": PROMPT, "system_prompt": SYSTEM_PROMPT}
    ask("POST", "/api/templates", json={"title": TEMPLATE, "content": TEMPLATE + "{{ a.b.c }}"})
    ask("POST", "/api/templates/preview", json={"content": TEMPLATE + "{% x %}", "variables": {"a": PROMPT}})
    for options in (
        {},
        {"request_id": "r"},
        {"request_id": "r", "message": PROMPT + "!"},
        {"temperature": PROMPT},
        {"tools": [PROMPT]},
        {"model": "none-such"},
        {"message": PROMPT + "\0"},
        {"message": [PROMPT]},
    ):
        ask("POST", "/api/llm/chat/session", json={**body, **options})
    ask("POST", "/api/llm/chat", json={"messages": [{"role": "user", "content": PROMPT}]})
    ask("POST", "/api/llm/chat", content=json.dumps({"messages": PROMPT})[:-1], headers=JSON)
    ask("POST", "/api/llm/chat/session", json=body, headers={"Content-Encoding": "gzip"})
    for script in (
        Script(status=500, error="it fails"),
        Script(status=400, error="the context is too long"),
        Script(raw=b"data: nonsense\n\n"),
        Script(cut_after=1),
    ):
        llm.script = script
        ask("POST", "/api/llm/chat/session", json=body)
    llm.script = Script()


def _over_mqtt(broker: Mosquitto, access: str, device: str) -> None:
    game, session = GameClient(broker.port, "racing/assistant_response/#"), new_id()
    try:
        replies = 0
        for token in (access, device, access + "x", None):
            for body in ({"message": MESSAGE}, {"message": MESSAGE, "temperature": MESSAGE}):
                game.publish(f"racing/user_input/{session}", {**body, "token": token})
                replies += 1
                game.reply(f"racing/assistant_response/{session}", replies)
    finally:
        game.close()


def test_secrets_and_prompts_are_told_to_nobody(
    talkative: Portal, llm: FakeLLM, mosquitto: Mosquitto
) -> None:
    with httpx.Client(base_url=talkative.url, timeout=30) as client:
        witness = Witness(client)
        made = use_everything(witness, talkative, llm, mosquitto)
        exported = client.get("/api/admin/audit/export").text
        metrics = client.get("/metrics")
        assert metrics.status_code == 200
    places = {
        "log": talkative.log.read_text(),
        "errors": "\n".join(witness.errors),
        "audit": exported,
        "metrics": metrics.text,
        "openapi": httpx.get(f"{talkative.url}/openapi.json").text,
        "health": httpx.get(f"{talkative.url}/api/llm/health").text,
    }
    assert len(witness.errors) > 20
    assert exported.count("\n") > 10
    assert "request refused" in places["log"]
    everywhere = [*made, SECRET, PASSWORD, WRONG_PASSWORD, NEW_PASSWORD, LLM_KEY, HOOK]
    content = [PROMPT, SYSTEM_PROMPT, TEMPLATE, MESSAGE]
    found = {
        (name, canary)
        for name, text in places.items()
        for canary in (*everywhere, *content)
        if canary in text
    }
    assert found == set()


def test_secrets_are_not_in_the_database_either(talkative: Portal) -> None:
    """Beside the test above: what it used is stored, as hashes."""
    with talkative.client("stored") as client:
        key = client.post("/api/keys", json={"name": "k"}).json()["secret"]
        token = client.headers["Authorization"].split()[1]
    files = b"".join(path.read_bytes() for path in Path(talkative.directory).glob("portal.db*"))
    assert key[:10].encode() in files, "its beginning is there, so this looks in the right place"
    for secret in (key, token, PASSWORD, NEW_PASSWORD, SECRET):
        assert secret.encode() not in files


# --- whose text it is ----------------------------------------------------------------------------


def test_the_request_id_of_somebody_else_gets_nothing_of_theirs(target: Portal, model: FakeLLM) -> None:
    model.script = Script(random=True)
    try:
        with target.client("alice") as alice, target.client("bob") as bob:
            body = {"session_id": "shared", "message": "tell me", "request_id": "shared"}
            hers = alice.post("/api/llm/chat/session", json=body).json()
            again = alice.post("/api/llm/chat/session", json=body).json()
            his = bob.post("/api/llm/chat/session", json=body).json()
            other = alice.post("/api/llm/chat/session", json={**body, "message": "tell me more"})
            stolen = bob.get(f"/api/llm/turns/{hers['turn_id']}/events")
            unknown = bob.get(f"/api/llm/turns/{new_id()}/events")
    finally:
        model.script = Script()
    assert again["response"] == hers["response"]
    assert his["response"] != hers["response"]
    assert his["turn_id"] != hers["turn_id"]
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")
    assert hers["response"] not in other.text
    assert (stolen.status_code, stolen.json()["detail"]) == (unknown.status_code, unknown.json()["detail"])


def test_the_request_id_of_somebody_over_mqtt_gets_nothing_of_theirs(
    target: Portal, model: FakeLLM, mosquitto: Mosquitto
) -> None:
    model.script = Script(random=True)
    game, session = GameClient(mosquitto.port, "siege/assistant_response/#"), new_id()
    body = {"message": "tell me", "requestId": "shared", "format": "json"}
    mine = f"siege/assistant_response/{session}"
    try:
        with target.client("alice") as alice:
            known = {"session_id": session, "message": "tell me", "request_id": "shared"}
            hers = alice.post("/api/llm/chat/session", json={**known, "project": "siege"}).json()
        game.publish(f"siege/user_input/{session}", body)
        told = json.loads(game.reply(mine))
        game.publish(f"siege/user_input/{session}", {**body, "message": "tell me more"})
        game.wait_for(lambda: b'"error"' in game.messages_unlocked(mine)[-1])
        other = json.loads(game.messages(mine)[-1])
    finally:
        model.script = Script()
        game.close()
    assert told["response"] != hers["response"]
    assert other["error"]["code"] == "conflict"
