"""Two portals on one database: what happens in one of them is seen at once in the other."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from app.events import new_id
from app.services.elsewhere import HEED_S
from tests.fake_llm import FakeLLM, Script, text
from tests.support import (
    GameClient,
    Mosquitto,
    Portal,
    Redis,
    ask,
    new_database,
    owner_of,
    token_of,
    wait_until,
)
from tests.test_session_list import watch
from tests.test_websocket import Chat, chat, reply, types

pytestmark = pytest.mark.slow

SOME = "s\u00f6me" * 4000
"""More than PostgreSQL takes in one notice."""


@dataclass
class Pair:
    """Two portals, and what they share beside the database."""

    one: Portal
    two: Portal
    project: str
    redis: Redis | None


@pytest.fixture(scope="module", params=["postgresql", "redis"])
def pair(
    request: pytest.FixtureRequest,
    module_fake: FakeLLM,
    mosquitto: Mosquitto,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("pair")
    project = f"by-{request.param}"
    settings = {"LLM_SERVER_URL": module_fake.url}
    settings |= {"MQTT_BROKER_URL": mosquitto.url, "MQTT_PROJECTS": project}
    redis = None
    if request.param == "redis":
        redis = Redis(directory)
        settings |= {"DATABASE_URL": f"sqlite:///{directory / 'shared.db'}", "REDIS_URL": redis.url}
    else:
        settings["DATABASE_URL"] = new_database(request.getfixturevalue("postgres_server"))
    portals = []
    for name in ("one", "two"):
        (directory / name).mkdir()
        # The first one serves the project over MQTT, so the second one is not ready.
        portals.append(Portal(directory / name, **settings).start(ready=name == "one"))
    one, two = portals
    yield Pair(one, two, project, redis)
    for portal in portals:
        portal.stop()
    if redis is not None:
        redis.stop()


@dataclass
class Clients:
    """The same person at both."""

    one: httpx.Client
    two: httpx.Client


@pytest.fixture
def ada(pair: Pair) -> Iterator[Clients]:
    with pair.two.client(f"ada-{new_id()[-6:]}") as two:
        headers = {"Authorization": two.headers["Authorization"]}
        with httpx.Client(base_url=pair.one.url, timeout=60, headers=headers) as one:
            yield Clients(one, two)


@contextmanager
def asked(client: httpx.Client, session: str, llm: FakeLLM, **body: Any) -> Iterator[threading.Event]:
    """Asks, of an LLM server that holds its answer back after the first piece until the event is set."""
    held = threading.Event()
    llm.script = Script(pieces=text(SOME, " more", "!"), held=held)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client, session, **body)
        try:
            yield held
        finally:
            held.set()
            answer.result()


def test_a_turn_of_the_other_process_is_seen_as_it_comes(
    pair: Pair, ada: Clients, llm: FakeLLM, session: str
) -> None:
    with chat(pair.one, ada.one, session) as socket, asked(ada.two, session, llm, message="hi") as held:
        seen = socket.until("ai_message_chunk")
        assert types(seen) == ["user_message", "ai_typing", "ai_message_chunk"]
        assert (seen[0]["message"]["content"], seen[-1]["content"]) == ("hi", SOME)
        url = f"/api/llm/turns/{seen[0]['turn_id']}/events"
        with ada.one.stream("GET", url, headers={"Accept": "application/x-ndjson"}) as following:
            lines = following.iter_lines()
            events = [json.loads(next(lines)) for _ in range(2)]
            assert events[-1]["content"] == SOME, "the generation is held"
            held.set()
            events += map(json.loads, lines)
        assert (
            "".join(event.get("content", "") for event in events) == events[-1]["response"] == f"{SOME} more!"
        )
        rest = socket.until("ai_message_complete")
        assert SOME + reply(rest) == rest[-1]["response"]
    kept = ada.two.get(url, headers={"Accept": "application/x-ndjson"}).text.splitlines()
    assert list(map(json.loads, kept)) == events, "each has the same number here and there"
    assert [seen[0]["id"], seen[-1]["id"], rest[-1]["id"]] == ["1.0", "1.1", f"1.{len(kept) - 1}"]


def test_who_comes_in_the_middle_sees_it_too(pair: Pair, ada: Clients, llm: FakeLLM, session: str) -> None:
    with asked(ada.two, session, llm) as held:
        wait_until(lambda: llm.running, what="the generation")
        with chat(pair.one, ada.one, session) as socket:
            assert reply(socket.until("ai_message_chunk")) == SOME
            held.set()
            assert socket.until("ai_message_complete")[-1]["response"] == f"{SOME} more!"


def test_others_see_that_somebody_types_at_the_other_process(pair: Pair, ada: Clients, session: str) -> None:
    with chat(pair.one, ada.one, session) as one, chat(pair.two, ada.two, session) as two:
        for here, there in ((one, two), (two, one)):

            def is_seen(here: Chat = here, there: Chat = there) -> bool:
                here.say("typing")  # before the other one is known to watch, nobody is told
                with suppress(TimeoutError):
                    return bool(json.loads(there.connection.recv(0.5))["type"] == "typing")
                return False

            wait_until(is_seen, what="who types")


@pytest.mark.parametrize("door", ["rest", "socket"])
def test_a_stop_reaches_the_other_process(
    pair: Pair, ada: Clients, llm: FakeLLM, session: str, door: str
) -> None:
    dropped = llm.dropped
    with chat(pair.one, ada.one, session) as socket, asked(ada.two, session, llm):
        socket.until("ai_message_chunk")
        stopped = time.monotonic()
        if door == "rest":
            assert ada.one.post(f"/api/llm/chat/session/{session}/stop").json()["turn_id"]
            assert time.monotonic() - stopped < HEED_S, "it was told, and has not had to be looked for"
        else:
            socket.say("stop")
        wait_until(lambda: llm.dropped > dropped, 1.0, "the end of the request to the LLM server")
        assert socket.until("cancelled")[-1]["response"] == SOME
    shown = ada.one.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
    assert [(message["content"], message["status"]) for message in shown][-1] == (SOME, "cancelled")


def test_a_clear_ends_what_the_other_process_generates(
    pair: Pair, ada: Clients, llm: FakeLLM, session: str
) -> None:
    dropped = llm.dropped
    with chat(pair.two, ada.two, session) as socket, asked(ada.two, session, llm):
        socket.until("ai_message_chunk")
        assert ada.one.delete(f"/api/llm/chat/session/{session}").status_code == 200
        wait_until(lambda: llm.dropped > dropped, 2.0, "the end of the request to the LLM server")
        socket.until("cancelled")
    assert ada.two.get(f"/api/llm/chat/session/{session}/history").json()["messages"] == []


def test_what_waits_here_and_is_cleared_there_is_counted(
    pair: Pair, ada: Clients, llm: FakeLLM, session: str
) -> None:
    with pair.one.client("root", role="admin") as root, ThreadPoolExecutor(1) as pool:
        limits = f"/api/admin/limits/{owner_of(ada.one)}"
        assert root.put(limits, json={"concurrent_turns": 2}).status_code == 200
        with asked(ada.two, session, llm):
            wait_until(lambda: llm.running, what="the generation")
            waiting = pool.submit(ask, ada.one, session, message="waits", request_id="w")
            history = f"/api/llm/chat/session/{session}/history"
            wait_until(lambda: len(ada.one.get(history).json()["messages"]) == 2, what="both messages")
            assert ada.two.delete(f"/api/llm/chat/session/{session}").status_code == 200
            assert waiting.result().json()["finish_reason"] == "cancelled"
        llm.script = Script()
        assert root.put(limits, json={"concurrent_turns": 1}).status_code == 200
        wait_until(lambda: ask(ada.one).status_code == 200, 10, "the place of the turn that had waited")
        wait_until(lambda: ada.one.get("/api/stats").json()["today"]["turns"] == 3, 10, "all three turns")


def test_a_list_of_sessions_follows_the_other_process(
    pair: Pair, ada: Clients, llm: FakeLLM, session: str
) -> None:
    with watch(pair.one, ada.one) as socket, watch(pair.two, ada.two) as beside:
        with asked(ada.two, session, llm, message="hi"):
            beside.until("turn_started")
            seen = socket.until("turn_started")
            assert types(seen) == ["session_created", "turn_started"]
            assert seen[0]["session"] == ada.one.get(f"/api/sessions/{session}").json()
            with watch(pair.one, ada.one) as later:
                assert later.until("turn_started")[-1] == seen[-1]
        assert socket.next() == {**seen[-1], "type": "turn_ended"}
        ada.two.patch(f"/api/sessions/{session}", json={"title": "Another"})
        assert socket.next()["session"]["title"] == "Another"
        ada.two.delete(f"/api/sessions/{session}")
        assert socket.next() == {"type": "session_deleted", "session": {"session_id": session}}


def test_a_stream_over_mqtt_follows_the_other_process(
    pair: Pair, ada: Clients, llm: FakeLLM, mosquitto: Mosquitto, session: str
) -> None:
    topic = f"{pair.project}/stream/{session}/r"
    game = GameClient(mosquitto.port, topic)
    with asked(ada.two, session, llm, message="hi", request_id="r") as held:
        wait_until(lambda: llm.running, what="the generation")
        said = {"message": "hi", "requestId": "r", "stream": True, "token": token_of(ada.one)}
        game.publish(f"{pair.project}/user_input/{session}", said)
        game.reply(topic, 2)
        assert game.json_replies(topic)[1]["content"] == SOME, "the generation is held"
        held.set()
        game.wait_for(lambda: json.loads(game.messages_unlocked(topic)[-1])["type"] == "final")
    game.close()


@pytest.mark.parametrize("pair", ["redis"], indirect=True)
def test_a_torn_wire_makes_it_slower_and_nothing_else(
    pair: Pair, ada: Clients, llm: FakeLLM, session: str
) -> None:
    assert pair.redis is not None
    with chat(pair.one, ada.one, session) as socket, asked(ada.two, session, llm) as held:
        socket.until("ai_message_chunk")
        pair.redis.stop()
        held.set()
        rest = socket.until("ai_message_complete")
        assert SOME + reply(rest) == rest[-1]["response"] == f"{SOME} more!"
    with chat(pair.one, ada.one, session) as socket, asked(ada.two, session, llm) as held:
        pair.redis.start()
        assert reply(socket.until("ai_message_chunk")) == SOME, "it works again, and what was missed is told"
