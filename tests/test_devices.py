"""Devices: their passwords and their rights at a real Mosquitto, configured as the setup does it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from pydantic import SecretStr

from app.access import LOCAL, Identity, Limits
from app.config import Settings
from app.container import Container, open_container
from app.errors import (
    BrokerUnavailable,
    BudgetExceeded,
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    RateLimited,
)
from app.events import Final, GenerationOptions, TurnRequest
from app.mqtt.dynsec import CONTROL, DynamicSecurity
from app.mqtt.rights import device_rights, emqx_claims
from app.services.audit import AuditFilter
from tests.fake_llm import FakeLLM, Script
from tests.support import GuardedMosquitto, MakePortal, can_sign_in, person, wait_until

REFUSED = "Not authorized"
WAIT_S = 10.0


class Client:
    """An MQTT 5 client that keeps what it is told."""

    def __init__(
        self,
        port: int,
        username: str = "",
        password: str | None = None,
        *,
        client_id: str = "",
        will: str = "",
        transport: Any = "tcp",
    ) -> None:
        self.received: list[tuple[str, bytes]] = []
        self.answers: dict[int, str] = {}
        self.told = threading.Condition()
        self.connected = self.disconnected = ""
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5, transport=transport
        )
        if username:
            self._client.username_pw_set(username, password)
        if will:
            self._client.will_set(will, b"the will", qos=1)
        self._client.on_connect = lambda _c, _d, _f, reason, _p: self._tell("connected", str(reason))
        self._client.on_disconnect = lambda _c, _d, _f, reason, _p: self._tell("disconnected", str(reason))
        self._client.on_subscribe = lambda _c, _d, mid, reasons, _p: self._answer(mid, reasons[0])
        self._client.on_publish = lambda _c, _d, mid, reason, _p: self._answer(mid, reason)
        self._client.on_message = lambda _c, _d, message: self._receive(message)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 3600 if client_id else 0
        self._client.connect("127.0.0.1", port, clean_start=not client_id, properties=properties)
        self._client.loop_start()
        self.wait_for(lambda: self.connected)

    def _tell(self, what: str, reason: str) -> None:
        with self.told:
            setattr(self, what, reason)
            self.told.notify_all()

    def _answer(self, mid: int, reason: Any) -> None:
        with self.told:
            self.answers[mid] = str(reason)
            self.told.notify_all()

    def _receive(self, message: paho.MQTTMessage) -> None:
        with self.told:
            self.received.append((message.topic, bytes(message.payload)))
            self.told.notify_all()

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        with self.told:
            found = self.told.wait_for(condition, WAIT_S)
        assert found, f"it did not come; received: {self.received}"
        return found

    def hear(self, topic: str, payload: bytes = b"x") -> None:
        """Waits until this message has come."""
        self.wait_for(lambda: (topic, payload) in self.received)

    def subscribe(self, topic: str) -> str:
        """The broker's answer."""
        mid = self._client.subscribe(topic, 1)[1]
        assert mid is not None
        return str(self.wait_for(lambda: self.answers.get(mid)))

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> str:
        """The broker's answer."""
        mid = self._client.publish(topic, payload, 1, retain=retain).mid
        return str(self.wait_for(lambda: self.answers.get(mid)))

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def die(self) -> None:
        """Goes without a word, so that its will is published."""
        self._client.loop_stop()
        sock = self._client.socket()
        assert sock is not None
        sock.close()


Connect = Callable[..., Client]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedMosquitto]:
    running = GuardedMosquitto(tmp_path_factory.mktemp("guarded"))
    yield running
    running.stop()


@pytest.fixture
def connect(broker: GuardedMosquitto) -> Iterator[Connect]:
    """Connects clients: the portal's own user, devices, or nobody in particular."""
    opened: list[Client] = []

    def make(username: str = "", password: str | None = None, **options: Any) -> Client:
        if username == broker.portal.username:
            password = broker.portal.password
        opened.append(Client(options.pop("port", broker.port), username, password, **options))
        return opened[-1]

    yield make
    for client in opened:
        client.close()


