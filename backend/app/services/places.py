"""Places at the LLM server: at most so many generations at once, behind a bounded queue that is fair.

Whoever has the fewest places gets the next one, and among those whoever was served longest ago: one who
asks a thousand times at once does not keep waiting one who asks once.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from app.errors import Expired, Overloaded

POSITION_INTERVAL_S = 1.0
"""How often one who waits is told of a new position."""

ORDER_INTERVAL_S = 0.25
"""How often the order of a queue is made out anew, for all who wait."""

_SMOOTHING = 0.2


@dataclass(slots=True)
class Meter:
    """What a generation used: the model that answered, and its share of the time in which the LLM server
    was busy. Of two that run side by side each has half of that time."""

    model: str = ""
    gpu_seconds: float = 0.0


class Places:
    """`capacity` places for any number of owners; at most `max_queue` may wait."""

    def __init__(self, capacity: int, max_queue: int) -> None:
        self.capacity = capacity
        self.max_queue = max_queue
        self.taken = 0
        self.waiting = 0
        self._queues: dict[str, deque[Place]] = {}
        self._held: Counter[str] = Counter()
        self._served: dict[str, int] = {}  # of those who have a place or wait: when they last got one
        self._grants = 0
        self._mean_hold_s = 2.0
        self._shared_s = 0.0
        self._shared_at = time.monotonic()
        self._order: Mapping[Place, int] = {}
        self._order_at = 0.0

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

    def ask(self, owner: str = "") -> Place:
        """A place for `owner`, or a position in the queue. Raises `Overloaded` when the queue is full."""
        self.check()
        place = Place(self, owner)
        if self.taken < self.capacity and not self.waiting:
            self._grant(place)
        else:
            self._queues.setdefault(owner, deque()).append(place)
            self.waiting += 1
        return place

    def _grant(self, place: Place) -> None:
        place.shared_at_grant = self._shared_time()
        self.taken += 1
        self._held[place.owner] += 1
        self._grants += 1
        self._served[place.owner] = self._grants
        place.granted_at = time.monotonic()
        if place.wakeup is not None and not place.wakeup.done():
            place.wakeup.set_result(None)

    def _shared_time(self) -> float:
        """A clock that goes as fast as one of those who have places gets on: its difference between two
        moments is each one's share of the time between them."""
        now = time.monotonic()
        if self.taken:
            self._shared_s += (now - self._shared_at) / self.taken
        self._shared_at = now
        return self._shared_s

    def _position(self, place: Place) -> int:
        now = time.monotonic()
        if place not in self._order or now - self._order_at > ORDER_INTERVAL_S:
            self._order, self._order_at = self._next_places(), now
        return self._order[place]

    def _next_places(self) -> dict[Place, int]:
        """The positions of all who wait, as places would be handed out if all were kept as long."""
        order: dict[Place, int] = {}
        queues = [list(queue) for queue in self._queues.values()]
        for turn in range(max(map(len, queues), default=0)):
            for queue in queues:
                if turn < len(queue):
                    order[queue[turn]] = len(order) + 1
        return order

    def _give_back(self, place: Place) -> float:
        """Takes the place, or the position, back; returns its share of the server's time."""
        if place.granted_at is None:
            self._remove(place)
            self._forget(place.owner)
            return 0.0
        share = self._shared_time() - place.shared_at_grant
        self.taken -= 1
        self._held[place.owner] -= 1
        self._forget(place.owner)
        held = time.monotonic() - place.granted_at
        self._mean_hold_s += _SMOOTHING * (held - self._mean_hold_s)
        if self.waiting and self.taken < self.capacity:
            owner = min(self._queues, key=lambda name: (self._held[name], self._served.get(name, 0)))
            following = self._queues[owner][0]
            self._remove(following)
            self._grant(following)
        return share

    def _forget(self, owner: str) -> None:
        """Forgets who neither has a place nor waits for one."""
        if not self._held[owner]:
            del self._held[owner]
            if owner not in self._queues:
                self._served.pop(owner, None)

    def _remove(self, place: Place) -> None:
        queue = self._queues[place.owner]
        queue.remove(place)
        self.waiting -= 1
        if not queue:
            del self._queues[place.owner]
        if not self.waiting:
            self._order = {}


class Place:
    """One place, or the wait for it. Whoever asked must `leave`, exactly once."""

    def __init__(self, places: Places, owner: str) -> None:
        self._places = places
        self.owner = owner
        self.granted_at: float | None = None
        self.shared_at_grant = 0.0
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

    def leave(self) -> float:
        """Gives the place, or the position in the queue, to the next one. Returns its share of the time
        in which the server was busy, in seconds."""
        return self._places._give_back(self)
