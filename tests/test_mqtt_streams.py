"""Events of a turn over MQTT, in packets that small clients can take."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.events import new_id
from tests.fake_llm import FakeLLM, Script, text
from tests.support import GameClient, MakePortal, Mosquitto, Portal, wait_until

pytestmark = pytest.mark.slow

HEADER = 5
"""Bytes of a packet beside topic and payload: type, length, length of the topic, packet id (at most)."""


@pytest.fixture
def game(fake_portal: Portal, mosquitto: Mosquitto) -> Iterator[GameClient]:
    client = GameClient(mosquitto.port, "maze/stream/#", "maze/assistant_response/#", "maze/hint/#")
    yield client
    client.close()


def stream(game: GameClient, session: str, request_id: str) -> list[dict[str, Any]]:
    """The events of a turn, up to the one that ends it."""
    topic = f"maze/stream/{session}/{request_id}"
    endings = ("final", "cancelled", "superseded", "expired", "error")
    game.wait_for(lambda: any(json.loads(p)["type"] in endings for p in game.messages_unlocked(topic)), 60)
    return game.json_replies(topic)


def joined(events: list[dict[str, Any]]) -> str:
    return "".join(event["content"] for event in events if event["type"] == "token")


def test_a_turn_is_streamed_in_order(game: GameClient, llm: FakeLLM, session: str) -> None:
    llm.script = Script(pieces=text("One", " two", " three"), between=0.05)
    game.publish(f"maze/user_input/{session}", {"message": "count", "requestId": "r", "stream": True})
    events = stream(game, session, "r")
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert (events[0]["type"], events[-1]["type"]) == ("accepted", "final")
    assert joined(events) == events[-1]["response"] == "One two three"
    assert len({event["turn_id"] for event in events}) == 1
    assert game.reply(f"maze/assistant_response/{session}") == b"One two three"


def test_an_answer_with_emoji_fits_into_small_packets(game: GameClient, llm: FakeLLM, session: str) -> None:
    answer = 'Ünïcode "quoted"\n👩‍🚀🧭👾 and \\ more 🌍 ' * 20
    llm.script = Script(pieces=text(answer[:100], answer[100:101], answer[101:]))
    body = {"message": "go", "requestId": "esp", "stream": True, "maxChunkBytes": "256", "format": "json"}
    game.publish(f"maze/user_input/{session}", body)
    events = stream(game, session, "esp")
    topic = f"maze/stream/{session}/esp"
    sizes = [HEADER + len(topic) + len(payload) for payload in game.messages(topic)]
    assert max(sizes) <= 256
    assert joined(events) == answer
    assert [event["seq"] for event in events] == list(range(len(events)))
    final = events[-1]
    assert "response" not in final
    assert final["response_bytes"] == len(answer.encode())
    assert json.loads(game.reply(f"maze/assistant_response/{session}"))["response"] == answer


def test_a_long_topic_leaves_room_for_pieces(game: GameClient, llm: FakeLLM) -> None:
    session, request_id = "s" * 128, new_id() + "r" * 100
    llm.script = Script(pieces=text("🧭" * 300))
    body = {"message": "go", "requestId": request_id, "stream": True, "maxChunkBytes": 128}
    game.publish(f"maze/user_input/{session}", body)
    events = stream(game, session, request_id)
    assert joined(events) == "🧭" * 300
    assert max(map(len, game.messages(f"maze/stream/{session}/{request_id}"))) <= 128


def test_who_asks_again_gets_the_stream_again(game: GameClient, llm: FakeLLM, session: str) -> None:
    body = {"message": "hi", "requestId": "r", "stream": True}
    game.publish(f"maze/user_input/{session}", body)
    first = stream(game, session, "r")
    game.publish(f"maze/user_input/{session}", body)
    topic = f"maze/stream/{session}/r"
    game.wait_for(lambda: len(game.messages_unlocked(topic)) == 2 * len(first))
    assert game.json_replies(topic)[len(first) :] == first, "packet by packet"


def test_who_asks_again_while_it_runs_gets_the_stream_from_its_beginning(
    game: GameClient, llm: FakeLLM, session: str
) -> None:
    gate = threading.Event()
    llm.script = Script(pieces=text("One", " two"), held=gate)
    body = {"message": "count", "requestId": "r", "stream": True}
    game.publish(f"maze/user_input/{session}", body)
    topic = f"maze/stream/{session}/r"
    game.wait_for(lambda: any(b'"One"' in payload for payload in game.messages_unlocked(topic)))
    game.publish(f"maze/user_input/{session}", body)
    game.wait_for(lambda: sum(b'"One"' in payload for payload in game.messages_unlocked(topic)) == 2)
    gate.set()
    events = stream(game, session, "r")
    again = len(events) - 1 - [event["seq"] for event in reversed(events)].index(0)
    assert events[again]["type"] == "accepted"
    assert [event["seq"] for event in events[again:]] == list(range(len(events) - again)), "and once"
    assert joined(events[again:]) == events[-1]["response"] == "One two"
    assert joined(events[:again]) == "One"


def test_a_turn_that_is_superseded_ends_its_stream(game: GameClient, llm: FakeLLM, session: str) -> None:
    llm.script = Script(before_first=0.5)
    for step in range(3):
        body = {"state": {"step": step}, "requestId": f"s{step}", "stream": True}
        game.publish(f"maze/state/{session}", body)
    assert stream(game, session, "s1")[-1]["by"] == "s2"
    assert stream(game, session, "s2")[-1]["type"] == "final"


def test_a_stream_begins_again_after_a_crash(
    fake_thread: FakeLLM, mosquitto: Mosquitto, tmp_path: Path, make_portal: MakePortal
) -> None:
    fake_thread.script = Script(pieces=text(*["old "] * 200), between=0.05)
    portal = make_portal(
        tmp_path, LLM_SERVER_URL=fake_thread.url, MQTT_BROKER_URL=mosquitto.url, MQTT_PROJECTS="racing"
    ).start()
    game = GameClient(mosquitto.port, "racing/stream/#")
    game.publish("racing/user_input/s", {"message": "hi", "requestId": "r", "stream": True})
    topic = "racing/stream/s/r"
    game.wait_for(lambda: len(game.messages_unlocked(topic)) > 3)
    portal.kill()
    wait_until(lambda: fake_thread.running == 0, what="the server noticing")
    fake_thread.script = Script(pieces=text("new", " text"))
    portal.start()
    game.wait_for(lambda: b'"final"' in game.messages_unlocked(topic)[-1])
    events = game.json_replies(topic)
    game.close()
    begun = [event["type"] for event in events].index("restarted")
    assert events[begun]["attempt"] == 2
    after = events[begun + 1 :]
    assert [event["seq"] for event in after] == list(range(len(after))), events
    assert joined(after) == after[-1]["response"] == "new text"
