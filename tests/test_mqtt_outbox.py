"""The outbox of the MQTT door, in the process, where its steps can be put in an order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.config import Settings
from app.container import Container, open_container
from app.events import ReplyTarget, TurnRequest, new_id
from app.mqtt import bridge
from app.services import outbox
from app.services.leases import Leases
from app.services.outbox import Delivery
from tests.fake_llm import FakeLLM, Script, text
from tests.support import GameClient, Mosquitto, person

pytestmark = pytest.mark.slow


async def test_a_reply_that_is_confirmed_while_the_outbox_is_read_is_published_once(
    mosquitto: Mosquitto,
    fake: FakeLLM,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge, "OUTBOX_S", 0.01)
    settings = settings_for(fake.url, mqtt_broker_url=mosquitto.url, mqtt_projects="outbox")
    async with open_container(settings) as portal:
        store, owed = portal.store, portal.outbox
        was_read, was_confirmed = asyncio.Event(), asyncio.Event()
        ready, delivered, turn = owed.ready, owed.delivered, store.turn

        async def read_outbox(*wanted: Any) -> Any:
            rows = await ready(*wanted)
            if rows:
                was_read.set()
            return rows

        async def confirm(deliveries: Sequence[Delivery]) -> None:
            await was_read.wait()
            await delivered(deliveries)
            was_confirmed.set()

        async def read_turn(turn_id: str) -> Any:
            await was_confirmed.wait()
            return await turn(turn_id)

        monkeypatch.setattr(owed, "ready", read_outbox)
        monkeypatch.setattr(owed, "delivered", confirm)
        monkeypatch.setattr(store, "turn", read_turn)
        session, topic = new_id(), "outbox/assistant_response/"
        game = await asyncio.to_thread(GameClient, mosquitto.port, f"{topic}#", "outbox/status")
        try:
            await asyncio.to_thread(game.reply, "outbox/status")
            await asyncio.to_thread(game.publish, f"outbox/user_input/{session}", "hello")
            await asyncio.wait_for(was_confirmed.wait(), 20)
            await asyncio.to_thread(game.publish, f"outbox/user_input/{session}-2", "hello")
            await asyncio.to_thread(game.reply, f"{topic}{session}-2")
            assert len(game.messages(f"{topic}{session}")) == 1
        finally:
            await asyncio.to_thread(game.close)


async def test_who_asks_again_before_the_reply_is_forgotten_is_answered_again(
    mosquitto: Mosquitto,
    fake: FakeLLM,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge, "FORGET_S", 3600)
    settings = settings_for(fake.url, mqtt_broker_url=mosquitto.url, mqtt_projects="forgetful")
    session, topic = new_id(), "forgetful/assistant_response/"
    game = await asyncio.to_thread(GameClient, mosquitto.port, f"{topic}#", "forgetful/status")
    asked = {"message": "hello", "requestId": "r", "format": "json"}
    try:
        async with open_container(settings):
            await asyncio.to_thread(game.reply, "forgetful/status")
            await asyncio.to_thread(game.publish, f"forgetful/user_input/{session}", asked)
            await asyncio.to_thread(game.reply, f"{topic}{session}")
            await asyncio.to_thread(game.publish, f"forgetful/user_input/{session}", asked)
            await asyncio.to_thread(
                game.wait_for, lambda: len(game.messages_unlocked(f"{topic}{session}")) == 2
            )
        # What was confirmed is forgotten when the portal stops: the next start publishes nothing of it.
        async with open_container(settings):
            await asyncio.to_thread(game.publish, f"forgetful/user_input/{session}-2", "hello")
            await asyncio.to_thread(game.reply, f"{topic}{session}-2")
    finally:
        await asyncio.to_thread(game.close)
    first, second = game.json_replies(f"{topic}{session}")
    assert first == second


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the outbox and at the lease all the time."""
    monkeypatch.setattr(bridge, "OUTBOX_S", 0.05)
    monkeypatch.setattr(bridge, "RENEW_S", 0.05)


