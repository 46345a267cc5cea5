"""Turns that nobody runs: those of a process that died, and those whose commit was not heard of."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import psycopg
import pytest
from sqlalchemy import delete, func, select
from sqlalchemy.exc import OperationalError

from app import writing
from app.config import Settings
from app.container import Container, open_container
from app.errors import StorageUnavailable
from app.events import Cancelled, Final, TurnRequest
from app.models.tables import leases
from app.services import succession
from app.services.leases import Leases
from app.services.store import Store
from app.services.turns import Turn
from tests.fake_llm import FakeLLM, Script
from tests.support import person

SettingsFor = Callable[..., Settings]

ADA = person("1")


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"LEASE_S": 1.0, "HEARTBEAT_S": 0.2, "LATE_S": 0.4, "SWEEP_S": 0.02}.items():
        monkeypatch.setattr(succession, name, seconds)


@pytest.fixture
async def opened() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def request(message: str = "hi", **changes: Any) -> TurnRequest:
    return TurnRequest(**{"who": ADA, "session_id": "s", "message": message, **changes})


def lose_answer(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """Commits the next such operation of the store, and loses the database's answer to that."""
    carry_out = writing._carry_out

    def carried_out(connection: Any, writes: Sequence[writing.Write], before_commit: Any) -> None:
        carry_out(connection, writes, before_commit)
        if any(f"Store.{operation}." in write.operation.__qualname__ for write in writes):
            monkeypatch.setattr(writing, "_carry_out", carry_out)
            raise OperationalError("COMMIT", None, Exception("the connection was reset"))

    monkeypatch.setattr(writing, "_carry_out", carried_out)


async def forget_lease(portal: Container, instance: str) -> None:
    """Lets others think that an instance has ended."""
    lease = f"instance:{instance}"
    await portal.database.write(lambda c: c.execute(delete(leases).where(leases.c.name == lease)))


