"""The time between the signal to stop and the end of the process: nothing new is taken, and what was accepted
goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from app.errors import Overloaded
from app.logs import get_logger

LOOK_S = 0.1
COME_BACK_S = 5.0
"""When to come back for whoever is refused: to another process, or to the next one."""

log = get_logger(__name__)


class Draining(Overloaded):
    """This process is about to end and takes nothing new."""


class Drain:
    """Whether this process is about to end. `active` tells how many turns it has that have not ended."""

    def __init__(self) -> None:
        self.is_on = False
        self.active: Callable[[], int] = lambda: 0

    def check(self) -> None:
        """Raises `Draining` when nothing new is taken any more."""
        if self.is_on:
            raise Draining("The portal is being stopped and takes nothing new.", retry_after=COME_BACK_S)

    async def run(self, seconds: float, is_hurried: Callable[[], bool]) -> None:
        """From now on takes nothing new. Returns when all turns have ended, when so many `seconds` have
        passed, or once it `is_hurried`."""
        self.is_on = True
        deadline = time.monotonic() + seconds
        log.info("stopping", active=self.active(), seconds=seconds)
        while self.active() and time.monotonic() < deadline and not is_hurried():  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        if left := self.active():
            log.warning("turns are left for the next start, or for another process", left=left)
