from __future__ import annotations

import asyncio
import time

import pytest

from app.errors import Expired, Overloaded
from app.services.places import Load, Place, Queue
from app.services.places import Places as AllPlaces


def Places(capacity: int, max_queue: int) -> AllPlaces:  # noqa: N802
    return AllPlaces(Queue(max_queue), [Load(capacity)])


async def positions(place: Place, deadline: float | None = None) -> list[int]:
    return [position async for position in place.wait(deadline)]


async def test_places_are_handed_out_in_order() -> None:
    places = Places(capacity=2, max_queue=10)
    asked = [places.ask() for _ in range(5)]
    assert [place.granted_at is not None for place in asked] == [True, True, False, False, False]
    asked[0].leave()
    assert [place.granted_at is not None for place in asked[2:]] == [True, False, False]
    asked[3].leave()
    asked[1].leave()
    assert asked[4].granted_at is not None
    assert (places.taken, places.waiting) == (2, 0)


async def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    places = Places(capacity=1, max_queue=1)
    places.ask()
    places.ask()
    with pytest.raises(Overloaded) as refused:
        places.ask()
    assert refused.value.retry_after is not None
    assert refused.value.retry_after >= 1


async def test_who_waits_hears_of_each_position_once() -> None:
    places = Places(capacity=1, max_queue=10)
    first, second, third = (places.ask() for _ in range(3))
    waiting = asyncio.create_task(positions(third))
    await asyncio.sleep(0)
    second.leave()
    first.leave()
    assert await asyncio.wait_for(waiting, 2) == [2]
    assert await positions(third) == []


async def test_a_deadline_ends_the_wait() -> None:
    places = Places(capacity=1, max_queue=10)
    places.ask()
    late = places.ask()
    began = time.monotonic()
    with pytest.raises(Expired):
        await positions(late, time.time() + 0.1)
    assert time.monotonic() - began < 1
    late.leave()
    assert places.waiting == 0


async def test_who_has_the_fewest_places_comes_next() -> None:
    places = Places(capacity=2, max_queue=100)
    flood = [places.ask("flood") for _ in range(10)]
    others = [places.ask(name) for name in ("ada", "bo", "ada")]
    flood[0].leave()
    assert (others[0].granted_at is not None, flood[2].granted_at) == (True, None)
    flood[1].leave()
    assert others[1].granted_at is not None, "bo, who has none, before the flood and before ada's second"
    others[0].leave()
    assert flood[2].granted_at is not None, "now nobody has one: whoever was served longest ago"
    others[1].leave()
    assert others[2].granted_at is not None


async def test_positions_are_those_of_fair_turns() -> None:
    places = Places(capacity=1, max_queue=100)
    places.ask("flood")
    flood = [places.ask("flood") for _ in range(50)]
    late = places.ask("ada")
    told = [await anext(place.wait()) for place in (flood[0], late, flood[1], flood[49])]
    assert told == [1, 2, 3, 51]


async def test_the_time_of_the_server_is_shared_by_those_who_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    places = Places(capacity=3, max_queue=10)
    first = places.ask("ada")
    now += 2  # alone
    second, third = places.ask("bo"), places.ask("cy")
    now += 3  # of three
    waits = places.ask("dan")
    assert first.leave() == pytest.approx(2 + 1)
    assert waits.granted_at is not None
    now += 6  # of three again
    assert second.leave() == pytest.approx(1 + 2)
    now += 4  # of two
    assert third.leave() == pytest.approx(1 + 2 + 2)
    assert waits.leave() == pytest.approx(2 + 2)
    now += 50  # nobody
    again = places.ask("ada")
    now += 1
    assert again.leave() == pytest.approx(1), "the times in which nobody asks are nobody's"
    assert places.ask("x").leave() == 0