def settings_at(broker: GuardedMosquitto, settings_for: Callable[..., Settings], **changes: Any) -> Settings:
    at_broker = broker.portal.put_into(
        settings_for(mqtt_broker_url=broker.url, mqtt_projects=("maze", "racing"))
    )
    return at_broker.replace(**changes)


@asynccontextmanager
async def portal_at(settings: Settings) -> AsyncIterator[Container]:
    """A portal with one account, ada's."""
    async with open_container(settings) as container:
        await container.accounts.register("ada", "ada@example.org", "correct horse")
        yield container


@pytest.fixture
async def portal(broker: GuardedMosquitto, settings_for: Callable[..., Settings]) -> AsyncIterator[Container]:
    async with portal_at(settings_at(broker, settings_for)) as container:
        yield container
        for device in await container.devices.all(LOCAL):
            await container.devices.remove(LOCAL, device.name)


async def becomes(condition: Callable[[], bool]) -> None:
    """Waits, on the event loop, until something is so."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.02)


async def add(portal: Container, name: str, *projects: str) -> str:
    _, password = await portal.devices.add(LOCAL, name, projects or ("maze",), "ada")
    assert password
    return password


OWN_REQUESTS = [
    *(f"{name}{below}" for name in ("user_input", "state", "template") for below in ("", "/s1")),
    *(f"{name}{below}" for name in ("clear_history", "delete_session") for below in ("", "/s1")),
    "session",
    "cancel/s1",
]
OWN_REPLIES = [
    "assistant_response/s1",
    "assistant_response/s1/left",
    "hint/s1",
    "stream/s1/r1",
    "session/response",
]


async def test_a_device_has_its_own_tree(portal: Container, connect: Connect) -> None:
    cab = connect("cab-7", await add(portal, "cab-7", "maze", "racing"))
    bridge = connect("portal")
    for project in ("maze", "racing"):
        assert bridge.subscribe(f"{project}/device/+/#") == "Granted QoS 1"
        for topic in OWN_REQUESTS:
            assert cab.publish(f"{project}/device/cab-7/{topic}") == "Success", topic
            bridge.hear(f"{project}/device/cab-7/{topic}")
        for topic in ("assistant_response/#", "hint/+", "stream/s1/#", "session/response"):
            assert cab.subscribe(f"{project}/device/cab-7/{topic}") == "Granted QoS 1", topic
        assert cab.subscribe(f"{project}/status") == "Granted QoS 1"
        for topic in (*(f"device/cab-7/{reply}" for reply in OWN_REPLIES), "status"):
            bridge.publish(f"{project}/{topic}", b"to cab-7")
            cab.hear(f"{project}/{topic}", b"to cab-7")


UNREADABLE = [
    "#",
    "+/#",
    "maze/#",
    "maze/+",
    "maze/device/#",
    "maze/device/cab-7/#",
    "maze/device/cab-7/user_input/#",
    "maze/device/cab-7/state",
    "maze/device/+/assistant_response/#",
    "maze/device/+/assistant_response/s1",
    "maze/+/cab-7/assistant_response/#",
    "+/device/cab-7/assistant_response/#",
    "maze/device/cab-8/assistant_response/s1",
    "maze/device/cab-8/stream/#",
    "maze/device/cab-8/user_input/#",
    "racing/device/cab-7/assistant_response/#",
    "racing/status",
    "maze/assistant_response/s1",
    "maze/user_input/#",
    "$share/g/maze/device/cab-8/assistant_response/#",
    "$share/g/maze/device/cab-7/assistant_response/#",
    f"{CONTROL}/response",
    "$CONTROL/#",
    "$SYS/#",
]


async def test_nothing_else_can_be_read(portal: Container, connect: Connect) -> None:
    cab = connect("cab-7", await add(portal, "cab-7"))
    assert {topic: cab.subscribe(topic) for topic in UNREADABLE} == dict.fromkeys(UNREADABLE, REFUSED)


UNWRITABLE = [
    "maze/device/cab-7/assistant_response/s1",
    "maze/device/cab-7/hint/s1",
    "maze/device/cab-7/session/response",
    "maze/device/cab-7",
    "maze/device/cab-7/other",
    "maze/device/cab-8/user_input/s1",
    "maze/device/cab-8/assistant_response/s1",
    "maze/user_input/s1",
    "maze/assistant_response/s1",
    "maze/status",
    "racing/device/cab-7/user_input/s1",
    "racing/user_input",
    CONTROL,
    f"{CONTROL}/response",
    "$SYS/broker/version",
]


async def test_nothing_else_can_be_written(portal: Container, connect: Connect) -> None:
    cab = connect("cab-7", await add(portal, "cab-7"))
    bridge = connect("portal")
    bridge.subscribe("#")
    answers = {topic: cab.publish(topic, b"forged") for topic in UNWRITABLE}
    assert answers == dict.fromkeys(UNWRITABLE, REFUSED)
    assert cab.publish("maze/device/cab-7/user_input", b"after it") == "Success"
    bridge.hear("maze/device/cab-7/user_input", b"after it")
    assert not [topic for topic, payload in bridge.received if payload == b"forged"]


async def test_rights_do_not_hang_on_the_brokers_defaults(portal: Container, connect: Connect) -> None:
    """Mosquitto's own tool sets up a broker that lets everybody receive."""
    everything = ("publishClientSend", "publishClientReceive", "subscribe")
    admin = connect("portal")

    def allow_by_default(allow: bool) -> None:
        acls = [{"acltype": kind, "allow": allow} for kind in everything]
        command = {"command": "setDefaultACLAccess", "acls": acls}
        assert admin.publish(CONTROL, msgspec.json.encode({"commands": [command]})) != REFUSED

    cab = connect("cab-7", await add(portal, "cab-7"))
    allow_by_default(True)
    try:
        assert {topic: cab.subscribe(topic) for topic in UNREADABLE} == dict.fromkeys(UNREADABLE, REFUSED)
        answers = {topic: cab.publish(topic) for topic in UNWRITABLE if not topic.startswith("$")}
        assert set(answers.values()) == {REFUSED}, answers
        cab.subscribe("maze/device/cab-7/hint/#")
    finally:
        allow_by_default(False)


