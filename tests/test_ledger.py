"""The ledger: the same promises in memory and in Redis."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.events import new_id
from app.services import ledger as ledger_module
from app.services.ledger import Hold, Ledger, MemoryLedger, Window
from app.services.redis_ledger import RedisLedger

FAR = 4102444800.0
"""A time that no test will see."""


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["memory", "redis"])
async def ledger(request: pytest.FixtureRequest) -> AsyncIterator[Ledger]:
    opened: Ledger
    if request.param == "memory":
        opened = MemoryLedger()
    else:
        opened = RedisLedger(request.getfixturevalue("redis_url"))
    yield opened
    await opened.close()


def window(amount: int = 3, seconds: float = 60, key: str | None = None) -> Window:
    return Window("things", key or new_id(), amount, seconds)


def hold(amount: float, budget: float, key: str | None = None, ends_at: float = FAR) -> Hold:
    return Hold(key or new_id(), amount, budget, ends_at)


async def test_a_window_gives_what_it_has_and_then_says_when(ledger: Ledger) -> None:
    things = window()
    left = [(await ledger.take(f"id{n}", [things]))[0] for n in range(4)]
    assert [quota.remaining for quota in left] == [2, 1, 0, 0]
    assert [quota.is_full for quota in left] == [False, False, False, True]
    assert all(50 < quota.resets_in <= 60 for quota in left)


async def test_windows_that_are_over_take_no_memory() -> None:
    clock = Clock()
    ledger = MemoryLedger(clock)
    tracemalloc.start()
    try:
        sizes = []
        for minute in range(4):
            clock.now += 61
            for number in range(500):
                await ledger.take("id", [window(key=f"session {minute} {number}"), window(9, 3600, "user")])
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[-1] < 1.5 * sizes[0], "what was taken minutes ago is forgotten"


async def test_what_is_refused_makes_nothing_forgotten(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "MOST_WINDOWS", 10)
    of_another, blocked = window(1), window(1)
    for taken in (of_another, blocked):
        await ledger.take("a", [taken])
    for number in range(20):
        refused = await ledger.take(f"b{number}", [window(5), blocked])
        assert [quota.is_full for quota in refused] == [False, True]
    assert (await ledger.take("a", [of_another]))[0].is_full


async def test_what_is_given_back_can_be_taken_again(ledger: Ledger) -> None:
    things = window(1)
    await ledger.take("a", [things])
    await ledger.give_back("b", [things])
    assert (await ledger.take("c", [things]))[0].is_full, "only who took can give back"
    await ledger.give_back("a", [things])
    assert not (await ledger.take("c", [things]))[0].is_full


async def test_a_window_that_was_made_narrower_says_when_one_is_free(ledger: Ledger) -> None:
    key = new_id()
    for n in range(5):
        await ledger.take(f"id{n}", [window(10, key=key)])
    (quota,) = await ledger.take("late", [window(2, key=key)])
    assert (quota.is_full, quota.remaining) == (True, 0)
    assert 50 < quota.resets_in <= 60


async def test_of_several_windows_all_are_taken_or_none(ledger: Ledger) -> None:
    wide, narrow = window(10), window(1)
    await ledger.take("a", [wide, narrow])
    refused = await ledger.take("b", [wide, narrow])
    assert [quota.is_full for quota in refused] == [False, True]
    assert (await ledger.take("c", [wide]))[0].remaining == 8


async def test_what_comes_at_once_is_counted_one_after_the_other(ledger: Ledger) -> None:
    things = window(10)
    taken = await asyncio.gather(*(ledger.take(f"id{n}", [things]) for n in range(40)))
    assert sum(not quotas[0].is_full for quotas in taken) == 10


async def test_a_budget_holds_what_is_reserved_and_keeps_what_was_spent(ledger: Ledger) -> None:
    tokens = hold(60, 100)
    assert await ledger.unknown([tokens]) == [tokens]
    await ledger.seed(tokens, 10)
    await ledger.seed(tokens, 90)  # somebody else was first
    assert await ledger.unknown([tokens]) == []
    assert await ledger.reserve("a", [tokens]) is None
    assert await ledger.reserve("b", [tokens]) == tokens
    assert await ledger.settle("a", [tokens], {tokens.key: 25}) == {tokens.key: 35}
    assert await ledger.reserve("b", [tokens]) is None
    assert await ledger.settle("b", [tokens], {}) == {tokens.key: 35}


async def test_what_is_told_twice_counts_once(ledger: Ledger) -> None:
    tokens = hold(60, 100)
    await ledger.seed(tokens, 10)
    await ledger.reserve("a", [tokens])
    assert await ledger.settle("a", [tokens], {tokens.key: 25}) == {tokens.key: 35}
    assert await ledger.settle("a", [tokens], {tokens.key: 25}) == {tokens.key: 35}


async def test_of_several_budgets_all_are_reserved_or_none(ledger: Ledger) -> None:
    large, small = hold(10, 100), hold(10, 15)
    for budget in (large, small):
        await ledger.seed(budget, 0)
    assert await ledger.reserve("a", [large, small]) is None
    assert await ledger.reserve("b", [large, small]) == small
    assert await ledger.reserve("c", [hold(90, 100, large.key)]) is None


async def test_what_was_accepted_before_is_reserved_in_any_case(ledger: Ledger) -> None:
    tokens = hold(60, 100)
    await ledger.seed(tokens, 90)
    assert await ledger.reserve("a", [tokens], force=True) is None
    await ledger.reserve("a", [tokens], force=True)  # the same turn, taken up again
    assert await ledger.settle("a", [tokens], {tokens.key: 1}) == {tokens.key: 91}


async def test_things_at_once_are_never_spent(ledger: Ledger) -> None:
    turns = hold(1, 2, ends_at=0)
    assert await ledger.unknown([turns]) == []
    assert [await ledger.reserve(name, [turns]) is None for name in "abc"] == [True, True, False]
    await ledger.settle("a", [turns], {})
    assert await ledger.reserve("c", [turns]) is None


async def test_two_processes_count_together(redis_url: str) -> None:
    one, two = RedisLedger(redis_url), RedisLedger(redis_url)
    things, tokens = window(2), hold(60, 100)
    await one.take("a", [things])
    await two.take("b", [things])
    assert (await one.take("c", [things]))[0].is_full
    await one.seed(tokens, 0)
    assert await two.unknown([tokens]) == []
    assert await one.reserve("a", [tokens]) is None
    assert await two.reserve("b", [tokens]) == tokens
    for ledger in (one, two):
        await ledger.close()


async def test_what_is_handed_over_is_counted_where_it_is_now(redis_url: str) -> None:
    here, tokens = MemoryLedger(), hold(60, 100)
    await here.seed(tokens, 0)
    await here.reserve("a", [tokens])
    await here.hand_over("a", [tokens])
    assert await here.reserve("b", [tokens]) is None, "nothing is reserved here"
    one, two = RedisLedger(redis_url), RedisLedger(redis_url)
    await one.seed(tokens, 0)
    await one.reserve("a", [tokens])
    await two.reserve("a", [tokens], force=True)
    await one.hand_over("a", [tokens])
    assert await one.reserve("b", [tokens]) == tokens, "it is reserved there"
    assert await two.settle("a", [tokens], {tokens.key: 25}) == {tokens.key: 25}
    for ledger in (one, two):
        await ledger.close()


@settings(max_examples=200)
@given(
    st.integers(1, 5),
    st.lists(st.floats(0, 4, allow_nan=False), min_size=1, max_size=40),
)
async def test_no_span_ever_holds_more_than_the_window(amount: int, pauses: list[float]) -> None:
    clock = Clock()
    ledger, things = MemoryLedger(clock), window(amount, 5.0)
    taken: list[float] = []
    for number, pause in enumerate(pauses):
        clock.now += pause
        quota = (await ledger.take(str(number), [things]))[0]
        recent = [at for at in taken if at > clock.now - 5.0]
        assert quota.is_full == (len(recent) >= amount)
        if not quota.is_full:
            taken.append(clock.now)
        else:
            assert clock.now + quota.resets_in == pytest.approx(recent[-amount] + 5.0)
