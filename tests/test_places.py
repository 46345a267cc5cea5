from __future__ import annotations

import asyncio
import time

import pytest

from app.errors import Expired, Overloaded
from app.services.places import Place, Places


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