async def test_two_devices_hear_nothing_of_each_other(portal: Container, connect: Connect) -> None:
    cabs = {name: connect(name, await add(portal, name)) for name in ("cab-7", "cab-8")}
    for name, cab in cabs.items():
        cab.subscribe(f"maze/device/{name}/assistant_response/#")
    bridge = connect("portal")
    for name in cabs:
        bridge.publish(f"maze/device/{name}/assistant_response/s1", name.encode())
    for name, cab in cabs.items():
        bridge.publish(f"maze/device/{name}/assistant_response/last", b"last")
        cab.hear(f"maze/device/{name}/assistant_response/last", b"last")
        assert [payload for _, payload in cab.received] == [name.encode(), b"last"]


async def test_the_client_id_of_another_is_worth_nothing(portal: Container, connect: Connect) -> None:
    """A persistent session outlives its connection, with its subscriptions; whoever comes with its client id
    takes it over."""
    passwords = {name: await add(portal, name) for name in ("cab-7", "cab-8")}
    cab = connect("cab-7", passwords["cab-7"], client_id="the-id-of-cab-7")
    cab.subscribe("maze/device/cab-7/assistant_response/#")
    cab.close()
    bridge = connect("portal")
    bridge.publish("maze/device/cab-7/assistant_response/s1", b"waits for cab-7")
    thief = connect("cab-8", passwords["cab-8"], client_id="the-id-of-cab-7")
    thief.subscribe("maze/device/cab-8/assistant_response/#")
    bridge.publish("maze/device/cab-7/assistant_response/s1", b"for cab-7")
    bridge.publish("maze/device/cab-8/assistant_response/s1", b"for cab-8")
    thief.wait_for(lambda: thief.received)
    assert thief.received == [("maze/device/cab-8/assistant_response/s1", b"for cab-8")]


