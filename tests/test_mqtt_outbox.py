"""The outbox of the MQTT door, in the process, where its steps can be put in an order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from app.config import Settings
from app.container import open_container
from app.events import new_id
from app.mqtt import bridge
from app.services.outbox import Delivery
from tests.fake_llm import FakeLLM
from tests.support import GameClient, Mosquitto

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
        store, outbox = portal.store, portal.outbox
        was_read, was_confirmed = asyncio.Event(), asyncio.Event()
        ready, delivered, turn = outbox.ready, outbox.delivered, store.turn

        async def read_outbox(project: str) -> Any:
            rows = await ready(project)
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

        monkeypatch.setattr(outbox, "ready", read_outbox)
        monkeypatch.setattr(outbox, "delivered", confirm)
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
