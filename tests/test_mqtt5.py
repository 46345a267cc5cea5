"""What MQTT 5 clients can say, and what they get for it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from app.events import new_id
from tests.fake_llm import FakeLLM, Script, text
from tests.support import GameClient, Mosquitto, Portal, token_of, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def game(fake_portal: Portal, mosquitto: Mosquitto) -> Iterator[GameClient]:
    client = GameClient(mosquitto.port, "maze/#", "general/#", protocol=MQTTProtocolVersion.MQTTv5)
    yield client
    client.close()


def said_with(game: GameClient, topic: str, number: int = 1) -> Any:
    """The properties of the `number`th message on a topic."""
    game.reply(topic, number)
    return [p for (name, _, _), p in zip(game.received, game.properties, strict=True) if name == topic][
        number - 1
    ]


def test_the_answer_goes_to_the_response_topic_with_its_correlation(
    game: GameClient, llm: FakeLLM, session: str
) -> None:
    wanted, data = f"maze/assistant_response/{session}/left", bytes(range(256))
    body = {"message": "hi", "format": "json"}
    for number in (1, 2):
        game.publish(f"maze/user_input/{session}", body, ResponseTopic=wanted, CorrelationData=data)
        told = said_with(game, wanted, number)
    assert told.CorrelationData == data
    assert told.ContentType == "application/json"
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
    answers = game.json_replies(wanted)
    assert {answer["requestId"] for answer in answers} == {f"c-{digest}"}
    assert len({answer["turn_id"] for answer in answers}) == 1, (
        "the same correlation data is the same request"
    )
    assert len(llm.requests) == 1
    assert game.messages(f"maze/assistant_response/{session}") == []


def test_text_stays_text_and_errors_are_json(game: GameClient, llm: FakeLLM, session: str) -> None:
    wanted = f"maze/assistant_response/{session}"
    game.publish(f"maze/user_input/{session}", "hi", ResponseTopic=wanted, CorrelationData=b"1")
    assert said_with(game, wanted).ContentType == "text/plain"
    assert game.messages(wanted) == [b"Hello there"]
    bad = {"message": "hi", "temperature": 9, "requestId": "r"}
    game.publish(f"maze/user_input/{session}", bad, ResponseTopic=wanted, CorrelationData=b"2")
    assert said_with(game, wanted, 2).CorrelationData == b"2"
    told = json.loads(game.messages(wanted)[1])
    assert (told["requestId"], told["error"]["code"]) == ("r", "invalid_request")


@pytest.mark.parametrize(
    "topic",
    [
        "maze/assistant_response/other",
        "maze/assistant_response/{id}x",
        "maze/stream/{id}/r",
        "maze/user_input/{id}",
        "maze/status",
        "general/assistant_response/{id}",
        "maze/device/cab-7/assistant_response/{id}",
    ],
)
def test_no_other_response_topic_is_written_to(
    game: GameClient, llm: FakeLLM, session: str, topic: str
) -> None:
    wanted = topic.format(id=session)
    game.publish(f"maze/user_input/{session}", "hi", ResponseTopic=wanted, CorrelationData=b"x")
    told = json.loads(game.reply(f"maze/assistant_response/{session}"))
    assert told["error"]["message"].startswith("Response Topic: ")
    assert not llm.requests
    assert [
        payload for payload in game.messages(wanted) if payload != b"hi" and b'"state"' not in payload
    ] == []


def test_a_hint_at_the_response_topic(game: GameClient, llm: FakeLLM, session: str) -> None:
    wanted = f"maze/hint/{session}/mine"
    game.publish(f"maze/state/{session}", {"x": 1}, ResponseTopic=wanted, CorrelationData=b"7")
    assert json.loads(game.reply(wanted))["hint"] == "Hello there"


def test_the_event_that_ends_a_state_has_the_hint_wherever_it_goes(
    game: GameClient, llm: FakeLLM, session: str
) -> None:
    wanted = f"maze/assistant_response/{session}/mine"
    game.publish(f"maze/state/{session}", {"x": 1, "format": "json"}, ResponseTopic=wanted)
    told = json.loads(game.reply(wanted))
    assert (told["type"], told["hint"], told["response"]) == ("final", "Hello there", "Hello there")


def test_a_fresh_session_id_at_the_response_topic(game: GameClient) -> None:
    mine = f"maze/session/response/{new_id()}"
    game.publish("maze/session", b"", ResponseTopic=mine, CorrelationData=b"9")
    assert said_with(game, mine).CorrelationData == b"9"
    assert len(game.messages(mine)[0]) == 28
    assert game.messages("maze/session/response") == []


def test_the_expiry_is_the_deadline_and_the_answers_life(
    game: GameClient, llm: FakeLLM, session: str
) -> None:
    game.publish(f"maze/user_input/{session}", "hi", MessageExpiryInterval=60)
    assert said_with(game, f"maze/assistant_response/{session}").MessageExpiryInterval in {59, 60}
    llm.script = Script(before_first=3.0)
    game.publish(f"maze/user_input/{session}", {"message": "long", "requestId": "r1"})
    wait_until(lambda: llm.running == 1, what="a generation")
    body = {"message": "late", "requestId": "r2", "format": "json"}
    game.publish(f"maze/user_input/{session}", body, MessageExpiryInterval=1)
    told = json.loads(game.reply(f"maze/assistant_response/{session}", 2))
    assert (told["type"], told["requestId"]) == ("expired", "r2")
    game.reply(f"maze/assistant_response/{session}", 3)
    assert len(llm.requests) == 2


def test_what_user_properties_say(fake_portal: Portal, game: GameClient, llm: FakeLLM, session: str) -> None:
    with fake_portal.client() as web:
        said = [("token", token_of(web)), ("maxChunkBytes", "256"), ("other", "x")]
        body = {"message": "hi", "stream": True, "requestId": "r"}
        game.publish(f"maze/user_input/{session}", body, UserProperty=said)
        game.reply(f"maze/assistant_response/{session}")
        rows = web.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
        assert [row["content"] for row in rows] == ["hi", "Hello there"]
    assert max(map(len, game.messages(f"maze/stream/{session}/r"))) < 256
    game.publish(f"maze/user_input/{session}", body, UserProperty=[("token", "forged")])
    assert game.reply(f"maze/assistant_response/{session}", 2).startswith(b"Error: ")


def test_cancelling_with_correlation_data(game: GameClient, llm: FakeLLM, session: str) -> None:
    llm.script = Script(pieces=text(*["on "] * 500), between=0.05)
    for name in ("one", "two", "three"):
        body = {"message": name, "format": "json"}
        game.publish(f"maze/user_input/{session}", body, CorrelationData=name.encode())
    wait_until(lambda: llm.running == 1, what="a generation")
    cancel, told = f"maze/cancel/{session}", f"maze/assistant_response/{session}"
    game.publish(cancel, {"requestId": "none"}, CorrelationData=b"c1")
    assert json.loads(game.reply(f"maze/hint/{session}"))["hint"] == "Nothing to cancel", (
        "a given id is strict"
    )
    game.publish(cancel, b"", CorrelationData=b"two")
    assert said_with(game, told).CorrelationData == b"two", "it waits, and is what the data name"
    game.publish(cancel, b"", CorrelationData=b"c2")
    assert said_with(game, told, 2).CorrelationData == b"one", (
        "the data name the cancel: what runs is stopped"
    )
    wait_until(lambda: len(llm.requests) == 2 and llm.running == 1, what="the next generation")
    game.publish(cancel, {}, CorrelationData=b"c3")
    assert said_with(game, told, 3).CorrelationData == b"three"
    assert {answer["type"] for answer in game.json_replies(told)} == {"cancelled"}
    game.publish(cancel, b"", CorrelationData=b"c4")
    assert json.loads(game.reply(f"maze/hint/{session}", 2))["hint"] == "Nothing to cancel"
    assert said_with(game, f"maze/hint/{session}", 2).CorrelationData == b"c4"
