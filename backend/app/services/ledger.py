"""What was taken of limits, and what is left: in memory for one process, in Redis for several.

Two kinds of limit are counted. A window counts what was taken in the last so many seconds, to the moment,
so that no burst fits around the edge of an hour. A budget is spent: an amount is reserved before the work,
when nobody knows what it will cost, and settled after it.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from app.errors import QuotaInfo

MOST_WINDOWS = 100_000
"""Windows of one length that are remembered; beyond that the one used longest ago is forgotten."""

RESERVATION_S = 3600.0
"""How long a reservation counts whose process died."""


class Window(msgspec.Struct, frozen=True):
    """At most `amount` in any `seconds`, counted by `key`. `name` tells clients of what."""

    name: str
    key: str
    amount: int
    seconds: float


class Quota(msgspec.Struct, frozen=True):
    """How a window stands: `remaining` now, and the seconds until the next one is free again. `is_full`
    says that nothing was taken, for none was left."""

    window: Window
    remaining: int
    resets_in: float
    is_full: bool

    @property
    def info(self) -> QuotaInfo:
        """The same for clients."""
        window = self.window
        return QuotaInfo(window.name, window.amount, window.seconds, self.remaining, self.resets_in)


class Hold(msgspec.Struct, frozen=True):
    """An amount to reserve of a budget that is counted by `key`; of what is spent nothing is known after
    `ends_at` (Unix time). With `ends_at` 0 it is a number of things at once, of which none is ever
    spent."""

    key: str
    amount: float
    budget: float
    ends_at: float = 0.0


class Lacking(msgspec.Struct, frozen=True):
    """A budget that has not enough left for a hold, and what of it is `spent`: the rest is reserved."""

    hold: Hold
    spent: float


class Ledger(Protocol):
    """Counts. Every method is one step: what two ask for at once is one after the other. `id` names
    whoever takes, for giving back."""

    async def take(self, id: str, windows: Sequence[Window]) -> list[Quota]:
        """Takes one of every window, or, when one of them is full, of none."""

    async def give_back(self, id: str, windows: Sequence[Window]) -> None:
        """Takes back what `id` took."""

    async def unknown(self, holds: Sequence[Hold]) -> list[Hold]:
        """The budgets whose spending is not known here: `seed` them before `reserve`."""

    async def seed(self, hold: Hold, spent: float) -> None:
        """Tells what is spent of a budget already, unless it is known by now."""

    async def forget(self, keys: Sequence[str]) -> None:
        """What is spent of these budgets is not known any more; what is reserved of them stays."""

    async def reserve(self, id: str, holds: Sequence[Hold], *, force: bool = False) -> Lacking | None:
        """Reserves all, in the place of what `id` has reserved, or returns the budget that has not enough
        left; with `force` it reserves in any case."""

    async def settle(self, id: str, holds: Sequence[Hold], spent: Mapping[str, float]) -> dict[str, float]:
        """Gives the reservations back and adds what was spent by key; returns the sums by key. What is not
        reserved adds nothing: told twice, it counts once. But it may have been reserved in a ledger that
        was lost since, so what is spent of that budget is not known any more."""

    async def hand_over(self, id: str, holds: Sequence[Hold]) -> None:
        """Another process counts for `id` now: gives back what is reserved for this one alone. Where they
        count together, the reservations are that one's."""

    async def close(self) -> None:
        """Closes what it keeps open."""


@dataclass(slots=True)
class _Budget:
    spent: float | None = None
    ends_at: float = 0.0
    reserved: dict[str, float] = field(default_factory=dict)


_Windows = OrderedDict[str, deque[tuple[float, str]]]
"""Who took when, by the key of the window; of windows of one length, that used longest ago first."""