def door(portal: Container) -> tuple[bool, int]:
    """Whether the only project is served by this process, and how many publishes wait in it."""
    assert portal.mqtt is not None
    [figures] = portal.mqtt.figures()
    return figures.is_connected, figures.in_flight


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def until_owed(portal: Container, project: str, number: int) -> None:
    async with asyncio.timeout(30):
        while len(await portal.outbox.ready(project)) != number:
            await asyncio.sleep(0.01)


async def ask(portal: Container, project: str, session: str) -> None:
    """Has a turn answered as the HTTP door does, with a reply that goes out over MQTT."""
    target = ReplyTarget(project, f"{project}/hint/{session}", session, form="hint")
    asked = TurnRequest(person("1"), session, "hello", project=project, reply_to=target)
    await (await portal.sessions.submit(asked)).ended()


@pytest.mark.usefixtures("impatient")
async def test_a_process_that_does_not_serve_a_project_keeps_no_replies_for_later(
    mosquitto: Mosquitto,
    fake: FakeLLM,
    settings_for: Callable[..., Settings],
) -> None:
    game = await asyncio.to_thread(GameClient, mosquitto.port, "beside/hint/#")

    def settings(name: str) -> Settings:
        changes = {"mqtt_broker_url": mosquitto.url, "mqtt_projects": "beside", "instance": name}
        return settings_for(fake.url, **changes)

    try:
        async with open_container(settings("one")) as one:
            await until(lambda: door(one)[0])
            async with open_container(settings("two")) as two:
                await ask(two, "beside", "early")
                await asyncio.to_thread(game.reply, "beside/hint/early")
                assert door(two) == (False, 0)
                await until_owed(two, "beside", 0)
                leases = Leases(one.database)
                await leases.acquire("mqtt:beside", "two", 60, force=True)
                await until(lambda: door(two)[0] and not door(one)[0])
                await ask(one, "beside", "late")
                await asyncio.to_thread(game.reply, "beside/hint/late")
                assert len(game.messages("beside/hint/early")) == 1
    finally:
        await asyncio.to_thread(game.close)


@pytest.mark.parametrize("elsewhere", [True, False], ids=["published elsewhere", "still owed"])
@pytest.mark.usefixtures("impatient")
async def test_a_process_that_loses_a_project_drops_what_waits_to_be_published(
    elsewhere: bool,
    tmp_path: Path,
    fake: FakeLLM,
    settings_for: Callable[..., Settings],
) -> None:
    broker = Mosquitto(tmp_path)
    settings = settings_for(fake.url, mqtt_broker_url=broker.url, mqtt_projects="lost")
    async with open_container(settings) as portal:
        leases = Leases(portal.database)
        await until(lambda: door(portal)[0])
        await asyncio.to_thread(broker.stop)
        await until(lambda: not door(portal)[0])
        await ask(portal, "lost", "early")
        assert door(portal)[1] > 0
        await leases.acquire("mqtt:lost", "another", 60, force=True)
        await until(lambda: door(portal)[1] == 0)
        if elsewhere:
            await portal.outbox.delivered(await portal.outbox.ready("lost"))
        await asyncio.to_thread(broker.start)
        game = await asyncio.to_thread(GameClient, broker.port, "lost/hint/#")
        try:
            await leases.release("mqtt:lost", "another")
            await until(lambda: door(portal)[0])
            if not elsewhere:
                await asyncio.to_thread(game.reply, "lost/hint/early")
            await ask(portal, "lost", "late")
            await asyncio.to_thread(game.reply, "lost/hint/late")
            assert len(game.messages("lost/hint/early")) == (0 if elsewhere else 1)
        finally:
            await asyncio.to_thread(game.close)
    await asyncio.to_thread(broker.stop)


