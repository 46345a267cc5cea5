"""Several LLM servers: which one is asked, and what happens when one fails."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest

from app.config import Settings
from app.errors import LLMError, LLMTimeout, LLMUnavailable, Overloaded
from app.events import GenerationOptions
from app.services.llm_client import LLMClient
from app.services.places import Meter
from app.services.replies import Completion
from tests.fake_llm import FakeLLM, Script, serve, text
from tests.support import LlamaServer, client_for, free_port

SettingsFor = Callable[..., Settings]
HI = [{"role": "user", "content": "hi"}]
BUSY = Script(status=429, headers={"Retry-After": "30"})


@pytest.fixture
async def fakes() -> AsyncIterator[list[FakeLLM]]:
    """Three servers that say who they are."""
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(serve(FakeLLM())) for _ in range(3)]
        for number, fake in enumerate(running):
            fake.script = Script(pieces=text(f"from {number}"))
        yield running


@pytest.fixture
async def client(fakes: list[FakeLLM], settings_for: SettingsFor) -> AsyncIterator[LLMClient]:
    async with client_for(
        settings_for(urls(fakes), llm_max_concurrency=2, llm_first_token_timeout=0.5)
    ) as pool:
        await pool.ahealth()
        yield pool


def urls(fakes: list[FakeLLM]) -> str:
    return ",".join(fake.url for fake in fakes)


async def ask(client: LLMClient, session: str | None = None, owner: str = "ada", **options: Any) -> str:
    completion = Completion()
    updates = client.stream(HI, GenerationOptions(**options), session=session, owner=owner)
    async with aclosing(updates):
        async for update in updates:
            completion.add(update)
    return completion.response


def asked(fakes: list[FakeLLM]) -> list[int]:
    return [len(fake.requests) for fake in fakes]


# --- which one is asked --------------------------------------------------------------------------


async def test_load_is_spread_and_each_server_has_its_own_bound(
    client: LLMClient, fakes: list[FakeLLM]
) -> None:
    for fake in fakes:
        fake.script.before_first = 0.05
    await asyncio.gather(*(ask(client, owner=f"o{number}") for number in range(12)))
    assert asked(fakes) == [4, 4, 4]
    assert [fake.most_running for fake in fakes] == [2, 2, 2]


async def test_one_after_the_other_is_spread_too(client: LLMClient, fakes: list[FakeLLM]) -> None:
    for number in range(6):
        await ask(client, f"s{number}")
    assert asked(fakes) == [2, 2, 2]


async def test_a_session_stays_where_its_prefix_is(client: LLMClient) -> None:
    first = {f"s{number}": await ask(client, f"s{number}") for number in range(6)}
    for _ in range(3):
        for session in reversed(first):
            assert await ask(client, session) == first[session]


async def test_a_session_does_not_wait_for_its_server_while_another_is_free(
    client: LLMClient, fakes: list[FakeLLM]
) -> None:
    home = int((await ask(client, "s"))[-1])
    fakes[home].script.before_first = 30
    hanging = [asyncio.create_task(ask(client, "s")) for _ in range(2)]
    await fakes[home].until(lambda: fakes[home].running == 2)
    async with asyncio.timeout(5):
        assert await ask(client, "s") != f"from {home}"
    for task in hanging:
        task.cancel()
    await asyncio.gather(*hanging, return_exceptions=True)


async def test_the_queue_is_bounded_where_a_free_server_has_another_model(
    fakes: list[FakeLLM], settings_for: SettingsFor
) -> None:
    here, there, _ = fakes
    here.model, there.model, here.script = "a", "b", Script(before_first=30)
    limits = {"llm_max_concurrency": 1, "llm_max_queue": 2}
    async with client_for(settings_for(urls([here, there]), **limits)) as client, asyncio.timeout(10):
        await client.ahealth()
        asking = [asyncio.create_task(ask(client, owner=f"o{number}", model="a")) for number in range(3)]
        while client.queue.waiting < 2:
            await asyncio.sleep(0.01)
        assert isinstance(client.full("a"), Overloaded)
        with pytest.raises(Overloaded):
            await ask(client, model="a")
        assert client.full("b") is None
        assert await ask(client, model="b") == "from 1", "which has a place free"
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


# --- failover ------------------------------------------------------------------------------------


async def test_embeddings_are_another_servers_turn_when_one_is_silent(
    client: LLMClient, fakes: list[FakeLLM]
) -> None:
    for fake in fakes[:2]:
        fake.script = Script(before_headers=60)
    async with asyncio.timeout(5):
        for _ in range(2):
            assert (await client.embed(["one"], None, {})).tokens == 3


async def test_the_longest_time_for_embeddings_holds_over_all_attempts(
    fakes: list[FakeLLM], settings_for: SettingsFor
) -> None:
    for fake in fakes:
        fake.script = Script(before_headers=0.7, status=502)
    async with client_for(settings_for(urls(fakes), llm_timeout=1.0, llm_connect_timeout=1.0)) as client:
        await client.ahealth()
        with pytest.raises(LLMTimeout, match="within 1 s"):
            await client.embed(["one"], None, {})
    assert sum(asked(fakes)) == 2


@pytest.mark.parametrize(
    "script",
    [
        Script(status=500),
        Script(status=502),
        Script(status=503),
        BUSY,
        Script(before_headers=60),
        Script(before_first=60),
        Script(cut_after=0),
        Script(raw=b""),
    ],
)
async def test_before_the_first_piece_another_server_is_asked(
    client: LLMClient, fakes: list[FakeLLM], script: Script
) -> None:
    fakes[0].script = fakes[1].script = script
    for _ in range(3):
        assert await ask(client) == "from 2"
    assert client.queue.taken == 0
    await fakes[0].until(lambda: fakes[0].running == fakes[1].running == 0, 1)


async def test_no_server_is_asked_twice(client: LLMClient, fakes: list[FakeLLM]) -> None:
    for fake in fakes:
        fake.script = Script(status=502)
    with pytest.raises(LLMError, match="502"):
        await ask(client)
    assert asked(fakes) == [1, 1, 1]


async def test_after_the_first_piece_no_other_server_is_asked(
    client: LLMClient, fakes: list[FakeLLM]
) -> None:
    for fake in fakes:
        fake.script = Script(pieces=text("one", "two", "three"), cut_after=2)
    with pytest.raises(LLMError) as broken:
        await ask(client)
    assert broken.value.retryable
    assert sum(asked(fakes)) == 1


async def test_a_request_that_is_wrong_is_not_tried_elsewhere(
    client: LLMClient, fakes: list[FakeLLM]
) -> None:
    for fake in fakes:
        fake.script = Script(status=400)
    with pytest.raises(LLMError, match="wrong or too long"):
        await ask(client)
    assert sum(asked(fakes)) == 1


async def test_the_whole_time_holds_over_all_servers(fakes: list[FakeLLM], settings_for: SettingsFor) -> None:
    for fake in fakes:
        fake.script = Script(before_first=60)
    limits = {"llm_first_token_timeout": 0.4, "llm_timeout": 0.6, "llm_connect_timeout": 0.5}
    async with client_for(settings_for(urls(fakes), **limits)) as client:
        await client.ahealth()
        began = time.monotonic()
        with pytest.raises(LLMTimeout, match=r"finish its reply within 0\.6 s"):
            await ask(client)
        assert time.monotonic() - began < 1.5
        assert sum(asked(fakes)) == 2


async def test_the_whole_time_holds_while_it_waits_for_another_server(
    fakes: list[FakeLLM], settings_for: SettingsFor
) -> None:
    two = fakes[:2]
    limits = {"llm_timeout": 0.8, "llm_connect_timeout": 0.5, "llm_max_concurrency": 1}
    async with client_for(settings_for(urls(two), **limits)) as client:
        await client.ahealth()
        busy = two[int((await ask(client, "s"))[-1])]
        sick = two[1 - two.index(busy)]
        busy.script, sick.script = Script(before_first=60), Script(status=502, before_headers=0.2)
        hanging = asyncio.create_task(ask(client, "s", "bo"))
        await busy.until(lambda: busy.running == 1)
        client._settings = client._settings.replace(llm_timeout=0.4)
        began = time.monotonic()
        with pytest.raises(LLMTimeout, match=r"finish its reply within 0\.4 s"):
            await ask(client)
        assert time.monotonic() - began < 0.75
        await asyncio.gather(hanging, return_exceptions=True)
    assert client.queue.taken == client.queue.waiting == 0


async def test_a_server_that_dies_under_load_takes_only_what_it_had_begun(settings_for: SettingsFor) -> None:
    script = Script(pieces=text(*["x"] * 20), between=0.02)
    async with AsyncExitStack() as stack:
        stays = await stack.enter_async_context(serve(FakeLLM(script=script)))
        dies = AsyncExitStack()
        doomed = await dies.enter_async_context(serve(FakeLLM(script=script)))
        client = await stack.enter_async_context(
            client_for(settings_for(urls([stays, doomed]), llm_max_concurrency=4))
        )
        await client.ahealth()
        asking = [asyncio.create_task(ask(client, f"s{number}", f"o{number}")) for number in range(40)]
        await doomed.until(lambda: doomed.finished >= 2)
        await dies.aclose()
        results = await asyncio.gather(*asking, return_exceptions=True)
        broken = [result for result in results if not isinstance(result, str)]
        assert len(broken) <= 4, "those that had begun there"
        assert all(isinstance(error, LLMError) and error.retryable for error in broken)
        assert [result for result in results if isinstance(result, str)] == ["x" * 20] * (40 - len(broken))
        assert client.queue.taken == client.queue.waiting == 0


async def test_a_server_that_went_is_left_out_and_comes_back(settings_for: SettingsFor) -> None:
    ports = [free_port(), free_port()]
    addresses = ",".join(f"http://127.0.0.1:{port}" for port in ports)
    async with serve(FakeLLM(), ports[0]), client_for(settings_for(addresses)) as client:
        watching = asyncio.create_task(client.watch())
        async with asyncio.timeout(20):
            assert (await client.ahealth()).status == "degraded"
            for number in range(4):
                assert await ask(client, f"s{number}") == "Hello there"
            async with serve(FakeLLM(), ports[1]) as second:
                while (await client.ahealth()).status != "ok":
                    await asyncio.sleep(0.05)
                for number in range(4):
                    await ask(client, f"new-{number}")
                assert len(second.requests) == 2
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_a_server_that_does_not_answer_keeps_nobody_waiting(
    fakes: list[FakeLLM], settings_for: SettingsFor
) -> None:
    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()
        writer.close()

    gone = asyncio.Event()
    dead = await asyncio.start_server(silent, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{dead.sockets[0].getsockname()[1]}"
    async with client_for(settings_for(f"{fakes[0].url},{address}", llm_connect_timeout=30)) as client:
        watching = asyncio.create_task(client.watch())
        async with asyncio.timeout(10):
            while not client.can_answer:
                await asyncio.sleep(0.02)
            assert (await client.ahealth()).status == "degraded"
            assert await ask(client) == "from 0"
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    gone.set()
    dead.close()
    await dead.wait_closed()


async def test_a_server_that_is_late_once_is_only_busy(
    fakes: list[FakeLLM], settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.server_probe.FRESH_S", 0.0)
    async with client_for(settings_for(fakes[0].url, llm_connect_timeout=0.1)) as client:
        assert (await client.ahealth()).status == "ok"
        fakes[0].before_models = 30
        assert (await client.ahealth()).status == "ok"
        assert await ask(client) == "from 0"
        assert (await client.ahealth()).status == "down"
        fakes[0].before_models = 0
        assert (await client.ahealth()).status == "ok"


async def test_with_no_server_left_the_error_says_so(settings_for: SettingsFor) -> None:
    addresses = ",".join(f"http://127.0.0.1:{free_port()}" for _ in range(2))
    async with client_for(settings_for(addresses)) as client:
        with pytest.raises(LLMUnavailable, match="reached") as error:
            await ask(client)
        assert "127.0.0.1" not in error.value.message
        assert (await client.ahealth()).status == "down"


# --- breaker, and servers that want to be left alone ---------------------------------------------


async def test_the_breaker_opens_and_closes(
    fakes: list[FakeLLM], settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.server_state.COOL_OFF_S", 0.3)
    sick = fakes[0]
    async with client_for(settings_for(sick.url, llm_max_concurrency=3)) as client:
        await client.ahealth()
        state = client.servers[0].state
        state._cool_off = 0.3
        sick.script = Script(status=502)
        for _ in range(3):
            with pytest.raises(LLMError):
                await ask(client)
        assert (state.breaker, state.state) == ("open", "broken")
        assert (await client.ahealth()).status == "down"
        with pytest.raises(LLMUnavailable, match="rest") as refused:
            await ask(client)
        assert refused.value.retry_after
        assert len(sick.requests) == 3, "an open breaker lets nothing through"

        async with asyncio.timeout(5):
            while state.breaker != "half-open":
                await asyncio.sleep(0.02)
        sick.script = Script(before_headers=0.1)
        sick.most_running = 0
        trial = [asyncio.create_task(ask(client, owner=str(number))) for number in range(3)]
        await sick.until(lambda: sick.running == 1)
        assert client.queue.waiting == 2, "one at a time while it is half open"
        assert await asyncio.gather(*trial) == ["Hello there"] * 3
        assert (state.breaker, state.state) == ("closed", "ok")
        assert (await client.ahealth()).status == "ok"


async def test_a_failed_trial_opens_the_breaker_again(client: LLMClient, fakes: list[FakeLLM]) -> None:
    state = client.servers[0].state
    state._cool_off = 0.1
    fakes[0].script = Script(cut_after=0)
    async with asyncio.timeout(20):
        while state.breaker != "open":
            await ask(client)
        while state.breaker == "open":
            await asyncio.sleep(0.02)
        so_far = len(fakes[0].requests)
        while len(fakes[0].requests) == so_far:
            await asyncio.gather(*(ask(client, owner=str(number)) for number in range(3)))
    assert state.breaker == "open"


async def test_what_fails_everywhere_is_the_requests_fault(client: LLMClient, fakes: list[FakeLLM]) -> None:
    for fake in fakes:
        fake.script = Script(status=500)
    for _ in range(4):
        with pytest.raises(LLMError):
            await ask(client)
    assert {server.state.breaker for server in client.servers} == {"closed"}
    fakes[2].script = Script()
    while client.servers[0].state.breaker == "closed":
        assert await ask(client) == "Hello there", "others answer what this one fails at: its own fault"
    assert client.servers[2].state.breaker == "closed"


async def test_who_asks_to_be_left_alone_is(client: LLMClient, fakes: list[FakeLLM]) -> None:
    fakes[0].script = BUSY
    for _ in range(6):
        assert await ask(client) != "from 0"
    assert asked(fakes)[0] == 1
    assert client.servers[0].state.state == "busy"
    fakes[1].script = fakes[2].script = BUSY
    with pytest.raises(Overloaded) as busy:
        await ask(client)
    assert busy.value.retry_after == pytest.approx(30, abs=2)


async def test_those_who_wait_learn_that_no_server_is_left(
    fakes: list[FakeLLM], settings_for: SettingsFor
) -> None:
    async with client_for(settings_for(fakes[0].url, llm_max_concurrency=1)) as client:
        await client.ahealth()
        fakes[0].script.before_first = 30
        running = asyncio.create_task(ask(client))
        await fakes[0].until(lambda: fakes[0].running == 1)
        waiting = asyncio.create_task(ask(client, owner="bo"))
        while not client.queue.waiting:
            await asyncio.sleep(0.01)
        client.servers[0].state.drain(True)
        with pytest.raises(LLMUnavailable, match="out of service"):
            async with asyncio.timeout(3):
                await waiting
        assert not running.done(), "what runs on a drained server goes on"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_drained_server_gets_no_new_ones(client: LLMClient, fakes: list[FakeLLM]) -> None:
    home = int((await ask(client, "s"))[-1])
    state = client.servers[home].state
    state.drain(True)
    before = asked(fakes)[home]
    for number in range(4):
        await ask(client, "s")
        await ask(client, f"t{number}")
    assert asked(fakes)[home] == before
    assert (state.state, (await client.ahealth()).status) == ("drained", "ok")
    state.drain(False)
    await asyncio.gather(*(ask(client, owner=str(number)) for number in range(6)))
    assert asked(fakes)[home] > before


# --- slots of llama.cpp --------------------------------------------------------------------------


async def test_each_session_has_its_slot(fakes: list[FakeLLM], settings_for: SettingsFor) -> None:
    fake = fakes[0]
    fake.owner, fake.slots = "llamacpp", 3
    async with client_for(settings_for(fake.url, llm_max_concurrency=4)) as client:
        await client.ahealth()
        for session in ("a", "b", "c", "a", "b", "c"):
            await ask(client, session)
        slots = [request["id_slot"] for request in fake.requests]
        assert slots[:3] == slots[3:]
        assert sorted(slots[:3]) == [0, 1, 2]
        await ask(client, "d")
        await ask(client, "a")
        taken = [request["id_slot"] for request in fake.requests[6:]]
        assert taken == [slots[0], slots[1]], "the slot that was used longest ago, each time"

        fake.script.before_first = 0.2
        fake.requests.clear()
        await asyncio.gather(*(ask(client, "a", owner=str(number)) for number in range(4)))
        together = [request.get("id_slot") for request in fake.requests]
        assert sorted(slot for slot in together if slot is not None) == [0, 1, 2], "none waits for a busy one"
        assert together.count(None) == 1


async def test_a_summary_has_a_slot_that_no_turn_waits_for(
    fakes: list[FakeLLM], settings_for: SettingsFor
) -> None:
    fake = fakes[0]
    fake.owner, fake.slots, held = "llamacpp", 3, threading.Event()
    async with client_for(settings_for(fake.url, llm_max_concurrency=4)) as client, asyncio.timeout(10):
        await client.ahealth()
        await ask(client, "a")
        fake.script = Script(held=held)
        work = asyncio.create_task(client.in_spare_time("a", HI, GenerationOptions(), Meter()))
        await fake.until(lambda: fake.running == 1)
        turns: list[asyncio.Task[str]] = []
        for number, session in enumerate(("a", "b", "c"), 2):
            turns.append(asyncio.create_task(ask(client, session)))
            await fake.until(lambda so_many=number: len(fake.requests) > so_many)
        slots = [request["id_slot"] for request in fake.requests]
        own, summary, *_ = slots
        assert summary != own, "the session's own keeps its beginning"
        assert slots[2] == own
        assert summary not in slots[2:4], "which is in use"
        assert slots[4] == summary, "for the last turn the summary makes way"
        assert await work is None
        held.set()
        await asyncio.gather(*turns)
        work = asyncio.create_task(client.in_spare_time("a", HI, GenerationOptions(), Meter()))
        assert await work is not None
        await ask(client, "d")
        assert fake.requests[-1]["id_slot"] == fake.requests[-2]["id_slot"], "it was given back"


async def test_embeddings_take_no_slot(fakes: list[FakeLLM], settings_for: SettingsFor) -> None:
    fake = fakes[0]
    fake.owner, fake.slots, gate = "llamacpp", 2, threading.Event()
    async with client_for(settings_for(fake.url)) as client, asyncio.timeout(10):
        await client.ahealth()
        for session in ("a", "b"):
            await ask(client, session)
        fake.script = Script(gate=gate)
        embedding = asyncio.create_task(client.embed(["text"], None, {}))
        await fake.until(lambda: len(fake.requests) == 3)
        fake.script = Script()
        for session in ("a", "b"):
            await ask(client, session)
        gate.set()
        await embedding
    slots = [request["id_slot"] for request in fake.requests if "messages" in request]
    assert slots == [0, 1, 0, 1]


async def test_asking_a_server_anew_frees_no_slot_that_is_in_use(
    fakes: list[FakeLLM], settings_for: SettingsFor
) -> None:
    fake = fakes[0]
    fake.owner, fake.slots, held = "llamacpp", 2, threading.Event()
    async with client_for(settings_for(fake.url)) as client, asyncio.timeout(10):
        await client.ahealth()
        fake.script = Script(held=held)
        running = asyncio.create_task(ask(client, "a"))
        await fake.until(lambda: fake.running == 1)
        await client.pools["default"].ask_anew()
        other = asyncio.create_task(ask(client, "b"))
        await fake.until(lambda: fake.running == 2)
        held.set()
        await asyncio.gather(running, other)
        assert [request["id_slot"] for request in fake.requests] == [0, 1]
        fake.slots = 3
        await client.pools["default"].ask_anew()
        for session in ("c", "d", "e"):
            await ask(client, session)
        assert [request["id_slot"] for request in fake.requests[2:]] == [0, 1, 2]


@pytest.mark.slow
async def test_sessions_that_take_turns_keep_their_prefix(
    llama: LlamaServer, settings_for: SettingsFor
) -> None:
    """With one system prompt for all, llama.cpp by itself soon gives a session another's slot."""
    async with client_for(settings_for(llama.url, llm_max_tokens=4)) as client:
        async with asyncio.timeout(60):
            while (await client.ahealth()).status != "ok":  # it loads its model
                await asyncio.sleep(0.1)
        system = {"role": "system", "content": "You know all rivers. " * 10}
        topics = {"nile": "crocodiles and pyramids ", "rhine": "castles and vineyards "}
        cached: list[tuple[int, int]] = []
        for turn in range(3):
            for session, words in topics.items():
                first = {"role": "user", "content": words * 12}
                more = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "More?"}] * turn
                completion = Completion()
                updates = client.stream([system, first, *more], GenerationOptions(), session=session)
                async for update in updates:
                    completion.add(update)
                if turn:
                    cached.append((completion.usage.cached_tokens, completion.usage.prompt_tokens))
        assert all(hit > 0.7 * whole for hit, whole in cached), cached


def test_settings_name_several_servers(settings_for: SettingsFor) -> None:
    settings = settings_for("http://a:1/v1, http://b:2/ ,http://c:3")
    assert settings.llm_servers == ("http://a:1", "http://b:2", "http://c:3")
    for wrong in ("http://a,http://a/v1", "http://a,ftp://b", ",", "http://a:0", "http://me:secret@a"):
        with pytest.raises(ValueError, match="llm_server_url"):
            settings_for(wrong)