async def test_a_turn_whose_acceptance_nobody_heard_of_is_run(
    fake: FakeLLM, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_container(settings_for(fake.url)) as portal:
        lose_answer(monkeypatch, "accept")
        with pytest.raises(StorageUnavailable):
            await portal.sessions.submit(request(request_id="r"))
        again = await portal.sessions.submit(request(request_id="r"))
        after = await portal.sessions.submit(request("and then?"))
        assert isinstance(await again.ended(), Final)
        assert isinstance(await after.ended(), Final)
        assert len(fake.requests) == 2


async def test_a_turn_whose_acceptance_is_heard_of_late_is_run_to_its_end(
    fake: FakeLLM, settings_for: SettingsFor, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres_url.replace("postgresql://", "postgresql+psycopg://")
    carry_out, adopt, has_orphans = writing._carry_out, Store.adopt, Store.has_orphans
    answered, looks, adopts = threading.Event(), asyncio.Event(), asyncio.Event()

    def carried_out(connection: Any, writes: Sequence[writing.Write], before_commit: Any) -> None:
        carry_out(connection, writes, before_commit)
        if any("Store.accept." in write.operation.__qualname__ for write in writes):
            answered.wait(20)

    def looked(store: Store, *args: Any, **options: Any) -> Any:
        looks.set()
        return has_orphans(store, *args, **options)

    def adopted(store: Store, *args: Any, **options: Any) -> Any:
        adopts.set()
        return adopt(store, *args, **options)

    monkeypatch.setattr(Store, "has_orphans", looked)
    fake.script = Script(between=0.2)
    async with open_container(settings_for(fake.url, database_url=url)) as portal:
        await looks.wait()  # what it writes before that is behind it
        monkeypatch.setattr(Store, "adopt", adopted)
        monkeypatch.setattr(writing, "_carry_out", carried_out)
        submitting = asyncio.create_task(portal.sessions.submit(request(request_id="r")))
        await adopts.wait()
        answered.set()
        turn = await submitting
        assert isinstance(await turn.ended(), Final)
        assert (turn.row.attempt, len(fake.requests)) == (2, 2)
        assert isinstance(await (await portal.sessions.submit(request())).ended(), Final)


async def test_who_has_left_a_turn_that_was_not_heard_of_holds_nobody_up(
    fake: FakeLLM, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_container(settings_for(fake.url)) as portal:
        lose_answer(monkeypatch, "accept")
        with pytest.raises(StorageUnavailable):
            await portal.sessions.submit(request("nobody follows it", detached=False))
        assert isinstance(await (await portal.sessions.submit(request())).ended(), Final)


async def test_a_turn_whose_claim_nobody_heard_of_is_run(
    fake: FakeLLM, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_container(settings_for(fake.url)) as portal:
        one, two = [await portal.sessions.submit(request(message)) for message in ("one", "two")]
        lose_answer(monkeypatch, "claim")
        assert isinstance(await one.ended(), Final)
        assert isinstance(await two.ended(), Final)
        assert [len(asked["messages"]) for asked in fake.requests] == [1, 3]


async def test_turns_are_run_whose_adoption_nobody_heard_of(
    fake: FakeLLM, settings_for: SettingsFor, opened: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = [
        await opened.enter_async_context(open_container(settings_for(fake.url, instance=name)))
        for name in ("one", "two")
    ]
    fake.script = Script(before_first=30)
    turns = [await one.sessions.submit(request(session_id=name)) for name in "abc"]
    await fake.until(lambda: fake.running == 3)
    fake.script = Script()
    one.drain.is_on = True  # it takes nothing up
    lose_answer(monkeypatch, "adopt")
    await forget_lease(two, "one")
    for turn in turns:
        followed = await two.sessions.find(ADA, turn.id)
        assert isinstance(await followed.ended(), Final)


async def test_those_who_live_keep_their_turns_when_the_database_was_away(
    fake: FakeLLM, settings_for: SettingsFor, opened: AsyncExitStack, postgres_url: str
) -> None:
    url = postgres_url.replace("postgresql://", "postgresql+psycopg://")
    portals = [
        await opened.enter_async_context(
            open_container(settings_for(fake.url, instance=name, database_url=url))
        )
        for name in ("one", "two")
    ]
    held = threading.Event()
    fake.script = Script(held=held)
    turns = [await portal.sessions.submit(request(session_id=f"{n}")) for n, portal in enumerate(portals)]
    await fake.until(lambda: fake.running == 2)

    def expiry(connection: Any) -> Any:
        return connection.execute(select(func.min(leases.c.expires_at))).scalar_one()

    with psycopg.connect(postgres_url) as away:
        away.execute("LOCK TABLE turns, leases IN EXCLUSIVE MODE")  # they may still be read
        while await portals[0].database.read(expiry) > time.time() - succession.LEASE_S:
            await asyncio.sleep(0.05)
    while await portals[0].database.read(expiry) < time.time():
        await asyncio.sleep(0.05)
    held.set()
    for turn in turns:
        assert isinstance(await turn.ended(), Final)
        assert turn.row.attempt == 1
    assert len(fake.requests) == 2


async def test_a_turn_of_an_instance_that_died_is_taken_up(fake: FakeLLM, settings_for: SettingsFor) -> None:
    async with open_container(settings_for(fake.url, instance="one")) as portal:
        accepted = await portal.store.accept(request(), turn_id="t" * 28, instance="dead")
        await Leases(portal.database).acquire("instance:dead", "it", -1)
        turn = await portal.sessions.find(ADA, accepted.turn.id)
        assert isinstance(await turn.ended(), Final)
        assert turn.row.attempt == 2


async def test_a_stop_goes_after_a_turn_that_is_taken_up_meanwhile(
    fake: FakeLLM, settings_for: SettingsFor, opened: AsyncExitStack
) -> None:
    one, two = [
        await opened.enter_async_context(open_container(settings_for(fake.url, instance=name)))
        for name in ("one", "two")
    ]
    fake.script = Script(before_first=30)
    one.drain.is_on = True  # it takes nothing up
    accepted = await one.store.accept(request(), turn_id="t" * 28, instance="dead")
    await fake.until(lambda: fake.running == 1)
    await one.sessions._runner.elsewhere.stop(accepted.turn, accepted.session)
    found = await two.store.turn(accepted.turn.id)
    assert found is not None
    assert (found[0].state, found[0].attempt) == ("cancelled", 2)
    await fake.until(lambda: fake.running == 0)


async def test_a_stop_reaches_a_turn_that_is_just_being_taken_in(
    fake: FakeLLM, settings_for: SettingsFor
) -> None:
    fake.script = Script(before_first=30)
    async with open_container(settings_for(fake.url)) as portal:
        runner = portal.sessions._runner
        accepted = await portal.store.accept(request(), turn_id="t" * 28, instance=runner.instance)
        stopping = asyncio.create_task(portal.sessions.stop(ADA, "s"))
        while not runner.turns:  # until it was looked for, and not found to be here
            await asyncio.sleep(0)
        turn = Turn(accepted.turn, accepted.session)
        runner.enqueue(turn)
        assert await stopping == turn.id
        assert isinstance(await turn.ended(), Cancelled)
        await fake.until(lambda: fake.running == 0)
