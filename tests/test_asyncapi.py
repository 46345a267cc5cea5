"""The AsyncAPI document: right in itself, and true of what the portal says."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest
from jsonschema import Draft7Validator, Draft202012Validator
from paho.mqtt.client import topic_matches_sub
from paho.mqtt.enums import MQTTProtocolVersion

from app.config import Settings
from app.events import new_id
from app.main import create_app
from app.mqtt.asyncapi import document
from app.mqtt.rights import device_rights
from tests.fake_llm import FakeLLM, Script, text
from tests.support import ROOT, GameClient, Mosquitto, Portal, wait_until

OFFICIAL = ROOT / "frontend" / "node_modules" / "@asyncapi" / "specs" / "schemas" / "3.0.0-without-$id.json"
"""The AsyncAPI initiative's JSON Schema of its documents; `npm ci` in `frontend/` fetches it."""

PROJECTS = ("maze", "general")
DOCUMENT = document(PROJECTS)


def problems_of(found: Any) -> list[str]:
    assert OFFICIAL.exists(), "run `npm ci` in frontend/"
    schema = {key: value for key, value in json.loads(OFFICIAL.read_text()).items() if key != "$schema"}
    return [f"{list(error.path)}: {error.message}" for error in Draft7Validator(schema).iter_errors(found)]


def resolve(reference: str) -> Any:
    found: Any = DOCUMENT
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        part = list(part.values())
    for inner in part if isinstance(part, list) else []:
        yield from references(inner)


def test_it_is_a_document_of_the_specification() -> None:
    assert problems_of(DOCUMENT) == []
    broken = copy.deepcopy(DOCUMENT)
    broken["operations"]["send_status"]["action"] = "publish"
    assert problems_of(broken)


def test_it_is_whole() -> None:
    for reference in references(DOCUMENT):
        resolve(reference)
    used = set(references(DOCUMENT))
    for name in DOCUMENT["components"]["messages"]:
        assert f"#/components/messages/{name}" in used
    for channel in DOCUMENT["channels"].values():
        assert re.findall(r"{(\w+)}", channel["address"]) == list(channel["parameters"])
        assert channel["messages"]
    for operation in DOCUMENT["operations"].values():
        for end in (operation, operation.get("reply", operation)):
            at = end["channel"]["$ref"]
            assert all(message["$ref"].startswith(f"{at}/messages/") for message in end["messages"])
    addresses = [channel["address"] for channel in DOCUMENT["channels"].values()]
    assert len(set(addresses)) == len(addresses)


def test_its_channels_are_what_a_device_may_use() -> None:
    rights = device_rights("cab-7", ["maze"])
    for action, filters in (("receive", rights.publish), ("send", rights.receive)):
        topics = [
            resolve(operation["channel"]["$ref"])["address"].format(
                project="maze", device="cab-7", session="s", request="r"
            )
            for operation in DOCUMENT["operations"].values()
            if operation["action"] == action
        ]
        mine = [topic for topic in topics if "/device/" in topic or topic == "maze/status"]
        assert all(any(topic_matches_sub(allowed, topic) for allowed in filters) for topic in mine)
        assert all(any(topic_matches_sub(allowed, topic) for topic in mine) for allowed in filters)


async def test_everybody_gets_it_also_where_there_is_no_broker(settings_for: Callable[..., Settings]) -> None:
    app = create_app(settings_for(mqtt_projects=PROJECTS))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://portal") as web:
        answer = await web.get("/asyncapi.json")
        assert "/asyncapi.json" not in (await web.get("/openapi.json")).json()["paths"]
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == json.loads(json.dumps(DOCUMENT))


