"""Places at the LLM server: at most so many generations at once, behind a bounded queue."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator

from app.errors import Expired, Overloaded

POSITION_INTERVAL_S = 1.0
"""How often one who waits is told of a new position."""

_SMOOTHING = 0.2


class Places:
    """`capacity` places, handed out in the order of asking; at most `max_queue` may wait."""

    def __init__(self, capacity: int, max_queue: int) -> None:
        self.capacity = capacity
        self.max_queue = max_queue
        self.taken = 0
        self._waiting: deque[Place] = deque()
        self._mean_hold_s = 2.0

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._waiting)

    def eta(self, position: int) -> float:
        """Roughly how long the one at `position` (from 1) of the queue will wait, in seconds."""
        return round(math.ceil(position / self.capacity) * self._mean_hold_s, 1)

    @property
    def full(self) -> Overloaded | None:
        """The error for whoever comes now, when nobody more may wait."""
        if self.waiting < self.max_queue or self.taken < self.capacity:
            return None
        retry_after = max(1.0, self.eta(self.waiting))
        return Overloaded("Too many requests wait for the LLM server.", retry_after=retry_after)

    def check(self) -> None:
        """Raises `Overloaded` when nobody more may wait."""
        if (full := self.full) is not None:
            raise full

    def ask(self) -> Place:
        """A place, or a position in the queue. Raises `Overloaded` when the queue is full."""
        self.check()
        place = Place(self)
        if self.taken < self.capacity and not self._waiting:
            self._grant(place)
        else:
            self._waiting.append(place)
        return place

    def _grant(self, place: Place) -> None:
        self.taken += 1
        place.granted_at = time.monotonic()
        if place.wakeup is not None and not place.wakeup.done():
            place.wakeup.set_result(None)

    def _position(self, place: Place) -> int:
        return self._waiting.index(place) + 1

    def _give_back(self, place: Place) -> None:
        if place.granted_at is None:
            self._waiting.remove(place)
            return
        self.taken -= 1
        held = time.monotonic() - place.granted_at
        self._mean_hold_s += _SMOOTHING * (held - self._mean_hold_s)
        if self._waiting and self.taken < self.capacity:
            self._grant(self._waiting.popleft())


class Place:
    """One place, or the wait for it. Whoever asked must `leave`, exactly once."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.granted_at: float | None = None
        self.wakeup: asyncio.Future[None] | None = None

    async def wait(self, deadline: float | None = None) -> AsyncGenerator[int, None]:
        """Yields the position in the queue, at first and when it has changed, until the place is
        there. Raises `Expired` at `deadline` (Unix time)."""
        shown = 0
        if deadline is not None and deadline <= time.time():
            raise Expired("The deadline had passed before the request came this far.")
        while self.granted_at is None:
            patience = POSITION_INTERVAL_S
            if deadline is not None:
                patience = min(patience, deadline - time.time())
                if patience <= 0:
                    raise Expired("The deadline passed while the request waited.")
            position = self._places._position(self)
            if position != shown:
                shown = position
                yield position
                continue
            self.wakeup = asyncio.get_running_loop().create_future()
            await asyncio.wait((self.wakeup,), timeout=patience)

    def leave(self) -> None:
        """Gives the place, or the position in the queue, to the next one."""
        self._places._give_back(self)