async def test_a_last_will_reaches_no_further(
    portal: Container, broker: GuardedMosquitto, connect: Connect
) -> None:
    password = await add(portal, "cab-7")
    bridge = connect("portal")
    bridge.subscribe("#")
    for topic in ("maze/device/cab-8/user_input/s1", "maze/status", "maze/device/cab-7/user_input/s1"):
        cab = Client(broker.port, "cab-7", password, will=topic)
        if cab.connected == "Success":
            cab.die()
    bridge.hear("maze/device/cab-7/user_input/s1", b"the will")
    assert [payload for _, payload in bridge.received].count(b"the will") == 1


async def test_who_is_let_in(portal: Container, connect: Connect) -> None:
    await add(portal, "cab-7")
    assert connect("cab-7", "wrong").connected == REFUSED
    assert connect("cab-7", "").connected == REFUSED
    assert connect("cab-7").connected == REFUSED
    assert connect("cab-9", "x").connected == REFUSED
    assert connect("portal").connected == "Success"


async def test_a_removal_holds_at_once(portal: Container, connect: Connect) -> None:
    password = await add(portal, "cab-7")
    cab = connect("cab-7", password)
    assert portal.devices.identity("cab-7", "maze")
    await portal.devices.remove(LOCAL, "cab-7")
    cab.wait_for(lambda: cab.disconnected)
    assert connect("cab-7", password).connected == REFUSED
    assert portal.devices.identity("cab-7", "maze") is None
    assert await portal.devices.all(LOCAL) == []
    with pytest.raises(NotFound):
        await portal.devices.remove(LOCAL, "cab-7")


async def test_a_new_password_ends_the_old_one(portal: Container, connect: Connect) -> None:
    old = await add(portal, "cab-7")
    cab = connect("cab-7", old)
    new = await portal.devices.new_password(LOCAL, "cab-7")
    cab.wait_for(lambda: cab.disconnected)
    assert connect("cab-7", old).connected == REFUSED
    assert connect("cab-7", new).connected == "Success"


# --- clients without a user name -----------------------------------------------------------------


async def test_anonymous_clients_have_the_classic_topics(portal: Container, connect: Connect) -> None:
    await portal.devices.sync()
    game, bridge = connect(), connect("portal")
    for topic in ("user_input", "user_input/s1", "state/s1", "template", "cancel/s1", "session"):
        assert game.publish(f"maze/{topic}") != REFUSED, topic
    for topic in ("assistant_response/s1", "assistant_response/s1/#", "stream/s1/+", "hint/s1"):
        assert game.subscribe(f"maze/{topic}") == "Granted QoS 1", topic
    for topic in ("session/response", "session/response/mine", "status"):
        assert game.subscribe(f"maze/{topic}") == "Granted QoS 1", topic
    told = ("assistant_response/s1", "assistant_response/s1/left", "stream/s1/r1", "hint/s1")
    for topic in (*told, "session/response/mine"):
        bridge.publish(f"maze/{topic}", topic.encode())
        game.hear(f"maze/{topic}", topic.encode())


LOOKING_FOR_SESSIONS = [
    "#",
    "maze/#",
    "+/assistant_response/s1",
    *(
        f"maze/{name}/{below}"
        for name in ("assistant_response", "stream", "session/response")
        for below in ("#", "+", "+/#", "+/+")
    ),
    "maze/hint/+",
    "maze/user_input/#",
    "maze/device/#",
    "maze/device/cab-7/assistant_response/s1",
    "other/assistant_response/s1",
    f"{CONTROL}/response",
    "$SYS/#",
]


async def test_anonymous_clients_cannot_look_for_sessions(portal: Container, connect: Connect) -> None:
    await portal.devices.sync()
    game = connect()
    answers = {topic: game.subscribe(topic) for topic in LOOKING_FOR_SESSIONS}
    assert answers == dict.fromkeys(LOOKING_FOR_SESSIONS, REFUSED)


async def test_anonymous_clients_cannot_forge(portal: Container, connect: Connect) -> None:
    await portal.devices.sync()
    game = connect()
    for topic in ["maze/device/cab-7/user_input", "maze/assistant_response/s1", "maze/status", CONTROL]:
        assert game.publish(topic) == REFUSED, topic


