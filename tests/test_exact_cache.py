"""Answers that are given again (LLM_CACHE_MB): to whom, to what, and what is never kept."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from app.config import Settings
from app.container import Container, open_container
from app.events import Cancelled, Final, GenerationOptions, Token, TurnRequest, Usage
from app.services.llm_client import LLMClient
from app.services.replies import Completion
from app.services.routing import OwnKey
from app.services.turns import Turn
from tests.fake_llm import FakeLLM, Script, text
from tests.support import person

SettingsFor = Callable[..., Settings]

ADA, BO = person("1"), person("2")
GO = {"type": "function", "function": {"name": "go"}}


@pytest.fixture
async def portal(fake: FakeLLM, settings_for: SettingsFor) -> AsyncIterator[Container]:
    fake.script = Script(random=True)  # another text each time it is asked
    async with open_container(settings_for(fake.url, llm_cache_mb=1, llm_temperature=0)) as container:
        yield container


async def ask(portal: Container, session: str, message: str = "hi", who: Any = ADA, **options: Any) -> Turn:
    request = TurnRequest(who=who, session_id=session, message=message, options=GenerationOptions.of(options))
    turn = await portal.sessions.submit(request)
    await turn.ended()
    return turn


def final(turn: Turn) -> Final:
    assert isinstance(turn.ending, Final)
    return turn.ending


async def test_the_same_question_is_answered_at_once_and_is_a_turn(fake: FakeLLM, portal: Container) -> None:
    first, second = await ask(portal, "one"), await ask(portal, "two")
    assert len(fake.requests) == 1
    assert final(second).response == final(first).response
    assert final(second).finish_reason == "stop"
    usage, again = final(first).usage, final(second).usage
    assert (usage.cache_hit, again.cache_hit) == (False, True)
    assert (again.prompt_tokens, again.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    async for batch in second.follow():
        told = [numbered.event for numbered in batch if isinstance(numbered.event, Token)]
        assert "".join(token.content for token in told) == final(first).response
    stored = (await portal.sessions.page(ADA, "two")).messages
    assert [message.content for message in stored] == ["hi", final(first).response]
    assert stored[1].usage == again
    spent = (await portal.book.report(["owner"], since="2000-01-01", until="2999-12-31"))[0].spent
    assert (spent.turns, spent.prompt_tokens) == (2, usage.prompt_tokens), "what was kept costs nothing"


async def test_the_history_is_part_of_the_question(fake: FakeLLM, portal: Container) -> None:
    for session in ("one", "two"):
        for message in ("hi", "and then?"):
            await ask(portal, session, message)
    assert len(fake.requests) == 2
    await ask(portal, "three", "and then?")
    assert len(fake.requests) == 3


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"who": BO}, {}),
        ({"message": "hello"}, {}),
        ({"seed": 1}, {}),
        ({"max_tokens": 99}, {}),
        ({"extra": {"top_k": 1}}, {}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"tools": [GO]}, {"tools": [GO]}),
    ],
)
async def test_another_question_is_asked(
    fake: FakeLLM, portal: Container, changes: dict[str, Any], first: dict[str, Any]
) -> None:
    await ask(portal, "one", **first)
    assert not final(await ask(portal, "two", **changes)).usage.cache_hit
    assert len(fake.requests) == 2


@pytest.mark.parametrize(
    "script",
    [
        Script(raw=b'data: {"choices":[{"delta":{"content":"x"},"finish_reason":"length"}],"usage":{}}\n\n'),
        Script(pieces=text("One", " two"), cut_after=1),
        Script(pieces=[{"tool_calls": [{"index": 0, "id": "c", "function": {"name": "go"}}]}]),
    ],
)
async def test_what_is_not_whole_is_not_kept(fake: FakeLLM, portal: Container, script: Script) -> None:
    fake.script = script
    await ask(portal, "one")
    fake.script = Script()
    assert final(await ask(portal, "two")).response == "Hello there"


async def test_a_stopped_answer_is_not_kept(fake: FakeLLM, portal: Container) -> None:
    fake.script = Script(pieces=text(*["more "] * 500), between=0.02)
    turn = await portal.sessions.submit(TurnRequest(who=ADA, session_id="one", message="hi"))
    async for _batch in turn.follow():
        if turn.response:
            break
    await portal.sessions.stop(ADA, "one")
    assert isinstance(await turn.ended(), Cancelled)
    fake.script = Script()
    assert final(await ask(portal, "two")).response == "Hello there"


async def test_another_version_of_the_model_is_asked(fake: FakeLLM, portal: Container) -> None:
    first = await ask(portal, "one")
    fake.context = 4096  # of the same name, and yet another one
    await portal.llm.router.route(None).pool._probes[0]._ask()
    assert final(await ask(portal, "two")).response != final(first).response


async def test_who_brings_a_key_is_not_answered_from_it(fake: FakeLLM, portal: Container) -> None:
    hi = [{"role": "user", "content": "hi"}]
    for _ in range(2):
        async for _update in portal.llm.stream(hi, GenerationOptions(), own_key=OwnKey("other", "k")):
            pass
    assert len(fake.requests) == 2


async def test_it_is_bounded_and_forgets_what_was_not_used(fake: FakeLLM, portal: Container) -> None:
    fake.script = Script(pieces=text("x" * 300_000))
    for message in ("a", "b", "c"):
        await ask(portal, message, message, max_tokens=10_000)
    await ask(portal, "again", "a", max_tokens=10_000)
    assert len(fake.requests) == 3
    await ask(portal, "d", "d", max_tokens=10_000)
    cache = portal.llm._cache
    assert cache is not None
    assert cache.size <= 1 << 20
    for message, asked in (("a", 4), ("b", 5)):
        await ask(portal, f"later-{message}", message, max_tokens=10_000)
        assert len(fake.requests) == asked


async def test_it_is_off_by_default(fake: FakeLLM, settings_for: SettingsFor) -> None:
    async with open_container(settings_for(fake.url)) as portal:
        for session in ("one", "two"):
            await ask(portal, session, temperature=0)
    assert len(fake.requests) == 2


async def test_thinking_is_given_again_too(fake: FakeLLM, settings_for: SettingsFor) -> None:
    fake.script = Script(pieces=[{"reasoning_content": "Hm."}, *text("Yes")])
    client = LLMClient(settings_for(fake.url, llm_cache_mb=1, llm_skip_thinking=False))
    await client.open()
    await client.ahealth()  # from then on it is known which version answers
    kept = []
    for _ in range(2):
        completion = Completion()
        stream = client.stream([{"role": "user", "content": "hi"}], GenerationOptions(temperature=0))
        async for update in stream:
            completion.add(update)
        kept.append((completion.thinking, completion.response))
    await client.close()
    assert kept == [("Hm.", "Yes")] * 2
    assert isinstance(completion.usage, Usage)
    assert completion.usage.cache_hit
