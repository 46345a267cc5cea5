"""The log: one event a line, with the ids of what it belongs to, from the door to the LLM server."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog

from app.events import new_id
from app.logs import bind, configure_logging, context_with, get_logger
from tests.fake_llm import FakeLLM, Script, text
from tests.support import GameClient, Mosquitto, Portal, ask, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def json_portal(
    module_fake: FakeLLM, mosquitto: Mosquitto, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Portal]:
    """A portal that logs as JSON, and everything."""
    running = Portal(
        tmp_path_factory.mktemp("portal"),
        LLM_SERVER_URL=module_fake.url,
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS="logged",
        LOG_FORMAT="json",
        LOG_LEVEL="debug",
    ).start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(json_portal: Portal) -> Iterator[httpx.Client]:
    """Somebody there."""
    with json_portal.client() as signed_in:
        yield signed_in


def lines(portal: Portal, **wanted: Any) -> list[dict[str, Any]]:
    """The lines of the log that say this."""
    said = [json.loads(line) for line in portal.log.read_text().splitlines()]
    return [line for line in said if wanted.items() <= line.items()]


def test_a_turn_has_a_line_at_its_beginning_and_one_at_its_end(
    json_portal: Portal, client: httpx.Client, llm: FakeLLM
) -> None:
    request = new_id()
    answer = client.post(
        "/api/llm/chat/session",
        json={"session_id": new_id(), "message": "hi"},
        headers={"X-Request-ID": request},
    )
    assert answer.headers["X-Request-ID"] == request
    mine = lines(json_portal, turn=answer.json()["turn_id"])
    assert [line["event"] for line in mine if line["level"] == "info"] == ["turn accepted", "turn ended"]
    for line in mine:
        assert line["request_id"] == request
    begun, ended = mine[0], mine[-1]
    assert begun["door"] == ended["door"] == "http"
    assert begun["model"] == ended["model"] == "fake-1"
    assert ended["outcome"] == "final"
    assert 0 <= ended["ms"] < 10_000


def test_what_is_asked_of_the_llm_server_has_the_ids_too(
    json_portal: Portal, client: httpx.Client, llm: FakeLLM
) -> None:
    llm.script = Script(status=400)
    request = new_id()
    answer = client.post(
        "/api/llm/chat/session", json={"session_id": "s", "message": "hi"}, headers={"X-Request-ID": request}
    )
    assert answer.status_code == 502
    (refused,) = lines(json_portal, event="LLM server refused a request", request_id=request)
    (ended,) = lines(json_portal, event="turn ended", turn=refused["turn"])
    assert (ended["outcome"], ended["code"]) == ("error", "llm_error")
    (answered,) = lines(json_portal, event="request refused", request_id=request)
    assert answered["code"] == "llm_error"


def test_a_turn_that_waits_keeps_its_own_ids(json_portal: Portal, client: httpx.Client, llm: FakeLLM) -> None:
    """It is started by the end of the turn before it."""
    llm.script = Script(text("a", "b"), between=0.5)
    session, requests = new_id(), [new_id(), new_id()]
    body = {"session_id": session, "message": "hi"}
    with client.stream(
        "POST", "/api/llm/chat/session/stream", json=body, headers={"X-Request-ID": requests[0]}
    ) as first:
        wait_until(lambda: llm.running == 1, what="the first generation")
        second = client.post("/api/llm/chat/session", json=body, headers={"X-Request-ID": requests[1]})
        first.read()
    for request, number in zip(requests, (0, 1), strict=True):
        (ended,) = lines(json_portal, event="turn ended", request_id=request)
        assert (ended["turn"] == second.json()["turn_id"]) == bool(number)


def test_a_chat_without_a_session(json_portal: Portal, client: httpx.Client, llm: FakeLLM) -> None:
    request = new_id()
    body = {"messages": [{"role": "user", "content": "hi"}]}
    client.post("/api/llm/chat", json=body, headers={"X-Request-ID": request})
    events = [line["event"] for line in lines(json_portal, request_id=request, level="info")]
    assert events == ["turn accepted", "turn ended"]


def test_over_mqtt(json_portal: Portal, mosquitto: Mosquitto, llm: FakeLLM, session: str) -> None:
    topic, request = f"logged/assistant_response/{session}", new_id()
    game = GameClient(mosquitto.port, topic)
    game.publish(f"logged/user_input/{session}", {"message": "hi", "requestId": request})
    game.reply(topic)
    game.close()
    found = lines(json_portal, request_id=request, project="logged", door="mqtt")
    assert [line["event"] for line in found] == ["turn accepted", "turn ended"]


def test_a_request_without_an_id_gets_one(json_portal: Portal, client: httpx.Client, llm: FakeLLM) -> None:
    for given in ({}, {"X-Request-ID": "not an id"}):
        answer = client.post(
            "/api/llm/chat/session", json={"session_id": new_id(), "message": "hi"}, headers=given
        )
        request = answer.headers["X-Request-ID"]
        assert request != "not an id"
        assert len(lines(json_portal, event="turn ended", request_id=request)) == 1


def test_every_line_is_json_and_tells_no_text(
    json_portal: Portal, client: httpx.Client, llm: FakeLLM
) -> None:
    prompt, reply = f"canary-{new_id()}", f"canary-{new_id()}"
    llm.script = Script(text(reply))
    assert ask(client, message=prompt).json()["response"] == reply
    said = json_portal.log.read_text()
    assert prompt not in said
    assert reply not in said
    for line in lines(json_portal):
        assert {"event", "level", "timestamp"} <= set(line)


def test_libraries_in_the_same_form(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    was_configured, before = structlog.is_configured(), structlog.get_config()
    try:
        configure_logging("info", "json")
        try:
            raise ValueError("broken")
        except ValueError:
            logging.getLogger("library").exception("it %s", "failed")
        context_with(turn="t").run(get_logger("app").info, "ours", path=object)
        bind(request_id="r")
        get_logger("app").info("after")
    finally:
        structlog.contextvars.clear_contextvars()
        structlog.reset_defaults()
        if was_configured:
            structlog.configure(**before)
    library, ours, after = map(json.loads, capfd.readouterr().err.splitlines())
    assert (library["event"], library["level"], library["logger"]) == ("it failed", "error", "library")
    assert "ValueError: broken" in library["exception"]
    assert (ours["event"], ours["turn"]) == ("ours", "t")
    assert "turn" not in after
    assert after["request_id"] == "r"