async def test_anonymous_clients_have_no_rights_where_they_are_denied(
    broker: GuardedMosquitto, settings_for: Callable[..., Settings], connect: Connect
) -> None:
    async with portal_at(settings_at(broker, settings_for, mqtt_anonymous="deny")) as portal:
        await portal.devices.sync()
        assert connect().publish("maze/user_input") == REFUSED
    async with open_container(settings_at(broker, settings_for)) as portal:
        await portal.devices.sync()
        assert connect().publish("maze/user_input") != REFUSED


# --- keeping the broker and the database together ------------------------------------------------


async def state_of(portal: Container, name: str) -> bool | None:
    return next(device.at_broker for device in await portal.devices.all(LOCAL) if device.name == name)


async def test_a_broker_that_lost_its_file_gets_the_rules_again(
    portal: Container, broker: GuardedMosquitto, connect: Connect
) -> None:
    old = await add(portal, "cab-7")
    assert await state_of(portal, "cab-7") is True
    broker.forget()
    assert await state_of(portal, "cab-7") is False
    await portal.devices.sync()
    assert await state_of(portal, "cab-7") is False, "nobody knows its password"
    assert connect("cab-7", old).connected == REFUSED
    cab = connect("cab-7", await portal.devices.new_password(LOCAL, "cab-7"))
    assert await state_of(portal, "cab-7") is True
    assert cab.subscribe("maze/device/cab-7/hint/#") == "Granted QoS 1"
    assert cab.subscribe("maze/device/cab-8/hint/#") == REFUSED
    assert connect().publish("maze/user_input") != REFUSED


async def test_a_broker_that_comes_late_gets_the_rules(
    broker: GuardedMosquitto, settings_for: Callable[..., Settings], connect: Connect
) -> None:
    broker.stop()
    (broker.config.data / "dynamic-security.json").unlink()
    async with open_container(settings_at(broker, settings_for)):
        broker.start()
        await asyncio.to_thread(
            wait_until, lambda: connect().publish("maze/user_input") != REFUSED, what="the rules"
        )


async def test_what_a_crash_left_at_the_broker_is_cleared(
    portal: Container, broker: GuardedMosquitto, settings_for: Callable[..., Settings], connect: Connect
) -> None:
    rules = DynamicSecurity(settings_at(broker, settings_for))
    await rules.put("cab-9", ["maze"], "secret")
    left = connect("cab-9", "secret")
    assert left.connected == "Success"
    await portal.devices.sync()
    left.wait_for(lambda: left.disconnected)
    assert connect("cab-9", "secret").connected == REFUSED
    password = await add(portal, "cab-7")
    await portal.devices.sync()
    assert connect("cab-7", password).connected == "Success", "nothing else is touched"


async def test_clients_of_other_admins_are_left_alone(portal: Container, connect: Connect) -> None:
    admin = connect("portal")
    commands = [{"command": "createClient", "username": "theirs", "password": "secret"}]
    admin.publish(CONTROL, msgspec.json.encode({"commands": commands}))
    wait_until(lambda: connect("theirs", "secret").connected == "Success", what="their client")
    await portal.devices.sync()
    with pytest.raises(Conflict, match="has not made"):
        await portal.devices.add(LOCAL, "theirs", ["maze"], "ada")
    assert await portal.devices.all(LOCAL) == []
    assert connect("theirs", "secret").connected == "Success"


async def test_without_the_broker_nothing_is_said_to_be_done(
    portal: Container, broker: GuardedMosquitto, connect: Connect
) -> None:
    password = await add(portal, "cab-7")
    broker.stop()
    try:
        with pytest.raises(BrokerUnavailable):
            await portal.devices.add(LOCAL, "cab-8", ["maze"], "ada")
        with pytest.raises(BrokerUnavailable):
            await portal.devices.remove(LOCAL, "cab-7")
        with pytest.raises(BrokerUnavailable):
            await portal.devices.new_password(LOCAL, "cab-7")
        assert [(d.name, d.at_broker) for d in await portal.devices.all(LOCAL)] == [("cab-7", None)]
    finally:
        broker.start()
    assert connect("cab-7", password).connected == "Success"


