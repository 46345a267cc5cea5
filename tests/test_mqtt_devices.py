"""Devices that play: with the rules of the broker on, and the portal behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from app.events import new_id
from tests.fake_llm import FakeLLM, Script
from tests.support import GameClient, GuardedMosquitto, Portal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedMosquitto]:
    running = GuardedMosquitto(tmp_path_factory.mktemp("broker"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def portal(
    module_fake: FakeLLM, broker: GuardedMosquitto, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Portal]:
    running = Portal(
        tmp_path_factory.mktemp("portal"),
        LLM_SERVER_URL=module_fake.url,
        MQTT_PROJECTS="maze general",
        **broker.settings,
    ).start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def root(portal: Portal) -> Iterator[httpx.Client]:
    with portal.client("root", role="admin") as client:
        yield client


@pytest.fixture
def llm(module_fake: FakeLLM) -> FakeLLM:
    module_fake.script = Script(echo=True)
    return module_fake


class Arcade:
    """Makes devices, and connects them."""

    def __init__(self, broker: GuardedMosquitto, root: httpx.Client, stack: ExitStack) -> None:
        self._broker = broker
        self._root = root
        self._stack = stack

    def device(self, owner: httpx.Client) -> tuple[str, GameClient]:
        """A new device of the owner, which hears what it may."""
        name = f"cab-{new_id()[-8:]}"
        body = {"name": name, "projects": ["maze"], "owner": owner.get("/api/auth/me").json()["username"]}
        made = self._root.post("/api/admin/devices", json=body)
        assert made.status_code == 201, made.text
        tree = f"maze/device/{name}"
        client = GameClient(
            self._broker.port,
            *(f"{tree}/{kind}/#" for kind in ("assistant_response", "hint", "stream")),
            protocol=MQTTProtocolVersion.MQTTv5,
            username=name,
            password=made.json()["password"],
        )
        self._stack.callback(client.close)
        return name, client


@pytest.fixture
def arcade(broker: GuardedMosquitto, root: httpx.Client) -> Iterator[Arcade]:
    with ExitStack() as stack:
        yield Arcade(broker, root, stack)


@pytest.fixture
def ada(portal: Portal) -> Iterator[httpx.Client]:
    with portal.client(f"ada-{new_id()[-6:]}") as client:
        yield client


def test_a_devices_sessions_are_its_owners(arcade: Arcade, ada: httpx.Client, llm: FakeLLM) -> None:
    name, cab = arcade.device(ada)
    tree = f"maze/device/{name}"
    body = {"message": "hello", "requestId": "r", "format": "json", "stream": True}
    cab.publish(f"{tree}/user_input/s1", body)
    told = json.loads(cab.reply(f"{tree}/assistant_response/s1"))
    assert (told["response"], told["sessionId"]) == ("echo: hello", "s1")
    assert json.loads(cab.reply(f"{tree}/stream/s1/r"))["type"] == "accepted"
    cab.publish(f"{tree}/state/s1", {"x": 1})
    assert "hint" in json.loads(cab.reply(f"{tree}/hint/s1"))
    sessions = ada.get("/api/sessions").json()["sessions"]
    assert [(row["session_id"], row["project"]) for row in sessions] == [(f"{name}:s1", "maze")]
    cab.publish(f"{tree}/user_input/s1", b"")
    assert cab.reply(f"{tree}/assistant_response/s1", 2) == b"Session cleared"


def test_two_devices_of_one_owner_have_sessions_of_their_own(
    arcade: Arcade, ada: httpx.Client, llm: FakeLLM
) -> None:
    for name, cab in (arcade.device(ada), arcade.device(ada)):
        cab.publish(f"maze/device/{name}/user_input/s1", f"I am {name}")
        cab.reply(f"maze/device/{name}/assistant_response/s1")
        sent = [message["content"] for message in llm.requests[-1]["messages"] if message["role"] == "user"]
        assert sent == [f"I am {name}"]


def test_a_device_gets_answers_nowhere_but_in_its_tree(
    arcade: Arcade, ada: httpx.Client, llm: FakeLLM
) -> None:
    (name, cab), (other, victim) = arcade.device(ada), arcade.device(ada)
    tree = f"maze/device/{name}"
    anywhere = f"{tree}/assistant_response/another-session/left"
    cab.publish(f"{tree}/user_input/s1", "hi", ResponseTopic=anywhere, CorrelationData=b"1")
    assert cab.reply(anywhere) == b"echo: hi"
    for number, wanted in enumerate(
        [f"maze/device/{other}/assistant_response/s1", "maze/assistant_response/s1", f"{tree}/user_input/s1"],
        1,
    ):
        cab.publish(f"{tree}/user_input/s1", "hi", ResponseTopic=wanted, CorrelationData=b"2")
        told = json.loads(cab.reply(f"{tree}/assistant_response/s1", number))
        assert told["error"]["code"] == "invalid_request"
    assert victim.received == []


def test_a_stolen_session_or_request_id_is_worth_nothing(
    arcade: Arcade, ada: httpx.Client, llm: FakeLLM
) -> None:
    (name, cab), (other, thief) = arcade.device(ada), arcade.device(ada)
    cab.publish(f"maze/device/{name}/user_input/s1", {"message": "secret", "requestId": "r"})
    cab.reply(f"maze/device/{name}/assistant_response/s1")
    for claimed in ("s1", f"{name}:s1"):
        body = {"message": "secret", "requestId": "r", "sessionId": claimed, "format": "json"}
        thief.publish(f"maze/device/{other}/user_input", body)
        told = json.loads(thief.reply(f"maze/device/{other}/assistant_response/{claimed}"))
        assert told["type"] == "final"
        sent = [message["content"] for message in llm.requests[-1]["messages"] if message["role"] == "user"]
        assert sent == ["secret"], "a session of its own, without what the other said"
    assert len(cab.received) == 1


def test_a_device_may_not_change_what_is_everybodys(arcade: Arcade, root: httpx.Client, llm: FakeLLM) -> None:
    name, cab = arcade.device(root)
    tree = f"maze/device/{name}"
    for number, (verb, body) in enumerate(
        [("template", {"template": "x"}), ("clear_history", {"target": "all"})], 1
    ):
        cab.publish(f"{tree}/{verb}", body)
        told = json.loads(cab.reply(f"{tree}/hint/all", number))
        assert told["error"]["code"] == "forbidden", "also that of an admin"


def test_a_device_has_limits_of_its_own(
    arcade: Arcade, root: httpx.Client, ada: httpx.Client, llm: FakeLLM
) -> None:
    name, cab = arcade.device(ada)
    limit = root.put(f"/api/admin/limits/device:{name}", json={"requests_per_hour": 1})
    assert limit.status_code == 200, limit.text
    body, topic = {"message": "hi", "format": "json"}, f"maze/device/{name}/assistant_response/s"
    cab.publish(f"maze/device/{name}/user_input/s", body)
    assert json.loads(cab.reply(topic))["type"] == "final"
    cab.publish(f"maze/device/{name}/user_input/s", body)
    refused = json.loads(cab.reply(topic, 2))["error"]
    assert refused["code"] == "rate_limited"
    assert "A device may send at most 1 messages in an hour" in refused["message"]