@pytest.mark.usefixtures("impatient")
async def test_a_stream_ends_with_the_lease(
    mosquitto: Mosquitto,
    fake: FakeLLM,
    settings_for: Callable[..., Settings],
) -> None:
    settings = settings_for(fake.url, mqtt_broker_url=mosquitto.url, mqtt_projects="gone")
    session, held = new_id(), threading.Event()
    fake.script = Script(pieces=text("One", " two"), held=held)
    topics = "gone/stream/#", "gone/assistant_response/#"
    game = await asyncio.to_thread(GameClient, mosquitto.port, *topics)
    try:
        async with open_container(settings) as portal:
            leases = Leases(portal.database)
            await until(lambda: door(portal)[0])
            asked = {"message": "count", "requestId": "r", "stream": True}
            await asyncio.to_thread(game.publish, f"gone/user_input/{session}", asked)
            topic = f"gone/stream/{session}/r"
            await asyncio.to_thread(game.wait_for, lambda: b"One" in b"".join(game.messages_unlocked(topic)))
            await leases.acquire("mqtt:gone", "another", 60, force=True)
            await until(lambda: not door(portal)[0])
            held.set()
            await until_owed(portal, "gone", 1)
            await leases.release("mqtt:gone", "another")
            await asyncio.to_thread(game.reply, f"gone/assistant_response/{session}")
            await ask(portal, "gone", "late")
            assert b"final" not in b"".join(game.messages(topic))
    finally:
        held.set()
        await asyncio.to_thread(game.close)


async def test_all_that_is_stored_is_published_before_what_ends_now(
    mosquitto: Mosquitto,
    fake: FakeLLM,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox, "MOST_READ", 2)
    monkeypatch.setattr(bridge, "MOST_READ", 2)
    monkeypatch.setattr(bridge, "RENEW_S", 0.05)
    game = await asyncio.to_thread(GameClient, mosquitto.port, "stored/hint/#")
    settings = settings_for(fake.url, mqtt_broker_url=mosquitto.url, mqtt_projects="stored")
    try:
        async with open_container(settings) as portal:
            leases = Leases(portal.database)
            await until(lambda: door(portal)[0])
            await leases.acquire("mqtt:stored", "another", 60, force=True)
            await until(lambda: not door(portal)[0])
            for number in range(7):
                await ask(portal, "stored", f"s{number}")
            was_read, may_go_on, turn = asyncio.Event(), asyncio.Event(), portal.store.turn

            async def read_turn(turn_id: str) -> Any:
                was_read.set()
                await may_go_on.wait()
                return await turn(turn_id)

            monkeypatch.setattr(portal.store, "turn", read_turn)
            await leases.release("mqtt:stored", "another")
            await asyncio.wait_for(was_read.wait(), 20)
            await ask(portal, "stored", "s7")
            may_go_on.set()
            await asyncio.to_thread(game.wait_for, lambda: len(game.received) == 8)
        assert [topic for topic, _, _ in game.received] == [f"stored/hint/s{number}" for number in range(8)]
    finally:
        await asyncio.to_thread(game.close)


async def test_replies_of_a_session_keep_their_order_when_a_project_moves(
    mosquitto: Mosquitto,
    fake: FakeLLM,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first turn ends in the process that has lost the project, the others in the one that has it."""
    monkeypatch.setattr(bridge, "RENEW_S", 0.05)
    topic, held = "moved/assistant_response/s", threading.Event()
    fake.script = Script(echo=True, held=held)
    game = await asyncio.to_thread(GameClient, mosquitto.port, topic)

    def settings(name: str) -> Settings:
        changes = {"mqtt_broker_url": mosquitto.url, "mqtt_projects": "moved", "instance": name}
        return settings_for(fake.url, **changes)

    try:
        async with open_container(settings("one")) as one, open_container(settings("two")) as two:
            await until(lambda: door(one)[0])
            await asyncio.to_thread(game.publish, "moved/user_input/s", "first")
            await until(lambda: len(fake.requests) == 1)
            await Leases(one.database).acquire("mqtt:moved", "two", 60, force=True)
            await until(lambda: door(two)[0] and not door(one)[0])
            for message in ("second", "third"):
                await asyncio.to_thread(game.publish, "moved/user_input/s", message)
            who = two.accounts.anonymous("moved")
            await until(lambda: len(two.sessions.live_turns(who, "s")) == 2)
            held.set()
            await asyncio.to_thread(game.reply, topic, 3)
            fake.script = Script(echo=True)
            await asyncio.to_thread(game.publish, "moved/user_input/s", "fourth")
            await asyncio.to_thread(game.reply, topic, 4)
        said = ("first", "second", "third", "fourth")
        assert game.messages(topic) == [f"echo: {message}".encode() for message in said]
    finally:
        held.set()
        await asyncio.to_thread(game.close)
