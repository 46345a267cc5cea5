"""What the MQTT door does with requests, in the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from app.config import Settings
from app.container import Container, open_container
from app.errors import NotFound, StorageUnavailable
from app.events import TurnRequest
from app.mqtt.connection import Incoming
from app.mqtt.contract import Command, read
from app.mqtt.requests import Requests
from app.services.turns import Turn
from tests.fake_llm import FakeLLM
from tests.support import Mosquitto

pytestmark = pytest.mark.slow


def command(verb: str, payload: bytes, *, again: bool) -> Command:
    found = read("once", Incoming(f"once/{verb}", payload, mid=7, again=again))
    assert isinstance(found, Command)
    return found


def requests_of(portal: Container) -> Requests:
    return Requests(
        portal.settings,
        portal.sessions,
        portal.projects,
        portal.accounts,
        portal.authorizer,
        portal.devices,
    )


@pytest.mark.parametrize(
    ("verb", "payload"),
    [("clear_history", b"all"), ("delete_session", b"all"), ("template", b'{"template": "Hi."}')],
)
async def test_what_is_about_all_sessions_counts_once_when_it_is_sent_again(
    fake: FakeLLM, mosquitto: Mosquitto, settings_for: Callable[..., Settings], verb: str, payload: bytes
) -> None:
    async with open_container(
        settings_for(fake.url, mqtt_broker_url=mosquitto.url, mqtt_projects="once")
    ) as portal:
        requests = requests_of(portal)
        who = portal.accounts.anonymous("once")

        async def speak() -> None:
            turn = await portal.sessions.submit(TurnRequest(who, "s1", "hi", project="once"))
            await turn.ended()

        async def roles() -> list[str]:
            try:
                page = await portal.sessions.page(who, "s1")
            except NotFound:
                return []
            return [message.role for message in page.messages]

        await speak()
        await requests.carry_out(command(verb, payload, again=True))
        assert await roles() == [], "what may have come before, but has not, is carried out"
        await portal.projects.set_prompt(who, "once", "Later.")
        await speak()
        answer = await requests.carry_out(command(verb, payload, again=True))
        assert isinstance(answer, bytes), "it is answered all the same"
        assert await roles() == ["user", "assistant"]
        assert portal.projects.project("once").system_prompt == "Later."
        await requests.carry_out(command(verb, payload, again=False))
        assert await roles() == [], "the same bytes as a new message count anew"


@pytest.mark.parametrize(
    "payload", [b"hello", b'{"message": "hello", "requestId": "r"}'], ids=["plain", "id"]
)
async def test_a_message_whose_commit_nobody_heard_of_is_one_turn(
    fake: FakeLLM,
    mosquitto: Mosquitto,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    payload: bytes,
) -> None:
    async with open_container(
        settings_for(fake.url, mqtt_broker_url=mosquitto.url, mqtt_projects="once")
    ) as portal:
        accept, heard = portal.store.accept, 0

        async def committed_unheard(*arguments: Any, **more: Any) -> Any:
            nonlocal heard
            heard += 1
            accepted = await accept(*arguments, **more)
            if heard == 1:
                raise StorageUnavailable("The connection was lost.")
            return accepted

        monkeypatch.setattr(portal.store, "accept", committed_unheard)
        asked = command("user_input/s1", payload, again=False)
        turn = await requests_of(portal).carry_out(asked)
        assert isinstance(turn, Turn)
        await turn.ended()
        page = await portal.sessions.page(portal.accounts.anonymous("once"), "s1")
        assert [message.role for message in page.messages] == ["user", "assistant"]
        assert len(fake.requests) == 1
