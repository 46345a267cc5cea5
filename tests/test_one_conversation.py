"""One session used by every door, in turn and at once; streams that are cut and go on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any

import httpx
import pytest
from openai import OpenAI
from paho.mqtt.enums import MQTTProtocolVersion
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from app.events import new_id
from tests.fake_llm import FakeLLM, Script, text
from tests.proxy import Proxy
from tests.support import GameClient, Mosquitto, Portal, ask, token_of

pytestmark = pytest.mark.slow

PIECES = [f"{number} " for number in range(400)]
CUTS = 20

Say = Callable[[str], str]
"""Says something by one door, and returns the answer."""


@pytest.fixture
def doors(
    fake_portal: Portal, client: httpx.Client, mosquitto: Mosquitto, session: str
) -> Iterator[dict[str, Say]]:
    """Every door, as the same person in the same session."""
    body = {"session_id": session}
    old = GameClient(mosquitto.port, f"maze/assistant_response/{session}")
    new = GameClient(mosquitto.port, f"reply/{session}", protocol=MQTTProtocolVersion.MQTTv5)
    sdk = OpenAI(base_url=f"{fake_portal.url}/v1", api_key=token_of(client))

    def rest(message: str) -> str:
        return str(ask(client, session, message=message).json()["response"])

    def sse(message: str) -> str:
        streamed = client.post("/api/llm/chat/session/stream", json={**body, "message": message})
        return said_in(events_of(streamed.text))

    def socket(message: str) -> str:
        url = fake_portal.url.replace("http://", "ws://")
        headers = {"Authorization": client.headers["Authorization"]}
        with connect(f"{url}/ws/chat/{session}", additional_headers=headers) as opened:
            request_id = new_id()
            opened.send(json.dumps({"type": "send_message", "message": message, "request_id": request_id}))
            mine: str | None = None
            while True:
                said = json.loads(opened.recv(60))
                if said.get("request_id") == request_id:
                    mine = said["turn_id"]
                if said["type"] == "ai_message_complete" and said["turn_id"] == mine:
                    return str(said["response"])

    def mqtt(message: str) -> str:
        request_id = new_id()
        payload = {"message": message, "requestId": request_id, "token": token_of(client), "format": "json"}
        old.publish(f"maze/user_input/{session}", payload)
        return answer_to(old, f"maze/assistant_response/{session}", request_id)

    def mqtt5(message: str) -> str:
        request_id = new_id()
        payload = {"message": message, "requestId": request_id, "token": token_of(client), "format": "json"}
        topic = f"maze/assistant_response/{session}"
        new.publish(f"maze/user_input/{session}", payload, ResponseTopic=topic)
        return answer_to(old, topic, request_id)

    def openai(message: str) -> str:
        headers = {"X-Session-Id": session}
        completion = sdk.chat.completions.create(
            model="default", messages=[{"role": "user", "content": message}], extra_headers=headers
        )
        return completion.choices[0].message.content or ""

    yield {"rest": rest, "sse": sse, "socket": socket, "mqtt": mqtt, "mqtt5": mqtt5, "openai": openai}
    old.close()
    new.close()
    sdk.close()


def events_of(stream: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]


def answer_to(game: GameClient, topic: str, request_id: str) -> str:
    def found() -> list[dict[str, Any]]:
        answers = [json.loads(payload) for payload in game.messages_unlocked(topic)]
        return [
            answer for answer in answers if answer.get("requestId", answer.get("request_id")) == request_id
        ]

    game.wait_for(found)
    return str(found()[0]["response"])


def conversation(client: httpx.Client, session: str) -> list[tuple[str, str]]:
    rows = client.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
    return [(row["role"], row["content"]) for row in rows if row["role"] != "system"]


def test_one_session_by_every_door_in_turn(
    doors: dict[str, Say], client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(echo=True)
    for name, say in doors.items():
        assert say(f"by {name}") == f"echo: by {name}"
    said = [("user", f"by {name}") for name in doors]
    expected = [line for pair in ((s, ("assistant", f"echo: {s[1]}")) for s in said) for line in pair]
    assert conversation(client, session) == expected
    last = [(m["role"], m["content"]) for m in llm.requests[-1]["messages"] if m["role"] != "system"]
    assert last == expected[:-1], "the model was told all that was said before, by whichever door"


def test_one_session_by_every_door_at_once(
    doors: dict[str, Say], client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(echo=True)
    asked = [(name, f"{name} {number}") for number in range(2) for name in doors]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda pair: doors[pair[0]](pair[1]), asked))
    assert answers == [f"echo: {message}" for _, message in asked]
    seen = conversation(client, session)
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    assert all(answer == ("assistant", f"echo: {question[1]}") for question, answer in pairs)
    assert sorted(question[1] for question, _ in pairs) == sorted(message for _, message in asked)


def test_a_stream_that_is_cut_twenty_times_gives_the_exact_text(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(pieces=text(*PIECES), between=0.005)
    chance = random.Random(7)
    with closing(Proxy(fake_portal.port)) as proxy:
        seen: list[dict[str, Any]] = []
        coming, last, turn, cuts = "", "", "", 0
        while not seen or seen[-1]["type"] != "final":
            url = f"{proxy.url}/api/llm/turns/{turn}/events"
            method, body = ("GET", None) if turn else ("POST", {"session_id": session, "message": "go"})
            if body is not None:
                url, body = f"{proxy.url}/api/llm/chat/session/stream", {**body, "request_id": "r"}
            headers = {"Authorization": client.headers["Authorization"]}
            if last:
                headers["Last-Event-ID"] = last
            until = chance.randrange(1, 20) if cuts < CUTS else None
            with suppress(httpx.TransportError), httpx.stream(method, url, json=body, headers=headers) as got:
                for line in got.iter_lines():
                    if line.startswith("id: "):
                        coming = line[4:]
                    elif line.startswith("data: "):
                        last = coming
                        seen.append(json.loads(line[6:]))
                        turn = seen[-1]["turn_id"]
                        until = None if until is None else until - 1
                    if until == 0:
                        cuts += 1
                        proxy.cut()
                        break
    assert_whole(seen, llm, cuts)


def rest_of(opened: ClientConnection, turn: str, after: str) -> Iterator[dict[str, Any]]:
    """The events of a turn behind a place, over a socket, in the words of other doors."""
    opened.send(json.dumps({"type": "resume", "turn_id": turn, "after": after}))
    names = {"ai_message_chunk": "token", "ai_message_complete": "final"}
    resumed = False
    while True:
        said = json.loads(opened.recv(20))
        resumed = resumed or said["type"] == "resumed"
        if resumed and "id" in said:
            yield {**said, "type": names.get(said["type"], said["type"])}


def said_in(events: list[dict[str, Any]]) -> str:
    return "".join(event["content"] for event in events if event["type"] == "token")


def assert_whole(seen: list[dict[str, Any]], llm: FakeLLM, cuts: int) -> None:
    assert cuts == CUTS
    assert said_in(seen) == seen[-1]["response"] == "".join(PIECES)
    assert len(llm.requests) == 1, "it was generated once"


def test_a_socket_that_is_cut_twenty_times_gives_the_exact_text(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(pieces=text(*PIECES), between=0.005)
    chance = random.Random(7)
    headers = {"Authorization": client.headers["Authorization"]}
    accepted = {"session_id": session, "message": "go", "request_id": "r"}
    with client.stream("POST", "/api/llm/chat/session/stream", json=accepted) as streamed:
        seen = [next(event for line in streamed.iter_lines() for event in events_of(line))]
    with closing(Proxy(fake_portal.port)) as proxy:
        turn, last, cuts = seen[0]["turn_id"], "1.0", 0
        url = f"{proxy.url.replace('http://', 'ws://')}/ws/chat/{session}"
        while seen[-1]["type"] != "final":
            until = chance.randrange(1, 20) if cuts < CUTS else None
            with suppress(ConnectionClosed), connect(url, additional_headers=headers) as opened:
                for event in rest_of(opened, turn, last):
                    seen.append(event)
                    last = event["id"]
                    if event["type"] == "final":
                        break
                    until = None if until is None else until - 1
                    if until == 0:
                        cuts += 1
                        proxy.cut()
                        break
    assert_whole(seen, llm, cuts)


def test_who_changes_the_door_misses_nothing_and_sees_nothing_twice(
    fake_portal: Portal, client: httpx.Client, mosquitto: Mosquitto, llm: FakeLLM, session: str
) -> None:
    """From MQTT to server-sent events, and from there to a socket, while the turn runs."""
    pieces = [f"{number} " for number in range(60)]
    llm.script = Script(pieces=text(*pieces), between=0.02)
    topic = f"maze/stream/{session}/r"
    game = GameClient(mosquitto.port, topic)
    asked = {"message": "go", "requestId": "r", "stream": True, "token": token_of(client)}
    game.publish(f"maze/user_input/{session}", asked)
    game.reply(topic, 8)
    seen = game.json_replies(topic)[:8]
    turn, last = seen[0]["turn_id"], f"1.{seen[-1]['seq']}"
    with client.stream("GET", f"/api/llm/turns/{turn}/events", params={"after": last}) as streamed:
        for line in streamed.iter_lines():
            last = line[4:] if line.startswith("id: ") else last
            seen += events_of(line)
            if len(seen) > 20:
                break
    url = fake_portal.url.replace("http://", "ws://")
    headers = {"Authorization": client.headers["Authorization"]}
    with connect(f"{url}/ws/chat/{session}", additional_headers=headers) as opened:
        for event in rest_of(opened, turn, last):
            seen.append(event)
            if event["type"] == "final":
                break
    assert said_in(seen) == seen[-1]["response"] == "".join(pieces)
    game.close()
