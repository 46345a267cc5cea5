"""What is told of a list of sessions, below the socket."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing

import pytest

from app.config import Settings
from app.container import Container, open_container
from app.events import TurnRequest
from app.services import session_feed
from app.services.session_feed import News
from tests.fake_llm import FakeLLM, Script
from tests.support import person

SettingsFor = Callable[..., Settings]

ADA = person("1")


@pytest.fixture
async def portal(fake: FakeLLM, settings_for: SettingsFor) -> AsyncIterator[Container]:
    async with open_container(settings_for(fake.url)) as container:
        yield container


async def make(portal: Container, *sessions: str) -> None:
    for session in sessions:
        await portal.sessions.set_prompt(ADA, session, "Be kind.", project="maze", reset=False)


def told(news: list[News]) -> list[tuple[str, str, str]]:
    return [(item.type, item.session.session_id, item.session.title) for item in news]


async def test_who_is_slow_is_told_how_it_is_in_the_end(portal: Container) -> None:
    async with aclosing(portal.feed.follow(ADA, lambda: None)) as batches:
        assert await anext(batches) == []
        await make(portal, "a", "b", "c")
        for number in range(100):
            await portal.sessions.rename(ADA, "a", f"{number}")
        await portal.sessions.delete(ADA, "b")
        expected = [
            ("session_created", "a", "99"),
            ("session_deleted", "b", ""),
            ("session_created", "c", ""),
        ]
        assert told(await anext(batches)) == expected


async def test_a_name_that_is_used_again_is_told_in_order(portal: Container) -> None:
    async with aclosing(portal.feed.follow(ADA, lambda: None)) as batches:
        await anext(batches)
        await make(portal, "z", "a")
        await portal.sessions.delete(ADA, "z")
        await make(portal, "z")
        news = told(await anext(batches))
        assert [kind for kind, session, _ in news if session == "z"] == ["session_deleted", "session_created"]


async def test_a_turn_that_has_come_and_gone_is_left_out(portal: Container) -> None:
    async with aclosing(portal.feed.follow(ADA, lambda: None)) as batches:
        await anext(batches)
        turn = await portal.sessions.submit(TurnRequest(who=ADA, session_id="s", message="hi"))
        await turn.ended()
        assert told(await anext(batches)) == [("session_created", "s", "hi")]


async def test_what_waits_for_a_reader_is_bounded(portal: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_feed, "MOST_UNTOLD", 2)
    complaints: list[str] = []
    async with aclosing(portal.feed.follow(ADA, lambda: complaints.append("slow"))) as batches:
        await anext(batches)
        await make(portal, "a", "b", "a", "b")
        assert complaints == []
        await make(portal, "c")
        assert complaints == ["slow"]
        assert [session for _, session, _ in told(await anext(batches))] == ["a", "b"]


async def test_an_end_that_nobody_tells_is_found(
    fake: FakeLLM, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_feed, "RECHECK_S", 0.1)
    gate = threading.Event()
    fake.script = Script(gate=gate)
    async with AsyncExitStack() as stack:
        one, two = [
            await stack.enter_async_context(open_container(settings_for(fake.url, instance=name)))
            for name in ("one", "two")
        ]
        turn = await one.sessions.submit(TurnRequest(who=ADA, session_id="s", message="hi"))
        batches = await stack.enter_async_context(aclosing(two.feed.follow(ADA, lambda: None)))
        await anext(batches)
        started = [item for item in await anext(batches) if item.turn is not None]
        gate.set()
        (ended,) = await anext(batches)
        assert [(item.type, item.turn) for item in (*started, ended)] == [
            ("turn_started", turn.id),
            ("turn_ended", turn.id),
        ]
