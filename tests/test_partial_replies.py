"""What there is of a reply that broke off: kept, marked, counted, and not sent to the model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from app.config import Settings
from app.container import Container, open_container
from app.events import Cancelled, Failed, TurnRequest
from app.services.session_manager import SessionManager
from app.services.turns import Turn, answer_of
from tests.fake_llm import FakeLLM, Script, text
from tests.support import person

ADA = person()
BROKEN = Script(pieces=text("One", " two", " three"), cut_after=2, between=0.02)


@pytest.fixture
def settings(
    fake: FakeLLM, settings_for: Callable[..., Settings], database_url: str
) -> Callable[[str], Settings]:
    return lambda instance: settings_for(fake.url, instance=instance, database_url=database_url)


@pytest.fixture
async def portal(settings: Callable[[str], Settings]) -> AsyncIterator[Container]:
    async with open_container(settings("one")) as container:
        yield container


async def ask(sessions: SessionManager, message: str, **changes: Any) -> Turn:
    turn = await sessions.submit(
        TurnRequest(**{"who": ADA, "session_id": "s", "message": message, **changes})
    )
    await turn.ended()
    return turn


async def told(sessions: SessionManager) -> list[tuple[str, str]]:
    page = await sessions.page(ADA, "s")
    assert [m.parent_id for m in page.messages[1:]] == [m.id for m in page.messages[:-1]]
    return [(message.content, message.status) for message in page.messages]


def sent(fake: FakeLLM) -> list[str]:
    return [message["content"] for message in fake.requests[-1]["messages"]]


async def test_it_is_kept_and_not_sent(
    fake: FakeLLM, portal: Container, settings: Callable[[str], Settings]
) -> None:
    await ask(portal.sessions, "first")
    fake.script = BROKEN
    turn = await ask(portal.sessions, "bad")
    assert isinstance(turn.ending, Failed)
    broken = [("bad", "failed"), ("One two", "failed")]
    assert (await told(portal.sessions))[2:] == broken
    usage = (await portal.sessions.page(ADA, "s")).messages[-1].usage
    assert usage is not None
    assert usage.estimated
    assert usage.completion_tokens > 0
    assert usage.ttft_ms is not None
    fake.script = Script()
    await ask(portal.sessions, "good")
    assert sent(fake) == ["first", "Hello there", "good"]
    async with open_container(settings("two")) as other:
        await ask(other.sessions, "and now")
        assert sent(fake) == ["first", "Hello there", "good", "Hello there", "and now"]
        assert (await told(other.sessions))[2:4] == broken


@pytest.mark.parametrize("answered_over", [False, True])
async def test_a_new_attempt_takes_its_place(fake: FakeLLM, portal: Container, answered_over: bool) -> None:
    fake.script = BROKEN
    first = await ask(portal.sessions, "bad", request_id="r")
    assert isinstance(first.ending, Failed)
    assert first.ending.error.retryable
    fake.script = Script()
    if answered_over:
        await ask(portal.sessions, "over")
    again = await ask(portal.sessions, "bad", request_id="r")
    assert (again.id, answer_of(await again.ended()).response) == (first.id, "Hello there")
    before = [("over", "complete"), ("Hello there", "complete")] if answered_over else []
    assert await told(portal.sessions) == [*before, ("bad", "complete"), ("Hello there", "complete")]


async def test_a_reply_that_breaks_off_twice_is_there_once(fake: FakeLLM, portal: Container) -> None:
    fake.script = BROKEN
    for _ in range(2):
        await ask(portal.sessions, "bad", request_id="r")
    assert await told(portal.sessions) == [("bad", "failed"), ("One two", "failed")]


async def test_a_stopped_reply_tells_what_it_used(fake: FakeLLM, portal: Container) -> None:
    fake.script = Script(pieces=text(*["more "] * 500), between=0.02)
    request = TurnRequest(who=ADA, session_id="s", message="hi")
    turn = await portal.sessions.submit(request)
    async for batch in turn.follow():
        if turn.response:
            break
        assert batch
    await portal.sessions.stop(ADA, "s")
    ending = await turn.ended()
    assert isinstance(ending, Cancelled)
    assert ending.usage is not None
    assert ending.usage.estimated
    stored = (await portal.sessions.page(ADA, "s")).messages[-1]
    assert stored.usage == ending.usage
