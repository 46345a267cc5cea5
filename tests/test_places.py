from __future__ import annotations

import asyncio
import time

import pytest

from app.errors import Expired, Overloaded
from app.services.places import PATIENCE, Load, NoServer, Place, Queue
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


# --- several servers -----------------------------------------------------------------------------


def two_servers() -> tuple[AllPlaces, Load, Load]:
    first, second = Load(1), Load(1)
    return AllPlaces(Queue(100), [first, second]), first, second


async def test_a_place_that_falls_free_goes_to_who_is_at_home_there() -> None:
    places, first, second = two_servers()
    here, there = places.ask("x", home=first), places.ask("y", home=second)
    assert (here.load, there.load) == (first, second)
    earlier, later = places.ask("a", home=first), places.ask("b", home=second)
    there.leave()
    assert (earlier.load, later.load) == (None, second)
    here.leave()
    assert earlier.load is first


async def test_no_server_is_idle_while_somebody_waits() -> None:
    places, first, second = two_servers()
    here, there = places.ask("x", home=first), places.ask("y", home=second)
    waits = places.ask("a", home=first)
    there.leave()
    assert waits.load is second
    assert places.ask("b", home=first).load is None
    here.leave()
    assert places.waiting == 0


async def test_of_one_owners_requests_the_one_at_home_goes_first() -> None:
    places, first, second = two_servers()
    here, there = places.ask("x", home=first), places.ask("y", home=second)
    asked = [places.ask("game", home=first) for _ in range(3)] + [places.ask("game", home=second)]
    there.leave()
    assert asked[3].load is second
    here.leave()
    assert asked[0].load is first


async def test_nobody_is_passed_over_for_ever() -> None:
    places, first, second = two_servers()
    places.ask("x", home=first)
    running = places.ask("y", home=second)
    patient = places.ask("a", home=first)
    rounds = 0
    while patient.load is None:
        following = places.ask(f"b{rounds}", home=second)
        running.leave()
        running = following
        rounds += 1
    assert rounds == PATIENCE + 2, (
        "one for each time that it was passed over, and the one before it got its own"
    )


async def test_under_load_everybody_keeps_the_home() -> None:
    places, *servers = two_servers()
    running = [places.ask(f"x{number}", home=load) for number, load in enumerate(servers)]
    waits = [places.ask(f"o{number}", home=servers[number % 2]) for number in range(40)]
    for following in range(0, 40, 2):
        for place in reversed(running):  # what falls free first is not the home of who comes first
            place.leave()
        running = waits[following : following + 2]
        assert [place.load for place in running] == servers
    assert places.waiting == 0


async def test_a_place_is_never_at_a_server_that_failed_before() -> None:
    places, first, second = two_servers()
    running = places.ask("x", home=second)
    again = places.ask("a", barred={first}, again=True)
    other = places.ask("b")
    assert (again.load, other.load) == (None, first), "the one that is free is nothing for it"
    running.leave()
    assert again.load is second


async def test_a_free_place_at_a_barred_server_makes_no_room() -> None:
    first, second = Load(1), Load(1)
    places = AllPlaces(Queue(1), [first, second])
    running, waits = (places.ask("a", barred={first}) for _ in range(2))
    assert (running.load, waits.load) == (second, None)
    with pytest.raises(Overloaded):
        places.ask("b", barred={first})
    assert places.ask("b").load is first


async def test_whoever_asks_again_goes_before_the_owners_others() -> None:
    places = Places(capacity=1, max_queue=1)
    running = places.ask("a")
    waits = places.ask("a")
    again = places.ask("a", again=True)
    running.leave()
    assert again.load is not None, "also where the queue is full"
    again.leave()
    assert waits.load is not None


async def test_a_server_that_opens_takes_those_who_wait() -> None:
    places, first, second = two_servers()
    first.limit = second.limit = 0
    waits = [places.ask(owner) for owner in ("a", "b", "c")]
    with pytest.raises(NoServer):
        await positions(waits[0])
    first.limit = 1
    places.offer(first)
    assert [place.load for place in waits] == [first, None, None]


async def test_servers_of_different_models_share_one_queue() -> None:
    queue = Queue(1)
    here, there = AllPlaces(queue, [Load(1)]), AllPlaces(queue, [Load(1)])
    here.ask("a")
    assert there.ask("b").load is not None, "a place that is free needs no queue"
    waits = here.ask("a")
    with pytest.raises(Overloaded):
        there.ask("c")
    assert (queue.taken, queue.waiting) == (2, 1)
    waits.leave()
    assert there.ask("c").load is None
    assert queue.waiting == 1


async def test_places_elsewhere_count_in_whose_turn_it_is() -> None:
    queue = Queue(10)
    here, there = AllPlaces(queue, [Load(1)]), AllPlaces(queue, [Load(1)])
    there.ask("busy")
    running = here.ask("x")
    earlier, later = here.ask("busy"), here.ask("idle")
    running.leave()
    assert (earlier.granted_at, later.granted_at is not None) == (None, True)
