"""Turns, end to end below the doors, with an LLM server that does as the test says."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest

from app.access import LOCAL
from app.config import Settings, child_environment
from app.container import Container, open_container
from app.errors import (
    Conflict,
    Expired,
    InvalidRequest,
    LLMUnavailable,
    NotFound,
    Overloaded,
    StorageUnavailable,
)
from app.events import (
    Cancelled,
    ExpiredEvent,
    Failed,
    Final,
    GenerationOptions,
    Queued,
    Thinking,
    Token,
    TurnRequest,
)
from app.loop import BackgroundLoop
from app.services.prompts import estimate_tokens
from app.services.session_manager import SessionManager
from app.services.turns import Numbered, Position, Turn, answer_of
from app.services.usage import today
from tests.fake_llm import FakeLLM, Script, serve, size_of, text
from tests.support import free_port, person

SettingsFor = Callable[..., Settings]

ADA, BO = person("1"), person("2")

LONG = Script(pieces=text(*["more "] * 500), between=0.01)


@pytest.fixture
async def portal(fake: FakeLLM, settings_for: SettingsFor) -> AsyncIterator[Container]:
    async with open_container(settings_for(fake.url)) as container:
        yield container


@pytest.fixture
def sessions(portal: Container) -> SessionManager:
    return portal.sessions


def request(message: str = "hi", **changes: Any) -> TurnRequest:
    return TurnRequest(**{"who": ADA, "session_id": "s", "message": message, **changes})


async def events(turn: Turn, after: Position | None = None) -> list[Numbered]:
    """All events of a turn, up to its end."""
    async with aclosing(turn.follow(after)) as batches:
        return [event async for batch in batches for event in batch]


async def told(sessions: SessionManager, session_id: str = "s") -> list[tuple[str, str]]:
    page = await sessions.page(ADA, session_id)
    return [(message.content, message.status) for message in page.messages]


def sent(fake: FakeLLM, number: int = -1) -> list[str]:
    """The messages of a request to the LLM server."""
    return [message["content"] for message in fake.requests[number]["messages"]]


async def test_a_turn_answers_and_is_remembered(fake: FakeLLM, sessions: SessionManager) -> None:
    turn = await sessions.submit(request("hi", system_prompt="Be kind."))
    seen = await events(turn)
    assert [event.id for event in seen] == ["1.0", "1.1", "1.2", "1.3"] or len(seen) == 3
    tokens = "".join(event.event.content for event in seen if isinstance(event.event, Token))
    final = seen[-1].event
    assert isinstance(final, Final)
    assert final.response == tokens == "Hello there"
    assert (final.usage.prompt_tokens, final.usage.completion_tokens) == (7, 2)
    await (await sessions.submit(request("and?", system_prompt="Not this."))).ended()
    assert sent(fake) == ["Be kind.", "hi", "Hello there", "and?"]
    assert await told(sessions) == [
        (content, "complete") for content in ("hi", "Hello there", "and?", "Hello there")
    ]


async def test_turns_of_a_session_run_in_order_and_sessions_side_by_side(
    fake: FakeLLM, sessions: SessionManager
) -> None:
    fake.script = Script(echo=True, before_first=0.02)
    turns = [await sessions.submit(request(f"{n}", session_id=f"s{n % 4}")) for n in range(20)]
    await asyncio.gather(*(turn.ended() for turn in turns))
    assert 1 < fake.most_running <= 4
    for session in range(4):
        asked = [content for content, _ in await told(sessions, f"s{session}")][::2]
        assert asked == [f"{n}" for n in range(20) if n % 4 == session]


async def test_sixty_four_threads_and_sixty_four_tasks_share_sixteen_sessions(
    fake: FakeLLM, settings_for: SettingsFor
) -> None:
    fake.script = Script(echo=True)
    background = BackgroundLoop()
    stack = AsyncExitStack()

    def on_portal_loop(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, background.loop).result(60)

    settings = settings_for(fake.url, llm_max_concurrency=16)
    container = await asyncio.to_thread(on_portal_loop, stack.enter_async_context(open_container(settings)))
    manager: SessionManager = container.sessions

    def from_thread(number: int) -> list[str]:
        return [
            manager.process_message(f"s{number % 16}", "", f"t{number}.{k}", request_id=f"t{number}.{k}")
            for k in range(3)
        ]

    async def from_task(number: int) -> list[str]:
        return [await manager.aprocess_message(f"s{number % 16}", "", f"a{number}.{k}") for k in range(3)]

    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(64) as pool:
        threads = [loop.run_in_executor(pool, from_thread, number) for number in range(64)]
        replies = await asyncio.gather(*threads, *(from_task(number) for number in range(64)))
    expected = [[f"echo: {kind}{n}.{k}" for k in range(3)] for kind in "ta" for n in range(64)]
    assert replies == expected

    for session in range(16):
        page = await asyncio.to_thread(on_portal_loop, manager.page(LOCAL, f"s{session}"))
        said = [message.content for message in page.messages]
        assert len(said) == 2 * 8 * 3
        assert all(answer == f"echo: {asked}" for asked, answer in zip(said[::2], said[1::2], strict=True))
        for kind in "ta":
            for number in range(session, 64, 16):
                mine = [one for one in said[::2] if one.startswith(f"{kind}{number}.")]
                assert mine == [f"{kind}{number}.{k}" for k in range(3)]
    await asyncio.to_thread(on_portal_loop, stack.aclose())
    await asyncio.to_thread(background.stop)


async def test_the_blocking_methods_refuse_the_loops_own_thread(portal: Container) -> None:
    with pytest.raises(RuntimeError, match="await"):
        portal.sessions.process_message("s", "", "hi")
    with pytest.raises(RuntimeError, match="await"):
        portal.llm.generate([{"role": "user", "content": "hi"}])
    assert await portal.sessions.aprocess_message("s", "", "hi") == "Hello there"


async def test_a_request_id_makes_one_generation(fake: FakeLLM, sessions: SessionManager) -> None:
    fake.script = Script(before_first=0.05)
    turns = await asyncio.gather(*(sessions.submit(request(request_id="r")) for _ in range(5)))
    endings = await asyncio.gather(*(turn.ended() for turn in turns))
    assert len(fake.requests) == 1
    assert endings == [endings[0]] * 5
    replayed = await sessions.submit(request(request_id="r"))
    assert [event.json for event in await events(replayed)] == [
        event.json for event in await events(turns[0])
    ]
    with pytest.raises(Conflict):
        await sessions.submit(request("else", request_id="r"))
    assert len(fake.requests) == 1


async def test_a_retryable_failure_begins_a_new_attempt(fake: FakeLLM, sessions: SessionManager) -> None:
    fake.script = Script(status=500)
    first = await sessions.submit(request(request_id="r"))
    failed = await first.ended()
    assert isinstance(failed, Failed)
    assert (failed.error.code, failed.error.retryable) == ("llm_error", True)
    fake.script = Script()
    again = await sessions.submit(request(request_id="r"))
    kinds = [event.id for event in await events(again)]
    assert again.id == first.id
    assert kinds[:2] == ["2.0", "2.1"]
    assert answer_of(await again.ended()).response == "Hello there"
    assert await told(sessions) == [("hi", "complete"), ("Hello there", "complete")]


async def test_what_had_failed_does_not_begin_again_at_the_end_of_the_process(
    fake: FakeLLM, portal: Container
) -> None:
    answered = await portal.sessions.submit(request(request_id="answered"))
    await answered.ended()
    fake.script = Script(status=500)
    await (await portal.sessions.submit(request(request_id="r"))).ended()
    fake.script = Script()
    await portal.drain.run(0, lambda: True)
    with pytest.raises(Overloaded, match="being stopped"):
        await portal.sessions.submit(request(request_id="r"))
    again = await portal.sessions.submit(request(request_id="answered"))
    assert answer_of(await again.ended()).response == "Hello there"


async def test_a_failed_message_is_kept_but_not_sent(fake: FakeLLM, sessions: SessionManager) -> None:
    fake.script = Script(status=400)
    ending = await (await sessions.submit(request("bad"))).ended()
    assert isinstance(ending, Failed)
    assert not ending.error.retryable
    fake.script = Script()
    await (await sessions.submit(request("good"))).ended()
    assert sent(fake) == ["good"]
    assert [status for _, status in await told(sessions)] == ["failed", "complete", "complete"]


@pytest.mark.parametrize(
    "script",
    [Script(status=500), Script(pieces=text("Good", " day"), cut_after=1), Script(before_headers=30)],
    ids=["fails", "breaks off", "is stopped"],
)
async def test_an_answer_that_was_not_made_again_stays(
    fake: FakeLLM, sessions: SessionManager, script: Script
) -> None:
    fake.script = Script(echo=True)
    for message in ("one", "two"):
        await (await sessions.submit(request(message))).ended()
    before = await told(sessions)
    fake.script = script
    again = await sessions.submit(request("", regenerate=True, request_id="r"))
    if script.before_headers:
        await fake.until(lambda: fake.running == 1)
        await sessions.stop(ADA, "s")
    assert not isinstance(await again.ended(), Final)
    assert await told(sessions) == before
    fake.script = Script(echo=True)
    await (await sessions.submit(request("three"))).ended()
    assert sent(fake) == ["one", "echo: one", "two", "echo: two", "three"]


async def test_a_retry_of_what_was_answered_over_is_another_answer_in_its_place(
    fake: FakeLLM, sessions: SessionManager
) -> None:
    fake.script = Script(echo=True)
    await (await sessions.submit(request("one"))).ended()
    fake.script = Script(status=503)
    await (await sessions.submit(request("two", request_id="r"))).ended()
    gate = threading.Event()
    fake.script = Script(pieces=text("over"), gate=gate)
    over = await sessions.submit(request("", regenerate=True))
    with pytest.raises(Conflict, match="busy"):
        await sessions.submit(request("two", request_id="r"))
    gate.set()
    await over.ended()
    fake.script = Script(status=503)
    await (await sessions.submit(request("two", request_id="r"))).ended()
    assert [content for content, _ in await told(sessions)] == ["one", "echo: one", "two", "over"]
    fake.script = Script(echo=True)
    again = await sessions.submit(request("two", request_id="r"))
    assert answer_of(await again.ended()).response == "echo: two"
    assert sent(fake) == ["one", "echo: one", "two"]
    (answers,) = await sessions.branches(ADA, "s")
    assert len(answers) == 2
    assert [content for content, _ in await told(sessions)] == ["one", "echo: one", "two", "echo: two"]
    await (await sessions.submit(request("three"))).ended()
    assert sent(fake) == ["one", "echo: one", "two", "echo: two", "three"]


async def test_a_retry_of_what_was_answered_over_does_not_undo_what_came_after(
    fake: FakeLLM, sessions: SessionManager
) -> None:
    fake.script = Script(status=503)
    await (await sessions.submit(request("one", request_id="r"))).ended()
    fake.script = Script(echo=True)
    await (await sessions.submit(request("", regenerate=True))).ended()
    await (await sessions.submit(request("two"))).ended()
    with pytest.raises(Conflict, match="gone on"):
        await sessions.submit(request("one", request_id="r"))
    assert [content for content, _ in await told(sessions)] == ["one", "echo: one", "two", "echo: two"]
    await sessions.clear(ADA, "s")
    await (await sessions.submit(request("one", request_id="r"))).ended()
    assert [content for content, _ in await told(sessions)] == ["one", "echo: one"]


async def test_a_pinned_question_stays_pinned_when_it_is_answered_again(
    fake: FakeLLM, settings_for: SettingsFor
) -> None:
    async with open_container(settings_for(fake.url, llm_max_history_messages=6)) as portal:
        fake.script = Script(echo=True)
        pinned = await portal.sessions.submit(request("the code is 1234"))
        await pinned.ended()
        await portal.pins.pin(ADA, "s", pinned.row.message_id)
        await (await portal.sessions.submit(request("", regenerate=True))).ended()
        for number in range(4):
            await (await portal.sessions.submit(request(f"q{number}"))).ended()
        assert sent(fake)[0] == "the code is 1234"
        assert "q0" not in sent(fake), "others were cut"


async def test_a_stop_keeps_and_sends_what_there_was(fake: FakeLLM, sessions: SessionManager) -> None:
    fake.script = Script(pieces=text("One", " two", *[" more"] * 500), between=0.02)
    turn = await sessions.submit(request())
    async with aclosing(turn.follow()) as batches:
        async for batch in batches:
            if isinstance(batch[-1].event, Token):
                break
    assert await sessions.stop(ADA, "s") == turn.id
    ending = await turn.ended()
    assert isinstance(ending, Cancelled)
    assert ending.response.startswith("One")
    await fake.until(lambda: fake.dropped == 1, 1.0)
    fake.script = Script()
    await (await sessions.submit(request("go on"))).ended()
    assert sent(fake) == ["hi", ending.response, "go on"]
    assert (await told(sessions))[1] == (ending.response, "cancelled")
    assert await sessions.stop(ADA, "s") is None


async def test_a_turn_that_is_not_detached_ends_with_its_last_follower(
    fake: FakeLLM, sessions: SessionManager
) -> None:
    fake.script = Script(pieces=text(*["more "] * 500), between=0.02)
    leaving = await sessions.submit(request(detached=False))
    staying = await sessions.submit(request(session_id="t", detached=True))
    followers = [asyncio.create_task(turn.ended()) for turn in (leaving, leaving, staying)]
    await fake.until(lambda: fake.running == 2)
    followers[0].cancel()
    followers[2].cancel()
    await asyncio.sleep(0)
    assert (leaving.followers, fake.dropped) == (1, 0)
    followers[1].cancel()
    await fake.until(lambda: fake.dropped == 1, 1.0)
    assert staying.ending is None
    await sessions.stop(ADA, "t")


async def test_clear_stops_drops_and_forgets(fake: FakeLLM, sessions: SessionManager) -> None:
    await (await sessions.submit(request("before", system_prompt="Be kind."))).ended()
    fake.script = Script(pieces=text(*["more "] * 500), between=0.02)
    turns = [await sessions.submit(request(f"{n}")) for n in range(3)]
    await fake.until(lambda: fake.running == 1)
    await sessions.clear(ADA, "s")
    assert [type(await turn.ended()) for turn in turns] == [Cancelled] * 3
    await fake.until(lambda: fake.dropped == 1, 1.0)
    assert await told(sessions) == []
    fake.script = Script()
    await (await sessions.submit(request("after"))).ended()
    assert sent(fake) == ["Be kind.", "after"]


async def test_a_deadline_bounds_the_wait_and_not_the_generation(
    fake: FakeLLM, settings_for: SettingsFor
) -> None:
    async with open_container(settings_for(fake.url, llm_max_concurrency=1)) as portal:
        fake.script = Script(pieces=text("a", "b", "c"), between=1.0)
        runs = await portal.sessions.submit(request("runs", deadline=time.time() + 2))
        await fake.until(lambda: fake.running == 1)
        behind = await portal.sessions.submit(request("behind", deadline=time.time() + 0.1))
        queued = await portal.sessions.submit(request("queued", session_id="t", deadline=time.time() + 0.1))
        endings = [await turn.ended() for turn in (behind, queued, runs)]
        assert [type(ending) for ending in endings] == [ExpiredEvent, ExpiredEvent, Final]
        assert len(fake.requests) == 1
        with pytest.raises(Expired):
            answer_of(endings[0])
        assert [status for _, status in await told(portal.sessions, "t")] == ["expired"]


async def test_who_waits_for_a_place_is_told_where(fake: FakeLLM, settings_for: SettingsFor) -> None:
    async with open_container(settings_for(fake.url, llm_max_concurrency=1, llm_max_queue=2)) as portal:
        fake.script = Script(before_first=1.3)
        turns = []
        for number in range(3):
            turns.append(await portal.sessions.submit(request(session_id=f"s{number}")))
            async with asyncio.timeout(5):
                while portal.llm.places.taken + portal.llm.places.waiting <= number:
                    await asyncio.sleep(0.01)
        with pytest.raises(Overloaded) as refused:
            await portal.sessions.submit(request(session_id="s9"))
        assert refused.value.retry_after is not None
        seen = await events(turns[2])
        positions = [event.event.position for event in seen if isinstance(event.event, Queued)]
        assert positions == [2, 1]
        recalled = await portal.sessions.find(ADA, turns[2].id)
        assert [event.json for event in await events(recalled)] == [event.json for event in seen]


async def test_thinking_is_streamed_apart_when_it_is_wanted(fake: FakeLLM, settings_for: SettingsFor) -> None:
    async with open_container(settings_for(fake.url, llm_skip_thinking=False)) as portal:
        fake.script = Script(pieces=[{"reasoning_content": "hm"}, *text("<thi", "nk>so</think>", "Yes")])
        turn = await portal.sessions.submit(request())
        seen = [event.event for event in await events(turn)]
        thoughts = "".join(event.content for event in seen if isinstance(event, Thinking))
        assert (thoughts, answer_of(await turn.ended()).response) == ("hmso", "Yes")
        recalled = await portal.sessions.find(ADA, turn.id)
        assert [event.event for event in await events(recalled)] == seen


async def test_the_reasoning_of_an_answer_that_was_finished_elsewhere_is_known(
    fake: FakeLLM, settings_for: SettingsFor
) -> None:
    held = threading.Event()
    fake.script = Script(pieces=[{"reasoning_content": "hm"}, *text("Yes")], held=held)
    async with (
        open_container(settings_for(fake.url, instance="one", llm_skip_thinking=False)) as one,
        open_container(settings_for(fake.url, instance="two")) as two,
    ):
        turn = await one.sessions.submit(request())
        followed = await two.sessions.find(ADA, turn.id)
        held.set()
        assert answer_of(await followed.ended()).response == "Yes"
        assert followed.reasoning == turn.reasoning == "hm"


async def test_a_follower_can_come_back_at_any_event(fake: FakeLLM, sessions: SessionManager) -> None:
    fake.script = Script(pieces=text(*[f"{n} " for n in range(40)]), between=0.002)
    turn = await sessions.submit(request())
    live = await events(turn)
    for after in range(len(live)):
        for source in (turn, await sessions.find(ADA, turn.id)):
            assert [event.json for event in await events(source, (1, after))] == [
                event.json for event in live[after + 1 :]
            ]


async def test_another_owners_things_are_not_found(sessions: SessionManager) -> None:
    turn = await sessions.submit(request())
    await turn.ended()
    for call in (
        sessions.find(BO, turn.id),
        sessions.page(BO, "s"),
        sessions.clear(BO, "s"),
        sessions.stop(BO, "s"),
    ):
        with pytest.raises(NotFound):
            await call


@pytest.mark.parametrize(
    "changes",
    [
        {"session_id": "a b"},
        {"session_id": ""},
        {"session_id": "x" * 129},
        {"session_id": "s\n"},
        {"request_id": "a/b"},
        {"message": "  "},
        {"message": "a\0b"},
    ],
)
async def test_bad_requests_are_refused_before_anything_is_stored(
    sessions: SessionManager, changes: dict[str, str]
) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(changes))):
        await sessions.submit(request(**changes))


async def test_turns_of_a_process_that_died_are_taken_up(fake: FakeLLM, settings_for: SettingsFor) -> None:
    settings = settings_for(fake.url, instance="one")
    fake.script = Script(pieces=text(*["more "] * 500), between=0.02)
    async with open_container(settings) as portal:
        turn = await portal.sessions.submit(request(request_id="r"))
        waiting = await portal.sessions.submit(request("next", request_id="r2"))
        alone = await portal.sessions.submit(request("alone", session_id="t", detached=False))
        await fake.until(lambda: fake.running == 2)
    fake.script = Script(echo=True)
    async with open_container(settings) as portal:
        again = await portal.sessions.submit(request(request_id="r"))
        seen = await events(again, (1, 3))
        assert (again.id, seen[0].id) == (turn.id, "2.1")
        assert answer_of(await again.ended()).response == "echo: hi"
        then = await portal.sessions.find(ADA, waiting.id)
        assert (await events(then))[0].id == "1.0", "it had not begun"
        assert answer_of(await then.ended()).response == "echo: next"
        left = await portal.sessions.find(ADA, alone.id)
        assert isinstance(await left.ended(), Cancelled), "nobody follows it any more"
        assert sent(fake) == ["hi", "echo: hi", "next"]


async def test_a_turn_that_is_cut_off_while_it_all_ends_is_counted(
    fake: FakeLLM, settings_for: SettingsFor
) -> None:
    settings = settings_for(fake.url)
    fake.script = LONG
    async with open_container(settings) as portal:
        turn = await portal.sessions.submit(request())
        async for _ in turn.follow():
            if turn.written:
                break
        await portal.sessions.clear(ADA, "s")
        await portal.sessions.close()
        assert not [task for task in asyncio.all_tasks() if turn.id in task.get_name()]
    async with open_container(settings) as portal:
        assert (await portal.book.spent(ADA.owner, today())).turns == 1


async def test_two_instances_keep_one_order(fake: FakeLLM, settings_for: SettingsFor) -> None:
    fake.script = Script(echo=True, before_first=0.05)
    async with (
        open_container(settings_for(fake.url, instance="one")) as one,
        open_container(settings_for(fake.url, instance="two")) as two,
    ):
        turns = [await (one, two)[n % 2].sessions.submit(request(f"{n}")) for n in range(6)]
        await asyncio.gather(*(turn.ended() for turn in turns))
        assert [content for content, _ in await told(one.sessions)][::2] == [f"{n}" for n in range(6)]
        assert sent(fake) == [*[said for n in range(5) for said in (f"{n}", f"echo: {n}")], "5"]
        elsewhere = await two.sessions.submit(request("6"))
        followed = await one.sessions.find(ADA, elsewhere.id)
        assert answer_of(await followed.ended()).response == "echo: 6"


async def test_a_turn_that_is_followed_where_it_is_cut_off_is_counted_where_it_runs(
    fake: FakeLLM, settings_for: SettingsFor
) -> None:
    fake.script = LONG
    async with (
        open_container(settings_for(fake.url, instance="one")) as one,
        open_container(settings_for(fake.url, instance="two")) as two,
    ):
        turn = await one.sessions.submit(request())
        async with aclosing(turn.follow()) as batches:
            async for batch in batches:
                if isinstance(batch[-1].event, Token):
                    break
        followed = await two.sessions.find(ADA, turn.id)
        await two.sessions.clear(ADA, "s")
        assert isinstance(await followed.ended(), Cancelled)
        await two.sessions.close()
        assert isinstance(await turn.ended(), Cancelled)
        await one.sessions.close()
        (used,) = await one.book.report(["model"], since=today(), until=today())
        assert (used.group, used.spent.turns) == ({"model": "fake-1"}, 1)
        assert used.spent.completion_tokens > 0


async def test_it_works_when_the_llm_server_comes_later(fake: FakeLLM, settings_for: SettingsFor) -> None:
    port = free_port()
    async with open_container(settings_for(f"http://127.0.0.1:{port}")) as portal:
        assert (await portal.llm.ahealth()).status == "down"
        with pytest.raises(LLMUnavailable):
            await portal.sessions.aprocess_message("s", "", "hi")
        async with serve(FakeLLM(), port), asyncio.timeout(5):
            while (await portal.llm.ahealth()).status != "ok":
                await asyncio.sleep(0.05)
            assert await portal.sessions.aprocess_message("s", "", "hi") == "Hello there"


async def test_a_request_that_is_cancelled_while_it_is_accepted_leaves_no_turn_behind(
    fake: FakeLLM, sessions: SessionManager
) -> None:
    for delay in range(12):
        asking = asyncio.create_task(sessions.aprocess_message("cut", "", "hi"))
        await asyncio.sleep(delay / 2000)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(10):
        assert await sessions.aprocess_message("cut", "", "still there?") == "Hello there"


async def test_a_clear_is_in_order_with_the_messages_beside_it(
    fake: FakeLLM, sessions: SessionManager
) -> None:
    fake.script = Script(echo=True)
    for _ in range(10):
        await (await sessions.submit(request("before"))).ended()
        clearing = asyncio.create_task(sessions.clear(ADA, "s"))
        asking = asyncio.create_task(sessions.submit(request("after")))
        await clearing
        assert answer_of(await (await asking).ended()).response == "echo: after"
        assert [content for content, _ in await told(sessions)] == ["after", "echo: after"]


async def test_who_resumes_after_a_clear_hears_the_ending(fake: FakeLLM, sessions: SessionManager) -> None:
    fake.script = Script(pieces=text(*["more "] * 500), between=0.01)
    turn = await sessions.submit(request())
    async with aclosing(turn.follow()) as batches:
        async for batch in batches:
            if batch[-1].n > 5:
                break
    await sessions.clear(ADA, "s")
    resumed = await events(await sessions.find(ADA, turn.id), (1, 5))
    assert isinstance(resumed[-1].event, Cancelled)


@pytest.mark.parametrize("how", ["clear", "fail"])
@pytest.mark.parametrize("attempt", [1, 2])
async def test_who_saw_one_event_hears_the_ending_that_was_stored_with_its_number(
    fake: FakeLLM, sessions: SessionManager, how: str, attempt: int
) -> None:
    if attempt == 2:
        fake.script = Script(status=500)
        await (await sessions.submit(request(request_id="r"))).ended()
    fake.script = LONG if how == "clear" else Script(cut_after=1, then="eof")
    turn = await sessions.submit(request(request_id="r"))
    if how == "clear":
        async with aclosing(turn.follow()) as batches:
            async for batch in batches:
                if isinstance(batch[-1].event, Token):
                    break
        await sessions.clear(ADA, "s")
    ending = await turn.ended()
    assert await events(turn, turn.last) == [], "who has seen the ending is not told again"
    seen = (attempt, attempt)  # the first token
    assert isinstance((await events(turn))[seen[1]].event, Token)
    resumed = await events(await sessions.find(ADA, turn.id), seen)
    assert [event.event for event in resumed] == [ending]


@pytest.mark.parametrize("by", ["one", "two"])
async def test_who_goes_on_in_another_process_hears_an_ending_that_has_no_trace(
    fake: FakeLLM, settings_for: SettingsFor, by: str
) -> None:
    fake.script = LONG
    async with (
        open_container(settings_for(fake.url, instance="one")) as one,
        open_container(settings_for(fake.url, instance="two")) as two,
    ):
        turn = await one.sessions.submit(request())
        following = asyncio.create_task(events(await two.sessions.find(ADA, turn.id), (1, 1)))
        await fake.until(lambda: fake.running == 1)
        await (one if by == "one" else two).sessions.clear(ADA, "s")
        async with asyncio.timeout(10):
            assert [type(event.event) for event in await following] == [Cancelled]


async def test_a_retry_has_a_deadline_of_its_own(fake: FakeLLM, sessions: SessionManager) -> None:
    fake.script = Script(status=500)
    deadline = time.time() + 1
    failed = await sessions.submit(request(request_id="r", deadline=deadline))
    assert isinstance(await failed.ended(), Failed)
    await asyncio.sleep(deadline - time.time())
    fake.script = Script()
    again = await sessions.submit(request(request_id="r", deadline=time.time() + 60))
    assert isinstance(await again.ended(), Final)


async def test_a_deadline_that_passed_while_nobody_looked(fake: FakeLLM, settings_for: SettingsFor) -> None:
    settings = settings_for(fake.url, instance="one")
    fake.script = Script(before_first=30)
    async with open_container(settings) as portal:
        await portal.sessions.submit(request("runs"))
        waiting = await portal.sessions.submit(request("waits", deadline=time.time() + 0.3))
    await asyncio.sleep(0.3)
    fake.script = Script()
    async with open_container(settings) as portal:
        turn = await portal.sessions.find(ADA, waiting.id)
        assert isinstance(await turn.ended(), ExpiredEvent)


async def test_a_chat_without_a_session_is_not_stored(fake: FakeLLM, sessions: SessionManager) -> None:
    messages = [{"role": "user", "content": "hi"}]
    turn = await sessions.chat(ADA, messages, GenerationOptions(temperature=0))
    assert answer_of(await turn.ended()).message_id is None
    assert fake.requests[-1]["temperature"] == 0
    with pytest.raises(NotFound):
        await sessions.find(ADA, turn.id)


async def test_who_leaves_before_a_chat_is_let_in_takes_nothing(
    fake: FakeLLM, settings_for: SettingsFor
) -> None:
    settings = settings_for(fake.url, RATE_LIMIT_PER_HOUR=1, daily_token_budget=10_000)
    message = [{"role": "user", "content": "hi"}]
    async with open_container(settings) as portal:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await portal.sessions.chat(ADA, message, GenerationOptions())
        turn = await portal.sessions.chat(ADA, message, GenerationOptions())
        assert answer_of(await turn.ended()).response == "Hello there"


async def test_a_turn_counts_for_the_day_on_which_it_was_accepted(
    fake: FakeLLM, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    midnight = (time.time() // 86400 + 1) * 86400
    monkeypatch.setattr(time, "time", lambda: midnight - 60)
    fake.script = Script(gate=threading.Event())
    async with open_container(settings_for(fake.url, daily_token_budget=10_000)) as portal:
        before = today()
        turn = await portal.sessions.submit(request())
        await fake.until(lambda: fake.running == 1)
        monkeypatch.setattr(time, "time", lambda: midnight + 60)
        assert fake.script.gate is not None
        fake.script.gate.set()
        await turn.ended()
        assert (await portal.book.spent(ADA.owner, before)).turns == 1
        assert (await portal.book.spent(ADA.owner, today())).turns == 0
        assert [budget.spent for budget in await portal.admission.budgets(ADA)] == [0]


def test_plain_python_needs_no_loop(fake_thread: FakeLLM, settings_for: SettingsFor) -> None:
    background = BackgroundLoop()
    stack = AsyncExitStack()
    opening = stack.enter_async_context(open_container(settings_for(fake_thread.url)))
    container = asyncio.run_coroutine_threadsafe(opening, background.loop).result(20)
    assert container.llm.generate([{"role": "user", "content": "hi"}], max_tokens=3) == "Hello there"
    assert next(iter(container.llm.generate_stream([{"role": "user", "content": "hi"}]))).startswith("Hello")
    assert container.llm.health().status == "ok"
    assert [model.id for model in container.llm.models()] == ["fake-1"]
    asyncio.run_coroutine_threadsafe(stack.aclose(), background.loop).result(20)
    background.stop()


def test_a_plain_program_needs_two_lines_and_ends_cleanly(fake_thread: FakeLLM, tmp_path: Path) -> None:
    program = """
