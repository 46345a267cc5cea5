"""Whether an LLM server gets requests: how it answers when asked, its circuit breaker, and the admin's word.

The breaker opens when so many requests in a row have failed, stays open for a time that doubles each time,
and is then half open: one request at once is let through, and the first that begins to be answered closes
it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Literal

from app.errors import LLMUnavailable, Overloaded, PortalError
from app.logs import get_logger
from app.services.places import Load

BREAK_AFTER = 3
COOL_OFF_S = 5.0
LONGEST_COOL_OFF_S = 60.0

LONGEST_PAUSE_S = 300.0
"""A server that asks to be left alone for longer is asked again after this time."""

State = Literal["ok", "loading", "busy", "broken", "down", "wrong", "draining", "drained"]
"""`busy`: it asked to be left alone for a while. `broken`: its breaker is open, or half open. `wrong`: it
answers, but not as an LLM server does."""

Breaker = Literal["closed", "open", "half-open"]

log = get_logger(__name__)


class Loading(LLMUnavailable):
    """It answers, but is still loading its model."""


class Refused(LLMUnavailable):
    """Nobody accepts connections at its address."""


class Resting(Overloaded):
    """It asked to be left alone with this model."""


NEVER_ASKED = LLMUnavailable("The LLM server has not been asked yet.")


class ServerState:
    """Decides how many places (`load`) a server has. `problem` is what it answered when it was last asked
    how it is; None when all is well."""

    def __init__(self, name: str, capacity: int, problem: PortalError | None) -> None:
        self.name = name
        self.problem = problem
        self.load = Load(capacity, 0 if problem else capacity)
        self.drained = False
        self.failures = 0
        self.on_offer: Callable[[Load], None] = lambda _load: None
        self._half_open = False
        self._cool_off = COOL_OFF_S
        self._closed_by: PortalError | None = None
        self._closed_until = 0.0
        self._resting: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.since, self._last = time.time(), self.state

    def close(self) -> None:
        """Forgets what was to happen later."""
        if self._timer is not None:
            self._timer.cancel()

    # --- what is known ---

    @property
    def breaker(self) -> Breaker:
        """How the breaker is."""
        if not self._half_open:
            return "closed"
        return "half-open" if self._closed_by is None else "open"

    @property
    def state(self) -> State:
        """The one word for it all."""
        if self.drained:
            return "draining" if self.load.taken else "drained"
        if isinstance(self.problem, Loading):
            return "loading"
        if self.problem is not None:
            return "down" if self.problem.code in {"llm_unavailable", "llm_timeout"} else "wrong"
        if self._half_open:
            return "broken"
        return "ok" if self._closed_by is None else "busy"

    @property
    def why(self) -> PortalError:
        """Why it gets no requests now."""
        if self.drained:
            return LLMUnavailable("The LLM server is being taken out of service.", retry_after=COOL_OFF_S)
        if self.problem is None and self._closed_by is not None:
            left = self._closed_until - asyncio.get_running_loop().time()
            return type(self._closed_by)(self._closed_by.message, retry_after=_rounded(left))
        return self.problem or LLMUnavailable("The LLM server cannot answer now.", retry_after=1)

    # --- what happens ---

    def note(self, problem: PortalError | None) -> None:
        """It was asked how it is."""
        if (problem is None) != (self.problem is None):
            if problem is None:
                log.info("LLM server is there", server=self.name)
            else:
                log.warning("LLM server is not there", server=self.name, reason=problem.message)
        self.problem = problem
        self._settle()

    def drain(self, drained: bool) -> None:
        """It is to get no new requests, or may get them again."""
        if drained != self.drained:
            log.info("LLM server is drained" if drained else "LLM server is in service", server=self.name)
            self.drained = drained
            self._settle()

    def begun(self) -> None:
        """It has begun to answer: a half-open breaker closes, on probation."""
        if self._half_open:
            log.info("LLM server answers again", server=self.name)
            self._half_open, self.failures = False, BREAK_AFTER - 1
            self._settle()

    def answered(self) -> None:
        """It has answered to the end."""
        if self.failures:
            self.failures, self._cool_off = 0, COOL_OFF_S

    def busy(self, seconds: float, model: str | None = None) -> None:
        """It asked to be left alone for so long: with one model, or altogether."""
        seconds = min(seconds, LONGEST_PAUSE_S)
        if model is None:
            self._closed_for(seconds, Overloaded("The LLM server is busy."))
            return
        now = asyncio.get_running_loop().time()
        until = max(self._resting.get(model, 0.0), now + seconds)
        self._resting = {name: end for name, end in self._resting.items() if end > now} | {model: until}

    def check(self, model: str) -> None:
        """Raises `Resting` while it is to be left alone with a model."""
        if self._resting:
            left = self._resting.get(model, 0.0) - asyncio.get_running_loop().time()
            if left > 0:
                raise Resting("The LLM server is busy.", retry_after=_rounded(left))

    def failed(self) -> None:
        """It did not answer, or not to the end, by no fault of the request."""
        self.failures += 1
        if self.failures < BREAK_AFTER or self.breaker == "open":
            return
        log.warning("LLM server fails again and again", server=self.name, cool_off_s=self._cool_off)
        self._half_open = True
        broken = LLMUnavailable("The LLM server has failed several times in a row; it is given a rest.")
        self._closed_for(self._cool_off, broken)
        self._cool_off = min(self._cool_off * 2, LONGEST_COOL_OFF_S)

    def _closed_for(self, seconds: float, why: PortalError) -> None:
        loop = asyncio.get_running_loop()
        self._closed_by, self._closed_until = why, max(self._closed_until, loop.time() + seconds)
        self.close()
        self._timer = loop.call_at(self._closed_until, self._open_again)
        self._settle()

    def _open_again(self) -> None:
        self._closed_by = None
        self._settle()

    def _settle(self) -> None:
        limit = 1 if self._half_open else self.load.capacity
        if self.drained or self.problem is not None or self._closed_by is not None:
            limit = 0
        more, self.load.limit = limit > self.load.limit, limit
        state = self.state
        if state != self._last:
            self.since, self._last = time.time(), state
        if more:
            self.on_offer(self.load)


def _rounded(left: float) -> float:
    """Seconds to wait: who comes then does not come too early."""
    return max(1.0, math.ceil(left * 10) / 10)
