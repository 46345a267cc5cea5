"""The ledgers, asked by two in whatever order, against a model that counts: nothing is counted twice, nothing
is lost, no limit lets more through than it allows, and what is given back is free again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from app.events import new_id
from app.loop import BackgroundLoop
from app.services.ledger import Hold, Lacking, Ledger, MemoryLedger, Window
from app.services.redis_ledger import RedisLedger

T = TypeVar("T")

FAR = 4102444800.0
"""A time that no test will see."""

ids = st.sampled_from(["a", "b", "c", "d"])
processes = st.sampled_from([0, 1])
amounts = st.integers(0, 4)
some = st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=3, unique=True)
"""Which of three windows, or of three budgets, of which the last one counts things at once."""


@dataclass
class Budget:
    """What should be counted of a budget."""

    spent: int | None = None
    reserved: dict[str, int] = field(default_factory=dict)


class Ledgers(RuleBasedStateMachine):
    """Two processes that count together, or one that is asked by two."""

    make: Callable[[Callable[[], float], str], Ledger]
    """Makes a ledger with a clock, for a database."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.prefix = 1000.0, new_id()
        self.background = BackgroundLoop()
        first = self.make(lambda: self.now, self.prefix)
        second = first if isinstance(first, MemoryLedger) else self.make(lambda: self.now, self.prefix)
        self.ledgers = [first, second]
        self.taken: list[list[tuple[float, str]]] = [[], [], []]
        self.budgets = [Budget(), Budget(), Budget()]

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.background.loop).result(20)

    def teardown(self) -> None:
        for ledger in self.ledgers:
            self.run(ledger.close())
        self.background.stop()

    # --- windows ---

    def window(self, number: int, most: int = 0) -> Window:
        return Window("things", f"w{number}", most or 2 + number, 600.0 * (1 + number % 2))

    @rule(at=processes, id=ids, numbers=some, most=st.integers(1, 5))
    def take(self, at: int, id: str, numbers: list[int], most: int) -> None:
        """The limit may be another one than it was."""
        windows = [self.window(number, most) for number in numbers]
        quotas = self.run(self.ledgers[at].take(id, windows))
        for number, window in zip(numbers, windows, strict=True):
            self.taken[number] = [one for one in self.taken[number] if one[0] > self.now - window.seconds]
        counts = [len(self.taken[number]) for number in numbers]
        full = [count >= most for count in counts]
        assert [quota.is_full for quota in quotas] == full
        if not any(full):
            for number in numbers:
                self.taken[number].append((self.now, id))
            counts = [count + 1 for count in counts]
        assert [quota.remaining for quota in quotas] == [max(most - count, 0) for count in counts]
        for number, quota in zip(numbers, quotas, strict=True):
            times = self.taken[number]
            oldest = times[-most:][0][0] if times else self.now - quota.window.seconds
            late = 0 if isinstance(self.ledgers[at], MemoryLedger) else 60  # Redis has a clock of its own
            assert quota.resets_in == pytest.approx(oldest + quota.window.seconds - self.now, abs=late)

    @rule(at=processes, id=ids, numbers=some)
    def give_back(self, at: int, id: str, numbers: list[int]) -> None:
        self.run(self.ledgers[at].give_back(id, [self.window(number) for number in numbers]))
        for number in numbers:
            mine = [one for one in self.taken[number] if one[1] == id]
            if mine:
                self.taken[number].reverse()
                self.taken[number].remove(mine[-1])
                self.taken[number].reverse()

    @precondition(lambda self: isinstance(self.ledgers[0], MemoryLedger))
    @rule(seconds=st.integers(1, 700))
    def let_time_pass(self, seconds: int) -> None:
        self.now += seconds

    # --- budgets ---

    def hold(self, number: int, amount: int = 0, most: int = 10) -> Hold:
        return Hold(f"b{number}", 1 if number == 2 else amount, most, 0.0 if number == 2 else FAR)

    @rule(at=processes, id=ids, numbers=some, amount=amounts, most=st.integers(1, 12), force=st.booleans())
    def reserve(self, at: int, id: str, numbers: list[int], amount: int, most: int, force: bool) -> None:
        """Whoever has reserved already does it anew."""
        ledger, holds = self.ledgers[at], [self.hold(number, amount, most) for number in numbers]
        unknown = self.run(ledger.unknown(holds))
        assert unknown == [
            hold
            for number, hold in zip(numbers, holds, strict=True)
            if number != 2 and self.budgets[number].spent is None
        ]
        for hold in unknown:
            self.run(ledger.seed(hold, 1))
            self.run(self.ledgers[1 - at].seed(hold, 3))
        lacking = None
        for number, hold in zip(numbers, holds, strict=True):
            budget = self.budgets[number]
            if number != 2 and budget.spent is None:
                budget.spent = 1
            others = sum(held for by, held in budget.reserved.items() if by != id)
            if lacking is None and not force and (budget.spent or 0) + others + hold.amount > most:
                lacking = Lacking(hold, budget.spent or 0)
        assert self.run(ledger.reserve(id, holds, force=force)) == lacking
        if lacking is None:
            for number, hold in zip(numbers, holds, strict=True):
                self.budgets[number].reserved[id] = int(hold.amount)

    @rule(at=processes, id=ids, numbers=some, spent=st.integers(0, 6))
    def settle(self, at: int, id: str, numbers: list[int], spent: int) -> None:
        """Also what is not reserved, or was told before: then nobody knows what is spent."""
        holds = [self.hold(number) for number in numbers]
        amounts = {hold.key: float(spent) for hold in holds if hold.ends_at}
        sums = self.run(self.ledgers[at].settle(id, holds, amounts))
        expected = {}
        for number in numbers:
            budget, was_reserved = self.budgets[number], id in self.budgets[number].reserved
            budget.reserved.pop(id, None)
            if budget.spent is not None:
                budget.spent += spent * was_reserved
                expected[f"b{number}"] = budget.spent
            if spent and not was_reserved:
                budget.spent = None
        assert sums == expected

    @rule(at=processes, number=st.sampled_from([0, 1]))
    def forget(self, at: int, number: int) -> None:
        """What is spent, and not what is reserved."""
        self.run(self.ledgers[at].forget([f"b{number}"]))
        self.budgets[number].spent = None

    @rule(at=processes, id=ids, numbers=some)
    def hand_over(self, at: int, id: str, numbers: list[int]) -> None:
        """It is free where nobody else counts."""
        self.run(self.ledgers[at].hand_over(id, [self.hold(number) for number in numbers]))
        if isinstance(self.ledgers[at], MemoryLedger):
            for number in numbers:
                self.budgets[number].reserved.pop(id, None)


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_what_is_counted_is_what_was_taken(kind: str, request: pytest.FixtureRequest) -> None:
    url = "" if kind == "memory" else request.getfixturevalue("redis_url")

    class Counted(Ledgers):
        make = staticmethod(
            lambda clock, database: RedisLedger(url, database) if url else MemoryLedger(clock)
        )

    run_state_machine_as_test(
        Counted,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