# --- what the portal says ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """One where nobody else is."""
    running = Mosquitto(tmp_path_factory.mktemp("broker"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def portal(
    module_fake: FakeLLM, broker: Mosquitto, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Portal]:
    running = Portal(
        tmp_path_factory.mktemp("portal"),
        LLM_SERVER_URL=module_fake.url,
        MQTT_BROKER_URL=broker.url,
        MQTT_PROJECTS=" ".join(PROJECTS),
        MQTT_ACL="external",
    ).start()
    with running.client("keeper", role="admin") as admin:
        assert admin.post("/api/admin/devices", json={"name": "cab-7", "projects": ["maze"]}).is_success
    yield running
    running.stop()


class Player:
    """Says everything that can be said in a tree of topics, and waits for the answer each time."""

    def __init__(self, game: GameClient, llm: FakeLLM, tree: str) -> None:
        self.game, self.llm, self.tree, self.session = game, llm, tree, new_id()
        self.said: list[tuple[str, bytes]] = []
        """What was right."""

    def says(self, what: str, payload: Any, kind: str, to: str | None = None, **properties: Any) -> None:
        """A request that is right, and answered at `kind/to`, by default at that of the session."""
        data = json.dumps(payload) if isinstance(payload, dict) else payload
        self.said.append((f"{self.tree}/{what}", data.encode()))
        self.errs(what, payload, kind, to, **properties)

    def errs(self, what: str, payload: Any, kind: str, to: str | None = None, **properties: Any) -> None:
        """A request that is not."""
        at = f"{self.tree}/{kind}" + ("" if kind == "session/response" else f"/{to or self.session}")
        number = len(self.game.messages(at)) + 1
        self.game.publish(f"{self.tree}/{what}", payload, **properties)
        self.game.reply(at, number)

    def chats(self) -> None:
        here, reply = f"user_input/{self.session}", "assistant_response"
        self.says(here, "hi", reply)
        self.says("user_input", {"message": "hi", "sessionId": self.session, "format": "json"}, reply)
        self.errs(here, {"message": "hi", "temperature": 9}, reply)
        self.errs(here, {"message": "hi", "temperature": 9, "format": "json", "requestId": "r"}, reply)
        own = f"{self.tree}/{reply}/{self.session}"
        self.says(here, "", reply, ResponseTopic=own, CorrelationData=b"7", MessageExpiryInterval=60)

    def streams(self) -> None:
        here, reply = f"user_input/{self.session}", "assistant_response"
        self.llm.script = Script(pieces=text("word " * 200, "\N{WORLD MAP}"))
        body = {"message": "go", "stream": True, "maxChunkBytes": 256, "format": "json"}
        self.says(here, {**body, "requestId": "small"}, reply)
        self.says(here, {"message": "go", "stream": True, "requestId": "whole"}, reply)
        self.llm.script = Script(status=500)
        self.says(here, {"message": "go", "stream": True, "requestId": "fails"}, reply)
        self.says(here, {"message": "go", "format": "json"}, reply)
        self.llm.script = Script()
        for request_id in ("small", "whole", "fails"):
            topic = f"{self.tree}/stream/{self.session}/{request_id}"
            self.game.wait_for(partial(self.ended, topic))

    def ended(self, topic: str) -> bool:
        payloads = self.game.messages_unlocked(topic)
        return bool(payloads) and json.loads(payloads[-1])["type"] in {"final", "error"}

    def plays(self) -> None:
        here = f"state/{self.session}"
        call = {"index": 0, "id": "c", "function": {"name": "reveal_map", "arguments": '{"seconds": 5}'}}
        self.llm.script = Script(pieces=[*text("Go", " on."), {"tool_calls": [call]}])
        self.says(here, {"x": 1, "requestId": "s1"}, "hint")
        self.says("state", {"state": {"x": 2}, "sessionId": self.session, "format": "json"}, "hint")
        own = f"{self.tree}/assistant_response/{self.session}"
        for payload in ({"x": 3}, {"x": 3, "format": "json"}):
            self.says(here, payload, "assistant_response", ResponseTopic=own)
        self.llm.script = Script(status=500)
        self.says(here, {"x": 3, "message": "Where to?"}, "assistant_response", ResponseTopic=own)
        self.errs(here, "left", "hint")
        self.errs(here, {"x": 1, "temperature": 9, "format": "json"}, "hint")
        self.says(here, {"x": 4, "format": "json"}, "hint")
        self.says(here, {"x": 5}, "hint")
        self.llm.script = Script()

    def cancels(self) -> None:
        self.says(f"cancel/{self.session}", {"requestId": "none"}, "hint")
        self.llm.script = Script(pieces=text(*["on "] * 500), between=0.05)
        begun = {"message": "hi", "requestId": "long", "format": "json", "stream": True}
        self.game.publish(f"{self.tree}/user_input/{self.session}", begun)
        wait_until(lambda: self.llm.running == 1, what="a generation")
        self.says(f"cancel/{self.session}", "", "assistant_response")
        self.llm.script = Script()

    def tidies(self) -> None:
        here = self.session
        self.says(f"template/{here}", {"template": "Be kind.", "requestId": "t"}, "hint")
        self.says(f"template/{here}", "Be short.", "hint")
        self.errs(f"template/{here}", {"reset": True, "format": "json"}, "hint")
        self.says("template", {"system_prompt": "Be kind.", "reset": False}, "hint", "all")
        for verb in ("clear_history", "delete_session"):
            self.says(f"{verb}/{here}", "", "hint")
            self.says(verb, {"session_id": here}, "hint")
            self.errs(verb, {"session_id": here, "requestId": "a/b"}, "hint")

    def asks_for_a_session(self) -> None:
        for payload in ("please", {"requestId": "r", "clientId": "c"}):
            self.says("session", payload, "session/response")
        self.errs("session", {"requestId": "a/b"}, "session/response")
        mine = f"{self.tree}/session/response"
        self.errs("session", {"requestId": "a/b"}, "session/response", ResponseTopic=mine)


@pytest.fixture(scope="module")
def game(portal: Portal, broker: Mosquitto) -> Iterator[GameClient]:
    """Whoever hears everything."""
    client = GameClient(broker.port, "#", protocol=MQTTProtocolVersion.MQTTv5)
    yield client
    client.close()


@pytest.fixture(scope="module")
def players(game: GameClient, module_fake: FakeLLM) -> list[Player]:
    """They have said everything."""
    found = [Player(game, module_fake, tree) for tree in ("maze", "maze/device/cab-7")]
    for player in found:
        player.chats()
        player.streams()
        player.plays()
        player.cancels()
        player.tidies()
        player.asks_for_a_session()
    return found


def channel_of(topic: str) -> str:
    """The one channel whose address matches."""
    found = []
    for name, channel in DOCUMENT["channels"].items():
        project = "|".join(channel["parameters"]["project"]["enum"])
        pattern = channel["address"].replace("{project}", f"({project})")
        if re.fullmatch(re.sub(r"{\w+}", "[^/]+", pattern), topic):
            found.append(name)
    assert len(found) == 1, (topic, found)
    return str(found[0])


def messages_of(channel: str, payload: bytes, content_type: str) -> set[str]:
    """The channel's messages that this one can be: with its content type, and no key that is not told."""
    value = json.loads(payload) if content_type == "application/json" else payload.decode()
    found = set()
    for name in DOCUMENT["channels"][channel]["messages"]:
        message = DOCUMENT["components"]["messages"][name]
        closed = {**message["payload"], "components": DOCUMENT["components"], "unevaluatedProperties": False}
        if message["contentType"] == content_type and Draft202012Validator(closed).is_valid(value):
            found.add(name)
    return found


SENT = {
    operation["channel"]["$ref"].removeprefix("#/channels/"): operation["bindings"]["mqtt"]
    for operation in DOCUMENT["operations"].values()
    if operation["action"] == "send"
}


@pytest.mark.slow
def test_everything_that_the_portal_says_is_in_it(game: GameClient, players: list[Player]) -> None:
    channels, messages = set(), set()
    for (topic, payload, retained), properties in zip(game.received, game.properties, strict=True):
        channel = channel_of(topic)
        channels.add(channel)
        if channel in SENT:
            # Packets of a stream have no room for it.
            content_type = getattr(
                properties, "ContentType", "application/json" if "stream" in channel else ""
            )
            said = messages_of(channel, payload, content_type)
            assert said, f"{topic}: {payload!r} ({content_type})"
            assert SENT[channel]["retain"] or not retained
            assert "messageExpiryInterval" in SENT[channel] or not hasattr(
                properties, "MessageExpiryInterval"
            )
            messages |= said
    assert channels == set(DOCUMENT["channels"])
    told = {message for channel in SENT for message in DOCUMENT["channels"][channel]["messages"]}
    assert messages == told


@pytest.mark.slow
def test_every_request_that_was_right_is_in_it(players: list[Player]) -> None:
    said = [request for player in players for request in player.said]
    kinds = set()
    for topic, payload in said:
        content_type = "application/json" if payload.startswith(b"{") else "text/plain"
        found = messages_of(channel_of(topic), payload, content_type)
        assert found, f"{topic}: {payload!r}"
        kinds |= found
    received = DOCUMENT["channels"].keys() - SENT.keys()
    assert kinds == {message for name in received for message in DOCUMENT["channels"][name]["messages"]}