async def test_a_portal_that_may_not_change_the_rules_says_so(
    broker: GuardedMosquitto, settings_for: Callable[..., Settings]
) -> None:
    wrong = settings_at(broker, settings_for, mqtt_password=SecretStr("wrong"))
    with pytest.raises(BrokerUnavailable, match="MQTT_PASSWORD"):
        await DynamicSecurity(wrong).ready()


# --- who they are --------------------------------------------------------------------------------


async def test_a_device_asks_in_its_owners_name(portal: Container) -> None:
    device, _ = await portal.devices.add(LOCAL, "cab-7", ["maze"], "ada")
    who = portal.devices.identity("cab-7", "maze")
    assert who is not None
    assert who.key is not None
    assert (who.owner, who.username, who.door) == (f"user:{device.owner}", "ada", "mqtt")
    assert (who.key.id, who.key.device, who.key.project) == (device.id, "cab-7", "maze")
    assert [name for name in ("chat:use", "sessions:read", "keys:write") if who.may(name)] == [
        "chat:use",
        "sessions:read",
    ]
    assert portal.devices.identity("cab-7", "racing") is None
    assert portal.devices.identity("cab-8", "maze") is None


def at_home(fake: FakeLLM, settings_for: Callable[..., Settings], **changes: Any) -> Settings:
    return settings_for(fake.url, mqtt_acl="external", instance="one", **changes)


async def cab_7(portal: Container, **limits: float) -> Identity:
    """A device of ada's with limits of its own."""
    if portal.devices.identity("cab-7", "maze") is None:
        await portal.devices.add(LOCAL, "cab-7", ["maze"], "ada")
        await portal.policies.set_limits(LOCAL, "device:cab-7", Limits.model_validate(limits))
    found = portal.devices.identity("cab-7", "maze")
    assert found is not None
    return found


def asked(who: Identity, session: str, **changes: Any) -> TurnRequest:
    options = GenerationOptions(max_tokens=10)
    return TurnRequest(who, session, "hi", project="maze", options=options, **changes)


async def test_a_budget_of_a_device_outlasts_a_restart_and_is_not_its_owners(
    fake: FakeLLM, settings_for: Callable[..., Settings]
) -> None:
    fake.script = Script(usage={"prompt_tokens": 30, "completion_tokens": 20})
    settings = at_home(fake, settings_for, daily_token_budget=90)
    async with portal_at(settings) as portal:
        cab = await cab_7(portal, daily_tokens=90)
        for session in "ab":
            assert isinstance(await (await portal.sessions.submit(asked(cab, session))).ended(), Final)
        with pytest.raises(BudgetExceeded):
            await portal.sessions.submit(asked(cab, "c"))
    async with open_container(settings) as portal:
        with pytest.raises(BudgetExceeded):
            await portal.sessions.submit(asked(await cab_7(portal), "c"))
        ada = replace(cab, key=None)
        assert [budget.spent for budget in await portal.admission.budgets(ada)] == [0]
        assert isinstance(await (await portal.sessions.submit(asked(ada, "d"))).ended(), Final)
        assert [budget.spent for budget in await portal.admission.budgets(ada)] == [50]


async def test_what_is_set_for_an_owner_counts_the_devices_too(
    fake: FakeLLM, settings_for: Callable[..., Settings]
) -> None:
    fake.script = Script(usage={"prompt_tokens": 30, "completion_tokens": 20})
    settings = at_home(fake, settings_for)
    async with portal_at(settings) as portal:
        cab = await cab_7(portal)
        await portal.policies.set_limits(LOCAL, cab.owner, Limits(daily_tokens=110))
        for session, who in (("cab-7:s", cab), ("s", replace(cab, key=None))):
            assert isinstance(await (await portal.sessions.submit(asked(who, session))).ended(), Final)
        with pytest.raises(BudgetExceeded):
            await portal.sessions.submit(asked(cab, "more"))
    async with open_container(settings) as portal:
        with pytest.raises(BudgetExceeded):
            await portal.sessions.submit(asked(cab, "more"))


