"""The MQTT door, against a real broker, the portal as users run it, and a real model."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.events import new_id
from tests.support import GameClient, LlamaServer, Mosquitto, Portal, token_of, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def game(portal: Portal, mosquitto: Mosquitto) -> Iterator[GameClient]:
    client = GameClient(mosquitto.port, "maze/assistant_response/#", "maze/status")
    yield client
    client.close()


def replies_at(session: str) -> str:
    return f"maze/assistant_response/{session}"


def ask_json(game: GameClient, session: str, **body: Any) -> dict[str, Any]:
    number = len(game.messages(replies_at(session))) + 1
    game.publish(f"maze/user_input/{session}", {"format": "json", "maxTokens": 8, **body})
    return dict(json.loads(game.reply(replies_at(session), number)))


def test_plain_text_is_answered_in_plain_text(game: GameClient, session: str) -> None:
    game.publish(f"maze/user_input/{session}", "Say hi")
    reply = game.reply(replies_at(session)).decode()
    assert reply
    assert not reply.startswith(("{", "Error"))


def test_json_with_parameters_is_answered_with_the_ending(game: GameClient, session: str) -> None:
    answer = ask_json(game, session, message="Say hi", requestId="r-1", temperature="0", maxTokens="3")
    assert (answer["type"], answer["requestId"], answer["sessionId"]) == ("final", "r-1", session)
    assert answer["usage"]["completion_tokens"] == 3
    again = ask_json(game, session, message="Say hi", requestId="r-1", temperature="0", maxTokens="3")
    assert again == answer, "a repeated request id is answered again with the same text"
    other = ask_json(game, session, message="Say ho", requestId="r-1")
    assert other["error"]["code"] == "conflict"


@pytest.mark.parametrize(
    ("topic", "body", "expected"),
    [
        ("maze/user_input/topic-{id}", {"sessionId": "body-{id}", "clientId": "client-{id}"}, "body-{id}"),
        ("maze/user_input/topic-{id}", {"clientId": "client-{id}"}, "topic-{id}"),
        ("maze/user_input", {"clientId": "client-{id}"}, "client-{id}"),
    ],
)
def test_where_the_session_is_named(
    game: GameClient, session: str, topic: str, body: dict[str, str], expected: str
) -> None:
    body = {key: value.format(id=session) for key, value in body.items()}
    game.publish(topic.format(id=session), {"message": "hi", "maxTokens": 1, **body})
    game.reply(replies_at(expected.format(id=session)))


def test_a_request_without_any_session_gets_one_of_its_own(game: GameClient) -> None:
    marker = new_id()
    game.publish("maze/user_input", {"message": "hi", "maxTokens": 1, "requestId": marker, "format": "json"})
    game.wait_for(lambda: any(marker.encode() in payload for _, payload, _ in game.received))


def test_a_reply_topic_below_the_own_session(game: GameClient, session: str) -> None:
    mine = f"{replies_at(session)}/left/1"
    game.publish(f"maze/user_input/{session}", {"message": "hi", "maxTokens": 1, "replyTopic": mine})
    assert game.reply(mine)


@pytest.mark.parametrize(
    "topic",
    [
        "maze/assistant_response/other",
        "maze/assistant_response/{id}x",
        "maze/assistant_response/{id}/#",
        "maze/assistant_response/{id}/+/a",
        "general/assistant_response/{id}",
        "$SYS/x",
        "maze/status",
    ],
)
def test_no_other_reply_topic_is_written_to(game: GameClient, session: str, topic: str) -> None:
    wanted = topic.format(id=session)
    game.publish(f"maze/user_input/{session}", {"message": "hi", "replyTopic": wanted})
    assert game.reply(replies_at(session)).startswith(b"Error: replyTopic:")


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"message": "hi", "temperature": 9}, "temperature"),
        ({"message": "hi", "topP": "much"}, "topP"),
        ({"message": ""}, "message"),
        ({"prompt": "hi"}, "message"),
        ({"message": "hi", "requestId": "a/b"}, "requestId"),
        ({"message": "hi", "format": "xml"}, "format"),
        ('{"message": "hi"', "payload"),
        (b"\xff\xfe", "payload"),
    ],
)
def test_bad_input_is_named(game: GameClient, session: str, payload: Any, field: str) -> None:
    game.publish(f"maze/user_input/{session}", payload)
    assert game.reply(replies_at(session)).startswith(f"Error: {field}:".encode())


def test_a_token_leads_to_the_same_session_as_on_the_web(
    portal: Portal, game: GameClient, session: str
) -> None:
    with portal.client() as web:
        for message in ("My name is Ada.", "I like blue."):
            body = {"session_id": session, "message": message, "max_tokens": 8}
            assert web.post("/api/llm/chat/session", json=body).status_code == 200
        answer = ask_json(game, session, message="What is my name?", token=token_of(web))
        assert answer["usage"]["cached_tokens"] > 0
        messages = web.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
        asked = [message["content"] for message in messages if message["role"] == "user"]
        assert asked == ["My name is Ada.", "I like blue.", "What is my name?"]
        assert messages[-1]["content"] == answer["response"]
        assert ask_json(game, session, message="hi")["type"] == "final", "without it, it is another session"
        assert len(web.get(f"/api/llm/chat/session/{session}/history").json()["messages"]) == 6
    forged = ask_json(game, session, message="hi", token="a.b.c")
    assert forged["error"]["code"] == "unauthenticated"


def test_one_request_id_over_http_and_mqtt_is_one_generation(
    portal: Portal, game: GameClient, session: str
) -> None:
    with portal.client() as web:
        request = {"message": "Tell me something.", "requestId": "both", "format": "json", "maxTokens": 30}
        game.publish(f"maze/user_input/{session}", {**request, "token": token_of(web)})
        body = {
            "session_id": session,
            "message": "Tell me something.",
            "request_id": "both",
            "max_tokens": 30,
        }
        answer = web.post("/api/llm/chat/session", json=body).json()
        reply = json.loads(game.reply(replies_at(session)))
        assert (reply["response"], reply["turn_id"]) == (answer["response"], answer["turn_id"])
        assert len(web.get(f"/api/llm/chat/session/{session}/history").json()["messages"]) == 2


def test_stopping_over_http_what_came_over_mqtt_frees_the_slot(
    portal: Portal, llama: LlamaServer, game: GameClient, session: str
) -> None:
    def busy() -> bool:
        return any(slot["is_processing"] for slot in httpx.get(f"{llama.url}/slots").json())

    body = {"message": "Count to a thousand.", "maxTokens": 1500, "format": "json", "stream": True}
    with portal.client() as web:
        game.publish(f"maze/user_input/{session}", {**body, "token": token_of(web)})
        wait_until(busy, what="a generation")
        assert web.post(f"/api/llm/chat/session/{session}/stop").json()["ok"]
        wait_until(lambda: not busy(), 1, "the slot to be idle")
    assert json.loads(game.reply(replies_at(session)))["type"] == "cancelled"


def test_no_message_stops_the_door(game: GameClient, session: str) -> None:
    poison = base64.urlsafe_b64encode(b"[" * 3000).decode() + ".e30.x"
    for number, token in enumerate((poison, poison * 50, "a" * 100_000), 1):
        game.publish(f"maze/user_input/{session}", {"message": "hi", "token": token})
        assert game.reply(replies_at(session), number).startswith(b"Error: ")
    assert ask_json(game, session, message="hi")["type"] == "final"


def test_a_refusal_is_in_the_form_that_was_asked_for(game: GameClient, session: str) -> None:
    answer = ask_json(game, session, message="hi", requestId="r9", replyTopic="maze/other")
    assert (answer["requestId"], answer["error"]["code"]) == ("r9", "invalid_request")
    answer = ask_json(game, session, message="hi", requestId="r9", temperature=9)
    assert (answer["requestId"], answer["error"]["code"]) == ("r9", "invalid_request")


def test_an_empty_payload_clears_the_session(game: GameClient, session: str) -> None:
    long = ask_json(game, session, message="Remember the word tangerine.", systemPrompt="Be brief.")
    game.publish(f"maze/user_input/{session}", b"")
    assert game.reply(replies_at(session), 2) == b"Session cleared"
    fresh = ask_json(game, session, message="hi")
    assert fresh["usage"]["prompt_tokens"] < long["usage"]["prompt_tokens"]


def test_what_is_about_all_sessions_has_a_place_in_the_order_of_each(game: GameClient, session: str) -> None:
    for _ in range(5):
        ask_json(game, session, message="hi")
        game.publish("maze/clear_history", "all")
        assert ask_json(game, session, message="hi again")["type"] == "final"


def test_retained_requests_are_ignored(portal: Portal, game: GameClient, session: str) -> None:
    game.publish(f"maze/user_input/{session}", {"message": "old"}, retain=True)
    game.reply(replies_at(session))  # it was live when it was published
    portal.stop()
    portal.start()
    ask_json(game, session, message="new")
    assert len(game.messages(replies_at(session))) == 2
    game.publish(f"maze/user_input/{session}", b"", retain=True)


def test_status_is_retained_and_told_by_the_last_will(
    portal: Portal, game: GameClient, mosquitto: Mosquitto
) -> None:
    def states() -> list[str]:
        return [json.loads(payload)["state"] for payload in game.messages_unlocked("maze/status")]

    game.wait_for(lambda: states()[-1:] == ["online"])
    told = json.loads(game.messages("maze/status")[-1])
    assert set(told) == {"state", "birth", "model", "since", "version", "queue", "eta_s"}
    portal.kill()
    game.wait_for(lambda: states()[-1] == "offline")
    assert json.loads(game.messages("maze/status")[-1])["birth"] == told["birth"]
    portal.start()
    game.wait_for(lambda: states()[-1] == "online")
    portal.stop()
    game.wait_for(lambda: states()[-1] == "offline")
    portal.start()
    late = GameClient(mosquitto.port, "maze/status")
    late.wait_for(lambda: late.received)
    assert late.received[0][2], "who comes later is told too"
    late.close()


def test_requests_that_come_while_the_portal_is_away_are_answered_later(
    portal: Portal, game: GameClient, session: str
) -> None:
    portal.stop()
    game.publish(f"maze/user_input/{session}", {"message": "hi", "maxTokens": 1, "requestId": "r"})
    portal.start()
    game.reply(replies_at(session))


def test_the_broker_may_go_and_come_back(
    portal: Portal, mosquitto: Mosquitto, game: GameClient, session: str
) -> None:
    mosquitto.stop()
    with portal.client() as web:
        wait_until(lambda: web.get("/health/ready").json()["mqtt"] == "down", what="the portal noticing")
        assert web.get("/health/ready").status_code == 503
        mosquitto.start()
        wait_until(lambda: web.get("/health/ready").status_code == 200, 5, "the portal's return")
    later = GameClient(mosquitto.port, replies_at(session))
    later.publish(f"maze/user_input/{session}", {"message": "hi", "maxTokens": 1})
    later.reply(replies_at(session))
    later.close()
