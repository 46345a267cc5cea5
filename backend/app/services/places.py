"""Places at the LLM servers: at most so many generations at once at each, behind a bounded queue that is
fair.

Whoever has the fewest places gets the next one, and among those whoever was served longest ago: one who
asks a thousand times at once does not keep waiting one who asks once. Of several servers that are alike the
one that is least loaded is chosen, and for whoever has a `home` that one while it has a place free.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from app.errors import Expired, Overloaded

POSITION_INTERVAL_S = 1.0
"""How often one who waits is told of a new position."""

ORDER_INTERVAL_S = 0.25
"""How often the order of a queue is made out anew, for all who wait."""

LOOKED_AT = 16
"""Of so many of an owner's requests, those that waited longest, one is looked for that is at home."""

PATIENCE = 8
"""So often is a request passed over for one that is at home; then any place will do."""

_SMOOTHING = 0.2


@dataclass(slots=True)
class Meter:
    """What a generation used: the model that answered, and its share of the time in which the LLM server
    was busy. Of two that run side by side each has half of that time. `has_read` when some server took the
    prompt up, and did not refuse it. `own_key` when somebody else than the portal pays for it."""

    model: str = ""
    has_read: bool = False
    gpu_seconds: float = 0.0
    own_key: bool = False


class NoServer(Exception):
    """None of the servers that could give the place gives places now."""


class Load:
    """How much is asked of one server at once: `taken` of `capacity` places, of which `limit` may be taken
    now."""

    def __init__(self, capacity: int, limit: int | None = None) -> None:
        self.capacity = capacity
        self.limit = capacity if limit is None else limit
        self.taken = 0
        self.last_grant = 0
        self._shared_s = 0.0
        self._shared_at = time.monotonic()

    def shared_time(self) -> float:
        """A clock that goes as fast as one of those who have places gets on: its difference between two
        moments is each one's share of the time between them."""
        now = time.monotonic()
        if self.taken:
            self._shared_s += (now - self._shared_at) / self.taken
        self._shared_at = now
        return self._shared_s