async def test_a_turn_that_is_taken_up_is_still_the_devices(
    fake: FakeLLM, settings_for: Callable[..., Settings]
) -> None:
    fake.script = Script(before_first=30)
    settings = at_home(fake, settings_for, MAX_TURNS_PER_USER=1)
    async with portal_at(settings) as portal:
        cab = await cab_7(portal, concurrent_turns=1)
        await portal.sessions.submit(asked(cab, "a", request_id="r"))
        await fake.until(lambda: fake.running == 1)
    async with open_container(settings) as portal:
        await fake.until(lambda: fake.running == 1)
        with pytest.raises(RateLimited, match="At most 1 turns"):
            await portal.sessions.submit(asked(await cab_7(portal), "b"))
        fake.script = Script()
        turn = await portal.sessions.submit(asked(replace(cab, key=None), "c"))
        assert isinstance(await turn.ended(), Final)


async def test_a_closed_account_has_no_devices(portal: Container) -> None:
    device, _ = await portal.devices.add(LOCAL, "cab-7", ["maze"], "ada")
    await portal.people.change(LOCAL, device.owner, closed=True)
    await becomes(lambda: portal.devices.identity("cab-7", "maze") is None)
    with pytest.raises(InvalidRequest, match="closed"):
        await portal.devices.add(LOCAL, "cab-8", ["maze"], "ada")


async def test_another_process_soon_knows(
    portal: Container, broker: GuardedMosquitto, settings_for: Callable[..., Settings]
) -> None:
    async with open_container(settings_at(broker, settings_for)) as other:
        await add(portal, "cab-7")
        await becomes(lambda: other.devices.identity("cab-7", "maze") is not None)
        await portal.devices.remove(LOCAL, "cab-7")
        await becomes(lambda: other.devices.identity("cab-7", "maze") is None)


@pytest.mark.parametrize(
    ("name", "projects", "owner", "problem"),
    [
        ("", ["maze"], "ada", "name"),
        ("..", ["maze"], "ada", "name"),
        ("cab/7", ["maze"], "ada", "name"),
        ("cab+", ["maze"], "ada", "name"),
        ("cab-ä", ["maze"], "ada", "name"),
        ("c" * 65, ["maze"], "ada", "name"),
        ("portal", ["maze"], "ada", "name"),
        ("cab-7", [], "ada", "projects: at least one is needed; there are maze, racing"),
        ("cab-7", ["maze", "chess"], "ada", "projects: there is no chess; there are maze, racing"),
        ("cab-7", ["maze"], "bob", "owner"),
        ("cab-7", ["maze"], None, "owner"),
    ],
)
async def test_what_no_device_can_be(
    portal: Container, name: str, projects: list[str], owner: str | None, problem: str
) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        await portal.devices.add(LOCAL, name, projects, owner)
    assert await portal.devices.all(LOCAL) == []


async def test_names_are_taken_once(portal: Container, connect: Connect) -> None:
    password = await add(portal, "cab-7")
    with pytest.raises(Conflict):
        await portal.devices.add(LOCAL, "cab-7", ["maze"], "ada")
    assert connect("cab-7", password).connected == "Success", "it keeps its password"


async def test_nobody_gives_a_device_more_rights_than_they_have(portal: Container) -> None:
    role = portal.policies.role("author").model_copy(
        update={"permissions": frozenset({"chat:use", "devices:read", "devices:write"})}
    )
    keeper = person("keeper", role)
    with pytest.raises(Forbidden):
        await portal.devices.add(keeper, "cab-7", ["maze"], "ada")
    await add(portal, "cab-7")
    with pytest.raises(Forbidden):
        await portal.devices.new_password(keeper, "cab-7")
    with pytest.raises(Forbidden):
        await portal.devices.all(person("player", portal.policies.role("player")))


async def test_the_audit_log_tells_of_it_without_the_password(portal: Container) -> None:
    passwords = [await add(portal, "cab-7"), await portal.devices.new_password(LOCAL, "cab-7")]
    await portal.devices.remove(LOCAL, "cab-7")
    rows = await portal.audit.search(AuditFilter(action="device."))
    assert [(row.action, row.target) for row in reversed(rows)] == [
        ("device.add", "device:cab-7"),
        ("device.password", "device:cab-7"),
        ("device.remove", "device:cab-7"),
    ]
    assert not any(password in str(row) for password in passwords for row in rows)


