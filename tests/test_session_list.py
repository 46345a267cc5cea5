"""The list of sessions over a WebSocket."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from app.events import new_id
from tests.fake_llm import FakeLLM, Script
from tests.support import Portal, ask
from tests.test_websocket import REFUSED, Chat, Message, opened, types

pytestmark = pytest.mark.slow


@contextmanager
def watch(portal: Portal, client: httpx.Client, **options: Any) -> Iterator[Chat]:
    with opened(portal, client, "/ws/sessions", **options) as socket:
        assert socket.next() == {"type": "connection_established"}
        yield socket


@contextmanager
def answering(client: httpx.Client, llm: FakeLLM, session: str) -> Iterator[str]:
    """Asks, and holds the answer back until the context is left."""
    gate = threading.Event()
    llm.script = Script(gate=gate)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client, session, message="What a day")
        try:
            yield session
        finally:
            gate.set()
            assert answer.result().status_code == 200


def settled(socket: Chat) -> list[Message]:
    """What comes up to the answer to a ping."""
    socket.say("ping")
    return socket.until("pong")[:-1]


def test_a_list_follows_what_happens_in_it(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    with watch(fake_portal, client) as socket:
        with answering(client, llm, session):
            made, started = socket.next(), socket.next()
            shown = client.get(f"/api/sessions/{session}").json()
            assert made == {"type": "session_created", "session": shown}
            assert shown["title"] == "What a day"
        ended = socket.next()
        named = {"session_id": session, "turn_id": started["turn_id"]}
        assert (started, ended) == ({"type": "turn_started", **named}, {"type": "turn_ended", **named})
        with answering(client, llm, session):
            again = socket.until("turn_started")
            assert types(again) == ["session_updated", "turn_started"]
            assert again[0]["session"]["updated_at"] > shown["updated_at"]
        socket.until("turn_ended")

        shown = client.patch(f"/api/sessions/{session}", json={"title": "Another"}).json()
        assert socket.next() == {"type": "session_updated", "session": shown}
        body = {"session_id": session, "template": "Be brief."}
        assert client.post("/api/mqtt/publish_template", json=body).status_code == 200
        assert socket.next()["session"]["system_prompt"] == "Be brief."
        assert client.delete(f"/api/llm/chat/session/{session}").status_code == 200
        assert socket.next()["type"] == "session_updated"
        assert client.delete(f"/api/sessions/{session}").status_code == 204
        assert socket.next() == {"type": "session_deleted", "session": {"session_id": session}}
        shown = client.post(f"/api/sessions/{session}/restore").json()
        assert socket.next() == {"type": "session_created", "session": shown}
        other = new_id()
        assert client.post("/api/mqtt/publish_template", json={**body, "session_id": other}).is_success
        made = socket.next()
        assert (made["type"], made["session"]["session_id"]) == ("session_created", other)


def test_who_comes_in_the_middle_is_told_that_a_session_answers(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    with watch(fake_portal, client) as first:
        with answering(client, llm, session):
            begun = first.until("turn_started")[-1]
            with watch(fake_portal, client) as socket:
                assert socket.until("turn_started")[-1] == begun
        assert first.next() == {**begun, "type": "turn_ended"}


def test_nobody_sees_what_is_anothers(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    body = {"name": "of the maze", "project": "maze"}
    key = client.post("/api/keys", json=body).json()["secret"]
    bound = {"Authorization": f"Bearer {key}"}
    with (
        fake_portal.client(f"eve-{new_id()[-6:]}") as eve,
        watch(fake_portal, eve) as others,
        watch(fake_portal, client, additional_headers=bound) as maze,
        watch(fake_portal, client) as mine,
    ):
        ask(client, session, message="secret")
        client.delete(f"/api/sessions/{session}")
        mine.until("session_deleted")
        assert (settled(others), settled(maze)) == ([], [])
        ask(client, session, message="a way out", project="maze")
        assert maze.next()["session"]["project"] == "maze"


@pytest.mark.parametrize(
    ("said", "told"), [("no JSON", "JSON"), ("[1]", "object"), ('{"type": "stop"}', "type: one of ping")]
)
def test_what_is_wrong_is_told_and_the_socket_stays(
    fake_portal: Portal, client: httpx.Client, said: str, told: str
) -> None:
    with watch(fake_portal, client) as socket:
        socket.connection.send(said)
        error = socket.next()["error"]
        assert error["code"] == "invalid_request"
        assert told in error["message"]
        assert settled(socket) == []


@pytest.mark.parametrize(("options", "status"), REFUSED)
def test_nobody_else_opens_it(
    fake_portal: Portal, client: httpx.Client, options: dict[str, Any], status: int
) -> None:
    if "origin" in options:
        options = {**options, "additional_headers": {"Authorization": client.headers["Authorization"]}}
    with pytest.raises(InvalidStatus) as refused, watch(fake_portal, client, **options):
        pass
    assert refused.value.response.status_code == status


def test_who_may_not_read_sessions_does_not_see_them(fake_portal: Portal, client: httpx.Client) -> None:
    key = client.post("/api/keys", json={"name": "writer", "scopes": ["chat:use"]}).json()["secret"]
    headers = {"Authorization": f"Bearer {key}"}
    with (
        pytest.raises(InvalidStatus) as refused,
        watch(fake_portal, client, additional_headers=headers),
    ):
        pass
    assert refused.value.response.status_code == 403
    assert json.loads(refused.value.response.body or b"")["error"]["code"] == "forbidden"


def test_a_ticket_opens_it(fake_portal: Portal, client: httpx.Client) -> None:
    ticket = client.post("/api/auth/ws-ticket").json()["ticket"]
    with watch(fake_portal, client, ticket=ticket, origin=fake_portal.url) as socket:
        assert settled(socket) == []