class Queue:
    """What all servers have in common: how many may wait, and who was served when."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self.waiting = 0
        self._held: Counter[str] = Counter()
        self._waits: Counter[str] = Counter()
        self._served: dict[str, int] = {}  # of those who have a place or wait: when they last got one
        self.grants = 0

    def turn_of(self, owner: str) -> tuple[int, int]:
        """What owners are served in the order of: the places that each has, and when it got the last."""
        return self._held[owner], self._served.get(owner, 0)

    def granted(self, owner: str) -> None:
        """An owner got a place."""
        self.taken += 1
        self.grants += 1
        self._held[owner] += 1
        self._served[owner] = self.grants

    def given_back(self, owner: str) -> None:
        """An owner has given a place back."""
        self.taken -= 1
        self._held[owner] -= 1
        self._forget(owner)

    def joined(self, owner: str) -> None:
        """An owner waits for one more place."""
        self.waiting += 1
        self._waits[owner] += 1

    def left(self, owner: str) -> None:
        """An owner waits for one place less."""
        self.waiting -= 1
        self._waits[owner] -= 1
        self._forget(owner)

    def _forget(self, owner: str) -> None:
        """Forgets who neither has a place nor waits for one."""
        if not self._waits[owner]:
            del self._waits[owner]
        if not self._held[owner]:
            del self._held[owner]
            if owner not in self._waits:
                self._served.pop(owner, None)


class Places:
    """The places at servers that are alike (`loads`), and those who wait for one of them in `queue`."""

    def __init__(self, queue: Queue, loads: Sequence[Load]) -> None:
        self.queue = queue
        self.loads = loads
        self._lines: dict[str, deque[Place]] = {}
        self._waiting = 0
        self._mean_hold_s = 2.0
        self._order: Mapping[Place, int] = {}
        self._order_at = 0.0

    @property
    def taken(self) -> int:
        """The places that are in use."""
        return sum(load.taken for load in self.loads)

    @property
    def waiting(self) -> int:
        """How many wait for one."""
        return self._waiting

    def eta(self, position: int) -> float:
        """Roughly how long the one at `position` (from 1) of the queue will wait, in seconds."""
        capacity = sum(load.limit for load in self.loads) or sum(load.capacity for load in self.loads)
        return round(math.ceil(position / capacity) * self._mean_hold_s, 1)

    def full(self, barred: Collection[Load] = ()) -> Overloaded | None:
        """The error for whoever comes now, to servers but for those `barred`, when nobody more may wait."""
        if self.queue.waiting < self.queue.most or self._free(barred):
            return None
        retry_after = max(1.0, self.eta(self._waiting))
        return Overloaded("Too many requests wait for the LLM server.", retry_after=retry_after)

    def ask(
        self,
        owner: str = "",
        home: Load | None = None,
        barred: Collection[Load] = (),
        *,
        again: bool = False,
    ) -> Place:
        """A place for `owner`, or a position in the queue; at `home` rather than elsewhere, and not at those
        `barred`. Whoever asks `again`, because a server failed, has waited before: there is room for it, and
        it goes before the owner's others. Raises `Overloaded` when the queue is full."""
        if not again and (full := self.full(barred)) is not None:
            raise full
        place = Place(self, owner, home, barred)
        load = self._choose(place)
        if load is not None:
            self._grant(place, load)
            return place
        line = self._lines.setdefault(owner, deque())
        line.appendleft(place) if again else line.append(place)
        self._waiting += 1
        self.queue.joined(owner)
        return place

    def offer(self, load: Load) -> None:
        """Gives what is free at a server to those who wait."""
        while self._waiting and load.taken < load.limit:
            following = self._next_for(load)
            if following is None:
                return
            self._remove(following)
            self._grant(following, load)

    def _free(self, barred: Collection[Load]) -> list[Load]:
        return [load for load in self.loads if load.taken < load.limit and load not in barred]

    def _choose(self, place: Place) -> Load | None:
        """Where the place is to be, when one is free. Nobody who waits can take a place that is free: each
        was offered to them."""
        free = self._free(place.barred)
        if len(free) < 2 or place.home in free:
            return place.home if place.home in free else free[0] if free else None
        return min(free, key=lambda load: (load.taken / load.capacity, load.last_grant))

    def _next_for(self, load: Load) -> Place | None:
        """Who gets a free place: of those who have the fewest, rather one who is at home there."""
        best: Place | None = None
        best_rank: tuple[int, bool, int] | None = None
        for owner, line in self._lines.items():
            place = line[0] if len(self.loads) == 1 else _best_of(line, load)
            if place is None or load in place.barred:
                continue
            held, served = self.queue.turn_of(owner)
            rank = (held, not place.is_at_home(load), served)
            if best_rank is None or rank < best_rank:
                best, best_rank = place, rank
        if best is not None and len(self.loads) > 1:
            self._pass_over(best, load)
        return best

    def _pass_over(self, chosen: Place, load: Load) -> None:
        """Counts it for those whose turn it was before, by fairness alone."""
        turn, came_first = self.queue.turn_of(chosen.owner), True
        for owner, line in self._lines.items():
            place = line[0]
            if owner == chosen.owner:
                is_before, came_first = place is not chosen, False
            else:
                other = self.queue.turn_of(owner)
                is_before = other < turn or (other == turn and came_first)
            if is_before and load not in place.barred:
                place.passed_over += 1
                if place.passed_over > PATIENCE:
                    place.home = None

    def _grant(self, place: Place, load: Load) -> None:
        place.load = load
        place.shared_at_grant = load.shared_time()
        load.taken += 1
        self.queue.granted(place.owner)
        load.last_grant = self.queue.grants
        place.granted_at = time.monotonic()
        if place.wakeup is not None and not place.wakeup.done():
            place.wakeup.set_result(None)

    def _position(self, place: Place) -> int:
        now = time.monotonic()
        if place not in self._order or now - self._order_at > ORDER_INTERVAL_S:
            self._order, self._order_at = self._next_places(), now
        return self._order[place]

    def _next_places(self) -> dict[Place, int]:
        """The positions of all who wait, as places would be handed out if all were kept as long."""
        order: dict[Place, int] = {}
        lines = [list(line) for line in self._lines.values()]
        for turn in range(max(map(len, lines), default=0)):
            for line in lines:
                if turn < len(line):
                    order[line[turn]] = len(order) + 1
        return order

    def _give_back(self, place: Place) -> float:
        """Takes the place, or the position, back; returns its share of the server's time."""
        load = place.load
        if load is None or place.granted_at is None:
            self._remove(place)
            return 0.0
        share = load.shared_time() - place.shared_at_grant
        load.taken -= 1
        self.queue.given_back(place.owner)
        held = time.monotonic() - place.granted_at
        self._mean_hold_s += _SMOOTHING * (held - self._mean_hold_s)
        if self._waiting:
            self.offer(load)
        return share

    def _remove(self, place: Place) -> None:
        line = self._lines[place.owner]
        line.remove(place)
        if not line:
            del self._lines[place.owner]
        self._waiting -= 1
        self.queue.left(place.owner)
        if not self._waiting:
            self._order = {}

    def _is_hopeless(self, place: Place) -> bool:
        return not any(load.limit and load not in place.barred for load in self.loads)


def _best_of(line: deque[Place], load: Load) -> Place | None:
    """Of one owner's requests, one that is at home at a server, else the first that may go there."""
    first = None
    for place in islice(line, LOOKED_AT):
        if load in place.barred:
            continue
        if place.is_at_home(load):
            return place
        first = first or place
    return first


class Place:
    """One place, or the wait for it. Whoever asked must `leave`, exactly once."""

    def __init__(
        self, places: Places, owner: str, home: Load | None = None, barred: Collection[Load] = ()
    ) -> None:
        self._places = places
        self.owner = owner
        self.home = home
        self.barred = barred
        self.load: Load | None = None
        self.passed_over = 0
        self.granted_at: float | None = None
        self.shared_at_grant = 0.0
        self.wakeup: asyncio.Future[None] | None = None

    def is_at_home(self, load: Load) -> bool:
        """Whether a place there is as good as any."""
        return self.home is None or self.home is load or not self.home.limit

    async def wait(self, deadline: float | None = None) -> AsyncGenerator[int, None]:
        """Yields the position in the queue, at first and when it has changed, until the place is
        there. Raises `Expired` at `deadline` (Unix time), and `NoServer` once no server is left that could
        give it."""
        shown = 0
        if deadline is not None and deadline <= time.time():
            raise Expired("The deadline had passed before the request came this far.")
        while self.granted_at is None:
            if self._places._is_hopeless(self):
                raise NoServer
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

    def eta(self, position: int) -> float:
        """Roughly how long it waits from `position` on, in seconds."""
        return self._places.eta(position)

    def leave(self) -> float:
        """Gives the place, or the position in the queue, to the next one. Returns its share of the time
        in which the server was busy, in seconds."""
        return self._places._give_back(self)
