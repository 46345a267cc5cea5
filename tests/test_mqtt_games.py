"""States, hints and the other topics of games: a real broker, and an LLM server that does as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fake_llm import FakeLLM, Script, text
from tests.support import GameClient, Mosquitto, Portal, ask, token_of, wait_until

pytestmark = pytest.mark.slow

MAP = ["#####", "#..e#", "#####"]


def calls(*wanted: tuple[str, Any]) -> list[dict[str, Any]]:
    """A reply that says "Go on." and calls tools."""
    deltas = [
        {"index": number, "id": f"c{number}", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for number, (name, arguments) in enumerate(wanted)
    ]
    return [*text("Go", " on."), {"tool_calls": deltas}]


@pytest.fixture(scope="module")
def portal(
    module_fake: FakeLLM, mosquitto: Mosquitto, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Portal]:
    running = Portal(
        tmp_path_factory.mktemp("games"),
        LLM_SERVER_URL=module_fake.url,
        LLM_MAX_CONCURRENCY="2",
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS="maze driving",
        PROJECTS_FILE="none.toml",
        HOME_ASSISTANT_DISCOVERY="true",
    ).start()
    yield running
    running.stop()


@pytest.fixture
def game(portal: Portal, mosquitto: Mosquitto) -> Iterator[GameClient]:
    client = GameClient(mosquitto.port, "maze/#", "driving/hint/#")
    yield client
    client.close()


def hint(game: GameClient, session: str, number: int = 1) -> dict[str, Any]:
    return dict(json.loads(game.reply(f"maze/hint/{session}", number)))


def asked(llm: FakeLLM) -> list[str]:
    """What the model was told in the newest request."""
    return [str(message["content"]) for message in llm.requests[-1]["messages"]]


def test_a_state_is_answered_with_a_hint_and_actions(game: GameClient, llm: FakeLLM, session: str) -> None:
    llm.script = Script(
        pieces=calls(
            ("break_wall", {"x": 1, "y": 2}),
            ("break_wall", {"x": "one"}),
            ("open_door", {}),
            ("reveal_map", {"seconds": 5}),
        )
    )
    state = {"position": {"x": 1, "y": 1}, "germs": [[3, 1], [4, 4]], "oxygen": 12, "visible_map": MAP}
    game.publish(f"maze/state/{session}", {**state, "requestId": "r-1", "maxTokens": "40"})
    assert hint(game, session) == {
        "hint": "Go on.",
        "function_calls": [
            {"name": "break_wall", "arguments": {"x": 1, "y": 2}},
            {"name": "reveal_map", "arguments": {"seconds": 5}},
        ],
        "requestId": "r-1",
    }
    sent = llm.requests[-1]
    assert sent["max_tokens"] == 40
    assert {tool["function"]["name"] for tool in sent["tools"]} >= {"break_wall", "move_exit", "slow_germs"}
    assert sent["messages"][0]["content"].startswith("You guide a player through a maze")
    lines = sent["messages"][-1]["content"].splitlines()
    assert lines[1:] == ["position: (1,1)", "germs: (3,1) (4,4)", "oxygen: 12", "visible_map:", *MAP]


def test_a_hint_that_the_model_writes_as_json_is_read(game: GameClient, llm: FakeLLM, session: str) -> None:
    written = {
        "hint": "North.",
        "suggestion": "Then east.",
        "function_calls": [
            {"name": "freeze_germs", "arguments": {"seconds": 3}},
            {"name": "rm", "arguments": {}},
        ],
    }
    llm.script = Script(pieces=text(f"```json\n{json.dumps(written)}\n```"))
    game.publish(f"maze/state/{session}", {"state": {"oxygen": 3}, "requestId": "r"})
    told = hint(game, session)
    assert (told["hint"], told["suggestion"]) == ("North.", "Then east.")
    assert told["function_calls"] == [{"name": "freeze_germs", "arguments": {"seconds": 3}}]


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ("left", "payload"),
        ("[1, 2]", "payload"),
        ('{"oxygen": ', "payload"),
        ({"requestId": "r"}, "state"),
        ({"oxygen": 1, "temperature": 9}, "temperature"),
        ({"state": {"temperature": 30}, "maxChunkBytes": 5}, "maxChunkBytes"),
        ({"oxygen": 1, "sessionId": "a/b"}, "sessionId"),
    ],
)
def test_a_bad_state_is_named_in_json(game: GameClient, session: str, payload: Any, field: str) -> None:
    game.publish(f"maze/state/{session}", payload)
    told = hint(game, session)
    assert told["error"]["code"] == "invalid_request"
    assert told["hint"].startswith(f"Error: {field}: ")


def test_of_many_states_the_newest_is_answered(game: GameClient, llm: FakeLLM, session: str) -> None:
    gate = threading.Event()
    llm.script = Script(pieces=text("one"), gate=gate)
    game.publish(f"maze/state/{session}", {"step": 0, "requestId": "s0"})
    wait_until(lambda: llm.running == 1, what="the first generation")
    llm.script = Script(pieces=text("newest"))
    for step in range(1, 51):
        game.publish(f"maze/state/{session}", {"step": step, "requestId": f"s{step}"})
    game.wait_for(lambda: len(game.messages_unlocked(f"maze/hint/{session}")) == 49)
    gate.set()
    game.wait_for(lambda: len(game.messages_unlocked(f"maze/hint/{session}")) == 51)
    told = {answer["requestId"]: answer for answer in game.json_replies(f"maze/hint/{session}")}
    assert told["s0"]["hint"] == "one"
    assert told["s50"]["hint"] == "newest"
    older = [told[f"s{step}"] for step in range(1, 50)]
    assert {answer["error"]["code"] for answer in older} == {"superseded"}
    assert {answer["hint"] for answer in older} == {""}
    assert len(llm.requests) == 2
    assert asked(llm)[-1].endswith("step: 50")
    game.publish(f"maze/state/{session}", {"step": 7, "requestId": "s7"})
    again = hint(game, session, 52)
    assert (again["requestId"], again["error"]["code"]) == ("s7", "superseded"), "it is replayed as it was"


def test_messages_are_not_superseded_by_states(game: GameClient, llm: FakeLLM, session: str) -> None:
    gate = threading.Event()
    llm.script = Script(echo=True, gate=gate)
    game.publish(f"maze/user_input/{session}", {"message": "one", "requestId": "m1"})
    wait_until(lambda: llm.running == 1, what="the first generation")
    llm.script = Script(echo=True)
    game.publish(f"maze/state/{session}", {"step": 1, "requestId": "s1"})
    game.publish(f"maze/user_input/{session}", {"message": "two", "requestId": "m2"})
    game.publish(f"maze/state/{session}", {"step": 2, "requestId": "s2"})
    game.reply(f"maze/hint/{session}")
    gate.set()
    game.wait_for(lambda: len(game.messages_unlocked(f"maze/assistant_response/{session}")) == 2)
    game.wait_for(lambda: len(game.messages_unlocked(f"maze/hint/{session}")) == 2)
    assert game.messages(f"maze/assistant_response/{session}") == [b"echo: one", b"echo: two"]
    first, second = game.json_replies(f"maze/hint/{session}")
    assert (first["requestId"], first["error"]["code"], second["requestId"]) == ("s1", "superseded", "s2")


def test_the_same_state_gets_another_hint_and_states_do_not_fill_the_history(
    portal: Portal, game: GameClient, llm: FakeLLM, session: str
) -> None:
    with portal.client() as web:
        token = token_of(web)
        ask(web, session, message="My name is Ada.", project="maze")
        for number in range(1, 4):
            game.publish(f"maze/state/{session}", {"step": 1, "token": token})
            hint(game, session, number)
            assert ("sent this very state" in asked(llm)[-1]) == (number > 1)
        assert "3 times" in asked(llm)[-1]
        game.publish(f"maze/state/{session}", {"step": 2, "token": token})
        hint(game, session, 4)
        assert "this very state" not in asked(llm)[-1]
        assert len(asked(llm)) == 4, "system prompt, one exchange, and this state"
        rows = web.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
        assert [row["content"] for row in rows[1:]] == [
            "My name is Ada.",
            "Hello there",
            "step: 2",
            "Hello there",
        ]
        ask(web, session, message="Where am I?")
        assert asked(llm)[-3:-1] == ["The state of the game:\nstep: 2", "Hello there"]
    portal.stop()
    portal.start()
    with portal.client() as web:
        game.publish(f"maze/state/{session}", {"step": 2, "token": token_of(web)})
        hint(game, session, 5)
        assert "2 times" in asked(llm)[-1], "also after a restart"


def test_another_prompt_for_a_session(game: GameClient, llm: FakeLLM, session: str) -> None:
    game.publish(f"maze/user_input/{session}", "hello")
    game.reply(f"maze/assistant_response/{session}")
    game.publish(f"maze/template/{session}", {"template": "Speak like a pirate.", "requestId": "t"})
    assert hint(game, session) == {"hint": "Template updated", "requestId": "t"}
    game.publish(f"maze/user_input/{session}", "ahoy")
    game.reply(f"maze/assistant_response/{session}", 2)
    assert asked(llm) == ["Speak like a pirate.", "ahoy"], "it begins anew"
    body = {"prompt_template": {"content": "Be kind."}, "reset": "false", "sessionId": session}
    game.publish("maze/template", body)
    hint(game, session, 2)
    game.publish(f"maze/user_input/{session}", "and now")
    game.reply(f"maze/assistant_response/{session}", 3)
    assert asked(llm) == ["Be kind.", "ahoy", "Hello there", "and now"]
    game.publish(f"maze/template/{session}", {"reset": True})
    assert hint(game, session, 3)["error"]["message"].startswith("template: ")


def test_another_prompt_for_a_project(portal: Portal, game: GameClient, llm: FakeLLM, session: str) -> None:
    game.publish("driving/template", {"system_prompt": "Drive well.", "clientId": "x"})
    game.reply("driving/hint/all")
    with portal.client() as web:
        ask(web, session, project="driving")
        assert asked(llm)[0] == "Drive well."
        game.publish("driving/template", {"template": "Faster.", "token": token_of(web)})
        game.reply("driving/hint/all", 2)
    with portal.client("watcher", role="viewer") as viewer:
        game.publish("driving/template", {"template": "Mine.", "token": token_of(viewer)})
        refused = json.loads(game.reply("driving/hint/all", 3))
        assert refused["error"]["code"] == "forbidden"


@pytest.mark.parametrize("verb", ["clear_history", "delete_session"])
@pytest.mark.parametrize("form", ["topic", "session_id", "sessionId", "target", "text"])
def test_clearing_and_deleting(game: GameClient, llm: FakeLLM, session: str, verb: str, form: str) -> None:
    game.publish(f"maze/user_input/{session}", "one")
    game.reply(f"maze/assistant_response/{session}")
    topic = f"maze/{verb}/{session}" if form == "topic" else f"maze/{verb}"
    payload: Any = {"topic": b"", "text": session}.get(form, {form: session})
    game.publish(topic, payload)
    assert hint(game, session)["hint"] == (
        "History cleared" if verb == "clear_history" else "Session deleted"
    )
    game.publish(f"maze/user_input/{session}", "two")
    game.reply(f"maze/assistant_response/{session}", 2)
    assert asked(llm)[1:] == ["two"]


def test_clearing_all_sessions(portal: Portal, game: GameClient, llm: FakeLLM, session: str) -> None:
    game.publish(f"maze/user_input/{session}", "one")
    game.reply(f"maze/assistant_response/{session}")
    with portal.client() as web:
        ask(web, session, project="maze")
        game.publish("maze/clear_history", {"target": "all", "token": token_of(web)})
        refused = json.loads(game.reply("maze/hint/all"))
        assert refused["error"]["code"] == "forbidden"
        game.publish("maze/clear_history", "all")
        assert json.loads(game.reply("maze/hint/all", 2))["hint"] == "History cleared"
        assert len(web.get(f"/api/llm/chat/session/{session}/history").json()["messages"]) == 3, (
            "on this machine anybody may clear what nobody has signed for, and nothing else"
        )
    game.publish(f"maze/user_input/{session}", "two")
    game.reply(f"maze/assistant_response/{session}", 2)
    assert asked(llm)[1:] == ["two"]


def test_a_fresh_session_id(game: GameClient, session: str) -> None:
    game.publish("maze/session", "please")
    plain = game.reply("maze/session/response").decode()
    assert len(plain) == 28
    game.publish("maze/session", {"requestId": "r", "clientId": "c"})
    told = json.loads(game.reply("maze/session/response", 2))
    assert (told["requestId"], told["clientId"], len(told["sessionId"])) == ("r", "c", 28)
    assert told["sessionId"] != plain


def test_cancelling(game: GameClient, llm: FakeLLM, session: str) -> None:
    game.publish(f"maze/cancel/{session}", b"")
    assert hint(game, session)["hint"] == "Nothing to cancel"
    llm.script = Script(pieces=text(*["on "] * 500), between=0.05)
    for name in ("one", "two"):
        game.publish(f"maze/user_input/{session}", {"message": name, "requestId": name, "format": "json"})
    wait_until(lambda: llm.running == 1, what="a generation")
    game.publish(f"maze/cancel/{session}", {"requestId": "two"})
    first = json.loads(game.reply(f"maze/assistant_response/{session}"))
    assert (first["requestId"], first["type"], first["response"]) == ("two", "cancelled", "")
    game.publish(f"maze/cancel/{session}", b"")
    second = json.loads(game.reply(f"maze/assistant_response/{session}", 2))
    assert (second["requestId"], second["type"]) == ("one", "cancelled")
    assert second["response"].startswith("on ")
    wait_until(lambda: llm.running == 0, 1, "the upstream request to be closed")


def test_stopping_over_http_what_came_over_mqtt(
    portal: Portal, game: GameClient, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(pieces=text(*["on "] * 500), between=0.05)
    with portal.client() as web:
        game.publish(
            f"maze/user_input/{session}", {"message": "hi", "token": token_of(web), "format": "json"}
        )
        wait_until(lambda: llm.running == 1, what="a generation")
        assert web.post(f"/api/llm/chat/session/{session}/stop").json()["ok"]
        wait_until(lambda: llm.running == 0, 1, "the upstream request to be closed")
    assert json.loads(game.reply(f"maze/assistant_response/{session}"))["type"] == "cancelled"


def test_a_deadline_that_passes_in_the_queue_costs_nothing(
    game: GameClient, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(before_first=3.0)
    for other in ("a", "b"):  # both places
        game.publish(f"maze/user_input/{session}-{other}", "long")
    wait_until(lambda: llm.running == 2, what="a busy server")
    body = {"message": "hi", "requestId": "r", "deadline_s": 1, "format": "json"}
    game.publish(f"maze/user_input/{session}", body)
    told = json.loads(game.reply(f"maze/assistant_response/{session}"))
    assert (told["type"], told["requestId"]) == ("expired", "r")
    for other in ("a", "b"):
        game.reply(f"maze/assistant_response/{session}-{other}")
    assert len(llm.requests) == 2
    assert len(game.messages(f"maze/assistant_response/{session}")) == 1


def test_it_shows_itself_to_home_assistant(portal: Portal, mosquitto: Mosquitto) -> None:
    client = GameClient(mosquitto.port, "homeassistant/device/#")
    topics = client.wait_for(lambda: [t for t, _, _ in client.received if t.endswith("_driving/config")])
    told = json.loads(client.messages(topics[0])[0])
    client.close()
    parts = told["components"]
    assert {part["platform"] for part in parts.values()} == {"sensor", "notify"}
    assert len({part["unique_id"] for part in parts.values()}) == len(parts)
    assert parts["message"]["command_topic"] == "driving/user_input/home-assistant"
    assert parts["reply"]["state_topic"] == "driving/assistant_response/home-assistant"
    assert told["availability"]["topic"] == parts["queue"]["state_topic"] == "driving/status"
