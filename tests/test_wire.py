"""Instances on one database, with and without a wire between them, when something goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, NoReturn

import pytest
from redis.asyncio import Redis
from sqlalchemy import delete

from app.config import Settings
from app.container import Container, open_container
from app.events import Cancelled, Token, TurnRequest
from app.models.tables import leases
from app.services.elsewhere import STOPPING_S
from app.services.turns import Numbered, Turn
from app.services.wire import Letter, Wire, WireDown
from tests.fake_llm import FakeLLM, Script, text
from tests.support import person

SettingsFor = Callable[..., Settings]

ADA = person("1")

LONG = Script(pieces=text(*(f"{number} " for number in range(500))), between=0.02)


@pytest.fixture
async def opened() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def instances(
    opened: AsyncExitStack, settings_for: SettingsFor, fake: FakeLLM, *names: str, **changes: Any
) -> list[Container]:
    """Instances of these names, on one database, until the test ends."""
    return [
        await opened.enter_async_context(open_container(settings_for(fake.url, instance=name, **changes)))
        for name in names
    ]


def request(**changes: Any) -> TurnRequest:
    return TurnRequest(**{"who": ADA, "session_id": "s", "message": "hi", **changes})


class Follower:
    """Follows a turn, and keeps what it is told."""

    def __init__(self, turn: Turn) -> None:
        self.seen: list[Numbered] = []
        self._change = asyncio.Condition()
        self._task = asyncio.create_task(self._follow(turn))

    async def _follow(self, turn: Turn) -> None:
        async with aclosing(turn.follow()) as batches:
            async for batch in batches:
                self.seen += batch
                async with self._change:
                    self._change.notify_all()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(20), self._change:
            await self._change.wait_for(condition)

    async def more(self, number: int) -> None:
        """Waits for so many more pieces of the reply."""
        had = len(self.tokens())
        await self.until(lambda: len(self.tokens()) > had + number)

    def tokens(self, attempt: int = 1) -> list[str]:
        events = [item.event for item in self.seen if item.attempt == attempt]
        return [event.content for event in events if isinstance(event, Token)]

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.mark.parametrize("how", ["stop", "clear", "delete"])
async def test_without_a_wire_the_database_tells_of_the_end(
    fake: FakeLLM, settings_for: SettingsFor, opened: AsyncExitStack, how: str
) -> None:
    one, two = await instances(opened, settings_for, fake, "one", "two")
    fake.script = LONG
    turn = await one.sessions.submit(request())
    waits = await one.sessions.submit(request(message="and then?"))
    follower = Follower(turn)
    await follower.until(follower.tokens)
    await getattr(two.sessions, how)(ADA, "s")
    await fake.until(lambda: fake.dropped == 1, 3.0)
    assert isinstance(await turn.ended(), Cancelled)
    if how == "stop":
        await two.sessions.clear(ADA, "s")
    async with asyncio.timeout(3):
        assert isinstance(await waits.ended(), Cancelled)
    assert one.sessions.live_turns(ADA, "s") == []
    await follower.close()


async def test_a_wire_that_breaks_loses_nothing(
    fake: FakeLLM, settings_for: SettingsFor, opened: AsyncExitStack, redis_url: str
) -> None:
    one, two = await instances(opened, settings_for, fake, "one", "two", redis_url=redis_url)
    fake.script = LONG
    turn = await one.sessions.submit(request())
    follower = Follower(await two.sessions.find(ADA, turn.id))
    redis = Redis.from_url(redis_url)
    for _ in range(2):
        await follower.more(5)
        await redis.client_kill_filter(_type="pubsub")
    await redis.aclose()
    await follower.more(60)
    assert turn.ending is None, "it was seen while it was made"
    assert "".join(follower.tokens()) == "".join(turn.response)[: len("".join(follower.tokens()))]
    assert [item.n for item in follower.seen] == list(range(len(follower.seen))), "nothing is left out"
    await two.sessions.stop(ADA, "s")
    await follower.close()


async def test_a_follower_goes_along_when_a_third_instance_takes_over(
    fake: FakeLLM, settings_for: SettingsFor, opened: AsyncExitStack, redis_url: str
) -> None:
    one, two, three = await instances(opened, settings_for, fake, "one", "two", "three", redis_url=redis_url)
    fake.script = LONG
    turn = await one.sessions.submit(request())
    follower = Follower(await two.sessions.find(ADA, turn.id))
    await follower.until(lambda: len(follower.tokens()) > 3)
    two.drain.is_on = one.drain.is_on = True  # these two take nothing up
    await one.database.write(lambda c: c.execute(delete(leases).where(leases.c.name == "instance:one")))
    await follower.until(lambda: len(follower.tokens(attempt=2)) > 3)
    assert next(item.n for item in follower.seen if item.attempt == 2) == 1, "`restarted` comes first"
    await fake.until(lambda: fake.dropped == 1, 3.0)
    mine = Follower(turn)
    await mine.until(lambda: mine.tokens(attempt=2))  # who has lost it follows it too
    assert await three.sessions.stop(ADA, "s") == turn.id
    ending = await turn.ended()
    assert isinstance(ending, Cancelled)
    assert "".join(follower.tokens(attempt=2)) == ending.response[: len("".join(follower.tokens(attempt=2)))]
    for following in (follower, mine):
        await following.close()


async def test_an_instance_that_has_left_a_turn_does_not_say_that_it_stops_it(
    fake: FakeLLM, settings_for: SettingsFor, opened: AsyncExitStack, redis_url: str
) -> None:
    one, two = await instances(opened, settings_for, fake, "one", "two", redis_url=redis_url)
    fake.script = LONG
    turn = await one.sessions.submit(request())
    follower = Follower(await two.sessions.find(ADA, turn.id))
    await follower.until(follower.tokens)
    one.sessions._runner.interrupt(turn, "shutdown")
    async with asyncio.timeout(STOPPING_S):
        assert await two.sessions.stop(ADA, "s") == turn.id
    await follower.close()


class Flaky:
    """A link whose first letters are lost."""

    def __init__(self) -> None:
        self.lost: list[bytes] = []
        self.sent: asyncio.Queue[bytes] = asyncio.Queue()

    async def listen(
        self, _channels: Sequence[str], _heard: Callable[[bytes], None], ready: Callable[[], None]
    ) -> NoReturn:
        ready()
        while True:
            await asyncio.Event().wait()

    async def send(self, letters: Sequence[Letter]) -> None:
        if not self.lost:
            self.lost += [message for _, message in letters]
            raise WireDown("it is torn")
        for _, message in letters:
            self.sent.put_nowait(message)

    async def close(self) -> None:
        pass


async def test_what_was_lost_is_told_again_though_nothing_else_is_to_be_told() -> None:
    link = Flaky()
    wire = Wire(link, "shared", "one")
    wire.on_up = lambda: wire.tell("two", b"a turn began")
    running = asyncio.create_task(wire.run())
    async with asyncio.timeout(10):
        assert await link.sent.get() == b"a turn began"
    assert link.lost == [b"a turn began"]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