def test_devices_over_http(broker: GuardedMosquitto, make_portal: MakePortal, tmp_path: Path) -> None:
    settings = {"LLM_SERVER_URL": "http://127.0.0.1:9", "MQTT_PROJECTS": "maze", **broker.settings}
    portal = make_portal(tmp_path, **settings).start(ready=False)
    with portal.client("root", role="admin") as root, portal.client("bob"):
        added = root.post("/api/admin/devices", json={"name": "cab-7", "projects": ["maze"], "owner": "bob"})
        device = added.json()
        first = device.pop("password")
        assert (added.status_code, device["owner"], device["at_broker"]) == (201, "bob", True)
        listed = root.get("/api/admin/devices").json()
        assert listed == {"devices": [device], "projects": ["maze"], "acl": "mosquitto"}
        second = root.post("/api/admin/devices/cab-7/password").json()["password"]
        assert [can_sign_in(broker.port, "cab-7", password) for password in (first, second)] == [False, True]
        again = root.post("/api/admin/devices", json={"name": "cab-7", "projects": ["maze"]})
        assert again.json()["error"]["code"] == "conflict"
        wrong = root.post("/api/admin/devices", json={"name": "cab-8", "projects": ["chess"]})
        assert (wrong.status_code, "there are maze" in wrong.json()["detail"]) == (422, True)
        secret = root.post("/api/keys", json={"name": "script"}).json()["secret"]
        by_key = root.delete("/api/admin/devices/cab-7", headers={"Authorization": f"Bearer {secret}"})
        assert by_key.status_code == 403, "no key may, whatever its owner may"
        assert root.delete("/api/admin/devices/cab-7").status_code == 204
        assert root.delete("/api/admin/devices/cab-7").status_code == 404


# --- other brokers -------------------------------------------------------------------------------


async def test_without_rules_there_are_no_devices(settings_for: Callable[..., Settings]) -> None:
    async with portal_at(settings_for()) as portal:
        with pytest.raises(InvalidRequest, match="MQTT_ACL"):
            await portal.devices.add(LOCAL, "cab-7", ["maze"], "ada")


async def test_where_somebody_else_keeps_to_the_rules(settings_for: Callable[..., Settings]) -> None:
    async with portal_at(settings_for(mqtt_acl="external")) as portal:
        device, password = await portal.devices.add(LOCAL, "cab-7", ["maze"], "ada")
        assert (password, device.at_broker) == (None, None)
        assert portal.devices.identity("cab-7", "maze") is not None
        with pytest.raises(InvalidRequest, match="whoever runs the broker"):
            await portal.devices.new_password(LOCAL, "cab-7")
        await portal.devices.remove(LOCAL, "cab-7")
        assert portal.devices.identity("cab-7", "maze") is None


def test_claims_for_emqx_are_the_same_rights() -> None:
    claims = emqx_claims("cab-7", ["maze", "racing"])
    rights = device_rights("cab-7", ["maze", "racing"])
    *rules, last = claims["acl"]
    assert claims["username"] == "cab-7"
    assert last == {"permission": "deny", "action": "all", "topic": "#"}
    assert {rule["permission"] for rule in rules} == {"allow"}
    allowed = {
        action: [rule["topic"] for rule in rules if rule["action"] == action]
        for action in ("publish", "subscribe")
    }
    assert allowed == {"publish": list(rights.publish), "subscribe": list(rights.receive)}
    mine = [topic for topic in allowed["publish"] if topic.startswith("maze/")]
    assert mine == [
        "maze/device/cab-7/user_input/#",
        "maze/device/cab-7/state/#",
        "maze/device/cab-7/template/#",
        "maze/device/cab-7/clear_history/#",
        "maze/device/cab-7/delete_session/#",
        "maze/device/cab-7/cancel/#",
        "maze/device/cab-7/session",
    ]
    assert [topic for topic in allowed["subscribe"] if topic.startswith("maze/")] == [
        "maze/device/cab-7/assistant_response/#",
        "maze/device/cab-7/hint/#",
        "maze/device/cab-7/stream/#",
        "maze/device/cab-7/session/response/#",
        "maze/status",
    ]