from app.services.llm_client import get_llm_client, get_session_manager
print(get_session_manager().process_message(session_id="s", system_prompt="", user_message="hi"))
print("".join(get_llm_client().generate_stream([{"role": "user", "content": "hi"}])))
"""
    settings = {"LLM_SERVER_URL": fake_thread.url, "DATABASE_URL": f"sqlite:///{tmp_path / 'plain.db'}"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env=child_environment(settings),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("Hello there\nHello there\n", "", 0)


# --- summaries ---


@pytest.mark.parametrize("why", ["the database is away", "the session speaks"])
async def test_what_a_summary_has_used_is_counted_though_it_is_not_stored_at_once(
    fake: FakeLLM, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    budget = 10_000
    fake.script = Script(pieces=text("a" * 60), counts=True, notes="Ada likes tea.")
    settings = settings_for(
        fake.url,
        llm_history_summary=50,
        llm_max_history_tokens=600,
        llm_max_tokens=60,
        daily_token_budget=budget,
    )
    async with open_container(settings) as portal:
        begun, go_on, stored = asyncio.Event(), asyncio.Event(), portal.memory.summarise

        async def summarise(*given: Any) -> bool:
            begun.set()
            if why == "the database is away":
                raise StorageUnavailable("It is locked.")
            await go_on.wait()
            return await stored(*given)

        monkeypatch.setattr(portal.memory, "summarise", summarise)
        starts: set[str | None] = set()
        while len(starts) < 2:
            await (await portal.sessions.submit(request("q" * 60))).ended()
            session = await portal.store.session(ADA.owner, "s")
            assert session is not None
            starts.add(session.window_start)
        async with asyncio.timeout(10):
            await begun.wait()
        if why == "the session speaks":
            await (await portal.sessions.submit(request("q"))).ended()
        go_on.set()
        await portal.sessions.close()
        spent = await portal.book.spent(ADA.owner, today())
        assert spent.prompt_tokens == sum(size_of(asked["messages"]) for asked in fake.requests)
        left = budget - spent.tokens - 2 * estimate_tokens("")  # of the message and the system prompt
        rest = request("", options=GenerationOptions(max_tokens=left))
        await portal.admission.admit(ADA, rest, "t", "fake-1")  # nothing is reserved any more