class MemoryLedger:
    """The ledger of one process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` measures windows: it goes on whatever becomes of the time of day."""
        self._clock = clock
        self._windows: dict[float, _Windows] = {}
        self._budgets: dict[str, _Budget] = {}
        self._looked_at = clock()

    async def take(self, id: str, windows: Sequence[Window]) -> list[Quota]:
        """See `Ledger`."""
        now = self._clock()
        taken = [self._taken(window, now) for window in windows]
        full = [len(times) >= window.amount for window, times in zip(windows, taken, strict=True)]
        if not any(full):
            for window, times in zip(windows, taken, strict=True):
                times.append((now, id))
                self._keep(window, times)
                self._forget_over(window.seconds, now)
        return [_quota(*found, now) for found in zip(windows, taken, full, strict=True)]

    async def give_back(self, id: str, windows: Sequence[Window]) -> None:
        """See `Ledger`."""
        for window in windows:
            alike = self._windows.get(window.seconds)
            times = None if alike is None else alike.get(window.key)
            mine = [entry for entry in times or () if entry[1] == id]
            if times is not None and mine:
                times.remove(mine[-1])

    def _taken(self, window: Window, now: float) -> deque[tuple[float, str]]:
        alike = self._windows.get(window.seconds)
        times = deque() if alike is None else alike.get(window.key, deque())
        while times and times[0][0] <= now - window.seconds:
            times.popleft()
        return times

    def _keep(self, window: Window, times: deque[tuple[float, str]]) -> None:
        """Remembers what was taken. What was refused is not, for it would make others forgotten."""
        alike = self._windows.setdefault(window.seconds, OrderedDict())
        alike[window.key] = times
        alike.move_to_end(window.key)

    def _forget_over(self, seconds: float, now: float) -> None:
        """Drops the windows of one length in which nothing was taken for so long."""
        alike = self._windows[seconds]
        while alike:
            times = next(iter(alike.values()))
            if times and times[-1][0] > now - seconds and len(alike) <= MOST_WINDOWS:
                return
            alike.popitem(last=False)

    async def unknown(self, holds: Sequence[Hold]) -> list[Hold]:
        """See `Ledger`."""
        self._forget_old()
        return [hold for hold in holds if hold.ends_at and self._budget(hold).spent is None]

    async def seed(self, hold: Hold, spent: float) -> None:
        """See `Ledger`."""
        budget = self._budget(hold)
        if budget.spent is None:
            budget.spent = spent

    async def forget(self, keys: Sequence[str]) -> None:
        """See `Ledger`."""
        for key in keys:
            if key in self._budgets:
                self._budgets[key].spent = None

    async def reserve(self, id: str, holds: Sequence[Hold], *, force: bool = False) -> Lacking | None:
        """See `Ledger`."""
        if not force:
            for hold in holds:
                budget = self._budget(hold)
                spent = budget.spent or 0.0
                of_others = sum(budget.reserved.values()) - budget.reserved.get(id, 0.0)
                if spent + of_others + hold.amount > hold.budget:
                    return Lacking(hold, spent)
        for hold in holds:
            self._budget(hold).reserved[id] = hold.amount
        return None

    async def settle(self, id: str, holds: Sequence[Hold], spent: Mapping[str, float]) -> dict[str, float]:
        """See `Ledger`."""
        sums = {}
        for hold in holds:
            budget = self._budget(hold)
            was_reserved = budget.reserved.pop(id, None) is not None
            amount = spent.get(hold.key, 0.0)
            if budget.spent is not None:
                sums[hold.key] = budget.spent + (amount if was_reserved else 0.0)
                budget.spent = sums[hold.key] if was_reserved or not amount else None
        return sums

    async def hand_over(self, id: str, holds: Sequence[Hold]) -> None:
        """See `Ledger`."""
        await self.settle(id, holds, {})

    async def close(self) -> None:
        """See `Ledger`."""

    def _budget(self, hold: Hold) -> _Budget:
        found = self._budgets.get(hold.key)
        if found is None:
            found = self._budgets[hold.key] = _Budget(ends_at=hold.ends_at)
        return found

    def _forget_old(self) -> None:
        """Drops the budgets of days that are over."""
        now = self._clock()
        if now < self._looked_at + RESERVATION_S:
            return
        self._looked_at = now
        for key, budget in list(self._budgets.items()):
            if not budget.reserved and budget.ends_at < time.time():
                del self._budgets[key]


def _quota(window: Window, times: Sequence[tuple[float, str]], is_full: bool, now: float) -> Quota:
    """How a window stands. One that is full has one free when the oldest of the newest `amount` is over:
    there may be more, when the amount was larger before."""
    oldest = times[max(len(times) - window.amount, 0)][0] if times else now - window.seconds
    resets_in = max(oldest + window.seconds - now, 0.0)
    return Quota(window, max(window.amount - len(times), 0), resets_in, is_full)
